"""What a search for activation calls found, which of the calls are wrapped, and the report of both."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from eafo_dynamic.errors import ConfigError, PatternError, printable
from eafo_dynamic.find.written import written_node
from eafo_dynamic.internals.checks import pattern
from eafo_dynamic.internals.tables import as_html, as_text, clipped

__all__ = ["FoundSite", "Selection", "SiteReport", "matches"]


@dataclass(frozen=True)
class FoundSite:
    """One activation call of a model.

    Args:
        name: unique name; the module's FQN, followed by ``#k`` for the k-th of several calls. A functional call is
            named after the module that makes it and the function: ``mlp:relu``.
        module: FQN of the activation module; of a functional call, of the module whose forward makes it.
        owner: FQN of the module whose forwards count the calls; None where one call needs no owner.
        call: which of the owner's calls of this activation, from 0, in the order in which they were found.
        base: name of the base function.
        class_name: class of the activation module; of a functional call, the function's name.
        shape: shape of the pre-activation without its first dimension; None where no example was run.
        inplace: whether the activation overwrites its input.
        role: ``hidden``; ``gate`` for functions onto (0, 1) such as sigmoid, for gated cells and for transforms of
            parameters; ``range`` for what goes into a root, a logarithm, a division or a distribution, or is the
            model's output; ``loss`` for what the loss is made of, no layer in between; ``unknown`` for what might be
            any of these. See ``roles``.
        wrapped: whether it is selected for correction.
        reason: why it is not, or what to know about it.
        kind: ``module`` (called once), ``shared`` (called several times), ``function``, ``written`` (out) or
            ``opaque`` (computed where no Python code can be corrected).
        parameters: hyper-parameters of a functional call; None for a module, which knows its own.
        calls: how many calls of this activation the owner makes, wrapped or not.
        guarded: modules that the code of a functional call's module calls, which keep their functions to themselves.
        hidden_from_compiler: whether torch.compile would run the call without showing it: ``F.leaky_relu_(x)``.
        channel_dim: dimension of the channels, by the layer before the call: 1 after a convolution or batch norm, -1
            after a Linear or layer norm; None where it is not known, which means 1 with four dimensions or more and the
            last one otherwise.
        caller: FQN of the module whose forwards tell the one call of an activation from others; None where nothing of
            the code could make another.
        places: where in the code the call is made; see ``evidence``.
        after: children that run before the call.
        turn: how often the owner has made a call by the same evidence before, in one forward.
        through: modules whose forwards run between the owner's and the call.
        beside: other modules whose children return in these forwards, as where one of their methods is called.
    """

    name: str
    module: str
    owner: str | None
    call: int
    base: str
    class_name: str
    shape: tuple[int, ...] | None
    inplace: bool
    role: str
    wrapped: bool = True
    reason: str = ""
    kind: str = "module"
    parameters: dict[str, object] | None = None
    calls: int = 1
    guarded: tuple[str, ...] = ()
    hidden_from_compiler: bool = False
    channel_dim: int | None = None
    caller: str | None = None
    places: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    turn: int = 0
    through: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What the owner counts: the module, or the function with the module that calls it."""
        if self.parameters is None:
            return self.module
        function = written_node(self.parameters) if self.kind == "written" else self.class_name
        return f"{self.module}:{function}"


@dataclass(frozen=True)
class Selection:
    r"""Which of the sites found are wrapped.

    A pattern matches a site by the class name of its module (``ReLU``) or the name of its function (``relu``), by the
    module's FQN or the end of it (``mlp.act``), or as a regular expression over the whole FQN
    (``blocks\\.[0-3]\\..*``). A functional call goes by the FQN of the module that makes it.

    Args:
        target_modules: patterns of sites to wrap; None: every hidden activation.
        exclude_modules: patterns of sites to leave alone.
        filter_fn: called with (module, FQN); False leaves the site alone.
        functional: what to do with functional calls: ``wrap``; ``warn``: leave them alone and say so; ``off``: do not
            look for them.

    Raises:
        ConfigError: if a pattern is no valid regular expression, or functional is none of the three.
    """

    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    filter_fn: Callable[[nn.Module, str], bool] | None = None
    functional: str = "wrap"

    def __post_init__(self) -> None:
        if self.functional not in ("wrap", "warn", "off"):
            raise ConfigError("functional", self.functional, "no such choice", "Choose one of wrap, warn, off.")
        for option in ("target_modules", "exclude_modules"):
            for given in _patterns(getattr(self, option)):
                pattern(option, given)

    def apply(self, sites: list[FoundSite], model: nn.Module) -> list[FoundSite]:
        """Marks each site as wrapped or not, with the reason.

        Args:
            sites: what was found.
            model: the model they were found in.

        Returns:
            The sites in the same order.

        Raises:
            PatternError: if a pattern matches no site.
        """
        if self.functional == "off":
            sites = [site for site in sites if site.parameters is None]
        names = sorted({site.class_name for site in sites}) + [site.module for site in sites]
        for option in ("target_modules", "exclude_modules"):
            for given in _patterns(getattr(self, option)):
                if not any(matches(given, site) for site in sites):
                    raise PatternError(option, given, names)
        marked = [self._mark(site, model.get_submodule(site.module)) for site in sites]
        at_risk = [f"{site.name} ({site.reason})" for site in marked if site.wrapped and site.role == "range"]
        if at_risk:
            warnings.warn(
                f"EAFO corrects {printable(', '.join(at_risk))}, since target_modules names it. A correction may leave "
                "the range that is needed there: watch for NaN, or take it out of target_modules.",
                stacklevel=3,
            )
        return marked

    def _mark(self, site: FoundSite, module: nn.Module) -> FoundSite:
        is_target = _any_matches(self.target_modules, site)
        is_excluded = _any_matches(self.exclude_modules, site)
        refusal = ""
        if not site.wrapped:
            refusal = site.reason
        elif self.target_modules is not None and not is_target:
            refusal = "not in target_modules"
        elif self.target_modules is None and site.role != "hidden":
            reason = site.reason or "a gate, not a hidden activation"
            refusal = f"{reason}; name it in target_modules to wrap it"
        elif is_excluded:
            refusal = "in exclude_modules"
        elif site.parameters is not None and self.functional == "warn":
            refusal = "a functional call, left alone by functional='warn'"
        elif self.filter_fn is not None and not self.filter_fn(module, site.module):
            refusal = "refused by filter_fn"
        return replace(site, wrapped=not refusal, reason=refusal or site.reason)


