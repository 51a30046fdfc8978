"""Attaching too late is said once; on the meta device, attaching early works."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from eafo_dynamic import EAFOController, own_group
from eafo_dynamic.errors import SiteError
from eafo_dynamic.find.sites import find_sites
from eafo_dynamic.policy import attachment
from eafo_dynamic.policy.options import Options


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()


@pytest.fixture(autouse=True)
def no_watch_is_left() -> Iterator[None]:
    gc.collect()
    before = len(attachment._WATCHES)
    yield
    gc.collect()
    assert len(attachment._WATCHES) == before


class TestOptimiser:
    """Amplitudes that no optimiser has."""

    def test_a_controller_that_is_collected_while_an_optimiser_steps_ends_nothing(self) -> None:
        model = net()
        controller = EAFOController.attach(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        other = EAFOController.attach(net())
        vars(other)["itself"] = other  # so that only the garbage collector takes it away
        gone = weakref.ref(other)
        gc.disable()
        # collects while torch goes through its hooks, with another one still to come
        hooks = [lambda *_: gc.collect() and None, lambda *_: None]
        handles = [register_optimizer_step_post_hook(hook) for hook in hooks]
        try:
            del other
            step(model, optimizer)
        finally:
            for handle in handles:
                handle.remove()
            gc.enable()
        assert gone() is None
        controller.step(1)

    @pytest.mark.parametrize("rate", [0.1, 0.0], ids=["rate", "warm-up from zero"])
    @pytest.mark.parametrize("policy", ["learned", "hybrid", "static"])
    def test_one_made_before_attach_is_noticed_at_its_first_step(self, policy: str, rate: float) -> None:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        controller = EAFOController.attach(model, policy=policy, terms="tied")
        step(model, optimizer)
        with pytest.warns(
            UserWarning, match=r"2 of 2 amplitudes are in no optimiser.*1\.eafo_0_eps.*own_group"
        ) as told:
            controller.step(1)
        assert "\n" not in str(told[0].message)
        for number in (2, 3, 4):  # once is enough
            step(model, optimizer)
            controller.step(number)

    def test_what_the_warning_says_helps(self) -> None:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        controller = EAFOController.attach(model)
        own_group([optimizer], controller.amplitudes, model)
        for number in (1, 2):
            step(model, optimizer)
            controller.step(number)
        assert all(abs(eps.item() - 0.01) > 1e-3 for eps in controller.bank.eps)

    def test_policies_without_an_optimiser_need_none(self) -> None:
        for policy in ("entropy", "frozen"):
            model = net()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            controller = EAFOController.attach(model, policy=policy)
            step(model, optimizer)
            controller.step(1)

    def test_one_that_leaves_out_a_site_is_noticed(self) -> None:
        model = net()
        controller = EAFOController.attach(model, terms="tied")
        optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if name != "3.eafo_0_eps"], lr=0.1)
        step(model, optimizer)
        with pytest.warns(UserWarning, match=r"1 of 2 amplitudes.*first of them 3\.eafo_0_eps"):
            controller.step(1)

    def test_other_peoples_optimisers_and_turns_are_no_mistake(self) -> None:
        """Another model's optimiser, and a generator's before the critic's first turn."""
        both = nn.ModuleDict({"make": net(), "judge": net()})
        controller = EAFOController.attach(both)
        makers, judges = (torch.optim.Adam(part.parameters(), lr=0.01) for part in both.values())
        other = nn.Linear(3, 1)
        step(other, torch.optim.SGD(other.parameters(), lr=0.1))
        controller.step(1)
        for number, (part, optimizer) in enumerate([("make", makers), ("make", makers), ("judge", judges)], start=2):
            step(both[part], optimizer)
            controller.step(number)

    def test_a_frozen_layer_waits_until_it_is_unfrozen(self) -> None:
        model = net()
        controller = EAFOController.attach(model, terms="tied")
        model[:2].requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for number in range(1, 7):
            step(model, optimizer)
            controller.step(number)
        model[:2].requires_grad_(True)
        optimizer.add_param_group({"params": list(model[0].parameters())})
        step(model, optimizer)
        controller.step(7)
        step(model, optimizer)
        with pytest.warns(UserWarning, match=r"1 of 2 amplitudes.*first of them 1\.eafo_0_eps"):
            controller.step(8)

    def test_a_frozen_backbone_under_a_head_is_noticed(self) -> None:
        model = net()
        model[:4].requires_grad_(False)
        optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
        controller = EAFOController.attach(model)
        step(model, optimizer)
        with pytest.warns(UserWarning, match="amplitudes are in no optimiser"):
            controller.step(1)

    def test_a_copied_controller_and_one_that_is_gone_watch_nothing(self) -> None:
        controller = EAFOController.attach(net())
        assert len(attachment._WATCHES) > 0
        copied = copy.deepcopy(controller)
        assert copied.step(1) is not None
        del controller
        gc.collect()
        step(other := nn.Linear(3, 1), torch.optim.SGD(other.parameters(), lr=0.1))


