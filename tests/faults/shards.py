"""What else goes on around FSDP2: initialisation, precision, clipping, accumulation, optimisers; in the children."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import settings
import torch
import torch.distributed as distributed
from torch import Tensor, nn

from eafo_dynamic import EAFOController, own_group

STEPS = 6


class Net(nn.Module):
    """A model that can leave out its last activation."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.gelu, self.relu = nn.GELU(), nn.ReLU()

    def forward(self, x: Tensor, skips: bool = False) -> Tensor:
        hidden = self.two(self.gelu(self.one(x)))
        if not skips:
            hidden = self.relu(hidden)
        return self.three(hidden)


@dataclass
class Case:
    """One way to train.

    Args:
        kind: of optimiser.
        shares: rows of each batch that each rank has, in parts.
        parts: micro-batches of a step.
        syncs_last: whether FSDP2 sends gradients in the last of them alone.
        clips: "torch" or "controller".
        fused: whether the optimiser is a fused one.
        frozen: whether the first layer and its amplitude do not train.
        skips: whether the second rank leaves out an activation in every other step.
        low: whether the forward is in bfloat16.
        begins_empty: whether the model is made on the meta device.
        options: of the corrections.
    """

    kind: str
    shares: tuple[int, int] = (8, 8)
    parts: int = 1
    syncs_last: bool = False
    clips: str = ""
    fused: bool = False
    frozen: bool = False
    skips: bool = False
    low: bool = False
    begins_empty: bool = False
    options: tuple[tuple[str, Any], ...] = ()


CASES: dict[str, dict[str, Any]] = {
    "unequal batches": {"shares": (5, 11)},
    "a frozen layer": {"frozen": True},
    "a rank that skips a site": {"skips": True},
    "clipped by torch": {"clips": "torch"},
    "clipped by the controller": {"clips": "controller"},
    "clipped, an amplitude a channel": {"clips": "controller", "options": (("per_channel", True),)},
    "accumulated without sending": {"parts": 2, "syncs_last": True},
    "a fused optimiser": {"fused": True},
    "bfloat16": {"low": True},
    "begun on the meta device": {"begins_empty": True},
}


def all_cases(folder: Path, rank: int, kind: str) -> dict[str, Any]:
    """What came of every case, or the text of its error."""
    found: dict[str, Any] = {}
    for name, about in CASES.items():
        try:
            found[name] = trained(Case(kind, **about), rank)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def trained(case: Case, rank: int | None = None) -> dict[str, Any]:
    """Trains a rank of two with FSDP2; None: both of them in one process, without it."""
    torch.manual_seed(0)
    net = Net()
    model, given = net, net.state_dict()
    if case.begins_empty and rank is not None:
        with torch.device("meta"):
            model = Net()
    example = torch.zeros(2, 8, device=next(model.parameters()).device)
    controller = EAFOController.attach(model, example, update_every_n_steps=2, **dict(case.options))
    if case.frozen:
        model.one.requires_grad_(False)
        model.gelu.requires_grad_(False)
    if rank is not None:
        shard(model, controller, case.low)
    if case.begins_empty and rank is not None:
        materialise(model, given)
    optimizer = optimizer_of(case, model, controller)
    rows: list[Any] = []
    for step, x in enumerate(settings.batches(STEPS), 1):
        optimizer.zero_grad()
        backward(case, model, x, step, rank)
        if case.clips == "torch":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        elif case.clips:
            norm = controller.clip_grad_norm_(0.05)
            assert step > 1 or float(norm) > 0.05
        controller.before_optimizer_step(step - 1)
        optimizer.step()
        rows += controller.step(step)
    return settings.summary(model, controller, rows)


def shard(model: Net, controller: EAFOController, low: bool) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = controller.shard_options()
    if low:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in (model.one, model.two):
        fully_shard(layer, **options)
    fully_shard(model, **options)


