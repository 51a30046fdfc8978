"""Activation checkpointing of a part of a forward: the recomputation must see the same sites as the forward did.

A recomputation starts in the middle of a forward whose frames have ended long ago. So a region that is about to be
recomputed is given, the first time a site is asked inside it, a function that opens copies of those frames first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

from eafo_dynamic.errors import SiteError
from eafo_dynamic.internals.torch_internals import (
    autograd_context,
    callers,
    checkpointed_region,
    code_of,
    compiler_option,
    constant_result,
    current_frame,
)

__all__ = ["check_compiled_part", "region_since"]

_REENTRANT = CheckpointFunction.forward.__code__


def region_since(before: Any, grad: bool) -> Any:
    """The innermost checkpointed region that has begun since a frame was entered.

    Args:
        before: ``checkpointed_region()`` when the frame was entered.
        grad: whether gradients were enabled then.

    Returns:
        torch's object for the region; None outside any.

    Raises:
        SiteError: inside another library's kind of checkpointing, which cannot be followed.
    """
    region = checkpointed_region()
    if region is not None and region is not before:
        return region
    if grad and not torch.is_grad_enabled():
        return _reentrant_region()
    return None


def _reentrant_region() -> Any:
    for frame in callers(current_frame(1)):
        context = autograd_context(frame)
        if context is None:
            continue
        code = code_of(frame)
        if code is _REENTRANT:
            return context
        raise SiteError(
            f"{code.co_filename}:{code.co_firstlineno} runs a part of a module's forward inside an autograd "
            "function of its own; whether it will be recomputed, and with which corrections, cannot be known. Use "
            "torch.utils.checkpoint, run whole modules in it, or exclude the activations inside."
        )
    return None


@constant_result
def check_compiled_part(owner: str) -> None:
    """Refuses, while the compiler is at work, a part whose recomputation would find no frame.

    Args:
        owner: name of the module whose forward it is a part of.

    Raises:
        SiteError: unless torch is told to make the frames again.
    """
    flag = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    if not compiler_option(flag):
        raise SiteError(
            f"{owner or 'the model'}: torch.compile cannot follow a part of its forward that is checkpointed with "
            f"use_reentrant=True. Checkpoint with use_reentrant=False, or set torch._dynamo.config.{flag} = True."
        )
