"""Finds every activation call of a model: a *site* is one call of one activation in one layer.

Two ways to look. *Dynamic*: one forward on an example input, run on a copy of the model without gradient and under a
forked random state, so that nothing of the user's model changes; it sees which module calls which activation or
function, how often and with what shape. *Static*: without an example, from the module tree alone; an activation called
several times in a forward then is one site, and functional calls are not seen, which the report says.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
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
from eafo_dynamic.find.telling import MadeCall, Row, told_apart
from eafo_dynamic.find.trace import SOFT_CAP, Call, Frame, Returned, Trace
from eafo_dynamic.find.unreached import is_named, relatives, taken_over
from eafo_dynamic.find.wrapped import CarriesCorrection, Wrapped, is_activation, plain_view
from eafo_dynamic.find.written import WRITTEN
from eafo_dynamic.internals.torch_internals import tree_map

__all__ = ["FoundSite", "Selection", "SiteReport", "find_sites", "forked_random_states", "matches"]

MAX_CALLS = 64
"""How many turns of a loop get a site of their own; all later turns belong to the last of these sites. A recurrent loop
over a sequence would otherwise have a site for each time step."""

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
    if run is None and (example_args or example_kwargs):
        run = functools.partial(_run, args=example_args, kwargs=example_kwargs)
    note = ""
    if run is None:
        found, note = _static_sites(model)
    else:
        found = _dynamic_sites(model, run)
    marked = selection.apply(found, model)
    if selection.functional == "warn":
        left = [site.name for site in marked if site.parameters is not None and site.role == "hidden"]
        if left:
            note = f"{note} Functional calls left alone: {', '.join(left)}.".strip()
    wrapped = [site for site in marked if site.wrapped]
    changed = {site.module for site in wrapped}
    changed |= {site.owner for site in wrapped if site.owner is not None}
    note = f"{note} {questions_of_type(model, changed)}".strip()
    return SiteReport(marked, dynamic=run is not None, note=note)


def _run(probe: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """Runs a forward on copies of the example's tensors, which the forward may overwrite."""
    copied_args, copied_kwargs = tree_map(_copied, (args, kwargs))
    return probe(*copied_args, **copied_kwargs)


