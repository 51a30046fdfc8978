"""The training loss beside the sites' entropies, in the log."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eafo_dynamic import EAFOController


def test_the_mean_loss_since_the_last_round_is_in_every_row() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    controller = EAFOController.attach(net, policy="entropy", update_every_n_steps=4)
    for step, loss in enumerate((4.0, 3.0, 2.0, 1.0), start=1):
        net(torch.randn(32, 4))
        controller.observe_loss(torch.tensor([loss]))  # of a model that gives it a dimension
        rows = controller.step(step)
    assert [row["loss"] for row in rows] == [pytest.approx(1.5)] * 2
    net(torch.randn(32, 4))
    assert all("loss" not in row for row in controller.update(5)), "nobody has shown one since"
