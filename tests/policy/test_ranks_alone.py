"""What several ranks need of a controller, where one process can show it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from eafo_dynamic import EAFOController
from eafo_dynamic.policy.gradients import clip_gradients


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.BatchNorm1d(8), nn.Linear(8, 2))


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_gradients_are_clipped_as_torch_clips_them(max_norm: float, norm_type: float) -> None:
    model = net()
    controller = EAFOController.attach(model, torch.zeros(2, 4))
    model(torch.randn(16, 4)).square().sum().backward()
    grads = {name: copy.deepcopy(parameter.grad) for name, parameter in model.named_parameters()}
    norm = controller.clip_grad_norm_(max_norm, norm_type)
    clipped = [parameter.grad.clone() for parameter in model.parameters()]
    for name, parameter in model.named_parameters():
        parameter.grad = grads[name]
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, norm_type))
    torch.testing.assert_close(clipped, [parameter.grad for parameter in model.parameters()])


def test_without_gradients_the_norm_is_zero() -> None:
    assert clip_gradients(net().parameters(), 1.0) == 0.0


def test_one_process_gathers_its_own_state() -> None:
    model = net()
    controller = EAFOController.attach(model, torch.zeros(2, 4))
    model(torch.randn(16, 4))
    state = controller.gathered_state()
    assert state.keys() == controller.state_dict().keys()
    assert len(state["ranks"]) == 1
