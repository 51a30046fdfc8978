"""What single ranks of a distributed run do and write down; imported in the children."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from crash_points import Point, arm
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from eafo_dynamic import EAFOController
from eafo_dynamic.apply.surgery import wrap
from eafo_dynamic.find.sites import find_sites
from eafo_dynamic.trainers.replicas import average_gradients


class Count(Callback):
    """Writes down every collective of each training batch, as c10d's own profiler ranges show them.

    Args:
        path: where to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.profile = torch.autograd.profiler.profile()
        self.profile.__enter__()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.profile.__exit__(None, None, None)
        names = [event.name.removeprefix("c10d::") for event in self.profile.function_events]
        found = [name for event, name in zip(self.profile.function_events, names, strict=True) if event.name != name]
        with self.path.open("a") as file:
            file.write(f"{trainer.global_step} {' '.join(sorted(found))}\n")


def count(folder: Path, rank: int, options: dict[str, Any]) -> None:
    options["callbacks"] = [Count(folder / f"collectives{rank}.txt")]


def collectives(folder: Path, rank: int) -> dict[int, list[str]]:
    """Names of the collectives of each step."""
    lines = [line.split() for line in (folder / f"collectives{rank}.txt").read_text().splitlines()]
    return {int(step): names for step, *names in lines}


def kill_one(folder: Path, rank: int, options: dict[str, Any]) -> None:
    victim, point = options.pop("victim"), options.pop("point")
    assert isinstance(point, Point)
    if rank == victim:
        arm(point)


def poison(folder: Path, rank: int, options: dict[str, Any]) -> None:
    """Lets one rank's pre-activations have a NaN in one step."""
    import training_process

    forward = training_process.Net.forward

    def poisoned(self: Any, x: Tensor) -> Tensor:
        if rank == 1 and self._trainer is not None and self.trainer.global_step == 0:
            with torch.no_grad():
                hidden = x.clone()
                hidden[0, 0] = torch.nan
                forward(self, hidden)
        return forward(self, x)

    training_process.Net.forward = poisoned


def mistake(folder: Path, rank: int, options: dict[str, Any]) -> None:
    """Lets every rank but the first call its last activation with what it cannot correct, in the second step."""
    import training_process

    class Mistaken(training_process.Net):
        def forward(self, x: Tensor) -> Tensor:
            if rank and self._trainer is not None and self.trainer.global_step == 1:
                wrong = torch.arange(3) if rank == 1 else torch.ones(3, dtype=torch.complex64)
                with contextlib.suppress(RuntimeError):  # nor can torch
                    self.gelu(wrong)
            return super().forward(x)

    training_process.Net = Mistaken  # pyright: ignore[reportAttributeAccessIssue]


def silence(folder: Path, rank: int, options: dict[str, Any]) -> None:
    """Lets the first activation fire on the last rank alone."""
    import training_process

    sign = 1 if rank == options.pop("last") else -1

    class Silent(training_process.Net):
        def __init__(self) -> None:
            super().__init__()
            self.one.weight.data.abs_()
            self.one.bias.data.zero_()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.abs() * sign)

    training_process.Net = Silent  # pyright: ignore[reportAttributeAccessIssue]


class Plain(nn.Module):
    """A model for a loop of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.act = nn.Linear(8, 16), nn.Linear(16, 3), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.act(self.one(x)))


def shard(folder: Path, rank: int, options: dict[str, Any]) -> None:
    """Trains with FSDP2 on real ranks, in a loop of one's own, and writes down what came of it; then leaves."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ranks = int(os.environ["WORLD_SIZE"])
    init_process_group("gloo", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    model = Plain()
    controller = EAFOController.attach(model, torch.zeros(2, 8), update_every_n_steps=2)
    mesh = init_device_mesh("cpu", (ranks,))
    refused = ""
    if options.pop("whole"):
        try:
            fully_shard(model, mesh=mesh)
        except ValueError as error:
            refused = str(error)
    else:
        fully_shard(model, mesh=mesh, ignored_params=set(controller.amplitudes.values()))
        train(model, controller, folder / f"sharded{rank}.pt", rank, ranks)
    (folder / f"refused{rank}.txt").write_text(refused)
    with contextlib.suppress(Exception):
        destroy_process_group()
    raise SystemExit(0)


def train(model: nn.Module, controller: EAFOController, path: Path, rank: int, ranks: int) -> None:
    """Each rank trains on its share of every batch."""
    eps = list(controller.amplitudes.values())
    rest = [p for p in model.parameters() if all(p is not each for each in eps)]
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": eps}], lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    rows: list[Any] = []
    for step in range(1, 7):
        x = torch.randn(8, 8, generator=generator).chunk(ranks)[rank]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        average_gradients(eps)
        optimizer.step()
        rows += controller.step(step)
    weights = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]
    kept = [{key: row[key] for key in ("step", "eps", "mean", "std", "entropy")} for row in rows]
    torch.save({"weights": weights, "eps": torch.stack([each.detach() for each in eps]), "rows": kept}, path)


class Spare(nn.Module):
    """One activation that is used, one in a branch that the data never take, and one that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.relu, self.spare, self.other = nn.ReLU(), nn.ReLU(), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.one(x)
        hidden = self.relu(hidden) if bool((x < 1e6).all()) else self.other(hidden)
        return self.three(hidden.relu() + self.two(hidden))


def train_spare(rank: int, port: int, example: bool) -> None:
    """Trains a wrapped model with torch's own DistributedDataParallel."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, x = Spare(), torch.randn(4, 8)
    if not example:
        model.other = nn.Identity()  # the module tree does not show which branches are taken
    wrap(model, find_sites(model, *[x] * example))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        parallel(x + rank).square().mean().backward()
        optimizer.step()
    eps = [value for name, value in model.named_parameters() if name.endswith("_eps")]
    assert eps and all(value.grad is not None for value in eps)
    distributed.barrier()
    os._exit(0)  # torch may hang where a process group ends with the function that holds it


def spare(folder: Path, rank: int, options: dict[str, Any]) -> None:
    """Lets the trained network be one with activations that are never called."""
    import training_process

    made, forward = training_process.Net.__init__, training_process.Net.forward

    def with_spare(self: Any) -> None:
        made(self)
        self.spare, self.other = nn.ReLU(), nn.GELU()

    def with_branch(self: Any, x: Tensor) -> Tensor:
        return self.other(x) if bool((x > 1e6).all()) else forward(self, x)

    training_process.Net.__init__, training_process.Net.forward = with_spare, with_branch
