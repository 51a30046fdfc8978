"""Scores a search: how many hidden activation calls a site covers, alone, and what it covers wrongly."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from eafo_dynamic.apply.surgery import unwrap, wrap
from eafo_dynamic.find.sites import SiteReport, find_sites, forked_random_states
from tests.zoo.truth import Event, witness

Run = Callable[[nn.Module], object]


@dataclass
class Score:
    """Counts of one model, by kind of call (module, shared, functional, written)."""

    name: str = ""
    hidden: Counter[str] = field(default_factory=Counter)
    covered: Counter[str] = field(default_factory=Counter)
    own: Counter[str] = field(default_factory=Counter)
    gates: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    report: SiteReport | None = None
    false_positives: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def score_coverage(name: str, model: nn.Module, run: Run) -> Score:
    """Wraps a copy of a model and asks the witness."""
    score = Score(name)
    model = copy.deepcopy(model).eval()
    with torch.no_grad(), forked_random_states():
        truth = witness(model, run)
    if not any(event.hidden for event in truth):
        return score
    before = _state(model)
    with forked_random_states() as _:
        report = find_sites(model, run=run)
    if not _same(before, _state(model)):
        score.problems.append("the dry run changed the model")
    score.report = report
    if not report.wrapped:
        seen: list[Event] = truth
    else:
        wrap(model, report, eps_init=1e-30)  # acts, and changes nothing
        with torch.no_grad(), forked_random_states():
            seen = witness(model, run)
    if [e.op for e in seen] != [e.op for e in truth]:
        score.problems.append("other kernels run in the wrapped model")
        return score
    uses = Counter(site for event in seen for site in set(event.sites))
    used_well = set()
    for fact, event in zip(truth, seen, strict=True):
        if fact.hidden:
            score.hidden[fact.kind] += 1
            if event.sites:
                score.covered[fact.kind] += 1
                used_well.update(event.sites)
                score.own[fact.kind] += uses[event.sites[-1]] == 1
            else:
                score.missed.append(f"{fact.kind} {fact.op} in {fact.module} {fact.why}")
        else:
            score.gates[fact.kind] += 1
    for fact, event in zip(truth, seen, strict=True):
        if not fact.hidden and event.sites and not set(event.sites) & used_well:
            score.wrong[fact.kind] += 1
            score.false_positives.append(f"{fact.op} in {fact.module} ({fact.why or 'gate'}) by {event.sites}")
    unwrap(model)
    return score


def bit_differences(model: nn.Module, run: Run, train: bool, report: SiteReport | None = None) -> list[str]:
    """What differs between a plain model and a copy wrapped at eps = 0: outputs, gradients, buffers."""
    plain, wrapped = copy.deepcopy(model).train(train), copy.deepcopy(model).train(train)
    report = report or find_sites(wrapped, run=run)
    if not report.wrapped:
        return []
    keys = list(wrapped.state_dict())
    wrap(wrapped, report, eps_init=0.0)
    differences = []
    if [k for k in wrapped.state_dict() if "eafo_" not in k] != keys:
        differences.append("keys of the state_dict")
    one, two = _outputs_and_gradients(plain, run), _outputs_and_gradients(wrapped, run)
    differences += [k for k in one if k not in two or not _equal(one[k], two[k])]
    with torch.no_grad():
        one, two = _outputs(plain, run), _outputs(wrapped, run)
    differences += [f"no_grad {k}" for k in one if k not in two or not _equal(one[k], two[k])]
    wrapped.load_state_dict(plain.state_dict())
    unwrap(wrapped)
    plain.load_state_dict(wrapped.state_dict())
    if [type(m) for m in plain.modules()] != [type(m) for m in wrapped.modules()]:
        differences.append("classes after unwrap")
    return differences


def _outputs(model: nn.Module, run: Run) -> dict[str, Tensor]:
    torch.manual_seed(3)
    numpy.random.seed(3)
    return {f"output {i}": t for i, t in enumerate(tree_leaves(run(model))) if isinstance(t, Tensor)}


def _outputs_and_gradients(model: nn.Module, run: Run) -> dict[str, Tensor]:
    found = _outputs(model, run)
    floats = [t for t in found.values() if t.is_floating_point() and t.requires_grad]
    if floats:
        generator = torch.Generator().manual_seed(5)
        loss = sum((t * torch.randn(t.shape, generator=generator)).sum() for t in floats)
        assert isinstance(loss, Tensor)
        if loss.isfinite():
            loss.backward()
    for name, parameter in model.named_parameters():
        if "eafo_" not in name and parameter.grad is not None:
            found[f"grad {name}"] = parameter.grad
    for name, buffer in model.named_buffers():
        if "eafo_" not in name:
            found[f"buffer {name}"] = buffer.clone()
    return {k: v.detach() for k, v in found.items()}


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = a.contiguous(), b.contiguous()
    nan = a.isnan()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    same = a.view(bits) == b.view(bits)
    return bool((same | (nan & b.isnan())).all())


def _state(model: nn.Module) -> tuple[dict[str, Tensor], Tensor, list[bool]]:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, torch.get_rng_state(), [m.training for m in model.modules()]


def _same(one: tuple[dict[str, Tensor], Tensor, list[bool]], two: tuple[dict[str, Tensor], Tensor, list[bool]]) -> bool:
    return (
        one[0].keys() == two[0].keys()
        and all(_equal(v, two[0][k]) for k, v in one[0].items())
        and torch.equal(one[1], two[1])
        and one[2] == two[2]
    )


def summary(scores: Iterable[Score]) -> str:
    """Coverage by kind, as printed by the zoo test: false positives in per cent of what is no hidden activation."""
    scores = list(scores)
    lines = [f"{'kind':<12}{'calls':>7}{'covered %':>11}{'own site %':>12}{'others':>8}{'false pos. %':>14}"]
    hidden = sum((s.hidden for s in scores), Counter[str]())
    covered = sum((s.covered for s in scores), Counter[str]())
    own = sum((s.own for s in scores), Counter[str]())
    gates = sum((s.gates for s in scores), Counter[str]())
    wrong = sum((s.wrong for s in scores), Counter[str]())
    for kind in (*sorted({*hidden, *gates}), "all"):
        parts = (sum(x.values()) if kind == "all" else x[kind] for x in (hidden, covered, own, gates, wrong))
        n, c, o, g, w = parts
        shares = f"{100 * c / max(n, 1):>11.2f}{100 * o / max(n, 1):>12.2f}{g:>8}{100 * w / max(g, 1):>14.2f}"
        lines.append(f"{kind:<12}{n:>7}{shares}")
    lines.append(f"{len(scores)} models; others: gates, transforms of parameters and other calls that are left alone")
    return "\n".join(lines)
