"""Whole training steps on a CUDA device in bfloat16, as they are and compiled, and their peak memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eafo_dynamic.experiments import GPT, ResNet, VisionTransformer
from eafo_dynamic.experiments.benchmark.rows import Row, compare, row
from eafo_dynamic.experiments.benchmark.short_steps import training
from eafo_dynamic.policy.controller import EAFOController
from eafo_dynamic.policy.options import Options

__all__ = ["device_steps", "gpu_step_cases"]

_COMPILED = 1.03  # target of every compiled model


class _Case(NamedTuple):
    """A model to train.

    Args:
        name: of the model, with its batch.
        model: the plain model, on the device.
        x: a batch, on the device.
        target: what a step may take over the plain one.
    """

    name: str
    model: nn.Module
    x: Tensor
    target: float


def gpu_step_cases(quick: bool) -> Iterator[Row]:
    """Steps of four models on the current CUDA device; no rows without one.

    Yields:
        Ratios of wall time, rounds and samples among them, and of peak memory.
    """
    if torch.cuda.is_available():
        yield from device_steps(torch.device("cuda", torch.cuda.current_device()), quick)


def device_steps(device: torch.device, quick: bool) -> Iterator[Row]:
    """Steps in bfloat16, relative to the plain model's.

    Args:
        device: what trains.
        quick: tiny models and few steps.

    Yields:
        The rows of one model after the other.
    """
    torch.manual_seed(0)
    pairs, steps = 3, Options().update_every_n_steps  # one round
    if quick:
        pairs, steps = 2, 2
    for case in _cases(device, quick):
        first, second = _beside(case, steps, is_compiled=False)
        yield compare(f"{case.name}, bfloat16", "plain", first, second, pairs, case.target)
        if device.type == "cuda":
            ours, plain = (_peak(run) for run in _beside(case, 3, is_compiled=False))
            yield row(f"{case.name}, peak memory", "plain", ours / plain, 1.01)
        first, second = _beside(case, steps, is_compiled=True)
        yield compare(f"{case.name}, bfloat16, compiled", "plain, compiled", first, second, pairs, _COMPILED)


def _cases(device: torch.device, quick: bool) -> Iterator[_Case]:
    images = torch.randn(256, 3, 32, 32, device=device)
    if quick:
        yield _Case("small GPT", GPT(dim=32, depth=1).to(device), torch.randint(256, (4, 128), device=device), 1.03)
        return
    yield _Case("ResNet-18, 32x32, batch 256", ResNet(width=64, depths=[2, 2, 2, 2]).to(device), images, 1.05)
    yield _Case("ViT-Tiny, 32x32, batch 256", VisionTransformer().to(device), images, 1.15)
    large = VisionTransformer(224, 16, 3, num_classes=1000, dim=768, depth=12, heads=12).to(device)
    yield _Case("ViT-B, 224x224, batch 64", large, torch.randn(64, 3, 224, 224, device=device), 1.03)
    gpt2 = GPT(50304, block_size=1024, dim=768, depth=12, heads=12).to(device)  # of GPT-2's smallest size
    yield _Case("GPT-2 124M, 8 x 1024 tokens", gpt2, torch.randint(50304, (8, 1024), device=device), 1.03)


def _beside(case: _Case, steps: int, is_compiled: bool) -> tuple[Callable[[], None], Callable[[], None]]:
    """Trainings of the corrected model and of the plain one, of which some steps are done."""
    plain = copy.deepcopy(case.model)
    ours = copy.deepcopy(case.model)
    controller = EAFOController.attach(ours, case.x[:2])
    if is_compiled:
        plain.compile()
        ours.compile()
    first = training(ours, case.x, steps, controller, bfloat16=True)
    second = training(plain, case.x, steps, bfloat16=True)
    for run in (first, second):
        run()
    return first, second


def _peak(run: Callable[[], None]) -> int:
    """Bytes that steps allocate at most, beside those that were there before them."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before
