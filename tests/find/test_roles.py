"""Each activation call is known for what it is: hidden, a gate, what needs a range, or a part of a loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from eafo_dynamic import EAFOCallback
from eafo_dynamic.apply.surgery import wrap
from eafo_dynamic.find.sites import Selection, SiteReport, find_sites
from tests.zoo.score import bit_differences


class Net(nn.Module):
    """Layers, and a forward that is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        self.head, self.norm = nn.Linear(16, 1), nn.BatchNorm1d(16)
        self.tanh, self.softplus, self.relu6, self.sigmoid = nn.Tanh(), nn.Softplus(), nn.ReLU6(), nn.Sigmoid()
        self.given = forward

    def forward(self, x: Tensor) -> Any:
        return self.given(self, x)


def example() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def report_of(forward: Callable[[Any, Tensor], Any], **selection: Any) -> SiteReport:
    torch.manual_seed(0)
    return find_sites(Net(forward), example(), selection=Selection(**selection))


def roles_of(report: SiteReport) -> list[str]:
    return [site.role for site in report.sites if site.role != "part" and "not reached" not in site.reason]


def linear_attention(m: Any, x: Tensor) -> Tensor:
    q, k = F.elu(m.two(m.one(x))) + 1, F.elu(m.three(m.one(x)).repeat(1, 2)) + 1
    weights = q @ k.T
    return m.three((weights @ m.one(x)) / weights.sum(-1, keepdim=True))


def squashed_actor(m: Any, x: Tensor) -> Tensor:
    a = torch.tanh(m.two(m.one(x)))
    return m.head(a) - torch.log(1 - a * a + 1e-6).sum(-1)


def squared_distance(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.one(x))
    return m.head(h) + (h - h.flip(0)).square().sum(-1, keepdim=True).sqrt()


