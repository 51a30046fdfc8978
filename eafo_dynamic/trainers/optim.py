"""Gives the amplitudes a parameter group of their own in optimisers that the user has already built."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from eafo_dynamic.errors import ConfigError, one_line, printable
from eafo_dynamic.internals.torch_internals import OTHERS_PER_GROUP, RATES_PER_GROUP, inner_schedulers
from eafo_dynamic.trainers.options import GroupOptions

__all__ = ["GROUP_NAME", "LR_MULTIPLE", "extend_groups", "own_group"]

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

    lr(amplitude) = lr_multiple * lr(group it comes from), at every step of every schedule, unless the schedule has a
    bound in absolute terms, such as ``eta_min`` above 0 of CosineAnnealingLR.

    An amplitude goes to the optimiser that holds it. One that no optimiser holds goes to the optimiser of its nearest
    relatives in the module tree. The new group has the options of the group it comes from, except learning rates and
    weight_decay. Amplitudes from several groups, such as backbone and head, get one group for each. Schedulers have one
    entry for each group, and get one for the new group. On a CPU a group of Adam or AdamW is stepped by torch's fused
    kernel where ``fused`` and ``foreach`` were left to torch. A second call changes nothing.

    Args:
        optimizers: the optimisers, no step taken yet.
        amplitudes: eps of every site by its parameter name in the model.
        model: the model they belong to.
        trained: names of those that train, now or once their frozen layer is unfrozen. One that does not train now and
            is in no optimiser is left alone: ``add_param_group(layer.parameters())`` adds it with its layer.
        schedulers: learning-rate schedulers of these optimisers.
        lr: learning rate of the group before any schedule; None: that of the group it comes from, times
            lr_multiple.
        lr_multiple: see lr.
        weight_decay: of the group, as the optimiser means it: AdamW draws an amplitude towards 0 by lr(amplitude) *
            weight_decay of itself at every step, Adam adds weight_decay * amplitude to the gradient.
        save_ungrouped: whether the state_dicts of optimisers and schedulers have the groups that there were before,
            for trainers that restore them before anything can be regrouped (Hugging Face's).
        by_relatives: whether an amplitude goes to its nearest relatives even where an optimiser holds it. For a run
            whose amplitudes were made after its optimisers, and for its resumed parts, so that both have the same
            groups.

    Returns:
        What could not be done: at most one line about amplitudes in an LBFGS, one about amplitudes that no optimiser
        can take, such as Muon, which steps matrices only, and one for each kind of optimiser that has no weight decay.

    Raises:
        ConfigError: if a number is out of range.
    """
    options = GroupOptions(lr=lr, lr_multiple=lr_multiple, weight_decay=weight_decay)
    plain: list[Optimizer] = [_unwrapped(optimizer) for optimizer in optimizers]
    places = _find_places(plain, _to_be_moved(plain, amplitudes, trained), model, by_relatives)
    all_schedulers = _flatten(schedulers)
    refusals: list[str] = []
    undecayed: list[str] = []
    for optimizer in plain:
        if isinstance(optimizer, torch.optim.LBFGS) or _is_grouped(optimizer):
            continue
        groups_before = len(optimizer.param_groups)
        # options first: they may be refused, and the optimiser is to be whole then
        new_groups = _new_groups(optimizer, places.of, options)
        if save_ungrouped:
            optimizer.register_state_dict_post_hook(_Ungrouped(optimizer))
        _take_out(optimizer, amplitudes, places.of)
        schedulers_here = [each for each in all_schedulers if _unwrapped(getattr(each, "optimizer", None)) is optimizer]
        for source, (group, ratio) in new_groups.items():
            members = {name: amplitudes[name] for name, place in places.of.items() if place == (optimizer, source)}
            why = _add(optimizer, source, members, group)
            if why:
                places.nowhere.extend(members)
                refusals.append(why)
                continue
            if weight_decay and "weight_decay" not in group:
                undecayed.append(type(optimizer).__name__)
            for scheduler in schedulers_here:
                _extend(scheduler, len(optimizer.param_groups) - 1, source, ratio)
        if save_ungrouped and new_groups:
            for scheduler in schedulers_here:
                _save_first(scheduler, groups_before)
    notes = _notes(places.in_lbfgs, places.nowhere, refusals)
    for name in sorted(set(undecayed)):
        notes.append(
            f"{name} has no weight_decay: weight_decay={weight_decay:g} does nothing to the amplitudes that it steps. "
            "Take an optimiser that has one, such as AdamW, or leave it out"
        )
    return notes


