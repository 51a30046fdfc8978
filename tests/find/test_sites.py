"""Finding sites: names, roles, reasons, patterns, and a dry run that leaves no trace."""

from __future__ import annotations

import copy
import random
import threading
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eafo_dynamic.apply.standalone import CRReLU
from eafo_dynamic.apply.surgery import hosted_sites, wrap
from eafo_dynamic.correction.bases import register_activation
from eafo_dynamic.errors import ConfigError, PatternError, SiteError
from eafo_dynamic.find.sites import MAX_CALLS, FoundSite, Selection, SiteReport, find_sites
from tests.zoo.awkward import Layers, make_awkward


def found(name: str, **selection: Any) -> SiteReport:
    model, run = make_awkward(name)
    return find_sites(model, run=run, selection=Selection(**selection))


def names(sites: list[FoundSite]) -> list[str]:
    return [site.name for site in sites]


class TestReport:
    def test_names_kinds_owners_and_shapes(self) -> None:
        report = found("MixedCalls")
        table = [(s.name, s.kind, s.owner, s.call, s.base, s.role) for s in report.sites]
        assert table == [
            (":relu#0", "function", "", 0, "relu", "hidden"),
            ("act#0", "shared", "", 0, "relu", "hidden"),
            ("sequence.1", "module", None, 0, "relu", "hidden"),
            ("sequence.2", "module", None, 0, "sigmoid", "gate"),
            ("inner.block:relu#0", "function", "inner", 0, "relu", "hidden"),
            ("inner.block:relu#1", "function", "inner", 1, "relu", "hidden"),
            ("inner.block:relu#2", "function", "inner", 2, "relu", "hidden"),
            ("act#1", "shared", "", 1, "relu", "hidden"),
            (":relu#1", "function", "", 1, "relu", "hidden"),
            (":tanh", "function", "", 0, "tanh", "hidden"),
        ]
        assert {site.shape for site in report.sites} == {(8,)}
        assert report.dynamic
        assert [site.name for site in report.skipped] == ["sequence.2"]

    def test_every_site_left_alone_says_why(self) -> None:
        reasons = {site.name: (site.role, site.reason) for site in found("Gates").skipped}
        assert reasons[":softplus"] == ("gate", "transforms a parameter; name it in target_modules to wrap it")
        assert "gate" in reasons[":sigmoid#0"][1]
        assert [why for role, why in reasons.values() if role == "unknown"] == [
            "a soft cap, not a hidden activation; name it in target_modules to wrap it"
        ]
        assert any("gated cell" in why for _, why in reasons.values())

    def test_written_out_activations_get_the_base_they_compute(self) -> None:
        report = found("WrittenOut")
        assert [s.base for s in report.wrapped] == ["quick_gelu", "gelu_tanh", "gelu", "mish", "written"]
        assert {s.kind for s in report.wrapped} == {"written"}

    def test_inplace_is_seen_in_modules_and_calls(self) -> None:
        assert all(site.inplace for site in found("InPlace").sites)
        assert [site.inplace for site in found("FunctionalInPlace").sites] == [True, True, True, True, True]

    def test_prints_as_a_table(self) -> None:
        text = str(found("MixedCalls"))
        assert "9 of 10 activation sites wrapped" in text
        assert "sequence.2" in text

    def test_more_calls_than_a_loop_may_have_share_the_last_site(self) -> None:
        class Loop(Layers):
            def forward(self, x: Tensor) -> Tensor:
                for _ in range(MAX_CALLS + 9):
                    x = torch.tanh(self.one(x))
                return x

        model, x = Loop(), torch.randn(2, 8)
        report = find_sites(model, x)
        assert len(report.wrapped) == MAX_CALLS
        wrap(model, report, 0.0)
        host, last = hosted_sites(model)[-1]
        reference = model(x).detach()
        nn.init.constant_(getattr(host, last.keys[0]), 0.4)
        assert not torch.equal(model(x), reference)

    def test_a_model_that_runs_twice_a_step_keeps_one_set_of_sites(self) -> None:
        model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(2, 4)
        report = find_sites(model, run=lambda m: (m(x), m(-x)))
        assert [(s.name, s.owner) for s in report.wrapped] == [("1", None)]


