"""Activation checkpointing of a part of a forward: the recomputation must see the same sites as the forward did.

A recomputation starts in the middle of a forward whose frames have ended long ago, and none of the code around it is
on the stack. So a region that is about to be recomputed is given, the first time a site is asked inside it, a function
that opens copies of those frames first; and as it makes the same calls again, in the same order, the sites of its
first run are written down.
"""

from __future__ import annotations

from collections.abc import Collection
from types import FrameType
from typing import Any, NamedTuple

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
    region_of,
)

__all__ = ["Region", "check_compiled_part", "in_new_region", "regions_within"]

_REENTRANT = CheckpointFunction.forward.__code__


class Region(NamedTuple):
    """A part of a forward that will be recomputed.

    Args:
        torchs: torch's object for it.
        around: which of the given frames of Python lie around it, by their ``id``.
    """

    torchs: Any
    around: frozenset[int]


def in_new_region(before: Any, grad: bool) -> bool:
    """Whether a checkpointed region may have begun since a frame was entered; cheap, for every call asks.

    Args:
        before: ``checkpointed_region()`` when the frame was entered.
        grad: whether gradients were enabled then.

    Returns:
        Whether ``regions_within`` can find one.
    """
    region = checkpointed_region()
    return (region is not None and region is not before) or (grad and not torch.is_grad_enabled())


def regions_within(entry: int, entries: Collection[int], before: Any, grad: bool) -> list[Region]:
    """The checkpointed regions around this code that have begun since a frame was entered.

    Args:
        entry: ``id`` of the frame of Python that has entered it.
        entries: of all frames that are to be told to lie around a region or in it.
        before: ``checkpointed_region()`` when the frame was entered.
        grad: whether gradients were enabled then.

    Returns:
        The regions, innermost first.

    Raises:
        SiteError: inside another library's kind of checkpointing, which cannot be followed.
    """
    innermost = checkpointed_region()
    met: list[tuple[Any, set[int]]] = []
    ended = False
    for frame in callers(current_frame(1)):
        if id(frame) in entries:
            for _, around in met:
                around.add(id(frame))
        ended = ended or id(frame) == entry
        region = None if ended else _region_at(frame, grad and not torch.is_grad_enabled())
        if region is not None:
            met.append((region, set()))
    if innermost is not None and innermost is not before and all(region is not innermost for region, _ in met):
        met.insert(0, (innermost, set(entries)))
    return [Region(region, frozenset(around)) for region, around in met]


def _region_at(frame: FrameType, without_grad: bool) -> Any:
    context = autograd_context(frame) if without_grad else None
    if context is None:
        return region_of(frame)
    code = code_of(frame)
    if code is _REENTRANT:
        return context
    raise SiteError(
        f"{code.co_filename}:{code.co_firstlineno} runs a part of a module's forward inside an autograd "
        "function of its own; whether it will be recomputed, and with which corrections, cannot be known. Use "
        "torch.utils.checkpoint, run whole modules in it, or exclude the activations inside."
    )


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
