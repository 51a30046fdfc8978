"""Models that are watched: the same bits, no parameter, and alerts in plain words."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from eafo_dynamic import EAFOController, merge, unwrap
from eafo_dynamic.errors import ConfigError, SiteError
from eafo_dynamic.policy import Rule
from eafo_dynamic.policy.options import Options


class Net(nn.Module):
    """A ReLU module that is called twice, and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        return self.last(torch.tanh(self.second(self.act(self.second(x)))))


def watched(net: nn.Module, **options: object) -> EAFOController:
    return EAFOController.attach(net, torch.randn(2, 8), policy="observe", **options)  # pyright: ignore[reportArgumentType]


def test_a_watched_model_trains_to_the_same_bits_without_a_parameter_more() -> None:
    torch.manual_seed(0)
    plain = Net()
    net = copy.deepcopy(plain)
    controller = watched(net, update_every_n_steps=3, density="histogram", per_channel=True)
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert list(net.state_dict()) == list(plain.state_dict())
    assert not controller.amplitudes
    optimizers = [torch.optim.AdamW(each.parameters(), 0.01) for each in (plain, net)]
    for step in range(1, 9):
        x = torch.randn(16, 8)
        for each, optimizer in zip((plain, net), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
        controller.step(step)
    assert controller.rounds > 3
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), net.parameters(), strict=True))
    plain.eval(), net.eval()
    assert torch.equal(net(x), plain(x))
    assert torch.equal(merge(net)(x), plain(x))
    unwrap(net)
    assert type(net) is Net and not list(net.buffers()) and not net._non_persistent_buffers_set


def test_each_call_has_range_and_flat_part() -> None:
    net = nn.Sequential(nn.Identity(), nn.Hardtanh(), nn.Identity())
    controller = EAFOController.attach(net, policy="observe", functional="off", target_modules="Hardtanh")
    net(torch.linspace(-3, 1, 4001).view(1, -1))
    (row,) = controller.update(1)
    assert (row["low"], row["high"]) == (pytest.approx(-3), pytest.approx(1, abs=0.01))
    assert row["flat_fraction"] == pytest.approx(0.5, abs=0.01)
    assert row["eps"] == 0.0 and row["policy"] == "observe"


def test_alerts_are_in_plain_words_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.first.bias[:12] = -10.0
    controller = watched(net, samples_per_site=65536)
    events: list[object] = []
    with caplog.at_level(logging.WARNING, "eafo_dynamic"):
        for step in (1, 2, 4):
            controller.collecting = True
            if step == 4:
                with torch.no_grad():
                    net.first.weight.mul_(500)
            net(torch.randn(256, 8))
            events.append(controller.step(step, due=True)[0]["event"])
    assert events[0] == "38 % of the units did not fire"
    assert events[1] == "38 % of the units did not fire, since step 1"
    assert "times as wide as at step 2" in str(events[2])
    assert sum("act#0: 38 %" in record.getMessage() for record in caplog.records) == 1


def test_a_resumed_watch_goes_on() -> None:
    net = Net()
    with torch.no_grad():
        net.first.bias.fill_(-100.0)
    controller = watched(net)
    net(torch.randn(64, 8))
    controller.step(1)
    again = watched(net)
    again.load_state_dict(controller.state_dict())
    net(torch.randn(64, 8))
    assert "100 % of the units did not fire, since step 1" in str(again.step(2)[0]["event"])


def test_a_corrected_model_is_not_taken_apart() -> None:
    net = Net()
    EAFOController.attach(net, torch.randn(2, 8))
    with pytest.raises(SiteError, match="this one has corrections, first of them act#0"):
        EAFOController.attach(net, torch.randn(2, 8), policy="observe")


def test_a_watched_model_can_be_corrected_later() -> None:
    net = Net()
    watched(net)
    controller = EAFOController.attach(net, torch.randn(2, 8), eps_init=0.02)
    assert all(eps.item() == pytest.approx(0.02) for name, eps in controller.amplitudes.items() if "eps" in name)
    assert [site.observes for site in controller.sites] == [False] * 3


def test_observe_stands_alone() -> None:
    with pytest.raises(ConfigError, match="leaves the whole model as it is"):
        EAFOController.attach(Net(), policy=[Rule("act", "observe"), Rule(".*", "learned")])


def test_another_base_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"base='silu'.*'observe' leaves the model as it is"):
        Options(policy="observe", base="silu")
