"""AdamW with a learning rate that warms up and then follows a cosine: what every task here trains with."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.nn import Parameter
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from eafo_dynamic.experiments.learnable import own_parameters

__all__ = ["adamw_with_schedule", "warmup_cosine"]


def warmup_cosine(step: int, warmup_steps: int, total_steps: float) -> float:
    """Factor of the learning rate: a line from 0 to 1, then half a cosine from 1 to 0.

    Args:
        step: optimiser steps done.
        warmup_steps: length of the line.
        total_steps: end of the cosine; infinity leaves the factor at 1.

    Returns:
        A number in [0, 1]; above 0 at the first step.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def adamw_with_schedule(
    module: LightningModule,
    lr: float,
    weight_decay: float,
    warmup_steps: int,
    activation_lr_multiple: float | None = None,
) -> OptimizerLRScheduler:
    """AdamW over all parameters, and `warmup_cosine` over the steps of the module's trainer.

    Args:
        module: the module to train, attached to a trainer.
        lr: largest learning rate.
        weight_decay: of every parameter.
        warmup_steps: optimiser steps until the learning rate is at its largest.
        activation_lr_multiple: learning rate of the parameters of learnable activations, in units of `lr`; they get a
            group of their own, without weight decay, as amplitudes of corrections do. None: as all other parameters.

    Returns:
        The optimiser and the scheduler, in Lightning's form.
    """
    optimizer = AdamW(_groups(module, lr, activation_lr_multiple), lr=lr, weight_decay=weight_decay)
    total_steps = module.trainer.estimated_stepping_batches
    scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup_steps, total_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _groups(module: LightningModule, lr: float, activation_lr_multiple: float | None) -> list[dict[str, Any]]:
    everything = list(module.parameters())
    of_activations: list[Parameter] = []
    if activation_lr_multiple is not None:
        of_activations = [parameter for _, parameter in own_parameters(module)]
    if not of_activations or activation_lr_multiple is None:
        return [{"params": everything}]
    taken = {id(parameter) for parameter in of_activations}
    others = [parameter for parameter in everything if id(parameter) not in taken]
    return [
        {"params": others},
        {"params": of_activations, "lr": activation_lr_multiple * lr, "weight_decay": 0.0},
    ]
