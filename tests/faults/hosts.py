"""Training loops of Fabric, accelerate and the Hugging Face Trainer on real ranks; imported in the children."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import settings
import torch
from torch import nn

from eafo_dynamic import EAFOController

OPTIMIZERS = ("SGD", "Adam")


def fabric(folder: Path, rank: int, strategy: str) -> Any:
    """Fabric, with micro-batches, clipped gradients and a checkpoint.

    Returns:
        By optimiser: the whole training, and one that goes on from its checkpoint.
    """
    from lightning.fabric import Fabric

    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")
    made = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    made.launch()
    found: dict[str, Any] = {}
    for name in OPTIMIZERS:
        path = folder / f"{name}.ckpt"
        found[name] = _with_fabric(made, name, path, 0, 6)
        found[f"{name} resumed"] = _with_fabric(made, name, path, 3, 6)
    return found


def _with_fabric(fabric: Any, name: str, path: Path, begin: int, end: int) -> dict[str, Any]:
    net = settings.net()
    controller = EAFOController.attach(net, torch.zeros(2, 8), update_every_n_steps=2)
    model, optimizer = fabric.setup(net, settings.optimizer_of(name, net, controller))
    state = {"model": model, "optimizer": optimizer, "eafo": controller}
    if begin:
        fabric.load(path, state)
    rows: list[Any] = []
    for step, x in enumerate(settings.batches()[begin:end], begin + 1):
        first, second = settings.shares(x, 2, fabric.global_rank, 2).chunk(2)
        with fabric.no_backward_sync(model):
            fabric.backward(model(first).square().mean() / 2)
        fabric.backward(model(second).square().mean() / 2)
        fabric.clip_gradients(model, optimizer, max_norm=0.05)
        controller.before_optimizer_step(step - 1)
        optimizer.step()
        optimizer.zero_grad()
        rows += controller.step(step)
        if step == 3 and not begin:
            fabric.save(path, {**state, "eafo": controller.gathered_state()})
    return settings.summary(net, controller, rows)


def accelerate(folder: Path, rank: int, given: None) -> Any:
    """The loop of accelerate's documentation, with accumulated and clipped gradients."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    os.environ.update(LOCAL_RANK=str(rank))
    found: dict[str, Any] = {}
    for name in OPTIMIZERS:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        net = settings.net()
        controller = EAFOController.attach(net, torch.zeros(2, 8), update_every_n_steps=2)
        loader: Any = DataLoader(torch.cat(settings.batches()), batch_size=4)
        model, optimizer, loader = accelerator.prepare(net, settings.optimizer_of(name, net, controller), loader)
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        rows: list[Any] = []
        step = 0
        for x in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(x).square().mean())
                if accelerator.sync_gradients:
                    step += 1
                    accelerator.clip_grad_norm_(model.parameters(), 0.05)
                    controller.before_optimizer_step(step - 1)
                optimizer.step()
                optimizer.zero_grad()
                rows += controller.step(step)
        assert step == 6
        found[name] = settings.summary(net, controller, rows)
    return found