class TestWhatCannotBeReached:
    def test_recurrent_kernels_are_listed(self) -> None:
        model = nn.Sequential(nn.LSTM(4, 4), nn.Flatten())
        (site,) = find_sites(model).sites
        assert (site.class_name, site.wrapped) == ("LSTM", False)
        assert "fused kernel" in site.reason

    @pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
    def test_scripted_modules_are_listed(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())))
        sites = find_sites(model, torch.randn(2, 4)).sites
        assert sites
        assert not any(site.wrapped for site in sites)
        assert any("TorchScript" in site.reason for site in sites)

    def test_static_search_says_what_it_cannot_see(self) -> None:
        model, _ = make_awkward("MixedCalls")
        report = find_sites(model)
        assert names(report.wrapped) == ["act", "sequence.1"]
        assert "No example input" in report.note
        assert "(root), inner.block" in report.note

    def test_affine_and_own_corrections_are_left_alone(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(1.0), CRReLU(), nn.ReLU())
        report = find_sites(model, torch.randn(2, 4))
        assert names(report.wrapped) == ["3"]
        reasons = {site.name: site.reason for site in report.skipped}
        assert reasons == {"1": "affine: nothing to correct", "2": "corrected already, by its own class"}

    def test_replaced_forward_is_a_reason(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        model[1].forward = lambda x: x  # type: ignore[method-assign, assignment]
        assert "replaced on the instance" in find_sites(model).sites[0].reason

    def test_modules_the_example_does_not_reach_stay_plain_and_say_so(self) -> None:
        class Branches(Layers):
            def __init__(self) -> None:
                super().__init__()
                self.left, self.right = nn.ReLU(), nn.Tanh()

            def forward(self, x: Tensor) -> Tensor:
                return self.left(x) if x.sum() > 0 else self.right(x)

        report = find_sites(Branches(), torch.ones(2, 8))
        assert [(s.name, s.wrapped, s.reason) for s in report.sites] == [
            ("left", True, ""),
            ("right", False, "not reached by the example input; name it in target_modules to wrap it"),
        ]
        named = find_sites(Branches(), torch.ones(2, 8), selection=Selection(target_modules=["left", "right"]))
        assert names(named.wrapped) == ["left", "right"]


class TestSelection:
    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("ReLU", ["act#0", "sequence.1", "act#1"]),
            ("relu", [":relu#0", "inner.block:relu#0", "inner.block:relu#1", "inner.block:relu#2", ":relu#1"]),
            ("block", ["inner.block:relu#0", "inner.block:relu#1", "inner.block:relu#2"]),
            (r"seq.*\.[12]", ["sequence.1", "sequence.2"]),
            (["act", "Sigmoid"], ["act#0", "sequence.2", "act#1"]),
        ],
    )
    def test_patterns(self, pattern: Any, expected: list[str]) -> None:
        assert names(found("MixedCalls", target_modules=pattern).wrapped) == expected

    def test_exclusion_and_filter(self) -> None:
        report = found("MixedCalls", exclude_modules="relu", filter_fn=lambda m, n: n != "act")
        assert names(report.wrapped) == ["sequence.1", ":tanh"]

    def test_functional_calls_can_be_left_alone(self) -> None:
        assert names(found("MixedCalls", functional="off").sites) == ["act#0", "sequence.1", "sequence.2", "act#1"]
        report = found("MixedCalls", functional="warn")
        assert names(report.wrapped) == ["act#0", "sequence.1", "act#1"]
        assert ":tanh" in report.note
        with pytest.raises(ConfigError, match="functional='on'"):
            Selection(functional="on")

    def test_a_pattern_that_matches_nothing_says_what_there_is(self) -> None:
        with pytest.raises(PatternError, match=r"target_modules='GELU'.*ReLU"):
            found("MixedCalls", target_modules=["ReLU", "GELU"])
        with pytest.raises(ConfigError, match="regular expression"):
            Selection(target_modules="(")