def materialise(model: nn.Module, given: dict[str, Tensor]) -> None:
    """Gives a model that was made on the meta device its weights; those of the corrections it has by itself."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, given, options=options)


def optimizer_of(case: Case, model: nn.Module, controller: EAFOController) -> torch.optim.Optimizer:
    made: dict[str, Callable[..., torch.optim.Optimizer]] = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}
    options: dict[str, Any] = {"lr": 0.1 if case.kind == "SGD" else 1e-2}
    if case.fused and case.kind == "Adam":
        options["fused"] = True
    optimizer = made[case.kind](model.parameters(), **options)
    own_group([optimizer], controller.amplitudes, model, lr_multiple=1.0)
    return optimizer


def backward(case: Case, model: Any, x: Tensor, step: int, rank: int | None) -> None:
    """Leaves gradients of the mean over both ranks' losses."""
    everyones = x.split(list(case.shares))
    for place, share in enumerate(everyones):
        if rank not in (None, place):
            continue
        skips = case.skips and place == 1 and step % 2 == 0
        parts = share.chunk(case.parts)
        for number, part in enumerate(parts, 1):
            if rank is not None:
                model.set_requires_gradient_sync(number == len(parts) or not case.syncs_last)
            loss = forward(case, model, part, skips, rank).float().square().mean() / len(parts)
            (loss if rank is not None else loss / len(everyones)).backward()


def forward(case: Case, model: Any, part: Tensor, skips: bool, rank: int | None) -> Tensor:
    if not case.low or rank is not None:
        return model(part, skips)
    with torch.autocast("cpu", torch.bfloat16):
        return model(part, skips)


def two_dimensional(folder: Path, rank: int, name: str) -> Any:
    """FSDP2 over two ranks, tensor parallelism over two."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = settings.net()
    controller = EAFOController.attach(model, torch.zeros(2, 8), update_every_n_steps=2, tensor_parallel=mesh["tensor"])
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"], **controller.shard_options())
    place = mesh["data"].get_local_rank()
    inputs = [x.chunk(2)[place] for x in settings.batches()]
    found = settings.train(model, controller, inputs, name)
    distributed.barrier()
    return found


def counted(folder: Path, rank: int, ways: list[str]) -> dict[str, list[tuple[list[str], int]]]:
    """The collectives of each step, and the bytes that the corrections send in calls of their own.

    Returns:
        By way, and for the plain model by "plain " and the way: names and bytes, step by step.
    """
    sent: list[int] = []
    for name in ("all_reduce", "all_gather"):
        setattr(distributed, name, _counting(getattr(distributed, name), sent))
    found: dict[str, list[tuple[list[str], int]]] = {}
    for way in ways:
        found[way] = _count(way, rank, True, sent)
        found[f"plain {way}"] = _count(way, rank, False, sent)
    return found


def _counting(call: Callable[..., Any], sent: list[int]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        given = args[1] if isinstance(args[0], list) else args[0]
        sent.append(given.numel() * given.element_size())
        return call(*args, **kwargs)

    return counted


def _count(way: str, rank: int, corrects: bool, sent: list[int]) -> list[tuple[list[str], int]]:
    from torch.distributed.fsdp import fully_shard

    model = settings.net()
    controller = None
    options: dict[str, Any] = {}
    if corrects:
        controller = EAFOController.attach(model, torch.zeros(2, 8), update_every_n_steps=4, samples_per_site=64)
        options = controller.shard_options() if way == "FSDP2" else {}
    trained: Any = model
    if way == "FSDP2":
        fully_shard(model, **options)
    else:
        trained = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: list[tuple[list[str], int]] = []
    for step, x in enumerate(settings.batches(STEPS), 1):
        sent.clear()
        with torch.autograd.profiler.profile() as profile:
            optimizer.zero_grad()
            trained(x.chunk(2)[rank]).square().mean().backward()
            optimizer.step()
            if controller is not None:
                controller.step(step)
        names = [event.name.removeprefix("c10d::") for event in profile.function_events if "c10d::" in event.name]
        found.append((sorted(names), sum(sent)))
    return found