def root_mean_square(m: Any, x: Tensor) -> Tensor:
    h = F.silu(m.one(x))
    return m.head(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


def softmax_by_hand(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.one(x)).exp()
    return m.head(h / h.sum(-1, keepdim=True))


RANGES: dict[str, Callable[[Any, Tensor], Any]] = {
    "a root": lambda m, x: (F.relu(m.head(m.one(x))) + 1e-3).sqrt(),
    "a power": lambda m, x: m.two(F.relu(m.one(x)) ** 0.45),
    "a logarithm": lambda m, x: torch.log(m.softplus(m.one(x)) + 1e-6),
    "a logarithm behind a minus": squashed_actor,
    "a division": lambda m, x: m.two(m.one(x) / m.softplus(m.one(x))),
    "one over it": lambda m, x: 1 / (F.relu(m.one(x)) + 1),
    "linear attention": linear_attention,
    "elu + 1 alone": lambda m, x: m.two(F.elu(m.one(x)) + 1),
    "a distribution": lambda m, x: Normal(m.head(m.one(x)), m.softplus(m.head(m.one(x)))).rsample(),
    "a comparison": lambda m, x: m.two(x.repeat(1, 2) * (F.relu(m.one(x)) > 0.5)),
    "a variance": lambda m, x: F.gaussian_nll_loss(m.head(m.one(x)), x[:, :1], m.softplus(m.head(m.one(x)))),
    "an image": lambda m, x: m.tanh(m.one(x)).view(4, 1, 4, 4),
    "few outputs": lambda m, x: 2.0 * torch.tanh(m.head(m.one(x))),
    "as many outputs as inputs": lambda m, x: torch.tanh(m.three(m.one(x))),
    "squashed features": lambda m, x: torch.tanh(m.two(m.one(x))),
    "a positive output of any width": lambda m, x: m.softplus(m.two(m.one(x))),
    "a positive output": lambda m, x: (m.head(m.one(x)), m.softplus(m.head(m.one(x)))),
}
GATES: dict[str, Callable[[Any, Tensor], Any]] = {
    "relu6 over 6, after the product": lambda m, x: m.two(m.one(x) * F.relu6(m.two(m.one(x)) + 3) / 6),
    "relu6 over 6": lambda m, x: m.two(m.one(x) * (F.relu6(m.two(m.one(x)) + 3) / 6)),
    "a module of relu6": lambda m, x: m.two(m.one(x) * m.relu6(m.two(m.one(x)) + 3) * (1 / 6)),
    "hardtanh from 0 to 1": lambda m, x: m.two(m.one(x) * F.hardtanh(m.two(m.one(x)) + 0.5, 0, 1)),
    "tanh from 0 to 1": lambda m, x: m.two(m.one(x) * (torch.tanh(m.two(m.one(x))) + 1) / 2),
    "tanh by a module": lambda m, x: m.two(m.one(x) * (0.5 * m.tanh(m.two(m.one(x))) + 0.5)),
}
HIDDEN: dict[str, Callable[[Any, Tensor], Any]] = {
    "a layer": lambda m, x: m.two(F.relu(m.one(x))),
    "a norm and a layer": lambda m, x: m.two(m.norm(torch.tanh(m.one(x)))),
    "shapes, sums and dropout": lambda m, x: m.two(F.dropout(F.gelu(m.one(x)).view(4, 4, 4).flatten(1)) + m.one(x)),
    "a distance beside the layer": squared_distance,
    "a root mean square": root_mean_square,
    "softmax": lambda m, x: m.head(F.relu(m.one(x)).softmax(-1)),
    "softmax by hand": softmax_by_hand,
    "a unit vector": lambda m, x: m.head(F.normalize(F.relu(m.one(x)))),
    "a mask of it": lambda m, x: m.head((lambda h: h * (h > 0.1))(F.relu(m.one(x)))),
    "returned beside the layer": lambda m, x: (lambda h: (m.head(h), h))(torch.tanh(m.one(x))),
    "features": lambda m, x: F.relu(m.three(m.one(x))),
    "a gate's other factor": lambda m, x: m.two(F.relu(m.one(x)) * torch.tanh(m.two(m.one(x)))),
    "hardswish of a relu6": lambda m, x: m.two((lambda h: h * F.relu6(h + 3) / 6)(m.one(x))),
}


@pytest.mark.parametrize("name", RANGES)
def test_what_needs_a_range_is_left_alone(name: str) -> None:
    report = report_of(RANGES[name])
    assert not report.wrapped or "not reached" in report.wrapped[0].reason, report
    assert set(roles_of(report)) == {"range"}
    assert all(site.reason for site in report.skipped)


@pytest.mark.parametrize("name", GATES)
def test_gates_are_left_alone(name: str) -> None:
    assert roles_of(report_of(GATES[name])) == ["gate"]


@pytest.mark.parametrize("name", HIDDEN)
def test_what_a_layer_takes_is_hidden(name: str) -> None:
    found = roles_of(report_of(HIDDEN[name]))
    assert found and set(found) <= {"hidden", "gate"} and "hidden" in found


def snake(h: Tensor) -> Tensor:
    return h + torch.sin(2.0 * h) ** 2 / 2.0


WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp": lambda h: h.clamp(min=0),
    "clamp_min": lambda h: torch.clamp_min(h, 0.0),
    "maximum": lambda h: torch.maximum(h, torch.tensor(0.0)),
    "maximum with zeros": lambda h: torch.maximum(h, torch.zeros_like(h)),
    "where": lambda h: torch.where(h > 0, h, 0.1 * h),
    "a mask": lambda h: h * (h > 0),
    "elu": lambda h: torch.where(h > 0, h, torch.exp(h) - 1),
    "silu by an exponential": lambda h: h / (1 + torch.exp(-h)),
    "softsign": lambda h: h / (1 + h.abs()),
    "sine": lambda h: torch.sin(h),
    "arc tangent": lambda h: torch.atan(h),
    "snake": snake,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_written_out_functions_are_corrected(name: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = WRITTEN[name](m.one(x))
        return m.three(WRITTEN[name](m.two(h)) + h)

    torch.manual_seed(0)
    model, x = Net(forward), example()
    report = find_sites(model, x)
    assert [site.kind for site in report.wrapped] == ["written", "written"]
    assert bit_differences(model, lambda m: m(x), True) == []
    plain = model(x)
    inner = WRITTEN[name](model.two(WRITTEN[name](model.one(x)))).detach()
    seen: list[Tensor] = []
    model.three.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    hosted = wrap(model, report, 0.0)
    assert torch.equal(model(x), plain)
    for host, site in hosted:
        nn.init.constant_(getattr(host, site.keys[0]), 0.3)
        assert not torch.equal(model(x), plain)
        nn.init.zeros_(getattr(host, site.keys[0]))
    assert inner.shape == seen[0].shape


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_corrects_written_out_functions_too() -> None:
    torch.manual_seed(0)
    model, x = Net(lambda m, x: m.three(WRITTEN["where"](m.two(WRITTEN["clamp"](m.one(x)))))), example()
    wrap(model, find_sites(model, x), 0.3)
    compiled: Any = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


LISTED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "in place": (lambda m, x: m.two((lambda h: h.mul_(h.sigmoid()))(m.one(x))), "in place"),
    "by a module": (lambda m, x: m.two((lambda h: h * m.sigmoid(h))(m.one(x))), "with a module"),
    "alone and inside another": (
        lambda m, x: m.two(torch.sin(m.one(x)) + (lambda h: h + torch.sin(h))(m.one(x))),
        "both alone and inside",
    ),
    "a clamp of a loss": (lambda m, x: m.head(m.one(x)).clamp(min=0).mean(), "loss"),
    "an output": (lambda m, x: m.head(m.one(x)).clamp(-1, 1), "output"),
    "coordinates": (lambda m, x: (lambda c: m.two(c - c.floor()))(m.one(x).clamp(0, 9)), "rounding"),
    "a denominator": (lambda m, x: m.two(m.one(x) / m.head(m.one(x)).clamp(min=1e-3)), "div"),
}


@pytest.mark.parametrize("name", LISTED)
def test_what_cannot_be_corrected_is_listed_with_the_reason(name: str) -> None:
    forward, words = LISTED[name]
    reasons = [site.reason for site in report_of(forward).skipped if site.kind == "written"]
    assert reasons and any(words in reason for reason in reasons), reasons


def snake_by_channel(m: Any, x: Tensor) -> Tensor:
    h = m.one(x)
    return m.two(h + torch.sin(m.norm.weight * h) ** 2 / m.norm.weight)


def snake_with_two_weights(m: Any, x: Tensor) -> Tensor:
    h, alpha, beta = m.one(x), m.norm.weight.log().exp(), (m.norm.weight * 2.0).exp()
    return m.two(h + (1.0 / (beta + 1e-9)) * torch.pow(torch.sin(h * alpha), 2))


BY_CHANNEL: dict[str, Callable[[Any, Tensor], Any]] = {
    "snake": snake_by_channel,
    "snake with two weights": snake_with_two_weights,
    "swish": lambda m, x: (lambda h: m.two(h * torch.sigmoid(m.norm.weight * h)))(m.one(x)),
    "a rectifier": lambda m, x: (lambda h: m.two(torch.where(h > 0, h, 0.1 * m.norm.weight * h)))(m.one(x)),
}


@pytest.mark.parametrize("name", BY_CHANNEL)
def test_functions_with_a_weight_for_each_channel_are_listed(name: str) -> None:
    report = report_of(BY_CHANNEL[name])
    assert not [site for site in report.wrapped if site.kind != "module"]
    assert [site.reason for site in report.sites if site.name == ":by_channel"] == [
        "written out with a weight for each channel, so that no correction fits all of them"
    ]


class Snake(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.alpha * x) ** 2 / self.alpha


def test_a_module_of_snake_is_listed() -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3), Snake(), nn.Conv1d(6, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 1))
    report = find_sites(model, torch.randn(2, 4, 16))
    assert [site.name for site in report.wrapped] == ["3"]
    assert [(site.name, site.shape) for site in report.skipped] == [("1:by_channel", (6, 14))]


