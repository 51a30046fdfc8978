"""Finds every activation call of a model: a *site* is one call of one activation in one layer.

Two ways to look. *Dynamic*: one forward on an example input, run on a copy of the model without gradient and under a
forked random state, so that nothing of the user's model changes; it sees which module calls which activation or
function, how often and with what shape. *Static*: without an example, from the module tree alone; an activation called
several times in a forward then is one site, and functional calls are not seen, which the report says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from eafo_dynamic.correction.bases import as_base
from eafo_dynamic.find.attributes import Attributes
from eafo_dynamic.find.behaviour import is_soft_cap, is_straight, looks_like_activation, may_call_functions
from eafo_dynamic.find.by_type import questions_of_type
from eafo_dynamic.find.children import names_of_children, parent_of
from eafo_dynamic.find.dryrun import trace_calls
from eafo_dynamic.find.functional import function_base, is_function_of_name
from eafo_dynamic.find.places import is_repeated
from eafo_dynamic.find.probe import forked_random_states
from eafo_dynamic.find.roles import is_rectifier
from eafo_dynamic.find.selection import FoundSite, Selection, SiteReport, matches
from eafo_dynamic.find.telling import MadeCall, told_apart
from eafo_dynamic.find.trace import SOFT_CAP, Call, Frame, Trace
from eafo_dynamic.find.unreached import is_named, relatives, taken_over
from eafo_dynamic.find.wrapped import CarriesCorrection, Wrapped, is_activation, plain_view
from eafo_dynamic.find.written import WRITTEN
from eafo_dynamic.internals.torch_internals import tree_map

__all__ = ["FoundSite", "Selection", "SiteReport", "find_sites", "forked_random_states", "matches"]

MAX_CALLS = 64
"""Turns of one loop that get a site of their own; all later ones belong to the last of them. A recurrent loop over a
sequence would otherwise have a site for each time step."""

_OUTSIDE = "called outside any forward, where its calls cannot be told apart; call it from a forward"
NOT_REACHED = "not reached by the example input"
"""How the reason begins for which an activation is left alone that the example does not call."""

_NOT_SEEN = "without an example it is not seen whether this is a hidden activation or an output"
_OPAQUE = (nn.RNNBase, nn.RNNCellBase)


def find_sites(
    model: nn.Module,
    *example_args: Any,
    selection: Selection | None = None,
    run: Callable[[nn.Module], object] | None = None,
    **example_kwargs: Any,
) -> SiteReport:
    """Finds every activation call of a model without changing anything of it.

    Args:
        model: any module; activations that are wrapped already are listed as such.
        *example_args: example input; with any example the search is dynamic.
        selection: which sites to wrap; default every hidden activation.
        run: called with the copy in place of ``copy(*example_args, **example_kwargs)``.
        **example_kwargs: example input.

    Returns:
        The report; print it to read it.

    Raises:
        SiteError: if the example's forward fails, or the model cannot be copied for it.
        PatternError: if a pattern of the selection matches nothing.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1), nn.Sigmoid())
        >>> [(site.name, site.base) for site in find_sites(net, torch.zeros(3, 2)).wrapped]
        [('1', 'relu')]
    """
    selection = selection or Selection()
    if run is None and not example_args and not example_kwargs:
        found, note = _static_sites(model)
    else:
        found, note = _dynamic_sites(model, run or (lambda probe: _run(probe, example_args, example_kwargs)))
    marked = selection.apply(found, model)
    if selection.functional == "warn":
        left = [site.name for site in marked if site.parameters is not None and site.role == "hidden"]
        if left:
            note = f"{note} Functional calls left alone: {', '.join(left)}.".strip()
    changed = {name for site in marked if site.wrapped for name in (site.module, site.owner) if name is not None}
    note = f"{note} {questions_of_type(model, changed)}".strip()
    return SiteReport(marked, dynamic=run is not None or bool(example_args or example_kwargs), note=note)


def _run(probe: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """A forward on copies of the example's tensors, which the forward may overwrite."""
    copied_args, copied_kwargs = tree_map(_copied, (args, kwargs))
    return probe(*copied_args, **copied_kwargs)