def extend_groups(
    optimizers: Sequence[Optimizer],
    amplitudes: dict[str, nn.Parameter],
    new: Collection[str],
    model: nn.Module,
    *,
    schedulers: Iterable[Any] = (),
    options: GroupOptions,
) -> list[str]:
    """Adds amplitudes that are made in mid-training to the groups that ``own_group`` has made.

    Each goes where those go that have the same nearest relatives in the module tree. The members of a group then stand
    in the order of a run that has all of them from the start, so that it can restore the state of the optimiser.

    Args:
        optimizers: from ``own_group``; they may have taken steps.
        amplitudes: all, by parameter name, in the order of ``own_group``.
        new: names of those that are new and train.
        model: the model they belong to.
        schedulers: learning-rate schedulers of these optimisers.
        options: of the groups, for an optimiser that has had no amplitude so far.

    Returns:
        What could not be done, as ``own_group`` says it.
    """
    plain: list[Optimizer] = [_unwrapped(optimizer) for optimizer in optimizers]
    places = _find_places(plain, amplitudes, model, by_relatives=True)
    ours = [group for optimizer in plain for group in optimizer.param_groups if _is_ours(group)]
    members = {id(parameter): group for group in ours for parameter in group["params"]}
    homes: dict[_Place, dict[str, Any]] = {}
    for name, place in places.of.items():
        if id(amplitudes[name]) in members:
            homes[place] = members[id(amplitudes[name])]
    rank = {id(parameter): number for number, parameter in enumerate(amplitudes.values())}
    homeless: dict[str, nn.Parameter] = {}
    for name in new:
        place = places.of.get(name)
        home = None
        if place is not None:
            home = homes.get(place, _first_of_ours(place.optimizer))
        if place is None or home is None:
            homeless[name] = amplitudes[name]
            continue
        home["params"].append(amplitudes[name])
        if "param_names" in home:
            home["param_names"].append(name)
        if isinstance(place.optimizer, torch.optim.Adagrad):
            _add_state_of_adagrad(place.optimizer, {name: amplitudes[name]}, home)
        _put_in_order(home, rank)
    without = [optimizer for optimizer in plain if not _is_grouped(optimizer)]
    if not homeless or not without:
        return _notes([], list(homeless), [])
    return own_group(
        without,
        homeless,
        model,
        schedulers=schedulers,
        lr=options.lr,
        lr_multiple=options.lr_multiple,
        weight_decay=options.weight_decay,
        by_relatives=True,
    )


def _is_ours(group: dict[str, Any]) -> bool:
    return re.fullmatch(rf"{GROUP_NAME}(-\d+)?", str(group.get("name"))) is not None


def _first_of_ours(optimizer: Optimizer) -> dict[str, Any] | None:
    return next(filter(_is_ours, optimizer.param_groups), None)


def _put_in_order(group: dict[str, Any], rank: Mapping[int, int]) -> None:
    order = sorted(range(len(group["params"])), key=lambda number: rank[id(group["params"][number])])
    for entry in ("params", "param_names"):
        if entry in group:
            group[entry] = [group[entry][number] for number in order]


