"""The amplitudes' own parameter group, for every optimiser and scheduler of torch, against a run without the plugin."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.trainers.optim import GROUP_NAME, own_group

Make = Callable[[Any], Optimizer]
Schedule = Callable[[Optimizer], Any]

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD tensor lr": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1), foreach=False),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1, weight_decay=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1, initial_accumulator_value=0.5),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1, weight_decay=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, weight_decay=0.1, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}

SCHEDULES: dict[str, Schedule] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], 0.3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "LambdaLR from zero": lambda o: lr_scheduler.LambdaLR(o, lambda k: min(1.0, k / 5)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 4),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "WarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=12, cycle_momentum=False),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.5, step_size_up=3, cycle_momentum=False),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=4),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, min_lr=0.03),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(o, 8)], [3]
    ),
    "Sequential in Chained": lambda o: lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.8)], [3]),
            lr_scheduler.StepLR(o, 2, 0.5),
        ]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


class Layer(nn.Module):
    """A linear layer with the amplitude of an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.act = nn.ReLU()
        self.act.register_parameter("eafo_0_eps", nn.Parameter(torch.tensor(0.1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x)) + self.act.eafo_0_eps * x


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Layer(), Layer())


def amplitudes(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith("_eps")}


def own(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [group for group in optimizer.param_groups if str(group.get("name", "")).startswith(GROUP_NAME)]


def others(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [group for group in optimizer.param_groups if not str(group.get("name", "")).startswith(GROUP_NAME)]


def assert_each_once(optimizer: Optimizer, expected: list[nn.Parameter]) -> None:
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in expected}


def train(model: nn.Module, optimizer: Optimizer, scheduler: Any, steps: int = 10) -> Iterator[list[float]]:
    """Yields the learning rates of all groups before each step."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        yield [float(group["lr"]) for group in optimizer.param_groups]
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()


# ------------------------------------------------------------------ schedules


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["SGD", "AdamW", "SGD tensor lr"])
@pytest.mark.parametrize("multiple", [1.0, 7.0])
def test_the_rate_of_eps_is_a_multiple_of_the_base_rate_at_every_step(
    schedule: str, kind: str, multiple: float
) -> None:
    plain, model = make_model(), make_model()
    reference = OPTIMIZERS[kind](plain.parameters())
    expected = list(train(plain, reference, SCHEDULES[schedule](reference)))
    optimizer = OPTIMIZERS[kind](model.parameters())
    scheduler = SCHEDULES[schedule](optimizer)
    notes = own_group([optimizer], amplitudes(model), model, schedulers=[scheduler], lr_multiple=multiple)
    assert notes == []
    assert_each_once(optimizer, list(model.parameters()))
    for (base,), (mine, eps) in zip(expected, train(model, optimizer, scheduler), strict=True):
        assert mine == pytest.approx(base, rel=1e-6)
        assert eps == pytest.approx(multiple * base, rel=1e-5)
    assert len({tuple(each) for each in expected}) > 1, "the schedule does something"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_rate_of_its_own_follows_the_same_course(schedule: str) -> None:
    model = make_model()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    scheduler = SCHEDULES[schedule](optimizer)
    initial = float(optimizer.param_groups[0].get("initial_lr", 0.1))
    own_group([optimizer], amplitudes(model), model, schedulers=[scheduler], lr=0.02)
    for base, eps in train(model, optimizer, scheduler):
        assert eps == pytest.approx(base * 0.02 / initial, rel=1e-6)


def test_the_schedulers_states_can_be_saved_and_restored() -> None:
    for schedule in ("LambdaLR", "OneCycleLR", "SequentialLR", "ReduceLROnPlateau", "CyclicLR"):
        rates: list[list[list[float]]] = []
        saved: tuple[Any, Any, Any] | None = None
        for resumed in (False, True):
            model = make_model()
            optimizer = OPTIMIZERS["AdamW"](model.parameters())
            scheduler = SCHEDULES[schedule](optimizer)
            own_group([optimizer], amplitudes(model), model, schedulers=[scheduler], lr_multiple=3.0)
            if not resumed:
                list(train(model, optimizer, scheduler, 4))
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
            else:
                assert saved is not None
                for part, state in zip((model, optimizer, scheduler), saved, strict=True):
                    part.load_state_dict(state)
            rates.append(list(train(model, optimizer, scheduler, 4)))
        assert rates[0] == rates[1], schedule


def test_a_scheduler_that_keeps_its_own_base_values() -> None:
    """As timm's do: outside torch's class, one list of values a parameter group."""

    class Halving:
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer
            self.base_values = [group["lr"] for group in optimizer.param_groups]
            self.count = 0

        def step(self) -> None:
            self.count += 1
            for group, value in zip(self.optimizer.param_groups, self.base_values, strict=True):
                group["lr"] = value / 2**self.count

    model = make_model()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    scheduler = Halving(optimizer)
    own_group([optimizer], amplitudes(model), model, schedulers=[scheduler], lr_multiple=3.0)
    for base, eps in train(model, optimizer, scheduler, 4):
        assert eps == pytest.approx(3 * base)


# ------------------------------------------------------------------ optimisers


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("held", [True, False], ids=["eps held", "eps missing"])
@pytest.mark.parametrize("named", [False, True], ids=["plain", "named"])
def test_every_optimiser_trains_eps_without_decay(kind: str, held: bool, named: bool) -> None:
    model = make_model()
    pairs = [(n, p) for n, p in model.named_parameters() if held or not n.endswith("_eps")]
    optimizer = OPTIMIZERS[kind](pairs if named else [p for _, p in pairs])
    own_group([optimizer], amplitudes(model), model, lr_multiple=1.0)
    assert_each_once(optimizer, list(model.parameters()))
    (group,) = own(optimizer)
    origin = optimizer.param_groups[0]
    assert {k: v for k, v in group.items() if k not in VARIES} == {k: v for k, v in origin.items() if k not in VARIES}
    assert group.get("weight_decay", 0.0) == 0.0
    assert ("param_names" in group) is named
    if named:
        names = [n for g in optimizer.param_groups for n in g["param_names"]]
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        assert {n: id(p) for n, p in zip(names, parameters, strict=True)} == {
            n: id(p) for n, p in model.named_parameters()
        }
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    list(train(model, optimizer, None, 3))
    for name, p in model.named_parameters():
        assert p.isfinite().all() and not torch.equal(p, start[name]), name


def test_amplitudes_learn_three_times_as_fast_as_the_model_unless_told_otherwise() -> None:
    for options, rate in (({}, 0.03), ({"lr": 0.3}, 0.3), ({"lr_multiple": 1.0}, 0.01)):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        own_group([optimizer], amplitudes(model), model, **options)
        assert own(optimizer)[0]["lr"] == pytest.approx(rate)


VARIES = ("params", "param_names", "name", "weight_decay", "fused")


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_one_kernel_steps_all_amplitudes_as_the_loop_would(kind: type[Optimizer]) -> None:
    ends: list[list[Tensor]] = []
    for fused in (None, False):  # None: left to torch, and so to us
        model = make_model()
        optimizer = kind(model.parameters(), lr=0.01, fused=fused)
        own_group([optimizer], amplitudes(model), model)
        assert own(optimizer)[0]["fused"] is (fused is None)
        assert optimizer.param_groups[0]["fused"] is fused
        list(train(model, optimizer, None, 5))
        ends.append([p.detach() for p in amplitudes(model).values()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("choice", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"differentiable": True}])
def test_how_the_user_wants_it_stepped_is_left_to_the_user(choice: dict[str, bool]) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **choice)
    own_group([optimizer], amplitudes(model), model)
    (group,) = own(optimizer)
    for option in ("foreach", "fused", "differentiable"):
        assert group[option] == optimizer.param_groups[0][option]


def test_a_new_amplitude_gets_the_state_that_adagrad_makes_when_it_is_built() -> None:
    """Releases of torch before 2.13 look for it at the first step and find nothing otherwise."""
    model = make_model()
    optimizer = OPTIMIZERS["Adagrad"]([p for p in model.parameters() if p.dim()])
    own_group([optimizer], amplitudes(model), model, lr_multiple=1.0)
    for eps in amplitudes(model).values():
        assert optimizer.state[eps]["sum"].item() == 0.5 and optimizer.state[eps]["step"].item() == 0


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adagrad"])
def test_the_base_trains_as_without_the_group(kind: str) -> None:
    """At the same rate and no decay, grouping changes not one bit of the trajectory."""
    trajectories: list[dict[str, Tensor]] = []
    for grouped in (False, True):
        model = make_model()
        optimizer = OPTIMIZERS[kind](model.parameters())
        optimizer.param_groups[0]["weight_decay"] = 0.0
        if grouped:
            own_group([optimizer], amplitudes(model), model, lr_multiple=1.0)
        list(train(model, optimizer, None, 5))
        trajectories.append(model.state_dict())
    for name, value in trajectories[0].items():
        assert torch.equal(value, trajectories[1][name]), name


def test_flags_are_copied_and_weight_decay_is_the_users() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.1, foreach=True, capturable=False, maximize=True, betas=(0.5, 0.6)
    )
    own_group([optimizer], amplitudes(model), model, weight_decay=0.3)
    (group,) = own(optimizer)
    assert (group["foreach"], group["maximize"], group["betas"]) == (True, True, (0.5, 0.6))
    assert group["weight_decay"] == 0.3
    assert optimizer.param_groups[0]["weight_decay"] == 0.01


def test_adamw_draws_amplitudes_towards_zero_by_rate_times_decay() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    own_group([optimizer], amplitudes(model), model, lr_multiple=3.0, weight_decay=0.5)
    before = [p.item() for p in amplitudes(model).values()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = [p.item() for p in amplitudes(model).values()]
    assert after == pytest.approx([(1 - 3 * 0.1 * 0.5) * value for value in before], rel=1e-6)


def test_an_optimiser_without_weight_decay_says_so() -> None:
    model = make_model()
    (note,) = own_group([torch.optim.Rprop(model.parameters())], amplitudes(model), model, weight_decay=0.5)
    assert note.startswith("Rprop has no weight_decay: weight_decay=0.5 does nothing to the amplitudes")
    assert "AdamW" in note and "\n" not in note
    model = make_model()
    assert own_group([torch.optim.Rprop(model.parameters())], amplitudes(model), model) == []


def test_states_survive_a_round_trip_after_regrouping() -> None:
    twins = []
    for _ in range(2):
        model = make_model()
        optimizer = OPTIMIZERS["Adam"](model.parameters())
        own_group([optimizer], amplitudes(model), model, lr_multiple=2.0)
        twins.append((model, optimizer))
    (first, one), (second, two) = twins
    list(train(first, one, None, 3))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert own(two)[0]["name"] == GROUP_NAME
    list(train(first, one, None, 3))
    list(train(second, two, None, 3))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert own_group([two], amplitudes(second), second) == [] and len(two.param_groups) == 2


@pytest.mark.parametrize("schedule", ["LambdaLR from zero", "OneCycleLR", "SequentialLR", "ReduceLROnPlateau"])
@pytest.mark.parametrize("kind", ["AdamW", "Adam", "Adagrad"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_state_saved_ungrouped_is_restored_before_regrouping(kind: str, frozen: bool, schedule: str) -> None:
    """As the Hugging Face Trainer does it: the state comes back into what is as the user built it."""

    def build() -> tuple[nn.Module, Optimizer, Any]:
        model = make_model()
        model[0].act.eafo_0_eps.requires_grad_(not frozen)
        decayed = [p for p in model.parameters() if p.dim() != 1]
        rest = [p for p in model.parameters() if p.dim() == 1]
        optimizer = OPTIMIZERS[kind]([{"params": decayed}, {"params": rest, "weight_decay": 0.0}])
        return model, optimizer, SCHEDULES[schedule](optimizer)

    def regroup(model: nn.Module, optimizer: Optimizer, scheduler: Any) -> None:
        options: dict[str, Any] = {"schedulers": [scheduler], "lr_multiple": 3.0, "save_ungrouped": True}
        own_group([optimizer], amplitudes(model), model, **options)

    first, second = build(), build()
    plain = [len(group["params"]) for group in first[1].param_groups]
    regroup(*first)
    list(train(*first, 3))
    saved = copy.deepcopy([part.state_dict() for part in first])
    assert [len(group["params"]) for group in saved[1]["param_groups"]] == plain
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    regroup(*second)
    for one, two in zip(train(*first, 5), train(*second, 5), strict=True):
        assert one == pytest.approx(two)
    for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------ which optimiser, which group


def test_run_twice_it_changes_nothing() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    scheduler = SCHEDULES["StepLR"](optimizer)
    own_group([optimizer], amplitudes(model), model, schedulers=[scheduler])
    before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(scheduler.state_dict())
    own_group([optimizer], amplitudes(model), model, schedulers=[scheduler], lr_multiple=9.0)
    assert (optimizer.state_dict(), scheduler.state_dict()) == before


def test_two_optimisers_keep_their_own_amplitudes() -> None:
    gan = nn.ModuleDict({"generator": make_model(), "discriminator": make_model()})
    generator = torch.optim.Adam(gan["generator"].parameters(), lr=0.1)
    discriminator = torch.optim.SGD(gan["discriminator"].parameters(), lr=0.01)
    schedulers = [SCHEDULES["StepLR"](generator), SCHEDULES["OneCycleLR"](discriminator)]
    own_group([generator, discriminator], amplitudes(gan), gan, schedulers=schedulers, lr_multiple=1.0)
    assert_each_once(generator, list(gan["generator"].parameters()))
    assert_each_once(discriminator, list(gan["discriminator"].parameters()))
    assert len(schedulers[0].base_lrs) == len(schedulers[1].base_lrs) == 2
    for name, optimizer, scheduler in zip(gan, (generator, discriminator), schedulers, strict=True):
        for base, eps in train(gan[name], optimizer, scheduler):
            assert eps == base


def test_eps_that_no_optimiser_holds_goes_to_its_nearest_relatives() -> None:
    model = make_model()
    slow = torch.optim.SGD(model[0].linear.parameters(), lr=0.001)
    fast = torch.optim.SGD(
        [{"params": [model[1].linear.bias]}, {"params": [model[1].linear.weight], "lr": 0.5}], lr=0.2
    )
    own_group([slow, fast], amplitudes(model), model, lr_multiple=1.0)
    assert own(slow)[0]["params"] == [model[0].act.eafo_0_eps] and own(slow)[0]["lr"] == 0.001
    assert own(fast)[0]["params"] == [model[1].act.eafo_0_eps] and own(fast)[0]["lr"] == 0.5


def test_frozen_relatives_lead_up_the_tree() -> None:
    model = make_model()
    head = torch.optim.SGD(model[1].linear.parameters(), lr=0.1)
    own_group([head], amplitudes(model), model, lr_multiple=1.0)
    assert len(own(head)[0]["params"]) == 2


@pytest.mark.parametrize("schedule", ["LambdaLR from zero", "OneCycleLR", "SequentialLR"])
def test_amplitudes_of_several_groups_keep_the_rate_of_their_own(schedule: str) -> None:
    model = make_model()
    groups = [{"params": list(model[0].parameters()), "lr": 0.01}, {"params": list(model[1].parameters())}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    scheduler = SCHEDULES[schedule](optimizer)
    own_group([optimizer], amplitudes(model), model, schedulers=[scheduler], lr_multiple=4.0)
    assert [group["name"] for group in own(optimizer)] == ["eafo", "eafo-2"]
    for rates in train(model, optimizer, scheduler):
        assert rates[2:] == pytest.approx([4 * rate for rate in rates[:2]])


def test_lambdas_by_group_stay_with_their_group() -> None:
    model = make_model()
    optimizer = torch.optim.SGD([{"params": list(layer.parameters())} for layer in model], lr=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda k: 1.0, lambda k: 0.5**k])
    own_group([optimizer], amplitudes(model), model, schedulers=[scheduler], lr_multiple=1.0)
    for rates in train(model, optimizer, scheduler, 4):
        assert rates[2:] == rates[:2]
    assert rates[0] != rates[1]


def test_decayed_and_undecayed_groups() -> None:
    model = make_model()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=0.1)
    own_group([optimizer], amplitudes(model), model, lr_multiple=1.0)
    assert_each_once(optimizer, list(model.parameters()))
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 2]


def test_a_group_of_amplitudes_alone_may_become_empty() -> None:
    model = make_model()
    scalars = list(amplitudes(model).values())
    rest = [p for p in model.parameters() if p.dim()]
    for make in (torch.optim.SGD, torch.optim.Adam):
        optimizer = make([{"params": scalars, "lr": 0.5}, {"params": rest}], lr=0.1)
        own_group([optimizer], amplitudes(model), model, lr_multiple=1.0)
        assert optimizer.param_groups[0]["params"] == [] and own(optimizer)[0]["lr"] == 0.5
        list(train(model, optimizer, None, 2))


@pytest.mark.parametrize("frozen", [1, 2])
@pytest.mark.parametrize("kind", ["SGD", "Adagrad"])
def test_frozen_amplitudes_are_in_no_group(frozen: int, kind: str) -> None:
    model = make_model()
    for layer in list(model)[:frozen]:
        layer.act.eafo_0_eps.requires_grad_(False)
    optimizer = OPTIMIZERS[kind](model.parameters())
    own_group([optimizer], amplitudes(model), model, lr_multiple=1.0)
    assert_each_once(optimizer, [p for p in model.parameters() if p.requires_grad])
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(own(optimizer)) == (1 if frozen == 1 else 0)


def test_lbfgs_keeps_its_one_group_and_a_note_says_so() -> None:
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    notes = own_group([optimizer], amplitudes(model), model, lr_multiple=1.0)
    assert len(optimizer.param_groups) == 1
    (note,) = notes
    assert note.startswith("LBFGS has one parameter group only: 0.act.eafo_0_eps, 1.act.eafo_0_eps share its options")
    assert "policy='entropy'" in note and "\n" not in note
    x = torch.randn(5, 3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    before = model[0].act.eafo_0_eps.item()
    optimizer.step(closure)
    assert model[0].act.eafo_0_eps.item() != before


def test_optimisers_that_cannot_take_a_scalar_are_passed_over() -> None:
    model = make_model()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    lbfgs = torch.optim.LBFGS(matrices)
    adam = torch.optim.Adam([p for p in model.parameters() if p.dim() == 1], lr=0.1)
    assert own_group([lbfgs, adam], amplitudes(model), model) == []
    assert len(own(adam)[0]["params"]) == 2
    (note,) = own_group([torch.optim.LBFGS(matrices)], amplitudes(model), model)
    assert note.startswith("no optimiser can take 0.act.eafo_0_eps, 1.act.eafo_0_eps: they stay as they are. ")
    assert "AdamW" in note and "policy='entropy'" in note and "\n" not in note


def test_many_amplitudes_are_one_line() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(12)))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    (note,) = own_group([torch.optim.LBFGS(matrices)], amplitudes(model), model)
    assert "2.act.eafo_0_eps and 9 more: they stay" in note


def test_an_optimiser_of_sparse_gradients_gives_its_amplitudes_away() -> None:
    model = make_model()
    sparse = torch.optim.SparseAdam(amplitudes(model).values())
    (note,) = own_group([sparse], amplitudes(model), model)
    assert note.startswith("no optimiser can take")
    assert sparse.param_groups[0]["params"] == []
    adam = torch.optim.Adam([p for p in model.parameters() if p.dim()], lr=0.1)
    assert own_group([torch.optim.SparseAdam(amplitudes(model).values()), adam], amplitudes(model), model) == []
    assert len(own(adam)[0]["params"]) == 2


class MatricesOnly(torch.optim.SGD):
    """As many a research optimiser: refuses what is no matrix, after it has taken it."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dim() != 2:
                raise AssertionError("matrices only")


def test_an_optimiser_that_refuses_them_stays_whole() -> None:
    model = make_model()
    optimizer = MatricesOnly([p for p in model.parameters() if p.dim() == 2], lr=0.1)
    scheduler = SCHEDULES["StepLR"](optimizer)
    (note,) = own_group([optimizer], amplitudes(model), model, schedulers=[scheduler])
    assert note.startswith("no optimiser can take 0.act.eafo_0_eps, 1.act.eafo_0_eps")
    assert "(MatricesOnly refuses them, AssertionError: matrices only)" in note and "\n" not in note
    assert len(optimizer.param_groups) == len(scheduler.base_lrs) == 1
    optimizer.load_state_dict(optimizer.state_dict())
    list(train(model, optimizer, scheduler, 2))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_takes_matrices_only() -> None:
    model = make_model()
    muon = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=0.1)
    adam = torch.optim.Adam([p for p in model.parameters() if p.dim() == 1], lr=0.01)
    assert own_group([muon, adam], amplitudes(model), model, lr_multiple=1.0) == []
    assert own(muon) == [] and own(adam)[0]["lr"] == 0.01
    (note,) = own_group([torch.optim.Muon(muon.param_groups[0]["params"])], amplitudes(model), model)
    assert note.startswith("no optimiser can take 0.act.eafo_0_eps, 1.act.eafo_0_eps")


