"""The signature of a model's forward, for a graph that ``torch.export`` has made of it by one example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from torch import nn

from eafo_dynamic.errors import SiteError

__all__ = ["Call", "call_of", "forward_of", "in_order"]

_PRIMITIVES = (bool, int, float, str)


@dataclass(frozen=True)
class Call:
    """How a graph is called, and how it calls its program.

    Args:
        parameters: name, kind (of ``inspect.Parameter``), whether it may be left out, and what it is then, if that is
            a text, a number or None.
        positional: how many arguments the program takes by their position.
        named: those that it takes by name, in its order.
    """

    parameters: tuple[tuple[str, int, bool, Any], ...]
    positional: int
    named: tuple[str, ...]

    @classmethod
    def of_lists(cls, saved: Mapping[str, Any]) -> Call:
        """What went through JSON.

        Args:
            saved: as ``dataclasses.asdict`` gives it.

        Returns:
            The call.
        """
        parameters = tuple(
            (str(name), int(kind), bool(left), default) for name, kind, left, default in saved["parameters"]
        )
        return cls(parameters, int(saved["positional"]), tuple(map(str, saved["named"])))


def in_order(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, in the order in which the forward takes them: torch.export puts them so.

    Args:
        model: any.
        kwargs: the arguments.

    Returns:
        The same.
    """
    names = [*inspect.signature(model.forward).parameters, *kwargs]
    return {name: kwargs[name] for name in dict.fromkeys(names) if name in kwargs}


def call_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """The call of a graph that is exported with an example.

    Args:
        model: whose forward it is.
        args: example.
        kwargs: example.

    Returns:
        The call; None where the forward takes any number of arguments, and the graph those of the example.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    if any(each.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD) for each in parameters):
        return None
    described = tuple(_described(each) for each in parameters)
    return Call(described, len(args), tuple(kwargs))


def _described(parameter: Parameter) -> tuple[str, int, bool, Any]:
    may_be_left = parameter.default is not Parameter.empty
    default = None
    if isinstance(parameter.default, _PRIMITIVES) and may_be_left:
        default = parameter.default
    return parameter.name, int(parameter.kind), may_be_left, default


def forward_of(call: Call) -> Callable[..., Any]:
    """A forward with a signature.

    Written as text and compiled, as dataclasses do it: whatever reads or traces a forward finds an ordinary one.

    Args:
        call: from ``call_of``.

    Returns:
        A function of the module and these parameters, which runs ``vars(module)["graph"]``.
    """
    given = {name for name, *_ in call.parameters[: call.positional]} | set(call.named)
    declared: list[str] = ["self"]
    defaults: dict[str, Any] = {"refuse": _refuse}
    last_kind = Parameter.POSITIONAL_ONLY
    follows_default = False
    body: list[str] = []
    for number, (name, kind, may_be_left, default) in enumerate(call.parameters):
        if kind != last_kind:
            if last_kind == Parameter.POSITIONAL_ONLY and number:
                declared.append("/")
            if kind == Parameter.KEYWORD_ONLY:
                declared.append("*")
        last_kind = kind
        defaults[f"default_{number}"] = default
        keeps_default = may_be_left and default is not None
        if keeps_default or name not in given or (follows_default and kind != Parameter.KEYWORD_ONLY):
            follows_default = True
            declared.append(f"{name}=default_{number}")
        else:
            declared.append(name)
        if name not in given:
            body.append(f"    refuse({name!r}, {name}, default_{number})")
    by_position = "".join(f"{name}, " for name, *_ in call.parameters[: call.positional])
    by_name = "".join(f"{name!r}: {name}, " for name in call.named)
    body.append(f"    return self.__dict__['graph'](*({by_position}), **{{{by_name}}})")
    text = f"def forward({', '.join(declared)}):\n" + "\n".join(body)
    exec(compile(text, "<forward of a merged graph>", "exec"), defaults)
    return defaults["forward"]


def _refuse(name: str, value: object, default: object) -> None:
    """Refuses an argument that the program does not have, unless it is what the program was made with."""
    if value is default or (isinstance(value, _PRIMITIVES) and value == default):
        return
    raise SiteError(
        f"the graph was merged without {name!r} and cannot take it. Give merge an example with it, "
        f"merge(model, ..., {name}=...)."
    )