class TestDryRun:
    def test_leaves_no_trace(self) -> None:
        class Stateful(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.norm, self.drop = nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4), nn.Dropout(0.5)
                self.generator = torch.Generator().manual_seed(3)
                self.calls, self.seen = 0, []
                self.code = nn.Parameter(torch.zeros(3))
                self.lock = threading.Lock()  # cannot be copied

            def forward(self, x: Tensor) -> Tensor:
                self.calls += 1
                self.seen.append(x.shape)
                with torch.no_grad():
                    self.code.add_(1)
                noise = torch.rand(1, generator=self.generator) + random.random() + numpy.random.rand()
                return F.relu(self.drop(self.norm(self.conv(x)))) * noise + torch.randn(1)

        model, x = Stateful(), torch.randn(3, 2, 5)
        state = copy.deepcopy(model.state_dict())
        streams = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy())  # type: ignore[union-attr, index]
        own = model.generator.get_state()
        report = find_sites(model, x)
        assert names(report.wrapped) == [":relu"]
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert (model.calls, model.seen, model.training) == (0, [], True)
        assert torch.equal(model.generator.get_state(), own)
        assert torch.equal(torch.get_rng_state(), streams[0])
        assert random.getstate() == streams[1]
        assert (numpy.random.get_state()[1] == streams[2]).all()  # type: ignore[index]
        assert all(p.grad is None for p in model.parameters())
        assert not model._forward_hooks

    def test_a_network_over_learned_queries_has_hidden_activations_and_a_transform_has_none(self) -> None:
        class Queries(Layers):
            def __init__(self) -> None:
                super().__init__()
                self.queries, self.scale = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.zeros(8))

            def forward(self, x: Tensor) -> Tensor:
                return x @ F.relu(self.one(self.queries)).T @ F.relu(self.two(self.queries)) * F.softplus(self.scale)

        roles = {site.name: site.role for site in find_sites(Queries(), torch.randn(2, 8)).sites}
        assert roles == {":relu#0": "hidden", ":relu#1": "hidden", ":softplus": "gate"}

    def test_an_example_that_does_not_run_is_named(self) -> None:
        with pytest.raises(SiteError, match="does not run through Linear"):
            find_sites(nn.Linear(2, 2), torch.randn(3, 5))


class TestGatesOfModules:
    def test_cells_are_gated_by_modules_as_by_functions(self) -> None:
        class Cell(Layers):
            def __init__(self) -> None:
                super().__init__()
                self.tanh, self.sigmoid = nn.Tanh(), nn.Sigmoid()

            def forward(self, x: Tensor) -> Tensor:
                h = self.tanh(self.one(x)) * self.sigmoid(self.two(x))
                h = torch.tanh(self.one(h)) * self.sigmoid(self.two(h))
                return self.one(self.tanh(self.three(h)))

        report = find_sites(Cell(), torch.randn(4, 8))
        roles = {site.name: site.role for site in report.sites if site.base == "tanh"}
        assert roles == {"tanh#0": "gate", ":tanh": "gate", "tanh#1": "hidden"}
        assert names(report.wrapped) == ["tanh#1"]

    @pytest.mark.parametrize("dynamic", [True, False])
    def test_hard_sigmoids_of_a_relu6_are_gates_and_swish_with_one_is_none(self, dynamic: bool) -> None:
        class HardSigmoid(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.relu = nn.ReLU6(inplace=True)

            def forward(self, x: Tensor) -> Tensor:
                return self.relu(x + 3) / 6

        class HardSwish(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.sigmoid = HardSigmoid()

            def forward(self, x: Tensor) -> Tensor:
                return x * self.sigmoid(x)

        model = nn.Sequential(nn.Linear(8, 8), HardSwish(), nn.Linear(8, 8), nn.ReLU6(), nn.Linear(8, 8), HardSigmoid())
        report = find_sites(model, *[torch.randn(4, 8)] * dynamic)
        assert {site.name: site.role for site in report.sites} == {"1": "hidden", "3": "hidden", "5": "gate"}

    def test_soft_caps_are_no_hidden_activations(self) -> None:
        class Cap(nn.Module):
            def __init__(self, bound: float, inner: float) -> None:
                super().__init__()
                self.bound, self.inner = bound, inner

            def forward(self, x: Tensor) -> Tensor:
                return self.bound * torch.tanh(x / self.inner)

        model = nn.Sequential(nn.Linear(8, 8), Cap(30.0, 30.0), Cap(1.0, 1.0), Cap(1.7159, 1.5), nn.Linear(8, 8))
        report = find_sites(model, torch.randn(4, 8))
        assert {site.name: site.role for site in report.sites} == {"1": "unknown", "2": "hidden", "3": "hidden"}
        assert report.sites[0].reason.startswith("a soft cap")


def test_registered_and_unregistered_classes_are_found_by_behaviour() -> None:
    class Cube(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x**3

    class Centre(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean()

    @register_activation
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs().sqrt()

    model = nn.Sequential(nn.Linear(4, 4), Cube(), Centre(), Noisy(), nn.Dropout(), nn.Identity())
    assert names(find_sites(model, torch.randn(2, 4)).wrapped) == ["1", "3"]
