"""AdamW with a learning rate that warms up and then follows a cosine: what every task here trains with."""

from __future__ import annotations

import math

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

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
    module: LightningModule, lr: float, weight_decay: float, warmup_steps: int
) -> OptimizerLRScheduler:
    """AdamW over all parameters, and `warmup_cosine` over the steps of the module's trainer.

    Args:
        module: the module to train, attached to a trainer.
        lr: largest learning rate.
        weight_decay: of every parameter.
        warmup_steps: optimiser steps until the learning rate is at its largest.

    Returns:
        The optimiser and the scheduler, in Lightning's form.
    """
    optimizer = AdamW(module.parameters(), lr=lr, weight_decay=weight_decay)
    total_steps = module.trainer.estimated_stepping_batches
    scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup_steps, total_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