def _copied(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _static_sites(model: nn.Module) -> tuple[list[FoundSite], str]:
    """Sites of the module tree, and a note of what the tree cannot tell."""
    found = [_without_use(_describe(name, module), model) for name, module in _activations(model).items()]
    found += _opaque(model)
    note = "No example input was run: an activation that is called several times a forward is one site."
    callers: list[str] = []
    for name, module in model.named_modules():
        is_of_torch = type(module).__module__.startswith("torch.nn.modules")
        if not is_of_torch and _names_functions(module):
            callers.append(name or "(root)")
    if callers:
        shown = ", ".join(callers[:6])
        if len(callers) > 6:
            shown += f" and {len(callers) - 6} more"
        note += f" Functional calls are not seen; these modules seem to make some: {shown}."
    return found, note


def _without_use(site: FoundSite, model: nn.Module) -> FoundSite:
    """The site with its role where nobody has seen what becomes of its result: hidden only if it is a rectifier."""
    if not is_named(model, site.module, {}):
        return _spare(site, "no code of the model names it")
    if site.role != "hidden" or not site.wrapped:
        return site
    base = as_base(plain_view(model.get_submodule(site.module)))
    if is_rectifier(base):
        return site
    return replace(site, role="unknown", reason=_NOT_SEEN)


def _names_functions(module: nn.Module) -> bool:
    """Whether the code of a module's forward has the name of an activation function in it."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and any(is_function_of_name(name) for name in code.co_names)


def _activations(model: nn.Module, but: Collection[str] = ()) -> dict[str, nn.Module]:
    """Activation modules by FQN, without those named in ``but``; a module inside an activation module is no other."""
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
    """Modules that compute activations where no Python code can be corrected."""
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
            site = FoundSite(
                name=name,
                module=name,
                owner=None,
                call=0,
                base="?",
                class_name=kind,
                shape=None,
                inplace=False,
                role="unknown",
                wrapped=False,
                reason=reason,
            )
            found.append(site)
    return found


def _describe(name: str, module: nn.Module) -> FoundSite:
    is_corrected = is_activation(module)
    module = plain_view(module)
    base_name = type(module).__name__
    role = "hidden"
    refusal = ""
    note = ""
    if isinstance(module, torch.jit.ScriptModule):
        refusal = "TorchScript: its forward cannot be replaced; pass the Python module instead"
    else:
        base = as_base(module)
        base_name = base.name
        if base.traits.gate:
            role = "gate"
        if is_soft_cap(base):
            role = "unknown"
            note = SOFT_CAP
        if is_corrected:
            refusal = "corrected already"
        elif base.traits.affine or is_straight(base):
            refusal = "affine: nothing to correct"
        elif "forward" in vars(module):
            refusal = "forward is replaced on the instance, which hides the class's; wrap before replacing it"
    if ".parametrizations." in f".{name}.":
        role = "gate"
        note = "transforms a parameter"
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
        wrapped=not refusal,
        reason=refusal or note,
    )


def _described_and_traced(model: nn.Module, run: Callable[[nn.Module], object]) -> tuple[dict[str, FoundSite], Trace]:
    """Activation modules by FQN, and all calls of the run.

    An activation that is called with more than one value, ``act(x, inplace=True)``, cannot be corrected as a whole.
    The calls inside it take its place, if there are any.

    Returns:
        A site for each activation module, by its FQN; and the trace.
    """
    described, trace = _traced_with(model, run)
    if not trace.crowded:
        return described, trace
    _, without_crowded = _traced_with(model, run, trace.crowded)
    callers = {call.module for call in without_crowded.calls}
    opened = {name for name in trace.crowded if any(f"{caller}.".startswith(f"{name}.") for caller in callers)}
    if not opened:
        return described, trace
    return _traced_with(model, run, opened)


def _traced_with(
    model: nn.Module, run: Callable[[nn.Module], object], but: Collection[str] = ()
) -> tuple[dict[str, FoundSite], Trace]:
    described = {name: _describe(name, module) for name, module in _activations(model, but).items()}
    functions = {name: site.base for name, site in described.items()}
    return described, trace_calls(model, functions, run)


def _dynamic_sites(model: nn.Module, run: Callable[[nn.Module], object]) -> list[FoundSite]:
    """Sites of the calls of one run in their order, then the modules that the run never reached."""
    described, trace = _described_and_traced(model, run)
    sites = _Naming(model, trace).sites(described)
    reached = [name for name, count in trace.forwards.items() if count]
    sites += taken_over(model, reached, sites)
    like = relatives(model, reached)
    by_name = {site.name: site for site in sites}
    shared = {site.module for site in sites if site.kind == "shared"}
    for name, site in described.items():
        if not trace.forwards[name] and name not in shared:
            sites.append(_unreached(site, model, trace, like, by_name))
        elif name in trace.refused and all(other.module != name for other in sites):
            why = f"the example calls it with what cannot be corrected: {trace.refused[name]}"
            sites.append(replace(site, reason=site.reason or why))
    return [*sites, *_hidden_in_code(trace), *_opaque(model)]


def _unreached(
    site: FoundSite, model: nn.Module, trace: Trace, like: Mapping[str, str], reached: Mapping[str, FoundSite]
) -> FoundSite:
    """Judges a site that the example did not reach by a module of the same structure that it did reach.

    Without such a module its role is unknown, so that it gets no parameter: nobody has seen what it is for, and
    ``DistributedDataParallel`` stops at a parameter that goes unused.

    Returns:
        The site with its role, and the reason.
    """
    if not is_named(model, site.module, trace.forwards):
        return _spare(site, f"{NOT_REACHED}, and no code of the model names it")
    around = next((name for name in like if site.module.startswith(f"{name}.")), None)
    if around is None:
        return replace(site, role="unknown", reason=site.reason or NOT_REACHED)
    role = site.role
    counterpart = reached.get(like[around] + site.name[len(around) :])
    if counterpart is not None:
        role = counterpart.role
    reason = site.reason or f"{NOT_REACHED}; as in {like[around]}"
    return replace(site, role=role, reason=reason)


def _spare(site: FoundSite, reason: str) -> FoundSite:
    """The site marked as left alone; a reason that it has already stays."""
    return replace(site, wrapped=False, reason=site.reason or reason)


def _hidden_in_code(trace: Trace) -> list[FoundSite]:
    """Activations beneath all Python functions, in scripted or C++ code, and those with a weight for each channel."""
    kernel = "computed by scripted or C++ code, or by torch.ops, which cannot be corrected; call a function of torch"
    branch = "what its branches compute cannot be corrected; branch in Python instead"
    channel = "written out with a weight for each channel, so that no correction fits all of them"
    found: list[FoundSite] = []
    for (module, name), shape in trace.opaque.items():
        reason = kernel if shape else branch
        found.append(_out_of_reach(module, name, shape[1:], reason))
    for module, shape in trace.by_channel.items():
        found.append(_out_of_reach(module, "by_channel", shape[1:], channel))
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
    """Turns calls into sites: finds the module that can tell the calls apart, tells them apart and names them.

    Args:
        model: the model.
        trace: all calls of the run.
    """

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.model = model
        self.trace = trace
        self.children = names_of_children(model)
        self.attributes = Attributes(model)
        self._parents: dict[int, set[str]] = {}
        self.aliases: dict[str, list[str]] = {}
        first = {id(module): name for name, module in model.named_modules()}
        for name, module in model.named_modules(remove_duplicate=False):
            self.aliases.setdefault(first[id(module)], []).append(name)

    def sites(self, described: dict[str, FoundSite]) -> list[FoundSite]:
        """The sites of all calls, in the order of the calls.

        Args:
            described: the activation modules, by FQN.

        Returns:
            The sites.
        """
        made = [self._made(call, described) for call in self.trace.calls]
        distinct = _distinct(made, told_apart(made, self.children))
        outside = {each.site.module for each in made if each.frame.instance == 0 and each.site.parameters is None}
        certain = {each.site.module for each in made if self._is_certain(each)}
        calls_of_module = Counter(site.module for site in distinct if site.parameters is None)
        calls_of_owner = Counter((site.owner, site.key) for site in distinct)
        seen: Counter[tuple[str | None, str]] = Counter()
        sites: dict[tuple[str | None, str, int], FoundSite] = {}
        for site in distinct:
            number = seen[site.owner, site.key]
            seen[site.owner, site.key] += 1
            is_module = site.parameters is None
            is_single = calls_of_module[site.module] == 1
            is_certain = is_single and site.module in certain
            if is_module and (is_certain or site.module in outside):
                # nobody need tell the call from others
                site = replace(site, owner=None, places=(), after=(), turn=0, through=(), beside=())
            elif is_module and is_single:
                site = replace(site, owner=None, caller=site.owner)
            else:
                site = replace(site, call=number, calls=calls_of_owner[site.owner, site.key])
                if is_module:
                    site = replace(site, name=self._local(site.module, site.owner or ""), kind="shared")
            sites[site.owner, site.key, site.call] = site  # all calls of a module outside any forward are one site
        return _numbered(list(sites.values()))

    def _made(self, call: Call, described: dict[str, FoundSite]) -> MadeCall:
        """A call, with the forward that can tell it from others and the modules that take part in that."""
        site = described[call.module] if call.function is None else self._function_site(call)
        frame = self._owner(call)
        at = call.path.index(frame)
        through = tuple(dict.fromkeys(inner.module for inner in call.path[at + 1 :]))
        site = replace(
            site,
            owner=frame.module,
            shape=call.shape[1:],
            channel_dim=call.channel_dim,
            through=through,
            beside=self._beside(call, at, {frame.module, *through}),
        )
        is_function = site.parameters is not None
        if is_function and frame.instance == 0:
            site = replace(site, wrapped=False, reason=_OUTSIDE)
        if not is_function and site.role == "hidden" and call.role != "hidden":
            site = replace(site, role=call.role, reason=site.reason or call.reason)
        return MadeCall(site, frame, at, call)

    def _beside(self, call: Call, at: int, forwards: Collection[str]) -> tuple[str, ...]:
        """Modules without a forward around the call whose children return there, as where their methods are called."""
        parents: set[str] = set()
        for returned, _ in call.returned[at:]:
            parents |= self._parents_of(returned)
        return tuple(sorted(parents.difference(forwards)))

    def _parents_of(self, returned: list[Returned]) -> set[str]:
        """The modules around the children that have returned in one forward, which its calls share."""
        found = self._parents.get(id(returned))
        if found is None:
            found = {parent_of(child.name, self.model) for child in returned if child.name in self.children}
            self._parents[id(returned)] = found
        return found

    def _is_certain(self, made: MadeCall) -> bool:
        """Whether the code of the model has no call of this activation module but this."""
        call = made.call
        if call.function is not None or not call.path[-1].is_forward:
            return False
        readers = sum(self._readers(name) for name in self.aliases[call.module])
        if readers != 1:
            return False
        parent, _, _ = call.module.rpartition(".")
        is_indexed = isinstance(self.model.get_submodule(parent), (nn.ModuleList, nn.ModuleDict))
        places = call.pieces[0].places
        return is_indexed or not places or not is_repeated(places)

    def _readers(self, name: str) -> int:
        """How many places in the code call a module by one of its names."""
        parent, _, attribute = name.rpartition(".")
        around = self.model.get_submodule(parent)
        while parent and isinstance(around, (nn.ModuleList, nn.ModuleDict)):
            parent, _, container = parent.rpartition(".")
            attribute = f"{container}.{attribute}"
            around = self.model.get_submodule(parent)
        return self.attributes.reads(around, attribute)

    def _function_site(self, call: Call) -> FoundSite:
        assert call.function is not None
        base = function_base(call.function, call.parameters)
        kind = "function"
        label = call.function
        if call.function == WRITTEN:
            kind = "written"
            label = base.name
        caller = self.model.get_submodule(call.module)
        refusal = ""
        if "forward" in vars(caller):
            refusal = "forward of the calling module is replaced on the instance; wrap before replacing it"
        elif isinstance(caller, Wrapped) and call.function in caller.eafo_functions:
            refusal = "corrected already"
        elif call.refusal:
            refusal = call.refusal
        elif call.role == "part":
            refusal = call.reason
        elif base.traits.affine:
            refusal = "affine: nothing to correct"
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
            reason=refusal or call.reason,
            kind=kind,
            parameters=call.parameters,
            guarded=self._guarded(call.module),
            hidden_from_compiler=call.hidden_from_compiler,
        )

    def _guarded(self, caller: str) -> tuple[str, ...]:
        """Modules that a module's own code may call, and that may call functions themselves."""
        module = self.model.get_submodule(caller)
        prefix = f"{caller}." if caller else ""
        called = list(self.trace.callees.get(caller, {}))
        children = [prefix + name for name, _ in module.named_children()]
        descendants = [prefix + name for name, _ in module.named_modules() if name]
        unreached = [name for name in descendants if not self.trace.forwards[name]]
        names = dict.fromkeys([*called, *children, *unreached])  # without repetitions, in this order
        return tuple(name for name in names if name != caller and may_call_functions(self.model.get_submodule(name)))

    def _owner(self, call: Call) -> Frame:
        """The innermost forward around the call whose module runs once, so that it can count all calls.

        Where even the outermost forward runs more than once (a whole model, twice in a training step), each of its
        forwards counts anew, so that both use the same sites.

        Returns:
            That forward.
        """
        path = call.path
        at = len(path) - 1
        while path[at].is_forward:
            module = path[at].module
            # of a module that runs inside itself, the outermost forward
            at = next(i for i, frame in enumerate(path) if frame.is_forward and frame.module == module)
            runs_once = self.trace.forwards[module] == 1
            is_outermost = at == 0 or not path[at - 1].is_forward
            if runs_once or is_outermost:
                break
            at -= 1
        return path[at]

    def _local(self, module: str, owner: str) -> str:
        """The name of a shared module inside its owner; with the owner before a slash where it has no name there."""
        prefix = f"{owner}." if owner else ""
        for name in self.aliases[module]:
            if name.startswith(prefix):
                return name
        return f"{owner}/{module}"


def _distinct(made: Sequence[MadeCall], rows: Sequence[Row]) -> list[FoundSite]:
    """A site for each call that can be told from the others: by the evidence of its row, and by its turn within it."""
    turns: Counter[tuple[Frame, str, int]] = Counter()
    distinct: dict[tuple[str, str, int, int], FoundSite] = {}
    for each, row in zip(made, rows, strict=True):
        frame = each.frame
        key = each.site.key
        turn = turns[frame, key, row.number]
        turns[frame, key, row.number] += 1
        if turn < MAX_CALLS:
            site = replace(each.site, places=row.evidence.places, after=row.evidence.after, turn=turn)
            distinct.setdefault((frame.module, key, row.number, turn), site)
    return list(distinct.values())


def _numbered(sites: list[FoundSite]) -> list[FoundSite]:
    """Gives every site a name of its own: ``#k`` for the k-th of those with the same name."""
    sites_named = Counter(site.name for site in sites)
    seen: Counter[str] = Counter()
    numbered: list[FoundSite] = []
    for site in sites:
        k = seen[site.name]
        seen[site.name] += 1
        if site.kind == "shared" or sites_named[site.name] > 1:
            site = replace(site, name=f"{site.name}#{k}")
        numbered.append(site)
    return numbered
