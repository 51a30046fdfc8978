"""The controller on problems whose right answer is known, under hostile settings, and in awkward models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eafo_dynamic.correction.kernels.native import native_kernel
from eafo_dynamic.correction.kernels.rounds import compiled_rounds
from eafo_dynamic.entropy import entropy_gradient, resolution_entropy
from eafo_dynamic.errors import ConfigError, EAFOError, PatternError, SiteError
from eafo_dynamic.policy import Entropy, Hybrid, Rule
from eafo_dynamic.policy.controller import EAFOController
from eafo_dynamic.trainers.optim import own_group


class OneSite(nn.Module):
    """An activation whose pre-activations are given."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, z: Tensor) -> Tensor:
        return self.activation(z)


def attach(model: nn.Module, *example: Any, **options: Any) -> EAFOController:
    """One amplitude a site, for tests that look at it; test_free_terms.py has the sites with two."""
    return EAFOController.attach(model, *example, **{"terms": "tied", **options})


def standard_normal(n: int = 65536) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(n)


def drive(controller: EAFOController, z: Tensor, steps: int) -> list[dict[str, Any]]:
    """Forward only, so that nothing but the policy moves eps."""
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        controller.model(z)
        rows += controller.step(step)
    return rows


def eps_of(controller: EAFOController) -> float:
    (eps,) = controller.amplitudes.values()
    return eps.item()


def entropy_at(base: Callable[[Tensor], Tensor], z: Tensor, eps: float, sigma: float = 1.0) -> float:
    u = z / sigma
    return resolution_entropy(base(z) + eps * sigma * u * torch.exp(-u * u / 2)).item()


def test_entropy_descent_finds_the_minimum_inside_the_trust_region() -> None:
    z = standard_normal()
    grid = torch.linspace(-0.5, 0.5, 201)
    best = grid[torch.tensor([entropy_at(F.relu, z, eps.item()) for eps in grid]).argmin()].item()
    controller = attach(OneSite(nn.ReLU()), policy=Entropy(rate=0.05), update_every_n_steps=1, samples_per_site=16384)
    drive(controller, z, 80)
    found = eps_of(controller)
    assert abs(entropy_at(F.relu, z, found) - entropy_at(F.relu, z, best)) < 2e-3
    assert found == pytest.approx(best, abs=0.06)
    assert -0.5 < found < 0.0


def test_entropy_ascent_climbs_to_the_bound() -> None:
    z = standard_normal()
    policy = Entropy(rate=0.1, ascent=True)
    controller = attach(OneSite(nn.ReLU()), policy=policy, max_eps=0.2, update_every_n_steps=1)
    rows = drive(controller, z, 30)
    assert eps_of(controller) == pytest.approx(0.2)
    assert rows[-1]["entropy"] > rows[0]["entropy"] + 0.1


def test_learned_recovers_the_teacher() -> None:
    """A student with a ReLU learns the eps of a teacher with CRReLU, when everything else is known."""
    torch.manual_seed(1)
    first = nn.Linear(8, 64)
    teacher = nn.Sequential(first, nn.ReLU(), nn.Linear(64, 1))
    student = nn.Sequential(first, nn.ReLU(), teacher[2]).requires_grad_(False)
    controller = attach(student, policy="learned", eps_init=0.0, update_every_n_steps=20)
    optimizer = torch.optim.Adam(controller.amplitudes.values(), lr=3e-3)
    true_eps = -0.12
    for step in range(1, 301):
        x = torch.randn(256, 8)
        z = first(x)
        mu, sigma = (t.item() for t in student[1].eafo_0_shape)
        u = (z - mu) / sigma
        target = teacher[2](F.relu(z) + true_eps * sigma * u * torch.exp(-u * u / 2))
        optimizer.zero_grad()
        F.mse_loss(student(x), target).backward()
        optimizer.step()
        controller.step(step)
    assert eps_of(controller) == pytest.approx(true_eps, abs=2e-3)