SCALED: dict[str, Callable[[Any, Tensor], Any]] = {
    "a sine that is scaled": lambda m, x: m.two(torch.sin(m.one(x)) * m.norm.weight),
    "a scaled layer": lambda m, x: m.two(m.one(x) * m.norm.weight + m.norm.bias),
    "positions": lambda m, x: m.two(m.one(x) + torch.sin(torch.arange(16) * m.norm.weight)),
    "features of data": lambda m, x: m.one(torch.sin(x * m.norm.weight[:8])),
    "a normalisation": lambda m, x: (lambda h: m.two((h - h.mean()) / (h.var() + 1).sqrt() * m.norm.weight))(m.one(x)),
}


@pytest.mark.parametrize("name", SCALED)
def test_other_uses_of_a_weight_are_not(name: str) -> None:
    assert not [site for site in report_of(SCALED[name]).sites if "by_channel" in site.name]


NOTHING: dict[str, Callable[[Any, Tensor], Any]] = {
    "positions": lambda m, x: m.two(m.one(x) + torch.sin(torch.arange(16) / 3.0)),
    "fourier features of data": lambda m, x: m.one((x * 2.0).sin()),
    "a clamp of data": lambda m, x: m.one(x.clamp(min=0)),
    "a bound against overflow": lambda m, x: m.two(m.one(x).clamp(-1e4, 1e4)),
    "a standard deviation": lambda m, x: m.two(m.one(x) + torch.randn(16) * (0.5 * m.two(m.one(x))).exp()),
    "a masked score": lambda m, x: m.two(torch.where(m.one(x).detach() > 9, m.one(x), -1e9)),
    "a norm": lambda m, x: (lambda h: m.two(h / (h.norm(dim=-1, keepdim=True) + 1)))(m.one(x)),
    "a distance": lambda m, x: m.two((m.one(x) - m.one(x + 1)).abs()),
}


