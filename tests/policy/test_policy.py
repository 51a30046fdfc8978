"""Policies by their formulas, the schedule by its promises, the trust region by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eafo_dynamic.errors import ConfigError, PatternError
from eafo_dynamic.policy import (
    Entropy,
    Frozen,
    Hybrid,
    Learned,
    Policy,
    Rule,
    Static,
    make_policy,
    make_rules,
)
from eafo_dynamic.policy.controller import EAFOController
from eafo_dynamic.policy.options import Options
from eafo_dynamic.policy.schedule import Schedule
from eafo_dynamic.policy.trust_region import TrustRegion

EPS = torch.tensor([0.1, -0.2, 0.0, 0.5])
GRADIENT = torch.tensor([2.0, -0.5, 0.0, 1e30])


def assert_names(error: pytest.ExceptionInfo[ConfigError], option: str, value: object) -> None:
    """The message names the option and the value, and says what to do."""
    text = str(error.value)
    assert error.value.option == option
    assert text.startswith(f"{option}={value!r}: ")
    problem, _, mend = text.removeprefix(f"{option}={value!r}: ").rpartition(". ")
    assert problem and mend.endswith("."), text


# ------------------------------------------------------------------ policies


@pytest.mark.parametrize("policy", [Static(), Learned(), Hybrid(), Hybrid(-2.0), Frozen()], ids=str)
def test_these_policies_leave_eps_to_others(policy: Policy) -> None:
    assert torch.equal(policy.move(EPS, GRADIENT), EPS)


@pytest.mark.parametrize("sign, policy", [(-1, Entropy(0.3)), (1, Entropy(0.3, ascent=True))])
def test_the_entropy_policy_takes_a_damped_step(sign: int, policy: Policy) -> None:
    expected = [e + sign * 0.3 * g / (1 + abs(g)) for e, g in zip(EPS.tolist(), GRADIENT.tolist(), strict=True)]
    np.testing.assert_allclose(policy.move(EPS, GRADIENT).numpy(), expected, rtol=1e-6)


@given(st.floats(-1, 1), st.floats(-1e38, 1e38), st.floats(1e-6, 10))
@settings(max_examples=100, deadline=None)
def test_the_step_never_exceeds_the_rate_and_goes_downhill(eps: float, gradient: float, rate: float) -> None:
    before = torch.tensor([eps], dtype=torch.float64)
    slope = torch.tensor([gradient], dtype=torch.float64)
    step = float(Entropy(rate).move(before, slope) - before)
    assert abs(step) <= rate * (1 + 1e-12) + 1e-15
    assert step * gradient <= 0
    up = float(Entropy(rate, ascent=True).move(before, slope) - before)
    assert up == pytest.approx(-step, rel=1e-9, abs=1e-15)


def test_what_the_policies_promise() -> None:
    promises = {p.name: (p.follows_data, p.trains_eps, p.adds_gradient) for p in map(make_policy, NAMES)}
    assert promises == {
        "static": (False, True, 0.0),
        "learned": (True, True, 0.0),
        "entropy": (True, False, 0.0),
        "hybrid": (True, True, 0.01),
        "frozen": (False, False, 0.0),
    }
    assert Hybrid(-0.5).adds_gradient == -0.5


NAMES = ["static", "learned", "entropy", "hybrid", "frozen"]


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf, "0.1", None])
def test_a_rate_that_cannot_work(rate: float) -> None:
    with pytest.raises(ConfigError) as error:
        Entropy(rate)
    assert_names(error, "rate", rate)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, "a"])
def test_a_weight_that_cannot_work(weight: float) -> None:
    with pytest.raises(ConfigError) as error:
        Hybrid(weight)
    assert_names(error, "weight", weight)


@pytest.mark.parametrize("policy", ["greedy", "", 3, Entropy, None, {"rate": 1}], ids=str)
def test_no_such_policy(policy: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_policy(policy)
    assert_names(error, "policy", policy)
    assert all(name in str(error.value) for name in NAMES)


def test_equal_policies_are_one() -> None:
    assert make_policy("entropy") == Entropy() and hash(Entropy(0.1)) == hash(Entropy(0.1))
    assert Entropy(0.1) != Entropy(0.2) and Static() != Learned() and Frozen() != Static()
    mine = Entropy(0.5)
    assert make_policy(mine) is mine


# ------------------------------------------------------------------ rules


def test_one_policy_stands_for_every_site() -> None:
    assert make_rules("static") == [Rule(".*", Static())]
    assert make_rules(Entropy(0.1)) == [Rule(".*", Entropy(0.1))]
    assert make_rules([Rule("a", "frozen"), Rule(".*", Learned())]) == [Rule("a", Frozen()), Rule(".*", Learned())]


@pytest.mark.parametrize("rules", [[], (), 7, [("a", "static")], [{"sites": "a"}], ["static"]], ids=str)
def test_rules_that_are_none(rules: list[Rule]) -> None:
    with pytest.raises(ConfigError) as error:
        make_rules(rules)
    assert_names(error, "policy", rules[0] if isinstance(rules, list) and rules else rules)


def model() -> nn.Module:
    return nn.ModuleDict(
        {
            "front": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU()),
            "back": nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        }
    )


def policies(*rules: Rule) -> list[Policy]:
    return EAFOController(model(), Options(policy=list(rules))).policies


def test_the_first_rule_that_matches_decides() -> None:
    assert policies(Rule("GELU", "frozen"), Rule(".*", "static")) == [Static(), Frozen(), Static()]
    assert policies(Rule(".*", "static"), Rule("GELU", "frozen")) == [Static()] * 3
    assert policies(Rule("front.1", Entropy(0.1)), Rule("ReLU", "learned"), Rule(".*", "hybrid")) == [
        Entropy(0.1),
        Hybrid(),
        Learned(),
    ]


def test_a_rule_that_matches_nothing_and_a_site_without_a_rule() -> None:
    with pytest.raises(PatternError, match=r"policy\.sites='Tanh'"):
        policies(Rule("Tanh", "static"), Rule(".*", "learned"))
    with pytest.raises(ConfigError, match="matches none of the rules"):
        policies(Rule("GELU", "static"))


# ------------------------------------------------------------------ schedule

SCHEDULES = st.builds(
    lambda every, start, freeze, collect: Schedule(every, start, freeze, collect and min(collect, every)),
    st.integers(1, 60),
    st.integers(0, 150),
    st.none() | st.integers(0, 300),
    st.none() | st.integers(1, 60),
)
JUMPS = st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.11, 5.0, math.nan, math.inf]), min_size=5, max_size=5)


@given(SCHEDULES)
@settings(max_examples=200, deadline=None)
def test_promises_of_the_schedule(schedule: Schedule) -> None:
    horizon = range(1, 400)
    rounds = [step for step in horizon if schedule.updates(step)]
    # the batches of step k are sampled if collects(k - 1)
    sampled = [step for step in horizon if schedule.collects(step - 1)]
    first = max(1, schedule.update_starting_at_step)
    frozen_from = math.inf if schedule.freeze_at_step is None else schedule.freeze_at_step
    multiples = [s for s in horizon if s > first and s % schedule.update_every_n_steps == 0]
    early = [first, *(first + 2**k - 1 for k in range(1, 9) if 2**k < schedule.update_every_n_steps)]
    assert rounds == [step for step in sorted({*early, *multiples}) if step < frozen_from]
    distances = [after - before for before, after in itertools.pairwise(rounds)]
    assert all(distance <= schedule.update_every_n_steps for distance in distances)
    for before, after in zip([0, *rounds], rounds, strict=False):
        assert any(before < step <= after for step in sampled), "every round finds a sample"
    assert all(first <= step < frozen_from for step in sampled)
    assert [step for step in horizon if schedule.frozen(step)] == [step for step in horizon if step >= frozen_from]


@given(SCHEDULES)
@settings(max_examples=100, deadline=None)
def test_sampled_steps_of_a_full_period(schedule: Schedule) -> None:
    every, period = schedule.update_every_n_steps, schedule.collect_period
    start = 10 * every + schedule.first_update // every * every
    offsets = [k for k in range(1, every + 1) if Schedule.collects(_endless(schedule), start + k - 1)]
    assert offsets == sorted({*range(period, every, period), every})
    assert len(offsets) == math.ceil(every / period)
    if schedule.collect_every_n_steps is None:
        assert len(offsets) <= 5


def _endless(schedule: Schedule) -> Schedule:
    return Schedule(
        schedule.update_every_n_steps, schedule.update_starting_at_step, None, schedule.collect_every_n_steps
    )


def test_the_default_schedule_by_hand() -> None:
    schedule = Options().schedule
    assert [s for s in range(201) if schedule.updates(s)] == [1, 2, 4, 8, 16, 32, 50, 100, 150, 200]
    assert [s for s in range(1, 101) if schedule.collects(s - 1)] == [
        1,
        2,
        4,
        8,
        10,
        16,
        20,
        30,
        32,
        *range(40, 101, 10),
    ]


@pytest.mark.parametrize(
    "option, value",
    [
        ("update_every_n_steps", 0),
        ("update_every_n_steps", 2.5),
        ("update_every_n_steps", "50"),
        ("update_starting_at_step", -1),
        ("freeze_at_step", -1),
        ("collect_every_n_steps", 0),
        ("collect_every_n_steps", 51),
    ],
)
def test_a_schedule_that_cannot_work(option: str, value: int) -> None:
    with pytest.raises(ConfigError) as error:
        Options(**{option: value})
    assert_names(error, option, value)


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    assert Options(update_every_n_steps=np.int64(7)).schedule.updates(14)


# ------------------------------------------------------------------ trust region


@given(st.integers(1, 5), st.lists(JUMPS, min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_admissible_against_brute_force(tried: int, sites: list[list[float]]) -> None:
    fractions = [1.0, 0.5, 0.25, 0.125, 0.0625][:tried]
    jumps = torch.tensor(sites, dtype=torch.float64).T[:tried]
    expected = [
        max((f for f, jump in zip(fractions, site, strict=False) if jump <= 0.1), default=0.0) for site in sites
    ]
    found = TrustRegion(1.0, 0.1).admissible(jumps, torch.tensor(fractions, dtype=torch.float64))
    assert found.tolist() == expected


def test_eps_is_brought_back() -> None:
    region = TrustRegion(0.25, 0.5)
    assert region.clamp(torch.tensor([-9.0, -0.25, 0.1, math.inf])).tolist() == pytest.approx([-0.25, -0.25, 0.1, 0.25])


@pytest.mark.parametrize("option", ["max_eps", "max_delta"])
@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, "0.5", None])
def test_bounds_that_cannot_work(option: str, value: float) -> None:
    with pytest.raises(ConfigError) as error:
        Options(**{option: value})
    assert_names(error, option, value)


@pytest.mark.parametrize("eps", [1.01, -1.01, math.nan, "0.1"])
def test_a_start_outside_the_region(eps: float) -> None:
    with pytest.raises(ConfigError) as error:
        Options(eps_init=eps)
    assert_names(error, "eps_init", eps)
    assert Options(eps_init=-1.0).eps_init == -1.0


def test_no_bound_at_all_is_a_choice() -> None:
    free = Options(max_eps=math.inf, max_delta=math.inf, eps_init=1e6).trust_region
    eps = torch.tensor([1e6])
    assert torch.equal(free.clamp(eps), eps)


def test_tensor_of_no_sites() -> None:
    empty: Tensor = Options().trust_region.admissible(torch.empty(5, 0), torch.ones(5))
    assert empty.shape == (0,)