def test_static_is_the_papers_function_throughout_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    controller = attach(model, policy="static", update_every_n_steps=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, 41):
        x = torch.randn(64, 4)
        optimizer.zero_grad()
        F.mse_loss(model(x), x.prod(1, keepdim=True)).backward()
        optimizer.step()
        controller.step(step)
        z = torch.randn(50) * 3
        paper = F.relu(z) + eps_of(controller) * z * torch.exp(-z * z / 2)
        torch.testing.assert_close(model[1](z), paper, rtol=1e-6, atol=1e-7)
    assert eps_of(controller) != pytest.approx(0.01, abs=1e-3), "eps has learned"


def test_hybrid_adds_the_entropy_gradient_to_eps_grad() -> None:
    z = standard_normal(4096)
    controller = attach(OneSite(nn.ReLU()), policy=Hybrid(weight=0.3), update_every_n_steps=1)
    drive(controller, z, 1)
    (eps,) = controller.amplitudes.values()
    controller.model(z).sum().backward()
    assert eps.grad is not None
    plain = eps.grad.clone()
    controller.before_optimizer_step(1)
    functions = controller.bank.functions()  # as the round has left them
    gradient = entropy_gradient(functions.outputs(z.view(1, -1)), functions.direction("eps", z.view(1, -1)))
    torch.testing.assert_close(eps.grad - plain, 0.3 * gradient[0], rtol=1e-3, atol=1e-4)


def test_hybrid_follows_the_shape_that_the_round_has_put_in_place() -> None:
    """Before the first round the shape is that of z ~ N(0, 1); the gradient in use is not its own."""
    z = 4 * standard_normal(4096) + 2
    controller = attach(OneSite(nn.ReLU()), policy=Hybrid(weight=1.0), update_every_n_steps=1, max_delta=math.inf)
    before = controller.bank.functions()
    (row,) = drive(controller, z, 1)
    controller.before_optimizer_step(1)
    (eps,) = controller.amplitudes.values()
    after, rows = controller.bank.functions(), z.view(1, -1)
    of_old = float(entropy_gradient(before.outputs(rows), before.direction("eps", rows)))
    of_new = float(entropy_gradient(after.outputs(rows), after.direction("eps", rows)))
    assert abs(of_old - of_new) > 0.02
    assert eps.grad is not None
    assert eps.grad.item() == pytest.approx(of_new, abs=2e-3)
    assert row["d_entropy_d_eps"] == pytest.approx(of_old, abs=2e-3), "the log has that of the functions found"


def test_frozen_never_changes() -> None:
    z = standard_normal(4096) * 3 + 1
    controller = attach(OneSite(nn.GELU()), policy="frozen", eps_init=0.1, update_every_n_steps=1)
    before = controller.model(z)
    rows = drive(controller, z, 5)
    assert torch.equal(controller.model(z), before)
    assert len(rows) == 5, "a frozen site still is observed"


