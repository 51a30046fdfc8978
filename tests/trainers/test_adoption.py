"""Calls that are first met in mid-training: plain, and said so, unless they are adopted."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from eafo_dynamic import CorrectionLog, EAFOCallback
from eafo_dynamic.apply.surgery import hosted_sites, unwrap
from eafo_dynamic.errors import SiteError
from eafo_dynamic.policy.controller import EAFOController
from eafo_dynamic.trainers.lightning.adoption import Adoption

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


class Opens(nn.Module):
    """Has a branch with a call of its own function, one of a function called elsewhere, too, and a module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.act = nn.Tanh()
        self.is_open = False

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        if self.is_open:
            h = F.relu(self.b(h)) + F.silu(self.c(h))
            h = self.act(self.b(h))
        return self.d(F.relu(self.c(h)))


def by_hand(model: Opens, eps: dict[str, float]) -> Tensor:
    """The open model's forward, with every site's eps."""

    def corrected(name: str, base: Any, z: Tensor) -> Tensor:
        return base(z) + eps[name] * z * torch.exp(-z * z / 2)

    h = corrected(":relu#0", F.relu, model.a(X))
    h = corrected(":relu#2", F.relu, model.b(h)) + corrected(":silu#0", F.silu, model.c(h))
    h = corrected("act", torch.tanh, model.b(h))
    return model.d(corrected(":relu#1", F.relu, model.c(h)))


def opened(**options: Any) -> tuple[Opens, EAFOController]:
    net = Opens()
    controller = EAFOController.attach(net, X, **options)
    net.is_open = True
    return net, controller


def set_eps(model: nn.Module) -> dict[str, float]:
    """Another eps for every site."""
    chosen: dict[str, float] = {}
    for number, (host, site) in enumerate(hosted_sites(model)):
        chosen[site.name] = 0.1 * (number + 1)
        for key in site.keys:
            if key.endswith("_eps"):
                nn.init.constant_(getattr(host, key), chosen[site.name])
    return chosen