def _notes(in_lbfgs: Sequence[str], nowhere: Sequence[str], refusals: Sequence[str]) -> list[str]:
    """One line for all amplitudes of a kind."""
    notes: list[str] = []
    if in_lbfgs:
        notes.append(
            f"LBFGS has one parameter group only: {_listed(in_lbfgs)} share its options, and lr, lr_multiple and "
            "weight_decay do nothing. Take another optimiser, or policy='entropy', which needs none"
        )
    if nowhere:
        reasons = "".join(f" ({why})" for why in refusals)
        notes.append(
            f"no optimiser can take {_listed(nowhere)}: they stay as they are{reasons}. Let an optimiser that steps "
            "single numbers, such as AdamW, have a part of the model (LBFGS, Muon and SparseAdam step none), or take "
            "policy='entropy', which needs none"
        )
    return [printable(note) for note in notes]


def _listed(names: Sequence[str], shown: int = 3) -> str:
    text = ", ".join(names[:shown])
    if len(names) > shown:
        text += f" and {len(names) - shown} more"
    return text


def _to_be_moved(
    optimizers: Sequence[Optimizer], amplitudes: dict[str, nn.Parameter], trained: Container[str] | None
) -> dict[str, nn.Parameter]:
    """Amplitudes that train now, and those that will and that an optimiser holds already."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    moving: dict[str, nn.Parameter] = {}
    for name, parameter in amplitudes.items():
        trains_later = trained is not None and name in trained
        if parameter.requires_grad or (trains_later and id(parameter) in held):
            moving[name] = parameter
    return moving


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


def _is_grouped(optimizer: Optimizer) -> bool:
    return any(group.get("name") == GROUP_NAME for group in optimizer.param_groups)


def _unwrapped(optimizer: Any) -> Any:
    """The torch optimiser inside wrappers such as accelerate's.

    Returns:
        The innermost.
    """
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


class _Place(NamedTuple):
    """A parameter group: its optimiser and its number there."""

    optimizer: Optimizer
    number: int


@dataclass
class _Places:
    """Where amplitudes go.

    Args:
        of: the group that each amplitude comes from, or that its nearest relative is in, by name.
        in_lbfgs: names of those that stay in the one group of an LBFGS.
        nowhere: names of those that no optimiser can take.
    """

    of: dict[str, _Place] = field(default_factory=dict)
    in_lbfgs: list[str] = field(default_factory=list)
    nowhere: list[str] = field(default_factory=list)


def _find_places(
    optimizers: Sequence[Optimizer], amplitudes: dict[str, nn.Parameter], model: nn.Module, by_relatives: bool
) -> _Places:
    place_of = {
        id(parameter): _Place(optimizer, number)
        for optimizer in optimizers
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    if by_relatives:
        for amplitude in amplitudes.values():
            place_of.pop(id(amplitude), None)
    places_for_numbers = {key: place for key, place in place_of.items() if _steps_numbers(place.optimizer)}
    found = _Places()
    for name, amplitude in amplitudes.items():
        place = place_of.get(id(amplitude))
        if place is not None and isinstance(place.optimizer, torch.optim.LBFGS):
            found.in_lbfgs.append(name)
            found.of[name] = place
            continue
        place = places_for_numbers.get(id(amplitude)) or _nearest(name, places_for_numbers, model)
        if place is not None:
            found.of[name] = place
        elif optimizers:
            found.nowhere.append(name)
    return found


def _nearest(name: str, places: dict[int, _Place], model: nn.Module) -> _Place | None:
    """The group of a parameter in the smallest module around an amplitude that has any."""
    while name:
        name = name.rpartition(".")[0]
        for relative in model.get_submodule(name).parameters():
            if id(relative) in places:
                return places[id(relative)]
    return None


def _steps_numbers(optimizer: Optimizer) -> bool:
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


def _new_groups(
    optimizer: Optimizer, places: dict[str, _Place], options: GroupOptions
) -> dict[int, tuple[dict[str, Any], Any]]:
    """Options of the groups that an optimiser gets, one for each group that amplitudes come from.

    Returns:
        By the number of that group: the options, and the ratio of the learning rates.
    """
    sources = sorted({place.number for place in places.values() if place.optimizer is optimizer})
    groups: dict[int, tuple[dict[str, Any], Any]] = {}
    for number, source in enumerate(sources, start=1):
        group, ratio = _copied(optimizer.param_groups[source], options)
        # monitors of learning rates refuse two groups of one name
        group["name"] = GROUP_NAME if number == 1 else f"{GROUP_NAME}-{number}"
        groups[source] = group, ratio
    return groups


def _copied(origin: dict[str, Any], options: GroupOptions) -> tuple[dict[str, Any], Any]:
    """Options of a new group after those of another.

    Returns:
        The options, and the ratio of the learning rates.
    """
    group = {key: value for key, value in origin.items() if key not in ("params", "param_names")}
    ratio = options.lr_multiple
    if options.lr is not None:
        # a warm-up may already have scaled lr down from initial_lr
        ratio = options.lr / _positive(origin.get("initial_lr", origin["lr"]))
    for key in _RATES:
        if key in group:
            group[key] = group[key] * ratio
    if "weight_decay" in group:
        group["weight_decay"] = options.weight_decay
    return group, ratio


def _take_out(optimizer: Optimizer, amplitudes: dict[str, nn.Parameter], places: Container[str]) -> None:
    ids = {id(p) for p in amplitudes.values()}
    for group in optimizer.param_groups:
        _remove(group, ids)
    for name, p in amplitudes.items():
        if name not in places:
            optimizer.state.pop(p, None)  # of a parameter in no group it would break state_dict


def _add(optimizer: Optimizer, source: int, amplitudes: dict[str, nn.Parameter], group: dict[str, Any]) -> str:
    """Adds a group to an optimiser.

    Returns:
        Why the optimiser, one that is not torch's own, refuses single numbers; empty if it has taken them.
    """
    parameters: list[Any] = list(amplitudes.values())
    if "param_names" in optimizer.param_groups[source]:
        parameters = list(amplitudes.items())
    if _fuses(optimizer, group, amplitudes):
        group = {**group, "fused": True}
    before = len(optimizer.param_groups)
    try:
        optimizer.add_param_group({**group, "params": parameters})
    except (ValueError, TypeError, RuntimeError, AssertionError, IndexError) as error:
        del optimizer.param_groups[before:]
        for parameter in amplitudes.values():
            optimizer.state.pop(parameter, None)
        return f"{type(optimizer).__name__} refuses them, {one_line(error)}"
    if isinstance(optimizer, torch.optim.Adagrad):
        _add_state_of_adagrad(optimizer, amplitudes, group)
    return ""


def _add_state_of_adagrad(
    optimizer: torch.optim.Adagrad, amplitudes: dict[str, nn.Parameter], group: dict[str, Any]
) -> None:
    """Makes the state of new parameters, which alone among torch's optimisers Adagrad makes when it is built."""
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
    left_to_torch = "fused" in group and group["fused"] is None and group.get("foreach") is None
    if not left_to_torch or group.get("differentiable"):
        return False
    if not all(p.is_cpu and p.is_floating_point() for p in amplitudes.values()):
        return False
    for kind in (torch.optim.AdamW, torch.optim.Adam):
        if isinstance(optimizer, kind):
            return _fuses_on_cpu(kind)
    return False


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


def _save_first(scheduler: Any, count: int) -> None:
    """Lets a scheduler save the entries of the first ``count`` parameter groups only."""
    kind = type(scheduler)

    def state_dict(self: Any) -> dict[str, Any]:
        state: dict[str, Any] = kind.state_dict(self)
        for name, value in state.items():
            if isinstance(value, list) and name.endswith((*RATES_PER_GROUP, *OTHERS_PER_GROUP)):
                state[name] = value[:count]
        return state

    # schedulers save every attribute of the instance, so that the method cannot be one
    scheduler.__class__ = type(kind.__name__, (kind,), {"state_dict": state_dict})


def _extend(scheduler: Any, count: int, source: int, ratio: Any) -> None:
    """Gives every per-group list of a scheduler an entry for the new group."""
    for name, value in vars(scheduler).items():
        if isinstance(value, list) and len(value) == count:
            if name.endswith(RATES_PER_GROUP):
                value.append(value[source] * ratio)
            elif name.endswith(OTHERS_PER_GROUP):
                value.append(value[source])
