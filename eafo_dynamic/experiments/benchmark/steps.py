"""Whole training steps of three kinds of models, with and without the corrections."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eafo_dynamic.apply.merge import merge
from eafo_dynamic.experiments import GPT, ResNet, VisionTransformer
from eafo_dynamic.experiments.benchmark.rows import Row, compare, row
from eafo_dynamic.experiments.benchmark.timing import milliseconds, time_in_pairs
from eafo_dynamic.policy.controller import EAFOController

__all__ = ["refill", "step_cases"]


def _models(quick: bool) -> dict[str, tuple[nn.Module, Tensor, Tensor, int]]:
    """Models, each with inputs, targets and a number of pairs; a single pair is off by some 3 %."""
    torch.manual_seed(0)
    classes = torch.randint(0, 10, (64,))
    if quick:
        images = torch.randn(16, 3, 32, 32)
        return {
            "small ResNet": (ResNet(width=8, depths=[1, 1]), images, classes[:16], 3),
            "small ViT": (VisionTransformer(dim=48, depth=2), images, classes[:16], 3),
        }
    tokens = torch.randint(0, 256, (8, 128))
    images = torch.randn(64, 3, 32, 32)
    return {
        "ResNet-18, 32x32, batch 64": (ResNet(width=64, depths=[2, 2, 2, 2]), images, classes, 15),
        "ViT-Tiny, 32x32, batch 16": (VisionTransformer(), images[:16], classes[:16], 41),
        "GPT, 12 layers of 128": (GPT(dim=128, depth=12, heads=4), tokens, tokens, 41),
        "digits ViT, 8x8, batch 64": (
            VisionTransformer(8, 2, 1, dim=64, depth=4, heads=4, mlp_ratio=2.0),
            images[:, :1, :8, :8],
            classes,
            101,
        ),
    }


def _step(
    model: nn.Module, x: Tensor, y: Tensor, controller: EAFOController | None = None
) -> tuple[Callable[[], None], list[int]]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    count = [0]

    def step() -> None:
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        count[0] += 1
        if controller is not None:
            controller.step(count[0])

    return step, count


def step_cases(quick: bool) -> Iterator[Row]:
    """CPU time of a step with default options relative to the plain model's, update rounds included at their share."""
    for name, (model, x, y, pairs) in _models(quick).items():
        plain, _ = _step(model, x, y)
        yield _corrected_step(name, model, x, y, plain, pairs, filling_steps=1 if quick else 3)
        merged, _ = _step(_merged(model), x, y)
        yield compare(f"{name}, merged", "plain", merged, plain, pairs, 1.01, cpu=True)
        smooth = _with_silu(model)
        if smooth is not None:
            step, _ = _step(smooth, x, y)
            yield compare(f"{name}, torch's SiLU for ReLU", "plain", step, plain, pairs, None, cpu=True)


def _corrected_step(
    name: str, model: nn.Module, x: Tensor, y: Tensor, plain: Callable[[], None], pairs: int, filling_steps: int
) -> Row:
    ours = copy.deepcopy(model)
    controller = EAFOController.attach(ours)
    step, count = _step(ours, x, y, controller)
    found = time_in_pairs(step, plain, pairs, cpu=True)
    for site in controller.sites:
        site.collector.drain()
    # Steps just before a round, in which samples are collected.
    period = controller.options.update_every_n_steps
    count[0] = period * (count[0] // period + 1) - 2
    controller.collecting = True
    for _ in range(filling_steps):
        step()
        count[0] -= 1
    round_ms = milliseconds(lambda: controller.update(1), 5, refill(controller))
    round_share = round_ms / period / found.beside_ms
    return row(
        name,
        "plain",
        found.ratio + round_share,
        1.03,
        "x",
        low=found.low + round_share,
        high=found.high + round_share,
        ms=found.ms,
        beside_ms=found.beside_ms,
        round_share=round_share,
    )


def refill(controller: EAFOController) -> Callable[[], None]:
    """A function that gives every site the samples again that it has now.

    Args:
        controller: a controller whose sites have samples.

    Returns:
        The function; call it before each round that is measured, as collecting is measured by itself.
    """
    pending = [(site.collector, site.collector.pending()) for site in controller.sites]

    def fill() -> None:
        for collector, chunks in pending:
            collector.restore(chunks, controller.bank.device)

    return fill


def _merged(model: nn.Module) -> nn.Module:
    ours = copy.deepcopy(model)
    EAFOController.attach(ours)
    return merge(ours)


def _with_silu(model: nn.Module) -> nn.Module | None:
    """A copy with torch's SiLU, which has to keep its input, in place of its ReLUs; None if it has none."""
    other = copy.deepcopy(model)
    relus: list[tuple[nn.Module, str, nn.ReLU]] = []
    for parent in other.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                relus.append((parent, name, child))
    if not relus:
        return None
    for parent, name, relu in relus:
        setattr(parent, name, nn.SiLU(relu.inplace))
    return other