def test_freeze_at_step_stops_everything() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    controller = attach(model, update_every_n_steps=2, freeze_at_step=6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    own_group([optimizer], controller.amplitudes, model)
    history: list[float] = []
    rows: list[dict[str, Any]] = []
    for step in range(12):
        x = torch.randn(64, 4)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        controller.before_optimizer_step(step)
        optimizer.step()
        rows += controller.step(step + 1)
        history.append(eps_of(controller))
    assert len(set(history[:5])) == 5
    assert len(set(history[4:])) == 1
    assert max(row["step"] for row in rows) == 4


@pytest.mark.parametrize("density", ["gaussian", "histogram"])
@pytest.mark.parametrize("policy", ["static", "learned", "entropy", "hybrid", "frozen"])
def test_every_policy_with_every_density_gives_a_row_per_site_and_update(policy: str, density: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    controller = attach(model, policy=policy, density=density, update_every_n_steps=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(30):
        optimizer.zero_grad()
        model(torch.randn(64, 6)).square().mean().backward()
        controller.before_optimizer_step(step)
        optimizer.step()
        controller.step(step + 1)
    rows = list(controller.records)
    assert [(row["step"], row["site"]) for row in rows] == [
        (s, site) for s in (1, 2, 4, 8, 10, 20, 30) for site in ("1", "3")
    ]
    numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert all(math.isfinite(value) for value in numbers)
    assert {row["policy"] for row in rows} == {policy}


def test_rules_give_each_site_its_policy() -> None:
    hidden = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh()
    model = nn.Sequential(*hidden, nn.Linear(8, 8))
    rules = [Rule("Tanh", "frozen"), Rule("1", Entropy(rate=0.1)), Rule(".*", "learned")]
    controller = attach(model, torch.zeros(2, 6), policy=rules)
    assert [policy.name for policy in controller.policies] == ["entropy", "learned", "frozen"]
    assert [eps.requires_grad for eps in controller.amplitudes.values()] == [False, True, False]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("nowhere", "frozen"), Rule(".*", "learned")], "policy.sites='nowhere' matches no activation"),
        ([Rule("ReLU", "frozen")], "policy='3': matches none of the rules. End the list"),
        ([], "an empty list of rules"),
    ],
)
def test_rules_that_cannot_work(rules: list[Rule], message: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU())
    with pytest.raises(EAFOError, match=message.replace("(", r"\(").replace("*", r"\*")):
        attach(model, policy=rules)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"policy": "lerned"}, ConfigError, "policy='lerned'.*static, learned"),
        ({"density": "gauss"}, ConfigError, "density='gauss'.*gaussian, histogram"),
        ({"target_modules": "Nope"}, PatternError, "target_modules='Nope'.*ReLU"),
        ({"exclude_modules": ["Nope"]}, PatternError, "exclude_modules='Nope'"),
        ({"target_modules": "(", "policy": "learned"}, ConfigError, "regular expression"),
        ({"update_every_n_steps": -1}, ConfigError, "update_every_n_steps=-1.*at least 1"),
        ({"update_starting_at_step": -1}, ConfigError, "update_starting_at_step=-1"),
        ({"collect_every_n_steps": 0}, ConfigError, "collect_every_n_steps=0"),
        ({"collect_every_n_steps": 100}, ConfigError, "larger than update_every_n_steps=50"),
        ({"freeze_at_step": -5}, ConfigError, "freeze_at_step=-5"),
        ({"eps_init": 1.9}, ConfigError, "eps_init=1.9.*max_eps=1.0"),
        ({"eps_init": math.nan}, ConfigError, "eps_init=nan"),
        ({"max_eps": 0.0}, ConfigError, "max_eps=0.0"),
        ({"max_delta": -1.0}, ConfigError, "max_delta=-1.0"),
        ({"samples_per_site": 3}, ConfigError, "samples_per_site=3"),
        ({"momentum": 0.0}, ConfigError, "momentum=0.0"),
        ({"resolution": 5.0}, ConfigError, "resolution=5.0"),
        ({"rollback_factor": 0.5}, ConfigError, "rollback_factor=0.5"),
    ],
)
def test_bad_options_name_option_value_and_mend(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    before = type(model[1])
    with pytest.raises(error, match=words) as caught:
        attach(model, **options)
    assert "\n" not in str(caught.value)
    assert type(model[1]) is before, "a refused model stays as it was"


def test_a_model_without_activations_is_a_clear_error() -> None:
    with pytest.raises(SiteError, match=r"Linear has no activation .*"):
        attach(nn.Linear(2, 2))


class Shift(nn.Module):
    """Feeds one activation whatever the test wants it to see."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.ReLU()

    def forward(self, z: Tensor) -> Tensor:
        return self.activation(z)


@pytest.mark.parametrize(
    ("z", "event"),
    [
        (torch.full((512,), 2.0), "no spread"),
        (torch.full((512,), math.nan), "non-finite samples left out; no samples"),
        (torch.cat([torch.randn(500), torch.full((12,), math.inf)]), "non-finite samples left out"),
        (-torch.rand(512) - 1.0, None),
        (torch.randn(512) * 1e30, None),
        (torch.randn(512) * 1e-30, None),
    ],
    ids=["zero variance", "all NaN", "some inf", "dead layer", "exploded", "vanished"],
)
def test_hopeless_statistics_leave_the_last_good_correction(z: Tensor, event: str | None) -> None:
    torch.manual_seed(0)
    controller = attach(Shift(), policy=Entropy(), update_every_n_steps=1)
    drive(controller, standard_normal(512), 3)
    (host,) = [module for module in controller.model.modules() if hasattr(module, "eafo_0_shape")]
    good = host.eafo_0_shape.clone()
    controller.model(z)
    (row,) = controller.step(4)
    assert row["event"] == event
    assert host.eafo_0_shape.isfinite().all()
    assert math.isfinite(eps_of(controller))
    if (event is not None and "left out" not in event) or event == "non-finite samples left out; no samples":
        assert torch.equal(host.eafo_0_shape, good)
    out = controller.model(standard_normal(512))
    assert out.isfinite().all()


@pytest.mark.parametrize("density", ["gaussian", "histogram"])
def test_two_thousand_hostile_steps_never_poison_a_weight(density: str) -> None:
    """Learning rate x 100, an update every step, inputs with Cauchy tails."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 1))
    controller = attach(
        model, policy="hybrid", density=density, update_every_n_steps=1, samples_per_site=64, max_eps=0.5
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    own_group([optimizer], controller.amplitudes, model)
    cauchy = torch.distributions.Cauchy(0.0, 1.0)
    for step in range(2000 if density == "gaussian" else 400):
        x = cauchy.sample((32, 4))
        optimizer.zero_grad()
        F.smooth_l1_loss(model(x), x.sum(1, keepdim=True).clamp(-5, 5)).backward()
        controller.before_optimizer_step(step)
        optimizer.step()
        controller.step(step + 1)
        assert all(abs(eps.item()) <= 0.5 for eps in controller.amplitudes.values())
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(b.isfinite().all() for b in model.buffers())


def test_trust_region_bounds_the_change_of_the_function() -> None:
    controller = attach(OneSite(nn.ReLU()), eps_init=0.5, max_delta=0.05, update_every_n_steps=1, momentum=1.0)
    drive(controller, standard_normal(4096), 3)
    grid = torch.linspace(-300, 300, 600001)
    for step, scale in enumerate([1.0, 30.0, 0.01, 5.0], start=4):
        controller.collecting = False
        before = controller.model(grid)
        sigma_before = controller.bank.functions().sigma.item()
        controller.collecting = True
        controller.model(standard_normal(4096) * scale + scale)
        (row,) = controller.step(step)
        controller.collecting = False
        jump = (controller.model(grid) - before).abs().max().item()
        assert jump / max(sigma_before, scale) <= 0.05 * 1.01, (scale, row["event"])


def test_rollback_undoes_a_round_after_which_the_loss_jumps() -> None:
    z = standard_normal(4096)
    controller = attach(OneSite(nn.ReLU()), policy=Entropy(rate=0.05), update_every_n_steps=1, rollback_factor=1.5)
    history: list[float] = []
    events: list[object] = []
    for step, loss in enumerate([1.0, 1.0, 1.1, 9.0, 1.0, 1.0], start=1):
        controller.model(z)
        controller.observe_loss(torch.tensor(loss))
        (row,) = controller.step(step)
        history.append(eps_of(controller))
        events.append(row["event"])
    assert events == [None, None, None, "rolled back", None, None]
    assert history[3] == history[1], "the round before the jump is undone"
    assert history[4] < history[3], "and then descent goes on"


def test_accumulated_micro_batches_count_once_and_as_one_batch() -> None:
    torch.manual_seed(0)
    z = torch.randn(128, 16)
    whole = attach(OneSite(nn.ReLU()), update_every_n_steps=1)
    halves = attach(OneSite(nn.ReLU()), update_every_n_steps=1)
    whole.model(z[:16])
    halves.model(z[:8])
    assert halves.step(0) == []
    halves.model(z[8:16])
    (one,), (two,) = whole.step(1), halves.step(1)
    assert one["n"] == two["n"] == 256
    assert two["mean"] == pytest.approx(one["mean"], rel=1e-6)
    assert two["entropy"] == pytest.approx(one["entropy"], abs=1e-6)


def test_a_generator_that_runs_twice_a_step_is_sampled_twice() -> None:
    generator = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2))
    controller = attach(generator, update_every_n_steps=1)
    generator(torch.randn(3, 4)).sum().backward()
    generator(torch.randn(5, 4)).sum().backward()
    (row,) = controller.step(1)
    assert row["n"] == (3 + 5) * 8


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_sampled_once(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    block = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    controller = attach(block, update_every_n_steps=1)
    x = torch.randn(6, 4, requires_grad=True)
    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    (row,) = controller.step(1)
    assert row["n"] == 6 * 8


def test_evaluation_is_not_sampled() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    controller = attach(model, update_every_n_steps=1)
    model.eval()
    with torch.no_grad():
        model(torch.randn(6, 4))
    (row,) = controller.step(1)
    assert row["n"] == 0
    assert row["event"] == "no samples"


def test_an_eps_that_is_not_finite_is_put_back() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    controller = attach(model, update_every_n_steps=1, eps_init=0.1)
    (eps,) = controller.amplitudes.values()
    with torch.no_grad():
        eps.fill_(math.nan)
    model(torch.randn(64, 4))
    (row,) = controller.step(1)
    assert eps.item() == pytest.approx(0.1)
    assert row["event"] == "eps was not finite and is back at its last good value"
    assert model(torch.randn(8, 4)).isfinite().all()


@pytest.mark.parametrize("policy", ["learned", "entropy", "hybrid"])
def test_extreme_amplitudes_stay_finite_and_can_come_back(policy: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 1))
    controller = attach(model, policy=policy, eps_init=1e3, max_eps=1e4, update_every_n_steps=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, 11):
        optimizer.zero_grad()
        F.smooth_l1_loss(model(torch.randn(32, 4)), torch.zeros(32, 1)).backward()
        optimizer.step()
        rows = controller.step(step)
        assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert all(p.isfinite().all() for p in model.parameters())


