"""Gives the amplitudes a parameter group of their own in optimisers that the user has already built."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.internals.torch_internals import OTHERS_PER_GROUP, RATES_PER_GROUP, inner_schedulers
from eafo_dynamic.trainers.options import GroupOptions

__all__ = ["GROUP_NAME", "LR_MULTIPLE", "own_group"]

GROUP_NAME = "eafo"
LR_MULTIPLE = GroupOptions.lr_multiple

# entries of a parameter group that are learning rates
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")


def own_group(
    optimizers: Sequence[Optimizer],
    amplitudes: dict[str, nn.Parameter],
    model: nn.Module,
    *,
    trained: Container[str] | None = None,
    schedulers: Iterable[Any] = (),
    lr: float | None = GroupOptions.lr,
    lr_multiple: float = GroupOptions.lr_multiple,
    weight_decay: float = GroupOptions.weight_decay,
    save_ungrouped: bool = False,
    by_relatives: bool = False,
) -> list[str]:
    """Moves every amplitude that trains into a parameter group of its own, and all of them out of other groups.

    An amplitude goes to the optimiser that holds it; one that no optimiser holds, to the optimiser of its
    nearest relatives in the module tree. The group copies the options of the group it comes from, but for
    learning rates and weight_decay; amplitudes from several groups (decayed and not, backbone and head) get
    one group for each. Schedulers keep one entry a group: each of their per-group lists gets the entry of that
    group. So the learning rate of eps stays lr_multiple times that of its relatives at every step, unless the
    scheduler has a bound in absolute terms, such as CosineAnnealingLR's eta_min above 0. On a CPU a group of Adam or
    AdamW is stepped by torch's fused kernel where ``fused`` and ``foreach`` were left to torch. Run twice, it changes
    nothing.

    Args:
        optimizers: the optimisers, no step taken yet.
        amplitudes: eps of every site by its parameter name in the model.
        model: the model they belong to.
        trained: names of those that train, now or once their frozen layer is unfrozen. One that does not train now and
            that no optimiser holds is left to who unfreezes its layer: ``add_param_group(layer.parameters())`` has it.
        schedulers: learning-rate schedulers of these optimisers.
        lr: learning rate of the group before any schedule; None: that of the group it comes from, times
            lr_multiple.
        lr_multiple: see lr.
        weight_decay: of the group.
        save_ungrouped: whether the state_dicts of optimisers and schedulers have the groups that there were before,
            for trainers that restore them before they let anyone regroup (Hugging Face's).
        by_relatives: whether an amplitude goes to its nearest relatives even where an optimiser holds it: in a run that
            made its amplitudes after its optimisers, and in its resumed parts, so that both have the same groups.

    Returns:
        Notes, one line each, about what could not be done.

    Raises:
        ConfigError: if a number is out of range.
    """
    checked = GroupOptions(lr=lr, lr_multiple=lr_multiple, weight_decay=weight_decay)
    plain: list[Optimizer] = [_unwrapped(optimizer) for optimizer in optimizers]
    held = {id(p) for optimizer in plain for group in optimizer.param_groups for p in group["params"]}
    later = () if trained is None else trained
    moving = {name: p for name, p in amplitudes.items() if p.requires_grad or (name in later and id(p) in held)}
    homes, notes = _homes(plain, moving, model, by_relatives)
    flat = _flatten(schedulers)
    for optimizer in plain:
        if isinstance(optimizer, torch.optim.LBFGS) or _grouped(optimizer):
            continue
        before, mine = len(optimizer.param_groups), _of(optimizer, flat)
        groups = {
            index: _copied(optimizer.param_groups[index], checked)
            for index in sorted({index for home, index in homes.values() if home is optimizer})
        }
        if save_ungrouped:
            optimizer.register_state_dict_post_hook(_Ungrouped(optimizer))
        _take_out(optimizer, amplitudes, homes)
        for number, (source, (group, scale)) in enumerate(groups.items(), start=1):
            members = {name: amplitudes[name] for name, home in homes.items() if home == (optimizer, source)}
            # monitors of learning rates refuse two groups of one name
            group["name"] = GROUP_NAME if number == 1 else f"{GROUP_NAME}-{number}"
            _add(optimizer, source, members, group)
            for scheduler in mine:
                _extend(scheduler, len(optimizer.param_groups) - 1, source, scale)
        if save_ungrouped and groups:
            for scheduler in mine:
                _save_first(scheduler, before)
    return notes


class _Ungrouped:
    """Rewrites the state_dict of an optimiser for the parameter groups that it has now.

    Args:
        optimizer: before it is regrouped.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.layout = [[id(p) for p in group["params"]] for group in optimizer.param_groups]

    def __call__(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        number_of = {id(p): number for p, number in zip(parameters, numbers, strict=True)}
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        place = 0
        for keys, group in zip(self.layout, state_dict["param_groups"], strict=False):
            for new, key in enumerate(keys, start=place):
                if number_of.get(key) in state_dict["state"]:
                    state[new] = state_dict["state"][number_of[key]]
            plain = {name: value for name, value in group.items() if name != "param_names"}
            groups.append({**plain, "params": list(range(place, place + len(keys)))})
            place += len(keys)
        return {**state_dict, "state": state, "param_groups": groups}


def _grouped(optimizer: Optimizer) -> bool:
    return any(group.get("name") == GROUP_NAME for group in optimizer.param_groups)


def _unwrapped(optimizer: Any) -> Any:
    """The torch optimiser inside wrappers such as accelerate's.

    Returns:
        The innermost.
    """
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _homes(
    optimizers: Sequence[Optimizer], amplitudes: dict[str, nn.Parameter], model: nn.Module, by_relatives: bool
) -> tuple[dict[str, tuple[Optimizer, int]], list[str]]:
    """Optimiser and group that each amplitude comes from, or that its nearest relative is in.

    Returns:
        Homes by name, without those that have none, and notes about these.
    """
    holds = {
        id(p): (optimizer, index)
        for optimizer in optimizers
        for index, group in enumerate(optimizer.param_groups)
        for p in group["params"]
    }
    if by_relatives:
        mine = {id(p) for p in amplitudes.values()}
        holds = {key: home for key, home in holds.items() if key not in mine}
    takes = {key: home for key, home in holds.items() if _takes_scalars(home[0])}
    homes: dict[str, tuple[Optimizer, int]] = {}
    notes: list[str] = []
    for name, parameter in amplitudes.items():
        home = holds.get(id(parameter))
        if home is not None and isinstance(home[0], torch.optim.LBFGS):
            notes.append(f"LBFGS has one parameter group only: {name} shares its learning rate")
        home = home or _nearest(name, takes, model)
        if home is None and optimizers:
            notes.append(f"no optimiser can take {name}: it stays as it is")
        elif home is not None:
            homes[name] = home
    return homes, notes


def _nearest(name: str, holds: dict[int, tuple[Optimizer, int]], model: nn.Module) -> tuple[Optimizer, int] | None:
    while name:
        name = name.rpartition(".")[0]
        relatives = model.get_submodule(name).parameters()
        home = next((holds[id(p)] for p in relatives if id(p) in holds), None)
        if home is not None:
            return home
    return None


def _takes_scalars(optimizer: Optimizer) -> bool:
    """Whether an optimiser accepts a new 0-dim parameter with a dense gradient.

    Returns:
        False for the few of torch's that do not.
    """
    names = {kind.__name__ for kind in type(optimizer).__mro__}
    return not names & {"LBFGS", "Muon", "SparseAdam"}


def _remove(group: dict[str, Any], ids: set[int]) -> None:
    keep = [i for i, p in enumerate(group["params"]) if id(p) not in ids]
    if "param_names" in group:
        group["param_names"] = [group["param_names"][i] for i in keep]
    group["params"] = [group["params"][i] for i in keep]


def _copied(origin: dict[str, Any], options: GroupOptions) -> tuple[dict[str, Any], Any]:
    """Options of a new group after those of another.

    Returns:
        The options, and the ratio of the learning rates.
    """
    group = {key: value for key, value in origin.items() if key not in ("params", "param_names")}
    # a warm-up may already have scaled lr down from initial_lr
    scale = options.lr_multiple
    if options.lr is not None:
        scale = options.lr / _positive(origin.get("initial_lr", origin["lr"]))
    for key in _RATES:
        if key in group:
            group[key] = group[key] * scale
    if "weight_decay" in group:
        group["weight_decay"] = options.weight_decay
    return group, scale


def _take_out(optimizer: Optimizer, amplitudes: dict[str, nn.Parameter], homes: Container[str]) -> None:
    ids = {id(p) for p in amplitudes.values()}
    for group in optimizer.param_groups:
        _remove(group, ids)
    for name, p in amplitudes.items():
        if name not in homes:
            optimizer.state.pop(p, None)  # of a parameter in no group it would break state_dict


def _add(optimizer: Optimizer, source: int, amplitudes: dict[str, nn.Parameter], group: dict[str, Any]) -> None:
    named = "param_names" in optimizer.param_groups[source]
    parameters: list[Any] = list(amplitudes.items()) if named else list(amplitudes.values())
    fused = {"fused": True} if _fuses(optimizer, group, amplitudes) else {}
    optimizer.add_param_group({**group, **fused, "params": parameters})
    if isinstance(optimizer, torch.optim.Adagrad):
        # alone among torch's optimisers it makes the state of its parameters when it is built
        new = [p for p in amplitudes.values() if p not in optimizer.state]
        options = {key: group[key] for key in ("initial_accumulator_value", "fused") if key in group}
        if new:
            optimizer.state.update(torch.optim.Adagrad(new, **options).state)


def _fuses(optimizer: Optimizer, group: dict[str, Any], amplitudes: dict[str, nn.Parameter]) -> bool:
    """Whether one kernel may step all amplitudes of a group, as the user has left it to torch how they are stepped.

    On a CPU torch's own choice is a loop in Python; it takes as long for a number as for a small matrix.

    Returns:
        Whether the group may be fused.
    """
    open_to_it = "fused" in group and group["fused"] is None and group.get("foreach") is None
    kind = next((kind for kind in (torch.optim.AdamW, torch.optim.Adam) if isinstance(optimizer, kind)), None)
    if kind is None or not open_to_it or group.get("differentiable"):
        return False
    return all(p.is_cpu and p.is_floating_point() for p in amplitudes.values()) and _fuses_on_cpu(kind)


@functools.cache
def _fuses_on_cpu(kind: type[Optimizer]) -> bool:
    """Whether this version of torch has such a kernel."""
    probe = nn.Parameter(torch.zeros((), dtype=torch.float32, device="cpu"))
    probe.grad = torch.ones_like(probe)
    try:
        kind([probe], fused=True).step()  # pyright: ignore[reportCallIssue]
    except (RuntimeError, TypeError):
        return False
    return True


def _positive(lr: Any) -> float:
    if float(lr) <= 0.0:
        problem = "the optimiser's own learning rate, by which schedules go, is 0"
        raise ConfigError("lr", float(lr), problem, "Leave out the callback's lr, or start the optimiser above 0.")
    return float(lr)


def _flatten(schedulers: Iterable[Any]) -> list[Any]:
    """Schedulers and the ones inside them (SequentialLR, ChainedScheduler).

    Returns:
        All of them.
    """
    flat: list[Any] = []
    for scheduler in schedulers:
        flat.append(scheduler)
        flat.extend(_flatten(inner_schedulers(scheduler)))
    return flat


def _of(optimizer: Optimizer, schedulers: Iterable[Any]) -> list[Any]:
    return [each for each in schedulers if _unwrapped(getattr(each, "optimizer", None)) is optimizer]


def _save_first(scheduler: Any, count: int) -> None:
    """Lets a scheduler save the entries of the first ``count`` parameter groups only."""
    kind = type(scheduler)

    def state_dict(self: Any) -> dict[str, Any]:
        state: dict[str, Any] = kind.state_dict(self)
        names = (*RATES_PER_GROUP, *OTHERS_PER_GROUP)
        return {k: v[:count] if isinstance(v, list) and k.endswith(names) else v for k, v in state.items()}

    # schedulers save every attribute of the instance, so that the method cannot be one
    scheduler.__class__ = type(kind.__name__, (kind,), {"state_dict": state_dict})


def _extend(scheduler: Any, count: int, source: int, scale: Any) -> None:
    """Gives every per-group list of a scheduler an entry for the new group."""
    for name, value in vars(scheduler).items():
        if isinstance(value, list) and len(value) == count:
            if name.endswith(RATES_PER_GROUP):
                value.append(value[source] * scale)
            elif name.endswith(OTHERS_PER_GROUP):
                value.append(value[source])
