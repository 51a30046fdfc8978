"""Finds every activation call of a model: a *site* is one call of one activation in one layer.

Two ways to look. *Dynamic*: one forward on an example input, run on a structural copy of the model (parameters shared,
everything else copied) without gradient and under a forked random state, so that nothing of the user's model changes;
it sees which module calls which activation, how often and with what shape. *Static*: without an example, from the
module tree alone; an activation called several times in a forward then is one site, which the report says.
"""

from __future__ import annotations

import copy
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from eafo_dynamic.bases import activation_types, as_base
from eafo_dynamic.errors import ConfigError, PatternError, SiteError

__all__ = ["FoundSite", "Selection", "SiteReport", "find_sites", "forked_random_states"]


@dataclass(frozen=True)
class FoundSite:
    """One activation call of a model.

    Args:
        name: unique name; the module's FQN, followed by ``#k`` for the k-th of several calls.
        module: FQN of the activation module.
        owner: FQN of the module in whose forward the call happens; None where one call needs no owner.
        call: which of the owner's calls of this module in one forward, from 0.
        base: name of the base function.
        class_name: class of the activation module.
        shape: shape of the pre-activation without its first dimension; None where no example was run.
        inplace: whether the module overwrites its input.
        role: ``hidden``, or ``gate`` for functions onto (0, 1) such as sigmoid.
        wrapped: whether it is selected for correction.
        reason: why it is not, or what to know about it.
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


@dataclass(frozen=True)
class Selection:
    """Which of the sites found are wrapped.

    A pattern matches a site by the class name of its module (``ReLU``), by its FQN or the end of it (``mlp.act``), or
    as a regular expression over the whole FQN (``blocks\\.[0-3]\\..*``).

    Args:
        target_modules: patterns of sites to wrap; None: every hidden activation.
        exclude_modules: patterns of sites to leave alone.
        filter_fn: called with (module, FQN); False leaves the site alone.

    Raises:
        ConfigError: if a pattern is no valid regular expression.
    """

    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    filter_fn: Callable[[nn.Module, str], bool] | None = None

    def __post_init__(self) -> None:
        for option in ("target_modules", "exclude_modules"):
            for pattern in _patterns(getattr(self, option)):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(
                        option,
                        pattern,
                        f"not a valid regular expression ({error})",
                        "Escape special characters, or use a class name or the end of a module's name.",
                    ) from None

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
        names = sorted({site.class_name for site in sites}) + [site.module for site in sites]
        for option in ("target_modules", "exclude_modules"):
            for pattern in _patterns(getattr(self, option)):
                if not any(_matches(pattern, site) for site in sites):
                    raise PatternError(option, pattern, names)
        return [self._mark(site, model.get_submodule(site.module)) for site in sites]

    def _mark(self, site: FoundSite, module: nn.Module) -> FoundSite:
        targets = _patterns(self.target_modules)
        refusal = ""
        if not site.wrapped:
            refusal = site.reason
        elif self.target_modules is not None and not any(_matches(p, site) for p in targets):
            refusal = "not in target_modules"
        elif self.target_modules is None and site.role == "gate":
            refusal = "a gate, not a hidden activation; name it in target_modules to wrap it"
        elif any(_matches(p, site) for p in _patterns(self.exclude_modules)):
            refusal = "in exclude_modules"
        elif self.filter_fn is not None and not self.filter_fn(module, site.module):
            refusal = "refused by filter_fn"
        return replace(site, wrapped=not refusal, reason=refusal or site.reason)


def _patterns(option: str | Sequence[str] | None) -> list[str]:
    if option is None:
        return []
    return [option] if isinstance(option, str) else list(option)


def _matches(pattern: str, site: FoundSite) -> bool:
    return (
        pattern == site.class_name
        or site.module == pattern
        or site.module.endswith("." + pattern)
        or re.fullmatch(pattern, site.module) is not None
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
        """One plain mapping a site, for tables and the manifest.

        Returns:
            Rows with keys site, base, shape, calls, status, reason.
        """
        return [
            {
                "site": site.name or "(root)",
                "base": site.base,
                "shape": "?" if site.shape is None else "x".join(["*", *map(str, site.shape)]),
                "status": "wrapped" if site.wrapped else "skipped",
                "reason": site.reason,
            }
            for site in self.sites
        ]

    def __rich__(self) -> Any:
        """Renders as a rich table.

        Returns:
            The table.
        """
        from rich.table import Table

        title = f"{len(self.wrapped)} of {len(self.sites)} activation sites wrapped"
        table = Table(title=title, caption=self.note or None, title_justify="left", caption_justify="left")
        for column in ("site", "base", "shape", "status", "reason"):
            table.add_column(column, overflow="fold")
        for row in self.rows():
            table.add_row(*map(str, row.values()), style=None if row["status"] == "wrapped" else "dim")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, no_color=True)
        with console.capture() as capture:
            console.print(self.__rich__())
        return capture.get()


@dataclass(frozen=True)
class _Call:
    module: str
    owner: str
    shape: tuple[int, ...]


def find_sites(
    model: nn.Module,
    *example_args: Any,
    selection: Selection | None = None,
    run: Callable[[nn.Module], object] | None = None,
    **example_kwargs: Any,
) -> SiteReport:
    """Finds every activation call of a model without changing anything of it.

    Args:
        model: any module; not wrapped yet.
        *example_args: example input; with any example the search is dynamic.
        selection: which sites to wrap; default every hidden activation.
        run: called with the structural copy in place of ``copy(*example_args, **example_kwargs)``.
        **example_kwargs: example input.

    Returns:
        The report; print it to read it.

    Raises:
        SiteError: if the example's forward fails, or the model cannot be copied for it.
        PatternError: if a pattern of the selection matches nothing.
    """
    selection = selection or Selection()
    modules = {name: m for name, m in model.named_modules() if _is_activation(m)}
    if run is None and (example_args or example_kwargs):

        def run(probe: nn.Module) -> object:
            return probe(*example_args, **example_kwargs)

    if run is None:
        note = "No example input was run: an activation that is called several times a forward is one site."
        found = [_describe(name, module) for name, module in modules.items()]
        return SiteReport(selection.apply(found, model), dynamic=False, note=note)
    calls = _trace_calls(model, list(modules), run)
    found = _sites_of_calls(model, modules, calls)
    return SiteReport(selection.apply(found, model), dynamic=True)


def _describe(name: str, module: nn.Module) -> FoundSite:
    base = as_base(module)
    reason = ""
    if base.traits.affine:
        reason = "affine: nothing to correct"
    elif isinstance(module, torch.jit.ScriptModule):
        reason = "TorchScript: its forward cannot be replaced; pass the Python module instead"
    elif "forward" in vars(module):
        reason = "forward is replaced on the instance, which hides the class's; wrap before replacing it"
    return FoundSite(
        name=name,
        module=name,
        owner=None,
        call=0,
        base=base.name,
        class_name=type(module).__name__,
        shape=None,
        inplace=bool(getattr(module, "inplace", False)),
        role="gate" if base.traits.gate else "hidden",
        wrapped=not reason,
        reason=reason,
    )


def _sites_of_calls(
    model: nn.Module, modules: dict[str, nn.Module], calls: list[_Call]
) -> list[FoundSite]:
    """One site a call; an owner is named only where a module is called more than once.

    Returns:
        The sites in the order of the calls, then the modules that the example never reached.
    """
    aliases = _aliases(model)
    totals: dict[str, int] = {}
    for call in calls:
        totals[call.module] = totals.get(call.module, 0) + 1
    seen: dict[tuple[str, str], int] = {}
    sites: list[FoundSite] = []
    for call in calls:
        site = replace(_describe(call.module, modules[call.module]), shape=call.shape[1:])
        if totals[call.module] > 1:
            k = seen.get((call.module, call.owner), 0)
            seen[call.module, call.owner] = k + 1
            local = _local_name(call.module, call.owner, aliases[call.module])
            site = replace(site, name=f"{local}#{k}", owner=call.owner, call=k)
        sites.append(site)
    for name, module in modules.items():
        if name not in totals:
            site = _describe(name, module)
            sites.append(replace(site, reason=site.reason or "not reached by the example input"))
    return sites


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """All FQNs of each module, by its first one."""
    first = {id(module): name for name, module in model.named_modules()}
    names: dict[str, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(first[id(module)], []).append(name)
    return names


def _local_name(module: str, owner: str, aliases: list[str]) -> str:
    prefix = owner + "." if owner else ""
    inside = [name for name in aliases if name.startswith(prefix)]
    return inside[0] if inside else f"{owner}/{module}"


def _trace_calls(
    model: nn.Module, activations: list[str], run: Callable[[nn.Module], object]
) -> list[_Call]:
    calls: list[_Call] = []
    with _probe(model) as probe:
        names = {id(module): name for name, module in probe.named_modules()}
        watched = set(activations)
        stack = [""]

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            name = names[id(module)]
            values = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            if name in watched and values:
                calls.append(_Call(name, stack[-1], tuple(values[0].shape)))
            stack.append(name)

        def leave(module: nn.Module, args: object, output: object) -> None:
            stack.pop()

        for module in probe.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
                module.register_forward_hook(leave, always_call=True)
        try:
            run(probe)
        except Exception as error:
            raise SiteError(
                f"the example input does not run through {type(model).__name__}: {type(error).__name__}: {error}. "
                "Give an input that the model's forward accepts."
            ) from error
    return calls


@contextmanager
def _probe(model: nn.Module) -> Iterator[nn.Module]:
    """A structural copy of the model, to be run without a trace.

    Parameters are shared (no memory, no gradient), buffers and Python attributes are copied, random states restored.

    Yields:
        The copy.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    for module in model.modules():
        # a LightningModule's trainer holds the whole experiment
        for attribute in ("_trainer", "_fabric"):
            held = vars(module).get(attribute)
            if held is not None:
                memo[id(held)] = held
    try:
        probe = copy.deepcopy(model, memo)
    except Exception as error:
        raise SiteError(
            f"{type(model).__name__} cannot be copied for a dry run ({type(error).__name__}: {error}). "
            "Search without an example input."
        ) from error
    with forked_random_states(), torch.no_grad():
        yield probe