def test_a_wrapped_optimiser_is_looked_through() -> None:
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    model = make_model()
    inner = OPTIMIZERS["SGD"](model.parameters())
    scheduler = SCHEDULES["StepLR"](inner)
    outer: Any = Wrapper(inner)
    scheduler.optimizer = outer
    own_group([outer], amplitudes(model), model, schedulers=[scheduler])
    assert len(own(inner)) == 1 and len(scheduler.base_lrs) == 2


def test_no_optimiser_at_all() -> None:
    model = make_model()
    assert own_group([], amplitudes(model), model) == []


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    "option, value",
    [("lr", -0.1), ("lr", float("nan")), ("lr", float("inf")), ("lr_multiple", -1.0), ("weight_decay", -0.1)],
)
def test_numbers_that_cannot_work(option: str, value: float) -> None:
    model = make_model()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    with pytest.raises(ConfigError) as error:
        own_group([optimizer], amplitudes(model), model, **{option: value})
    assert error.value.option == option and f"{option}={value!r}" in str(error.value)
    assert len(optimizer.param_groups) == 1


def test_one_of_the_two_rates() -> None:
    with pytest.raises(ConfigError, match=r"lr_multiple=2\.0: given beside lr=0\.1"):
        own_group([], {}, nn.Identity(), lr=0.1, lr_multiple=2.0)


def test_a_rate_of_its_own_beside_a_rate_of_zero_is_refused_and_leaves_the_optimiser_whole() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(ConfigError, match="is 0"):
        own_group([optimizer], amplitudes(model), model, lr=0.1)
    assert_each_once(optimizer, list(model.parameters()))


def test_names_reach_the_terminal_as_codes() -> None:
    model = nn.Module()
    vars(model)["_modules"]["block\x1b[31m"] = Layer()
    named = {"block\x1b[31m.act.eafo_0_eps": next(iter(amplitudes(model).values()), nn.Parameter(torch.zeros(())))}
    for optimizer in (torch.optim.LBFGS(named.values()), MatricesOnly([nn.Parameter(torch.zeros(2, 2))], 0.1)):
        (note,) = own_group([optimizer], named, model)
        assert "\x1b" not in note and r"block\x1b[31m.act.eafo_0_eps" in note
