"""A residual network in which one ReLU module serves several places.

Every call is a site of its own, since what comes in differs from place to place: ``blocks.0.relu`` is called twice in
a forward. Its in-place ReLUs need no change. With ``per_channel=True`` every channel has an amplitude of its own.

Run: python examples/shared_relu_cnn.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from eafo_dynamic import EAFOController, find_sites, own_group


class Block(nn.Module):
    """As in torchvision's ResNet: one in-place ReLU for both of its places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Net(nn.Module):
    """Two blocks between a stem and a head; the pooling is called as a function."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Block(channels), Block(channels))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def main(steps: int = 200) -> EAFOController:
    """Shows the sites, trains, and returns the controller."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
    model = Net()
    for site in find_sites(model, x[:2]).wrapped:  # a dry run: the example shows how often a module is called
        print(f"{site.name}: {site.base}")

    controller = EAFOController.attach(model, x[:2], update_every_n_steps=20, per_channel=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    own_group([optimizer], controller.amplitudes, model, lr_multiple=0.1)  # eps: a tenth of the rate, no weight decay
    for step in range(1, steps + 1):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        controller.step(step)
    for name, amplitude in controller.amplitudes.items():
        low, high = amplitude.aminmax()
        print(f"{name}: {amplitude.numel()} channels, from {low.item():+.3f} to {high.item():+.3f}")
    return controller


if __name__ == "__main__":
    main()