class TestWithoutAdoption:
    def test_what_the_example_has_not_made_is_plain_and_named_once(self) -> None:
        net, controller = opened()
        expected = {**set_eps(net), ":relu#2": 0.0, ":silu#0": 0.0, "act": 0.0}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = net(X)
            net(X)
        assert torch.allclose(out, by_hand(net, expected), atol=1e-6)
        said = [str(each.message) for each in caught]
        assert len(said) == 2
        assert "a call of relu" in said[0]
        assert "act, which no example has reached" in said[1]
        events = [str(row["event"]) for row in controller.update(1)]
        assert any("act, which no example has reached" in event for event in events)

    @pytest.mark.parametrize("how", ["evaluation", "no gradient"])
    def test_an_activation_that_only_evaluation_reaches_is_none_to_warn_of(self, how: str) -> None:
        class Spare(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.act, self.last = nn.Linear(4, 4), nn.ReLU(), nn.Tanh()
                self.finishes = False

            def forward(self, x: Tensor) -> Tensor:
                h = self.act(self.a(x))
                return self.last(h) if self.finishes else h

        net = Spare()
        controller = EAFOController.attach(net, X)
        net.finishes = True
        if how == "evaluation":
            net.eval()(X)
        else:
            with torch.no_grad():
                net(X)
        assert not controller.met_unknown

    def test_nothing_stays_where_corrections_are_taken_out(self) -> None:
        net, _ = opened()
        assert net.act._forward_pre_hooks
        for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                copied(X)
            assert hosted_sites(copied)[0][1].switch.met_unknown
            unwrap(copied)
            assert not copied.act._forward_pre_hooks
        assert not unwrap(net).get_submodule("act")._forward_pre_hooks


class TestByHand:
    def test_each_new_call_gets_its_own_and_the_others_keep_theirs(self) -> None:
        net, controller = opened()
        before = {name: id(amplitude) for name, amplitude in controller.amplitudes.items()}
        new = controller.adopt(X)
        assert {controller.bank.names[k] for k in range(2, 5)} == {":relu#2", ":silu#0", "act"}
        assert len(new) == 6, "eps and lift"
        assert not new.keys() & before.keys()
        assert all(id(controller.amplitudes[name]) == number for name, number in before.items())
        eps = set_eps(net)
        assert torch.allclose(net(X), by_hand(net, eps), atol=1e-6)
        assert controller.adopt(X) == {}
        net.is_open = False
        assert controller.adopt(X) == {}

    @pytest.mark.parametrize("density", ["gaussian", "histogram"])
    @pytest.mark.parametrize("policy", ["learned", "hybrid", "entropy", "observe"])
    def test_rounds_go_on(self, density: str, policy: str) -> None:
        net = Opens()
        options: dict[str, Any] = {"update_every_n_steps": 2, "density": density, "policy": policy}
        controller = EAFOController.attach(net, X, **options)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2)

        def train(first: int, last: int) -> None:
            for step in range(first, last):
                optimizer.zero_grad()
                net(X).square().mean().backward()
                controller.before_optimizer_step(step - 1)
                optimizer.step()
                controller.step(step)

        train(1, 5)
        net.is_open = True
        new = controller.adopt(X)
        assert bool(new) == (policy in ("learned", "hybrid"))
        if new:
            optimizer.add_param_group({"params": list(new.values())})
        train(5, 9)
        last = [row for row in controller.records if row["step"] == 8]
        assert len(last) == 5
        assert all(row["entropy"] == row["entropy"] for row in last), "not NaN"
        if policy != "observe":
            counts = controller._rounds.density.rounds
            assert counts is not None
            assert counts.tolist() == [5, 5, 2, 2, 2], "rounds 1, 2, 4, 6 and 8"
        state = controller.state_dict()
        again = EAFOController(copy.deepcopy(unwrap(copy.deepcopy(net))), controller.options, controller.report)
        again.load_state_dict(state)

    def test_an_optimiser_that_has_not_got_them_is_named(self) -> None:
        net = Opens()
        controller = EAFOController.attach(net, X)
        optimizer = torch.optim.SGD(net.parameters(), 1e-2)
        net.is_open = True
        assert controller.adopt(X)
        net(X).sum().backward()
        with pytest.warns(UserWarning, match="no optimi"):
            for step in range(1, 5):
                optimizer.step()
                controller.step(step)

    def test_a_loop_that_runs_on_has_no_new_call(self) -> None:
        class Loop(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.turns = nn.Linear(4, 4), 2

            def forward(self, x: Tensor) -> Tensor:
                for _ in range(self.turns):
                    x = F.gelu(self.a(x))
                return x @ torch.ones(4, 2)

        net = Loop()
        controller = EAFOController.attach(net, X)
        net.turns = 5
        assert controller.adopt(X) == {}

    def test_several_ranks_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _, controller = opened()
        monkeypatch.setattr(type(controller.agreement), "size", 2)
        with pytest.raises(SiteError, match="several ranks"):
            controller.adopt(X)

    def test_a_forward_that_fails_leaves_all_as_it_was(self) -> None:
        net, controller = opened()
        before = controller.report
        with pytest.raises(SiteError):
            controller.adopt(torch.randn(2, 3))
        assert controller.report is before
        assert controller.attached
        assert len(hosted_sites(net)) == 2


class Module(LightningModule):
    def __init__(self, opens_at: int = 6) -> None:
        super().__init__()
        self.net, self.opens_at = Opens(), opens_at

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        self.net.is_open = self.global_step >= self.opens_at
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def fit(folder: Path, steps: int, resume: str | None = None, **options: Any) -> tuple[Module, EAFOCallback]:
    callback = EAFOCallback(update_every_n_steps=2, verbose=False, **options)
    keeper = ModelCheckpoint(folder / "ckpt", every_n_train_steps=4, save_top_k=-1)
    trainer = Trainer(
        default_root_dir=folder,
        max_steps=steps,
        callbacks=[callback, keeper],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    module = Module()
    trainer.fit(module, DataLoader(TensorDataset(X, X[:, :1].gt(0).long().squeeze(1)), 16), ckpt_path=resume)
    return module, callback


@pytest.mark.filterwarnings("ignore:.*none that the example made:UserWarning")
@pytest.mark.filterwarnings("ignore:.*no example has reached:UserWarning")
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
class TestUnderLightning:
    def test_a_branch_that_opens_is_adopted_and_the_run_resumes_to_the_last_bit(self, tmp_path: Path) -> None:
        module, callback = fit(tmp_path / "whole", 15, adopt=True)
        assert callback.controller is not None
        assert len(callback.controller.bank.sites) == 5
        eps = {name: value for name, value in module.named_parameters() if name.endswith("_eps")}
        assert len(eps) == 5
        assert all(value.item() != 0.01 for value in eps.values()), "each has been trained"
        log = CorrectionLog.load(tmp_path / "whole")
        assert len(log.manifest["sites"]) == 5
        assert {row["site"] for row in log.rows if row["step"] == 6} < {row["site"] for row in log.rows}

        (checkpoint,) = (tmp_path / "whole" / "ckpt").glob("*step=8.ckpt")
        resumed, _ = fit(tmp_path / "resumed", 15, str(checkpoint), adopt=True)
        for (name, one), (same, two) in zip(module.state_dict().items(), resumed.state_dict().items(), strict=True):
            assert name == same
            assert torch.equal(one, two), name

    def test_without_the_option_they_stay_plain(self, tmp_path: Path) -> None:
        _, callback = fit(tmp_path, 15)
        assert callback.controller is not None
        assert len(callback.controller.bank.sites) == 2

    def test_where_it_cannot_be_it_says_so(self) -> None:
        module = Module()
        module.net.compile(backend="eager")
        trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        with pytest.warns(UserWarning, match="adopt=True does nothing: .*compiled"):
            Adoption(True, trainer, module)
