"""Options that carry everything that is said about them: dataclass fields with text, unit and check.

An option is written once, as a field of a class of options::

    @options_class
    class Options(Checked):
        resolution: float = option(
            default=0.1, part="How it is computed", text="r of the resolution-r entropy", check=number
        )

Its check runs when an object is made. Signatures, docstrings (and with them ``--help``) and the tables of the guide
are made from the fields.
"""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Concatenate, ParamSpec, TypeVar, cast, get_type_hints

from typing_extensions import dataclass_transform

from eafo_dynamic.errors import ConfigError

__all__ = ["Check", "Checked", "Described", "named", "option", "options_class", "same", "table", "takes"]

Check = Callable[[str, Any], object]
P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])

_KEY = "eafo_dynamic"
_HEADS = ("option", "default", "unit", "what it does", "when to change it")


@dataclass(frozen=True)
class Described:
    """What a field of an options class carries beside its name and type; see ``option``."""

    default: object
    part: str
    text: str
    unit: str
    when: str
    check: Check

    @classmethod
    def of(cls, options: type) -> dict[str, Described]:
        """What the fields of an options class carry.

        Args:
            options: the class; fields that were not made by ``option`` are left out.

        Returns:
            Descriptions by name.
        """
        return {each.name: each.metadata[_KEY] for each in fields(options) if _KEY in each.metadata}


def option(*, default: T, part: str, text: str, check: Check, unit: str = "", when: str = "") -> T:
    """A field of a class of options.

    Args:
        default: its default; None as a default is not checked.
        part: heading of the guide's page under which it stands.
        text: what it does, without a final stop; code in single backticks.
        check: called with the option's name and a value; returns the value to keep.
        unit: of its values; "1" for a number without one, empty for what is no quantity.
        when: when to change it, for the guide; Markdown, may have links.

    Returns:
        The field; for type checkers, the default.
    """
    return field(default=default, metadata={_KEY: Described(default, part, text, unit, when, check)})


def same(options: type, name: str, like: T) -> T:
    """A field that another class of options has too, with the same default, text and check.

    Args:
        options: the other class.
        name: of its field, and of this one.
        like: any value of the field's type; for type checkers only.

    Returns:
        The field; for type checkers, a value of its type.
    """
    described = Described.of(options)[name]
    return field(default=cast(T, described.default), metadata={_KEY: described})


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Base of options classes: all values are checked when an object is made.

    Raises:
        ConfigError: if options cannot work; the message has all of them, with their values and how to fix them.
    """

    def __post_init__(self) -> None:
        errors: list[ConfigError] = []
        for name, described in Described.of(type(self)).items():
            value = getattr(self, name)
            if value is None and described.default is None:
                continue
            try:
                object.__setattr__(self, name, described.check(name, value))
            except ConfigError as error:
                errors.append(error)
        errors = errors or list(self.conflicts())
        if errors:
            raise ConfigError.joined(errors)

    def conflicts(self) -> Iterator[ConfigError]:
        """Looks for options that cannot work together; asked once each of them is fine by itself.

        Yields:
            One error per conflict.
        """
        yield from ()


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option,))
def options_class(options: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass, made by keywords only, with its options in the docstring of ``__init__``.

    Args:
        options: a subclass of Checked.

    Returns:
        The dataclass.
    """
    made = dataclass(frozen=True, kw_only=True)(options)
    types = get_type_hints(made)  # in place of texts, which could not be read in the module of a subclass
    made.__init__.__annotations__ = {name: types[name] for name in inspect.signature(made).parameters}
    made.__init__.__doc__ = _arguments(made)
    return made


def takes(options: Callable[P, T]) -> Callable[[Callable[[S, T], None]], Callable[Concatenate[S, P], None]]:
    """Decorates an ``__init__`` that works on an options object, so that it is called with the options by name.

    The result has the options as parameters, for type checkers as well as in its signature, annotations and docstring,
    which is what ``help`` and jsonargparse read.

    Args:
        options: the options class.

    Returns:
        The decorator.
    """

    def decorate(initialise: Callable[[S, T], None]) -> Callable[Concatenate[S, P], None]:
        def initialised(self: S, /, *positional: P.args, **by_name: P.kwargs) -> None:
            if positional:
                kind, first = type(self).__name__, next(iter(parameters))
                raise TypeError(f"{kind} takes its options by name. Write {kind}({first}=...), with the option's name.")
            initialise(self, options(*positional, **by_name))

        parameters = inspect.signature(options).parameters
        functools.update_wrapper(initialised, initialise)
        del cast(Any, initialised).__wrapped__  # pdoc would show its signature
        initialised.__doc__ = _arguments(options)
        initialised.__annotations__ = cast(Any, options).__init__.__annotations__
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        _sign(initialised, inspect.Signature([itself, *parameters.values()], return_annotation=None))
        return initialised

    return decorate


def named(options: type) -> Callable[[Function], Function]:
    """Decorates a function whose ``**options`` are those of an options class: its signature shows them by name.

    Args:
        options: the options class.

    Returns:
        The decorator.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        others = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        _sign(function, signature.replace(parameters=[*others, *inspect.signature(options).parameters.values()]))
        return function

    return decorate


def _sign(function: Callable[..., Any], signature: inspect.Signature) -> None:
    cast(Any, function).__signature__ = signature


def _arguments(options: Callable[..., Any]) -> str:
    """A docstring with an Args section."""
    lines = ["All options are given by name.", "", "Args:"]
    for name, described in Described.of(cast(type, options)).items():
        entry = f"{name}: {described.text}. {_unit(described.unit)}".rstrip()
        lines.append(textwrap.fill(entry, 110, initial_indent="    ", subsequent_indent="        "))
    return "\n".join(lines)


def _unit(unit: str) -> str:
    if unit == "1":
        return "No unit."
    return f"Unit: {unit}." if unit else ""


def table(part: str, options: Iterable[type]) -> str:
    """The table of the guide's page about a part of the options.

    Args:
        part: heading of the page.
        options: options classes; an option that several have is in the table once.

    Returns:
        Markdown, with a final line break.
    """
    known = {name: each for kind in options for name, each in Described.of(kind).items()}
    lines = [_row(_HEADS), "|---" * len(_HEADS) + "|\n"]
    for name, described in known.items():
        if described.part == part:
            default = repr(described.default).replace("'", '"')
            lines.append(_row((f"`{name}`", f"`{default}`", described.unit, described.text, described.when)))
    return "".join(lines)


def _row(cells: tuple[str, ...]) -> str:
    filled = [cell.replace("|", "\\|") + " " if cell else "" for cell in cells]
    return "| " + "| ".join(filled) + "|\n"