class TestReplicas:
    """Attaching to what DistributedDataParallel has wrapped."""

    @pytest.fixture(autouse=True)
    def group(self) -> Iterator[None]:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()

    def test_on_it_inside_it_and_after_it_is_refused(self) -> None:
        model = net()
        replicated = DistributedDataParallel(model)
        for late in (replicated, nn.Sequential(replicated), model, model[:2]):
            with pytest.raises(SiteError, match=r"wrapped.*Attach first, then wrap") as caught:
                EAFOController.attach(late)
            assert "\n" not in str(caught.value)
        assert not any("eafo_" in name for name, _ in model.named_parameters())

    def test_before_it_is_right_and_one_that_is_gone_does_not_count(self) -> None:
        DistributedDataParallel(net())
        model = net()
        DistributedDataParallel(model)  # nobody keeps it
        controller = EAFOController.attach(model)
        replicated = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(replicated.parameters(), lr=0.1)
        step(replicated, optimizer)
        controller.step(1)
        assert all(eps.grad is not None for eps in controller.bank.eps)


class Owner(nn.Module):
    """Calls functions, and initialises itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.25)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.nn.functional.silu(x @ self.weight))


def sites_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "eafo_" in name}


FORMS: list[dict[str, Any]] = [{}, {"terms": "tied"}, {"density": "histogram"}]


class TestMeta:
    """A model that has no numbers yet when it is wrapped."""

    @pytest.mark.parametrize("options", FORMS, ids=str)
    @pytest.mark.parametrize("make", [net, Owner])
    def test_sites_begin_as_on_any_device(self, make: Any, options: dict[str, Any]) -> None:
        report = find_sites(make(), torch.randn(2, 3))
        expected, model = make(), make().to("meta")
        EAFOController(expected, Options(**options), report)
        controller = EAFOController(model, Options(**options), report)
        assert all(value.is_meta for value in sites_of(model).values())
        model.to_empty(device="cpu")
        for name, value in sites_of(expected).items():
            assert torch.equal(sites_of(model)[name], value), name
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for number in (1, 2):
                step(model, optimizer)
                rows = controller.step(number)
                assert all(row["eps"] == row["eps"] for row in rows)
        assert len(rows) == len(controller.sites)

    def test_attach_itself_takes_such_a_model(self) -> None:
        model = net().to("meta")
        controller = EAFOController.attach(model)
        model.to_empty(device="cpu")
        model.load_state_dict(net().state_dict())  # of the plain model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step(model, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [row["n"] for row in controller.step(1)] == [64, 64]

    def test_an_owner_gets_no_reset_parameters_that_its_class_has_not(self) -> None:
        """Else whoever resets a container by its children, as torch_geometric does, would reset the sites alone."""

        class Calls(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return torch.relu(super().forward(x))

        model = Calls(nn.Linear(3, 3))
        EAFOController.attach(model, torch.randn(2, 3))
        assert not hasattr(model, "reset_parameters")

    @pytest.mark.parametrize("options", FORMS, ids=str)
    def test_reset_parameters_resets_sites_as_well(self, options: dict[str, Any]) -> None:
        model = Owner()
        report = find_sites(model, torch.randn(2, 3))
        EAFOController(model, Options(**options), report)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(1.0)
        model.reset_parameters()
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