@pytest.mark.parametrize("name", NOTHING)
def test_other_pointwise_functions_are_not_taken_for_activations(name: str) -> None:
    assert not report_of(NOTHING[name]).wrapped


def test_a_hinge_inside_forward_is_a_loss() -> None:
    report = report_of(lambda m, x: F.relu(1 - m.head(F.relu(m.one(x)))).mean())
    assert roles_of(report) == ["hidden", "loss"]


def test_a_gradient_scaler_is_no_activation() -> None:
    class Scaler(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0.1 + x.detach() * 0.9

    report = find_sites(nn.Sequential(nn.Linear(8, 8), Scaler(), nn.Linear(8, 8)), example())
    assert [(site.wrapped, site.reason) for site in report.sites] == [(False, "affine: nothing to correct")]


class Pooler(nn.Module):
    """The end of a BERT: the first token through a layer and a Tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.dense, self.activation = nn.Sequential(nn.Linear(8, 8), nn.GELU()), nn.Linear(8, 8), nn.Tanh()

    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        return {"last_hidden_state": h, "pooler_output": self.activation(self.dense(h[:, 0]))}


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bert, self.head = Pooler(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bert(x)["pooler_output"])


def test_a_pooler_is_an_output_alone_and_hidden_before_a_classifier() -> None:
    tokens = torch.randn(2, 3, 8)
    alone, within = find_sites(Pooler(), tokens), find_sites(Classifier(), tokens)
    assert {site.name: site.role for site in alone.sites} == {"body.1": "hidden", "activation": "range"}
    assert {site.name: site.role for site in within.sites} == {"bert.body.1": "hidden", "bert.activation": "hidden"}


def test_a_generator_makes_images() -> None:
    layers = nn.ConvTranspose2d(8, 8, 4), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2), nn.Tanh()
    report = find_sites(nn.Sequential(*layers), torch.randn(2, 8, 1, 1))
    assert roles_of(report) == ["hidden", "range"]
    assert "output of the model" in report.skipped[0].reason


def test_a_pattern_overrides_the_role_and_warns_once() -> None:
    with pytest.warns(UserWarning, match=r"root|sqrt") as warned:
        report = report_of(RANGES["a root"], target_modules="relu")
    assert [site.name for site in report.wrapped] == [":relu"]
    assert len(warned) == 1


class Step(LightningModule):
    """A training step that is given."""

    def __init__(self, step: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.mean, self.sd = nn.Linear(16, 1), nn.Sequential(nn.Linear(16, 1), nn.Softplus())
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 8), nn.Tanh())
        self.critic = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
        self.counts = nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 1), nn.ReLU())
        self.encoder = nn.Sequential(nn.Linear(8, 2), nn.Tanh())
        self.decoder = nn.Sequential(nn.Linear(2, 8))
        self.given = step

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.given(self, batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def likelihood(m: Any, x: Tensor) -> Tensor:
    h = m.body(x)
    return -Normal(m.mean(h), m.sd(h)).log_prob(x[:, :1]).mean()


def adversaries(m: Any, x: Tensor) -> Tensor:
    fake = m.generator(x[:, :4])
    return m.critic(fake).mean() - m.critic(fake.detach()).mean() + m.critic(x).mean()


STEPS: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, str]]] = {
    "the scale of a normal": (likelihood, {"body.1": "hidden", "sd.1": "range"}),
    "a generator beside its critic": (
        adversaries,
        {"generator.1": "hidden", "generator.3": "range", "critic.1": "hidden"},
    ),
    "counts": (lambda m, x: F.mse_loss(m.counts(x), x[:, :1].abs()), {"counts.1": "hidden", "counts.3": "range"}),
    "a code": (lambda m, x: F.mse_loss(m.decoder(m.encoder(x)), x), {"encoder.1": "hidden"}),
}


@pytest.mark.parametrize("name", STEPS)
def test_roles_in_a_training_step(name: str, tmp_path: Path) -> None:
    step, expected = STEPS[name]
    torch.manual_seed(0)
    callback = EAFOCallback(verbose=False, save_log=False)
    data = DataLoader(TensorDataset(torch.randn(32, 8)), 8)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_epochs=5, callbacks=[callback], default_root_dir=tmp_path, enable_model_summary=False, **quiet
    )
    trainer.fit(Step(step), data)
    assert callback.controller is not None
    sites = callback.controller.report.sites
    assert {site.name.partition("#")[0]: site.role for site in sites if "not reached" not in site.reason} == expected


class Spare(nn.Module):
    """Has an activation that nothing uses, and one that another branch uses."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU()
        self.spare, self.other, self.more = nn.ReLU(), nn.GELU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.act(self.one(x)) if x.sum() < 1e6 else self.other(self.one(x)))


