"""Gives the amplitudes a parameter group of their own in optimisers that the user has already built."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from eafo_dynamic.errors import ConfigError

__all__ = ["GROUP_NAME", "own_group"]

GROUP_NAME = "eafo"

# how torch's schedulers, and those written after them, name their lists with one entry a parameter group
_PER_GROUP = ("lrs", "_last_lr", "lambdas", "momentums")


def own_group(
    optimizers: Sequence[Optimizer],
    amplitudes: dict[str, nn.Parameter],
    model: nn.Module,
    *,
    schedulers: Iterable[Any] = (),
    lr: float | None = None,
    lr_multiple: float = 1.0,
    weight_decay: float = 0.0,
) -> list[str]:
    """Moves every amplitude that trains into a parameter group of its own, and out of all others.

    An amplitude goes to the optimiser that holds it; one that no optimiser holds, to the optimiser of its nearest
    relatives in the module tree. The group copies the options of the group it comes from, but for lr and weight_decay.
    Schedulers keep one entry a group: each of their per-group lists gets the entry of that group. Run twice, it
    changes nothing.

    Args:
        optimizers: the optimisers, no step taken yet.
        amplitudes: eps of every site by its parameter name in the model.
        model: the model they belong to.
        schedulers: learning-rate schedulers of these optimisers.
        lr: learning rate of the group; None: that of the group it comes from, times lr_multiple.
        lr_multiple: see lr.
        weight_decay: of the group.

    Returns:
        Notes, one line each, about what could not be done.

    Raises:
        ConfigError: if a number is out of range.
    """
    _check(lr, lr_multiple, weight_decay)
    trained = {name: p for name, p in amplitudes.items() if p.requires_grad}
    homes = _homes(optimizers, trained, model)
    every = {id(p) for p in amplitudes.values()}
    notes: list[str] = []
    for optimizer in optimizers:
        mine = [name for name, home in homes.items() if home is optimizer]
        if isinstance(optimizer, torch.optim.LBFGS):
            if mine:
                notes.append("LBFGS has one parameter group only: eps shares its learning rate")
            continue
        if not mine or any(group.get("name") == GROUP_NAME for group in optimizer.param_groups):
            continue
        source = _source_group(optimizer, {id(amplitudes[name]) for name in mine})
        for group in optimizer.param_groups:
            _remove(group, every)
        _add(optimizer, source, {name: amplitudes[name] for name in mine}, lr, lr_multiple, weight_decay)
        count = len(optimizer.param_groups) - 1
        for scheduler in _flatten(schedulers):
            if getattr(scheduler, "optimizer", None) is optimizer:
                _extend(scheduler, count, source, optimizer.param_groups[-1])
    return notes


def _check(lr: float | None, lr_multiple: float, weight_decay: float) -> None:
    if lr is not None and not 0.0 <= lr < math.inf:
        raise ConfigError("lr", lr, "a learning rate cannot be negative", "Give 0 or more, or leave it out.")
    if not 0.0 <= lr_multiple < math.inf:
        raise ConfigError("lr_multiple", lr_multiple, "a multiple cannot be negative", "Give 0 or more.")
    if lr is not None and lr_multiple != 1.0:
        raise ConfigError("lr_multiple", lr_multiple, f"given beside lr={lr}", "Give one of the two.")
    if not 0.0 <= weight_decay < math.inf:
        raise ConfigError("weight_decay", weight_decay, "cannot be negative", "Give 0 or more.")


def _homes(
    optimizers: Sequence[Optimizer], amplitudes: dict[str, nn.Parameter], model: nn.Module
) -> dict[str, Optimizer]:
    holds = {id(p): opt for opt in optimizers for group in opt.param_groups for p in group["params"]}
    homes: dict[str, Optimizer] = {}
    for name, parameter in amplitudes.items():
        home = holds.get(id(parameter))
        prefix = name
        while home is None and prefix:
            prefix = prefix.rpartition(".")[0]
            relatives = model.get_submodule(prefix).parameters()
            home = next((holds[id(p)] for p in relatives if id(p) in holds), None)
        if home is None and optimizers:
            home = optimizers[0]
        if home is not None:
            homes[name] = home
    return homes


def _source_group(optimizer: Optimizer, ids: set[int]) -> int:
    for index, group in enumerate(optimizer.param_groups):
        if any(id(p) in ids for p in group["params"]):
            return index
    return 0


def _remove(group: dict[str, Any], ids: set[int]) -> None:
    keep = [i for i, p in enumerate(group["params"]) if id(p) not in ids]
    if "param_names" in group:
        group["param_names"] = [group["param_names"][i] for i in keep]
    group["params"] = [group["params"][i] for i in keep]


def _add(
    optimizer: Optimizer,
    source: int,
    amplitudes: dict[str, nn.Parameter],
    lr: float | None,
    lr_multiple: float,
    weight_decay: float,
) -> None:
    origin = optimizer.param_groups[source]
    group = {key: value for key, value in origin.items() if key not in ("params", "param_names")}
    # a warm-up may already have scaled lr down from initial_lr
    scale = lr_multiple if lr is None else lr / _positive(origin.get("initial_lr", origin["lr"]))
    for key in ("lr", "initial_lr", "max_lr", "min_lr"):
        if key in group:
            group[key] = group[key] * scale
    group["name"] = GROUP_NAME
    if "weight_decay" in group:
        group["weight_decay"] = weight_decay
    parameters: list[Any] = list(amplitudes.items()) if "param_names" in origin else list(amplitudes.values())
    optimizer.add_param_group({**group, "params": parameters})


def _positive(lr: Any) -> Any:
    if float(lr) <= 0.0:
        raise ConfigError(
            "lr", float(lr), "the optimiser's own learning rate is 0, eps's cannot be set in proportion to it", "Use lr=None."
        )
    return lr


def _flatten(schedulers: Iterable[Any]) -> list[Any]:
    """Schedulers and the ones inside them (SequentialLR, ChainedScheduler)."""
    flat: list[Any] = []
    for scheduler in schedulers:
        flat.append(scheduler)
        flat.extend(_flatten(getattr(scheduler, "_schedulers", ())))
    return flat


def _extend(scheduler: Any, count: int, source: int, group: dict[str, Any]) -> None:
    """Gives every per-group list of a scheduler an entry for the new group."""
    origin_lr = scheduler.optimizer.param_groups[source]["lr"]
    ratio = group["lr"] / origin_lr if float(origin_lr) else 1.0
    for name, value in vars(scheduler).items():
        if isinstance(value, list) and len(value) == count and name.endswith(_PER_GROUP):
            entry = value[source]
            scaled = name.endswith(("lrs", "_lr")) and isinstance(entry, (int, float, torch.Tensor))
            value.append(entry * ratio if scaled else entry)
