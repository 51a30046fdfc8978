"""A bare PyTorch loop: two lines attach the controller, one drives it.

Run: python examples/plain_pytorch.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_wine
from torch import nn

from eafo_dynamic import EAFOController, own_group


def main(steps: int = 300) -> EAFOController:
    """Trains a small network on scikit-learn's wine data."""
    torch.manual_seed(0)
    features, labels = load_wine(return_X_y=True)
    x = torch.tensor(features, dtype=torch.float32)
    x, y = (x - x.mean(0)) / x.std(0), torch.tensor(labels)
    model = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3))

    controller = EAFOController.attach(model, x[:2], update_every_n_steps=50)  # before the optimiser is made
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    own_group([optimizer], controller.amplitudes, model)  # eps without weight decay

    for step in range(1, steps + 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        for row in controller.step(step):
            print(f"step {step:4d}  site {row['site']}  eps {row['eps']:+.4f}  entropy {row['entropy']:.4f} nats")
    return controller


if __name__ == "__main__":
    main()
