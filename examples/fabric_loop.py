"""Lightning Fabric: a loop of your own on several processes, with a checkpoint to go on from.

Attach before ``fabric.setup`` wraps the model. All ranks pool their samples, and end with the same corrections.

Run: python examples/fabric_loop.py     (two processes on a CPU; Fabric starts the second one itself)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eafo_dynamic import EAFOController, own_group


def rings() -> DataLoader[Any]:
    """Points on a plane, inside and outside a circle."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 2, generator=generator)
    return DataLoader(TensorDataset(x, (x.norm(dim=1) > 1.2).long()), 64, shuffle=True)


def main(folder: str | Path, devices: int = 2, epochs: int = 6) -> EAFOController:
    """Trains as many epochs more; each rank says what it ends with."""
    fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto")
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    controller = EAFOController.attach(net, torch.zeros(2, 2), update_every_n_steps=10)  # before fabric.setup
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    own_group([optimizer], controller.amplitudes, net)
    model, optimizer = fabric.setup(net, optimizer)
    batches: Any = fabric.setup_dataloaders(rings())

    path = Path(folder) / "last.ckpt"
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "eafo": controller, "step": 0}
    if path.exists():
        fabric.load(path, state)
    step = state["step"]
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            fabric.backward(nn.functional.cross_entropy(model(x), y))
            controller.before_optimizer_step(step)
            optimizer.step()
            step += 1
            controller.step(step)
        # gathered_state: with what each rank has seen since the last round
        fabric.save(path, {**state, "step": step, "eafo": controller.gathered_state()})
    eps = {name: round(value.item(), 6) for name, value in controller.amplitudes.items()}
    print(f"rank {fabric.global_rank} of {fabric.world_size}: step {step}, {eps}", flush=True)
    return controller


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/fabric")