def _patterns(option: str | Sequence[str] | None) -> list[str]:
    if option is None:
        return []
    if isinstance(option, str):
        return [option]
    return list(option)


def _any_matches(option: str | Sequence[str] | None, site: FoundSite) -> bool:
    return any(matches(given, site) for given in _patterns(option))


def matches(given: str, site: FoundSite) -> bool:
    """Whether a pattern names a site; see Selection.

    Args:
        given: class name, FQN, end of an FQN, or regular expression over the FQN.
        site: the site.

    Returns:
        Whether it matches.
    """
    return (
        given == site.class_name
        or site.module == given
        or site.module.endswith("." + given)
        or re.fullmatch(given, site.module) is not None
    )


@dataclass(frozen=True)
class SiteReport:
    """What a search found: every activation call, wrapped or not, and why not.

    Args:
        sites: in the order of their calls (dynamic) or of the module tree (static).
        dynamic: whether an example was run.
        note: what the search could not see; empty where it saw everything it can.
    """

    sites: list[FoundSite] = field(default_factory=list)
    dynamic: bool = False
    note: str = ""

    @property
    def wrapped(self) -> list[FoundSite]:
        """The sites selected for correction."""
        return [site for site in self.sites if site.wrapped]

    @property
    def skipped(self) -> list[FoundSite]:
        """The sites left alone."""
        return [site for site in self.sites if not site.wrapped]

    def rows(self) -> list[dict[str, object]]:
        """One plain mapping per site, for tables and the manifest.

        Returns:
            Rows with keys site, kind, base, shape, role, status, reason.
        """
        return [_row(site) for site in self.sites]

    def __rich_console__(self, console: Any, options: Any) -> Any:
        """Renders as a rich table; where it is narrow, long names are cut from the left.

        Yields:
            The table.
        """
        mark = "…" if console.encoding.startswith("utf") else "~"
        width = max(20, options.max_width * 2 // 5)
        names = [str(row["site"]) for row in self.rows()]
        yield self._table(clipped(names, width, mark))

    def _table(self, names: Sequence[str]) -> Any:
        from rich.table import Table
        from rich.text import Text

        title = f"{len(self.wrapped)} of {len(self.sites)} activation sites wrapped"
        table = Table(title=title, caption=self.note or None, title_justify="left", caption_justify="left")
        for column in ("site", "kind", "base", "shape", "role", "status", "reason"):
            table.add_column(column, overflow="fold")
        for name, row in zip(names, self.rows(), strict=True):
            row["site"] = name
            cells = [Text(printable(str(value))) for value in row.values()]
            table.add_row(*cells, style=None if row["status"] == "wrapped" else "dim")
        return table

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        title = f"{len(self.wrapped)} of {len(self.sites)} activation sites wrapped"
        if self.note:
            title = f"{title}. {self.note}"
        return as_html(self.rows(), title)


def _row(site: FoundSite) -> dict[str, object]:
    kind = site.kind
    if site.inplace:
        kind = f"{kind}, in place"
    shape = "?"
    if site.shape is not None:
        shape = "x".join(["*", *map(str, site.shape)])
    return {
        "site": site.name or "(root)",
        "kind": kind,
        "base": site.base,
        "shape": shape,
        "role": site.role,
        "status": "wrapped" if site.wrapped else "skipped",
        "reason": site.reason,
    }
