"""Training loops of Fabric, accelerate and the Hugging Face Trainer on real ranks; imported in the children."""

from __future__ import annotations

import contextlib
import os
import runpy
import warnings
from pathlib import Path
from typing import Any

import settings
import torch
import torch.distributed as distributed
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


def accelerate(folder: Path, rank: int, shards: bool) -> Any:
    """The loop of accelerate's documentation, with accumulated and clipped gradients; with shards, by FSDP2.

    accelerate asks for an accelerator before it shards, although FSDP2 runs on the CPU; it is told that there is one.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState, DistributedType
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import FSDPModule
    from torch.utils.data import DataLoader

    os.environ.update(LOCAL_RANK=str(rank))
    found: dict[str, Any] = {}
    for name in OPTIMIZERS:
        AcceleratorState._reset_state(reset_partial_state=True)
        options: dict[str, Any] = {"cpu": True}
        net = settings.net()
        controller = EAFOController.attach(net, torch.zeros(2, 8), update_every_n_steps=2)
        if shards:
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            whole = nn.ParameterList(controller.amplitudes.values())
            options = {"fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=2, ignored_modules=[whole])}
        accelerator = Accelerator(gradient_accumulation_steps=2, **options)
        loader: Any = DataLoader(torch.cat(settings.batches()), batch_size=4)
        model, optimizer, loader = accelerator.prepare(net, settings.optimizer_of(name, net, controller), loader)
        assert isinstance(model, FSDPModule if shards else nn.parallel.DistributedDataParallel)
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


def trainer(folder: Path, rank: int, given: tuple[str, bool]) -> Any:
    """The Hugging Face Trainer; with shards, by FSDP2 as accelerate applies it.

    accelerate asks for an accelerator before it shards, although FSDP2 runs on the CPU; it is told that there is one.

    Returns:
        The whole training, and one that goes on from its checkpoint.
    """
    shards = given[1]
    if distributed.get_world_size() == 1:
        return _with_trainer(folder, given[0], False, None)
    os.environ.update(LOCAL_RANK=str(rank))
    whole = _with_trainer(folder, given[0], shards, None)
    if given[0] == "SGD":
        return {"whole": whole}  # torch restores no state of an optimiser that has none
    resumed = _with_trainer(folder, given[0], shards, str(folder / "checkpoint-3"))
    return {"whole": whole, "resumed": resumed}


def _with_trainer(folder: Path, kind: str, shards: bool, resume: str | None) -> dict[str, Any]:
    from accelerate import PartialState
    from accelerate.state import AcceleratorState, DistributedType
    from hf_ranks import Points
    from transformers import Trainer, TrainingArguments

    from eafo_dynamic import EAFOTrainerCallback

    torch.manual_seed(0)
    ranks = distributed.get_world_size()
    AcceleratorState._reset_state(reset_partial_state=True)
    sharding: dict[str, Any] = {}
    if shards:
        sharding = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Linear"]}}
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=8 // ranks,
        learning_rate=1e-2,
        optim="sgd" if kind == "SGD" else "adamw_torch",
        max_grad_norm=0.5,
        save_strategy="steps" if resume is None else "no",
        save_steps=3,
        report_to="none",
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **sharding,
    )
    if shards:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    callback = EAFOTrainerCallback(verbose=False, update_every_n_steps=2, lr_multiple=1.0)
    model = Regression()
    Trainer(model, args, train_dataset=Points(), callbacks=[callback]).train(resume_from_checkpoint=resume)
    assert callback.controller is not None
    return settings.summary(model, callback.controller, list(callback.controller.records))


class Regression(nn.Module):
    """A model of the kind that the Trainer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = settings.net()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def script(path: str, folder: Path, rank: int, ranks: int, port: int, arguments: list[Any]) -> None:
    """Runs a script's ``main`` as torchrun does, and keeps what it prints."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), NODE_RANK="0")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with (folder / f"out{rank}.txt").open("w", buffering=1) as out:
        os.dup2(out.fileno(), 2)
        with contextlib.redirect_stdout(out):
            runpy.run_path(path)["main"](folder, *arguments)
    os._exit(0)