def test_a_spare_module_gets_no_parameter() -> None:
    report = find_sites(Spare(), example())
    assert [site.name for site in report.wrapped] == ["act"]
    unnamed = "not reached by the example input, and no code of the model names it"
    assert {site.name: site.reason for site in report.skipped} == {
        "other": "not reached by the example input; name it in target_modules to wrap it",
        "spare": unnamed,
        "more.1": unnamed,
    }


def test_a_spare_module_gets_no_parameter_without_an_example_either() -> None:
    report = find_sites(Spare())
    assert [site.name for site in report.wrapped] == ["act", "other"]
    assert {site.name: site.reason for site in report.skipped} == dict.fromkeys(
        ("spare", "more.1"), "no code of the model names it"
    )


def test_code_behind_a_property_names_a_module() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self._act, self._other = nn.Linear(8, 8), nn.ReLU(), nn.GELU()

        @property
        def act(self) -> nn.Module:
            return self._act

        @functools.cached_property
        def other(self) -> Callable[[Tensor], Tensor]:
            return self._other

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.other(self.act(self.one(x))))

    assert [site.name for site in find_sites(Hidden()).wrapped] == ["_act", "_other"]


class Experts(nn.Module):
    """Two blocks of the same structure, of which the example reaches one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Softplus())
            for _ in range(2)
        )
        self.tails = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Dropout()) for _ in range(2))
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor, expert: int = 0) -> Tensor:
        return self.last(self.tails[expert](self.experts[expert](x).log()))


def test_an_expert_without_a_token_has_the_roles_of_its_like() -> None:
    report = find_sites(Experts(), example())
    roles = {site.name: (site.role, site.wrapped) for site in report.sites if site.name.startswith("experts")}
    expected = {"1": ("hidden", True), "3": ("hidden", True), "5": ("range", False)}
    assert roles == {f"experts.{k}.{name}": value for k in (0, 1) for name, value in expected.items()}
    tails = {site.name: site.wrapped for site in report.sites if site.name.startswith("tails")}
    assert tails == {"tails.0.0": True, "tails.1.0": False}, "a parameter there would be the only one of its module"


class TestStatic:
    """Without an example nobody sees what a result is for."""

    def test_rectifiers_are_wrapped_and_the_rest_is_named(self) -> None:
        rectifiers = (nn.ReLU(), nn.LeakyReLU(), nn.ReLU6(), nn.GELU(), nn.SiLU(), nn.Mish(), nn.ELU(), nn.SELU())
        others = (nn.Tanh(), nn.Softplus(), nn.Softsign(), nn.Hardtanh())
        report = find_sites(nn.Sequential(*rectifiers, *others))
        assert [site.class_name for site in report.wrapped] == [type(each).__name__ for each in rectifiers]
        assert [site.class_name for site in report.skipped] == [type(each).__name__ for each in others]
        assert all("example" in site.reason and site.role == "unknown" for site in report.skipped)