@contextmanager
def forked_random_states() -> Iterator[None]:
    """Restores the global random states of torch (all devices in use), numpy and Python afterwards.

    Yields:
        Nothing.
    """
    numpy_random = sys.modules["numpy"].random if "numpy" in sys.modules else None
    python_state = random.getstate()
    numpy_state = None if numpy_random is None else numpy_random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)


def _is_activation(module: nn.Module) -> bool:
    """By registry, or by behaviour: a leaf module that maps a tensor pointwise and deterministically.

    Returns:
        Whether the module is an activation.
    """
    if isinstance(module, nn.Identity):
        return False
    if isinstance(module, activation_types()):
        return True
    if type(module).__module__.startswith("torch.nn.") or next(module.children(), None) is not None:
        return False
    return _behaves_pointwise(module)


def _behaves_pointwise(module: nn.Module) -> bool:
    """Runs a copy of the module on small tensors: f acts on each element alone, twice the same, and not as identity."""
    values = torch.linspace(-3.0, 3.0, 24, dtype=torch.float32)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    try:
        with forked_random_states(), torch.no_grad():
            probe = copy.deepcopy(module).cpu().float()
            one = probe(values.view(2, 12).clone())
            two = probe(values[order].view(2, 12).clone())
            flat = probe(values.view(1, 2, 3, 4).clone())
    except Exception:  # whatever a foreign module raises on a tensor it was not made for: it is no activation
        return False
    if not isinstance(one, Tensor) or one.shape != (2, 12) or not one.is_floating_point():
        return False
    pointwise = torch.allclose(one.flatten()[order], two.flatten()) and torch.allclose(
        one.flatten(), flat.flatten()
    )
    return pointwise and not torch.equal(one.flatten(), values)
