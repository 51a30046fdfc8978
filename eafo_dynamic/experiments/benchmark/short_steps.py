"""Steps of a few milliseconds, in which Python weighs more than arithmetic, and compiled models."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from eafo_dynamic.experiments import MLP, ResNet, VisionTransformer
from eafo_dynamic.experiments.benchmark.rows import Row, compare
from eafo_dynamic.policy.controller import EAFOController
from eafo_dynamic.policy.options import Options
from eafo_dynamic.trainers.optim import own_group

__all__ = ["compiled_cases", "short_cases", "training"]


def training(
    model: nn.Module, x: Tensor, count: int, controller: EAFOController | None = None, *, bfloat16: bool = False
) -> Callable[[], None]:
    """A training, in parts.

    Args:
        model: trained by AdamW.
        x: the only batch.
        count: number of steps of a part.
        controller: of the model's corrections; its rounds run among the steps.
        bfloat16: whether to train under autocast.

    Returns:
        A function that takes the next steps, and waits until the device has taken them.
    """
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    if controller is not None:
        own_group([optimizer], controller.amplitudes, model)
    numbers = itertools.count(1)

    def steps() -> None:
        for _ in range(count):
            optimizer.zero_grad()
            with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
                outputs = model(x)
            outputs.float().square().mean().backward()
            optimizer.step()
            if controller is not None:
                controller.step(next(numbers))
        if x.is_cuda:
            torch.cuda.synchronize()

    return steps


def _beside_plain(name: str, model: nn.Module, x: Tensor, count: int, pairs: int, target: float) -> Row:
    ours = copy.deepcopy(model)
    controller = EAFOController.attach(ours, x)
    first, second = training(ours, x, count, controller), training(model, x, count)
    return compare(name, "plain", first, second, pairs, target, cpu=True)


def short_cases(quick: bool) -> Iterator[Row]:
    """CPU time of trainings of short steps, rounds and samples among them, relative to the plain model's."""
    torch.manual_seed(0)
    steps = Options().update_every_n_steps  # one round
    pairs = 3 if quick else 15
    table, digits = torch.randn(32, 13), torch.randn(64, 64)
    yield _beside_plain("MLP of the wine task", MLP(13, 3, [64, 64, 64]), table, steps, pairs, 1.35)
    autoencoder = MLP(64, 64, [128, 64, 12, 64, 128])
    yield _beside_plain("autoencoder of the digits task", autoencoder, digits, steps, pairs, 1.25)
    if not quick:
        resnet = ResNet(1, width=16, depths=[2, 2, 2])
        yield _beside_plain("ResNet of the digits task", resnet, digits.view(64, 1, 8, 8), steps, 7, 1.15)
        tiny = [layer for _ in range(1000) for layer in (nn.Linear(8, 8), nn.ReLU())]
        yield _beside_plain("1,000 tiny sites", nn.Sequential(*tiny), torch.randn(8, 8), steps, 3, 1.4)


def compiled_cases(quick: bool) -> Iterator[Row]:
    """CPU time of trainings of a model that torch.compile has compiled, relative to the plain model's, compiled too."""
    torch.manual_seed(0)
    steps = Options().update_every_n_steps
    models: dict[str, tuple[nn.Module, Tensor]] = {"MLP": (MLP(64, 10, [256, 256], "gelu"), torch.randn(256, 64))}
    if not quick:
        vit = VisionTransformer(8, 2, 1, dim=64, depth=4, heads=4, mlp_ratio=2.0)
        models["digits ViT, 8x8, batch 64"] = vit, torch.randn(64, 1, 8, 8)
    for name, (model, x) in models.items():
        ours = copy.deepcopy(model)
        controller = EAFOController.attach(ours, x)
        model.compile()
        ours.compile()
        first, second = training(ours, x, steps, controller), training(model, x, steps)
        for run in (first, second):
            run()  # compiles, also what a step that leaves samples runs
        yield compare(name, "plain, compiled", first, second, 3 if quick else 15, 1.05, cpu=True)