def _copied(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _static_sites(model: nn.Module) -> tuple[list[FoundSite], str]:
    """Sites of the module tree, and what it cannot tell."""
    found = [
        *(_without_use(_describe(name, each), model) for name, each in _activations(model).items()),
        *_opaque(model),
    ]
    note = "No example input was run: an activation that is called several times a forward is one site."
    callers = [
        name or "(root)"
        for name, module in model.named_modules()
        if not type(module).__module__.startswith("torch.nn.modules") and _names_functions(module)
    ]
    if callers:
        shown = ", ".join(callers[:6]) + (f" and {len(callers) - 6} more" if len(callers) > 6 else "")
        note += f" Functional calls are not seen; these modules seem to make some: {shown}."
    return found, note


def _without_use(site: FoundSite, model: nn.Module) -> FoundSite:
    """A site of which nobody has seen what becomes of its result: hidden only if it is a rectifier."""
    if not is_named(model, site.module, {}):
        return _spare(site, "no code of the model names it")
    if site.role != "hidden" or not site.wrapped or is_rectifier(as_base(plain_view(model.get_submodule(site.module)))):
        return site
    return replace(site, role="unknown", reason=_NOT_SEEN)


def _names_functions(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and any(is_function_of_name(name) for name in code.co_names)


def _activations(model: nn.Module, but: Collection[str] = ()) -> dict[str, nn.Module]:
    """Activation modules by FQN, but for some; what lies inside one of them is not another."""
    found: dict[str, nn.Module] = {}
    inside = ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, CarriesCorrection):
            inside = name + "."
        elif name and name not in but and looks_like_activation(module):
            found[name] = module
            inside = name + "."
    return found


def _opaque(model: nn.Module) -> list[FoundSite]:
    """Modules that compute activations where no Python code could be asked."""
    found: list[FoundSite] = []
    for name, module in model.named_modules():
        reason = ""
        if isinstance(module, _OPAQUE):
            reason = "computed inside a fused kernel, between the gates of a recurrent cell"
        elif isinstance(module, torch.jit.ScriptModule) and not looks_like_activation(module):
            reason = "TorchScript: its forward cannot be replaced; pass the Python module instead"
        elif isinstance(module, CarriesCorrection):
            reason = "corrected already, by its own class"
        if reason:
            kind = type(module).__name__
            if isinstance(module, torch.jit.ScriptModule):
                kind = str(getattr(module, "original_name", kind))
            found.append(FoundSite(name, name, None, 0, "?", kind, None, False, "unknown", False, reason))
    return found


def _describe(name: str, module: nn.Module) -> FoundSite:
    corrected = is_activation(module)
    module = plain_view(module)
    reason, note, base_name, role = "", "", type(module).__name__, "hidden"
    if isinstance(module, torch.jit.ScriptModule):
        reason = "TorchScript: its forward cannot be replaced; pass the Python module instead"
    else:
        base = as_base(module)
        base_name, role = base.name, "gate" if base.traits.gate else role
        if is_soft_cap(base):
            role, note = "unknown", SOFT_CAP
        if corrected:
            reason = "corrected already"
        elif base.traits.affine or is_straight(base):
            reason = "affine: nothing to correct"
        elif "forward" in vars(module):
            reason = "forward is replaced on the instance, which hides the class's; wrap before replacing it"
    if ".parametrizations." in f".{name}.":
        role, note = "gate", "transforms a parameter"
    return FoundSite(
        name=name,
        module=name,
        owner=None,
        call=0,
        base=base_name,
        class_name=type(module).__name__,
        shape=None,
        inplace=bool(getattr(module, "inplace", False)),
        role=role,
        wrapped=not reason,
        reason=reason or note,
    )


def _described_and_traced(model: nn.Module, run: Callable[[nn.Module], object]) -> tuple[dict[str, FoundSite], Trace]:
    """Activation modules by FQN, and all calls of one run.

    An activation that is called with more than one value, ``act(x, inplace=True)``, cannot be corrected as a whole: it
    gives way to the calls inside it, where there are any.

    Returns:
        The two.
    """
    described, trace = _traced_with(model, run)
    if trace.crowded:
        inside = _traced_with(model, run, trace.crowded)[1].calls
        opened = {name for name in trace.crowded if any(f"{call.module}.".startswith(f"{name}.") for call in inside)}
        described, trace = _traced_with(model, run, opened) if opened else (described, trace)
    return described, trace


def _traced_with(
    model: nn.Module, run: Callable[[nn.Module], object], but: Collection[str] = ()
) -> tuple[dict[str, FoundSite], Trace]:
    described = {name: _describe(name, module) for name, module in _activations(model, but).items()}
    return described, trace_calls(model, {name: site.base for name, site in described.items()}, run)


def _dynamic_sites(model: nn.Module, run: Callable[[nn.Module], object]) -> tuple[list[FoundSite], str]:
    """Sites of the calls of one run in their order, then the modules that the run never reached."""
    described, trace = _described_and_traced(model, run)
    sites = _Naming(model, trace).sites(described)
    reached = [name for name, count in trace.forwards.items() if count]
    sites += taken_over(model, reached, sites)
    like = relatives(model, reached)
    of_module = {site.name: site for site in sites}
    shared = {site.module for site in sites if site.kind == "shared"}
    for name, site in described.items():
        if not trace.forwards[name] and name not in shared:
            sites.append(_unreached(site, model, trace, like, of_module))
        elif name in trace.refused and all(each.module != name for each in sites):
            why = f"the example calls it with what cannot be corrected: {trace.refused[name]}"
            sites.append(replace(site, reason=site.reason or why))
    return [*sites, *_hidden_in_code(trace), *_opaque(model)], ""


def _unreached(
    site: FoundSite, model: nn.Module, trace: Trace, like: Mapping[str, str], reached: Mapping[str, FoundSite]
) -> FoundSite:
    """A site that the example did not reach: no parameter for it, but where a module of the same structure was reached.

    Nobody has seen what it is for, and ``DistributedDataParallel`` stops at a parameter that goes unused.

    Returns:
        The site with its role, and the reason.
    """
    if not is_named(model, site.module, trace.forwards):
        return _spare(site, f"{NOT_REACHED}, and no code of the model names it")
    around = next((name for name in like if site.module.startswith(f"{name}.")), None)
    if around is None:
        return replace(site, role="unknown", reason=site.reason or NOT_REACHED)
    other = reached.get(like[around] + site.name[len(around) :])
    reason = site.reason or f"{NOT_REACHED}; as in {like[around]}"
    return replace(site, role=site.role if other is None else other.role, reason=reason)


def _spare(site: FoundSite, reason: str) -> FoundSite:
    return replace(site, wrapped=False, reason=site.reason or reason)


def _hidden_in_code(trace: Trace) -> list[FoundSite]:
    """Activations that ran beneath all Python functions, in scripted or C++ code, and those of each channel its own."""
    kernel = "computed by scripted or C++ code, or by torch.ops, which cannot be corrected; call a function of torch"
    branch = "what its branches compute cannot be corrected; branch in Python instead"
    channel = "written out with a weight for each channel, so that no correction fits all of them"
    found = [
        _out_of_reach(module, name, shape[1:], kernel if shape else branch)
        for (module, name), shape in trace.opaque.items()
    ]
    found += [_out_of_reach(module, "by_channel", shape[1:], channel) for module, shape in trace.by_channel.items()]
    return found


def _out_of_reach(module: str, name: str, shape: tuple[int, ...], reason: str) -> FoundSite:
    return FoundSite(
        name=f"{module}:{name}",
        module=module,
        owner=None,
        call=0,
        base=name,
        class_name=name,
        shape=shape,
        inplace=False,
        role="unknown",
        wrapped=False,
        reason=reason,
        kind="opaque",
    )


class _Naming:
    """Turns calls into sites: finds the module that can tell the calls apart, tells them apart, gives names.

    Args:
        model: the model.
        trace: all calls of the run.
    """

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.model = model
        self.trace = trace
        self.children = names_of_children(model)
        self.attributes = Attributes(model)
        self.aliases: dict[str, list[str]] = {}
        first = {id(module): name for name, module in model.named_modules()}
        for name, module in model.named_modules(remove_duplicate=False):
            self.aliases.setdefault(first[id(module)], []).append(name)

    def sites(self, described: dict[str, FoundSite]) -> list[FoundSite]:
        """One site a call, in the order of the calls.

        Args:
            described: the activation modules, by FQN.

        Returns:
            The sites.
        """
        made = [self._made(call, described) for call in self.trace.calls]
        rows = told_apart(made, self.children)
        outside = {each.site.module for each in made if each.frame.instance == 0 and each.site.parameters is None}
        certain = outside | {each.site.module for each in made if self._is_certain(each)}
        turns: Counter[tuple[Frame, str, int]] = Counter()
        distinct: dict[tuple[str, str, int, int], FoundSite] = {}
        for each, row in zip(made, rows, strict=True):
            site, frame = each.site, each.frame
            turn = turns[frame, site.key, row.number]
            turns[frame, site.key, row.number] += 1
            if turn < MAX_CALLS:
                site = replace(site, places=row.evidence.places, after=row.evidence.after, turn=turn)
                distinct.setdefault((frame.module, site.key, row.number, turn), site)
        # a module that is called once in each forward needs nobody to tell its calls apart
        owners = Counter(site.module for site in distinct.values() if site.parameters is None)
        calls = Counter((site.owner, site.key) for site in distinct.values())
        seen: Counter[tuple[str | None, str]] = Counter()
        sites: list[FoundSite] = []
        for site in distinct.values():
            number = seen[site.owner, site.key]
            seen[site.owner, site.key] += 1
            if site.parameters is None and (owners[site.module] == 1 or site.module in outside):
                caller = None if site.module in certain else site.owner
                site = replace(site, owner=None, caller=caller)
                if caller is None:
                    site = replace(site, places=(), after=(), turn=0, through=(), beside=())
            else:
                site = replace(site, call=number, calls=calls[site.owner, site.key])
                if site.parameters is None:
                    site = replace(site, name=self._local(site.module, site.owner or ""), kind="shared")
            sites.append(site)
        once = {(site.owner, site.key, site.call): site for site in sites}
        return _numbered(list(once.values()))

    def _made(self, call: Call, described: dict[str, FoundSite]) -> MadeCall:
        """A call with the forward that can tell it from others, and how it can be told."""
        frame = self._owner(call)
        site = self._function_site(call) if call.function is not None else described[call.module]
        at = call.path.index(frame)
        through = tuple(dict.fromkeys(each.module for each in call.path[at + 1 :]))
        within = {child.name for children, _ in call.returned[at:] for child in children if child.name in self.children}
        parents = {parent_of(name, self.model) for name in within}
        size, dim = call.shape[1:], call.channel_dim
        site = replace(site, owner=frame.module, shape=size, channel_dim=dim, through=through)
        site = replace(site, beside=tuple(sorted(parents - {frame.module, *through})))
        if frame.instance == 0 and site.parameters is not None:
            site = replace(site, wrapped=False, reason=_OUTSIDE)
        if site.parameters is None and site.role == "hidden" != call.role:
            site = replace(site, role=call.role, reason=site.reason or call.reason)
        return MadeCall(site, frame, at, call)

    def _is_certain(self, made: MadeCall) -> bool:
        """Whether the code of the model has no other call of an activation that is called once."""
        call = made.call
        if call.function is not None or not call.path[-1].is_forward:
            return False
        readers = [self._readers(name) for name in self.aliases[call.module]]
        places = call.pieces[0].places
        around = self.model.get_submodule(call.module.rpartition(".")[0])
        is_indexed = isinstance(around, (nn.ModuleList, nn.ModuleDict))
        return sum(readers) == 1 and (is_indexed or not places or not is_repeated(places))

    def _readers(self, name: str) -> int:
        """How many places in the code call a module by one of its names."""
        parent, attribute = name.rpartition(".")[::2]
        around = self.model.get_submodule(parent)
        while parent and isinstance(around, (nn.ModuleList, nn.ModuleDict)):
            parent, container = parent.rpartition(".")[::2]
            attribute = f"{container}.{attribute}"
            around = self.model.get_submodule(parent)
        return self.attributes.reads(around, attribute)

    def _function_site(self, call: Call) -> FoundSite:
        assert call.function is not None
        base = function_base(call.function, call.parameters)
        label = base.name if call.function == WRITTEN else call.function
        reason = call.reason
        affine = base.traits.affine
        caller = self.model.get_submodule(call.module)
        refusal = "affine: nothing to correct" if affine else ""
        if "forward" in vars(caller):
            refusal = "forward of the calling module is replaced on the instance; wrap before replacing it"
        elif isinstance(caller, Wrapped) and call.function in caller.eafo_functions:
            refusal = "corrected already"
        elif call.role == "part" or call.refusal:
            refusal = call.refusal or reason
        return FoundSite(
            name=f"{call.module}:{label}",
            module=call.module,
            owner=None,
            call=0,
            base=base.name,
            class_name=label,
            shape=call.shape[1:],
            inplace=call.inplace,
            role=call.role,
            wrapped=not refusal,
            reason=refusal or reason,
            kind="written" if call.function == WRITTEN else "function",
            parameters=call.parameters,
            guarded=self._guarded(call.module),
            hidden_from_compiler=call.hidden_from_compiler,
        )

    def _guarded(self, caller: str) -> tuple[str, ...]:
        """Modules called by a module's own code that may call functions themselves."""
        module = self.model.get_submodule(caller)
        names = dict.fromkeys(self.trace.callees.get(caller, {}))
        prefix = f"{caller}." if caller else ""
        names |= dict.fromkeys(prefix + name for name, _ in module.named_children())
        inside = (prefix + name for name, _ in module.named_modules() if name)
        names |= dict.fromkeys(name for name in inside if not self.trace.forwards[name])
        return tuple(name for name in names if name != caller and may_call_functions(self.model.get_submodule(name)))

    def _owner(self, call: Call) -> Frame:
        """The innermost forward around the call whose module runs once, so that it can count all calls.

        Where even the outermost forward runs more than once (a whole model, twice in a training step), each of its
        forwards counts anew, so that both use the same sites.

        Returns:
            That forward.
        """
        path = call.path
        place = len(path) - 1
        while path[place].is_forward:
            module = path[place].module
            place = next(i for i, frame in enumerate(path) if frame.is_forward and frame.module == module)
            if self.trace.forwards[module] == 1 or place == 0 or not path[place - 1].is_forward:
                break
            place -= 1
        return path[place]

    def _local(self, module: str, owner: str) -> str:
        prefix = owner + "." if owner else ""
        inside = [name for name in self.aliases[module] if name.startswith(prefix)]
        return inside[0] if inside else f"{owner}/{module}"


def _numbered(sites: list[FoundSite]) -> list[FoundSite]:
    """Gives every site a name of its own: ``#k`` for the k-th of those with the same name."""
    several = Counter(site.name for site in sites)
    seen: Counter[str] = Counter()
    named: list[FoundSite] = []
    for site in sites:
        k = seen[site.name]
        seen[site.name] += 1
        numbered = site.kind == "shared" or several[site.name] > 1
        named.append(replace(site, name=f"{site.name}#{k}") if numbered else site)
    return named
