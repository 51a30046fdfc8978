"""An activation and a policy of one's own, and rules that give each site its policy.

``Snake`` is registered, so that its sites are found. ``SignStep`` moves eps down the entropy by a fixed amount, however
steep the entropy is: a policy says what moves eps, the trust region bounds it in every case.

Run: python examples/custom_activation_policy.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eafo_dynamic import EAFOController, register_activation
from eafo_dynamic.policy import Policy, Rule


@register_activation
class Snake(nn.Module):
    """x + sin^2(frequency x) / frequency: pointwise, and that is all an activation needs to be."""

    def __init__(self, frequency: float = 1.0) -> None:
        super().__init__()
        self.frequency = frequency

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.frequency * x).square() / self.frequency


@dataclass(frozen=True)
class SignStep(Policy):
    """eps goes down the entropy gradient by ``rate`` at every update; the optimiser leaves it alone."""

    rate: float = 0.01

    name = "sign step"  # as the log shows it
    trains_eps = False

    def move(self, eps: Tensor, gradient: Tensor) -> Tensor:
        return eps - self.rate * gradient.sign()


def main(steps: int = 400) -> EAFOController:
    """Fits a wave; returns the controller."""
    torch.manual_seed(0)
    x = torch.linspace(-4, 4, 512).unsqueeze(1)
    y = torch.sin(2 * x) + 0.3 * x
    model = nn.Sequential(nn.Linear(1, 64), Snake(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    rules = [Rule("Snake", SignStep(0.005)), Rule(".*", "learned")]  # the first rule that matches a site decides
    controller = EAFOController.attach(model, x[:2], policy=rules, update_every_n_steps=20)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        for row in controller.step(step):
            if step % 100 == 0:
                where = f"step {step:3d}  {row['site']}  {row['policy']:9}"
                print(f"{where}  eps {row['eps']:+.4f}  loss {loss.item():.4f}")
    return controller


if __name__ == "__main__":
    main()