class Skipping(nn.Module):
    """A model with a branch that some steps do not reach, a frozen layer and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.tied = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.acts = nn.ModuleList([nn.ReLU(), nn.GELU(), nn.SiLU(), nn.ReLU()])

    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        x = self.acts[0](self.frozen(x))
        x = x + self.drop(self.acts[1](self.norm(self.tied(x))))
        if branch:
            x = x + self.acts[2](self.drop(self.tied(x)))
        return self.acts[3](x)


def test_norm_residual_dropout_tied_frozen_and_unreached_layers() -> None:
    torch.manual_seed(0)
    model = Skipping()
    controller = attach(model, torch.randn(4, 8), update_every_n_steps=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    own_group([optimizer], controller.amplitudes, model)
    start = {name: eps.item() for name, eps in controller.amplitudes.items()}
    rows: list[dict[str, Any]] = []
    for step in range(1, 13):
        optimizer.zero_grad()
        model(torch.randn(32, 8), branch=step <= 4).square().mean().backward()
        optimizer.step()
        rows += controller.step(step)
    late = {row["site"]: row for row in rows if row["step"] == 12}
    assert late["acts.2"]["event"] == "no samples"
    assert late["acts.2"]["n"] == 0
    assert late["acts.0"]["n"] > 0, "a frozen layer's activation is corrected like any other"
    moved = {name for name, eps in controller.amplitudes.items() if eps.item() != start[name]}
    assert len(moved) == 4
    assert model.frozen.weight.grad is None


def test_state_round_trip_goes_on_as_if_never_interrupted() -> None:
    def make() -> tuple[nn.Module, EAFOController]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU())
        return model, attach(model, policy="entropy", density="histogram", update_every_n_steps=2)

    data = [torch.randn(64, 6, generator=torch.Generator().manual_seed(i)) for i in range(12)]
    model, controller = make()
    for step, x in enumerate(data[:6], start=1):
        model(x)
        controller.step(step)
    weights, state = model.state_dict(), controller.state_dict()
    twin, resumed = make()
    twin.load_state_dict(weights)
    resumed.load_state_dict(state)
    for step, x in enumerate(data[6:], start=7):
        model(x), twin(x)
        assert controller.step(step) == resumed.step(step)
    for one, two in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_state_knows_what_was_left_alone_since_the_last_round(ranks: int) -> None:
    """The row of the next round says it, also where the state is that of several ranks."""
    controllers = [attach(OneSite(nn.ReLU()), update_every_n_steps=2) for _ in range(ranks + 1)]
    *_, met, resumed = controllers
    met.model(torch.arange(4))
    states = [each.own_state() for each in controllers[:-1]]
    resumed.load_state_dict({**met.state_dict(), "ranks": states})
    resumed.model(standard_normal(64))
    (row,) = resumed.step(2)
    assert str(row["event"]).startswith("left alone: int64 tensor")
    resumed.model(standard_normal(64))
    (row,) = resumed.step(4)
    assert row["event"] in (None, "bounded"), "and it says it once"


def test_state_of_another_model_is_refused_with_a_readable_difference() -> None:
    one = attach(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    two = attach(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(SiteError, match="only in the checkpoint: 1; only in the model: 2"):
        two.load_state_dict(one.state_dict())


def test_detach_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    keys, activation = list(model.state_dict()), model[1]
    controller = attach(model)
    assert list(model.state_dict()) != keys
    assert controller.detach() is model
    assert list(model.state_dict()) == keys
    assert model[1] is activation
    assert type(activation) is nn.ReLU


def test_per_channel_amplitudes_learn_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 2))
    controller = attach(model, torch.randn(2, 1, 8, 8), per_channel=True, update_every_n_steps=5)
    (eps,) = controller.amplitudes.values()
    assert eps.shape == (6,)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(1, 11):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(16, 1, 8, 8)), torch.randint(0, 2, (16,))).backward()
        optimizer.step()
        rows = controller.step(step)
    assert len(set(eps.tolist())) == 6
    assert rows[0]["eps"] == pytest.approx(eps.mean().item(), abs=1e-6)


def test_per_channel_without_an_example_says_what_to_do() -> None:
    with pytest.raises(SiteError, match=r"1: one amplitude a channel needs the shape .* example"):
        attach(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), per_channel=True)


def _trained_under(dtype: torch.dtype, device: str, density: str) -> dict[str, Tensor]:
    """The corrections of a float32 model on the CPU, from the search to the last round under other defaults."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.SELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1)]
    model, x = nn.Sequential(*layers), torch.randn(64, 8)
    torch.set_default_dtype(dtype)
    native_kernel.cache_clear()
    compiled_rounds.cache_clear()
    try:
        with torch.device(device):
            controller = EAFOController.attach(model, x, update_every_n_steps=2, density=density)
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            for step in range(1, 9):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
                controller.step(step)
    finally:
        torch.set_default_dtype(torch.float32)
    return {key: value for key, value in model.state_dict().items() if "eafo_" in key}


@pytest.mark.parametrize("density", ["gaussian", "histogram"])
def test_the_defaults_of_torch_for_new_tensors_do_not_matter(density: str) -> None:
    expected = _trained_under(torch.float32, "cpu", density)
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")):
        found = _trained_under(dtype, device, density)
        assert {value.dtype for value in found.values()} <= {torch.float32, dtype} - {torch.bfloat16}
        for key, value in expected.items():
            torch.testing.assert_close(found[key].to(torch.float32), value, rtol=1e-4, atol=1e-6)
