"""Activation checkpointing of a part of a forward: the recomputation must see the same sites as the forward did.

A recomputation starts in the middle of a forward whose frames have ended long ago. So a region that is about to be
recomputed is given, the first time a site is asked inside it, a function that opens copies of those frames first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.utils import checkpoint as _checkpoint

from eafo_dynamic.errors import SiteError

__all__ = ["check_compiled_part", "current_hooks", "foreign_function", "region_since", "replace_recomputation"]

_REENTRANT = _checkpoint.CheckpointFunction.forward.__code__
_TOP_HOOKS = cast(Any, torch._C)._autograd._top_saved_tensors_default_hooks
_APPLY = cast(Any, torch.autograd.Function.apply).__func__.__code__


def current_hooks() -> Any:
    """The saved-tensor hooks in force, by which non-reentrant checkpointing knows its region.

    Returns:
        Their pack function; None without any.
    """
    hooks = _TOP_HOOKS(True)
    return None if hooks is None else hooks[0]


def region_since(hooks: Any, grad: bool) -> Any:
    """The innermost checkpointed region that has begun since a frame was entered.

    Args:
        hooks: ``current_hooks()`` when the frame was entered.
        grad: whether gradients were enabled then.

    Returns:
        torch's object for the region; None outside any.

    Raises:
        SiteError: inside another library's kind of checkpointing, which cannot be followed.
    """
    pack = current_hooks()
    if pack is not hooks and pack is not None and getattr(pack, "__qualname__", "").startswith("_checkpoint_hook"):
        cells = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
        return cells["frame"].cell_contents
    if grad and not torch.is_grad_enabled():
        return _reentrant_region()
    return None


def _reentrant_region() -> Any:
    python_frame = sys._getframe(1)
    while python_frame is not None:
        code = python_frame.f_code
        if code is _REENTRANT:
            return python_frame.f_locals["ctx"]
        context = python_frame.f_locals.get("ctx") if code.co_name == "forward" else None
        if isinstance(context, torch.autograd.function.FunctionCtx):
            raise SiteError(
                f"{code.co_filename}:{code.co_firstlineno} runs a part of a module's forward inside an autograd "
                "function of its own; whether it will be recomputed, and with which corrections, cannot be known. Use "
                "torch.utils.checkpoint, run whole modules in it, or exclude the activations inside."
            )
        python_frame = python_frame.f_back
    return None


def foreign_function() -> str:
    """The autograd function whose forward is running, torch's own checkpointing not counted.

    Returns:
        Its name; empty outside any.
    """
    python_frame = sys._getframe(1)
    while python_frame is not None:
        if python_frame.f_code is _APPLY:
            function = python_frame.f_locals["cls"]
            if function is not _checkpoint.CheckpointFunction:
                return str(function.__name__)
        python_frame = python_frame.f_back
    return ""


def replace_recomputation(region: Any, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Puts a function around a region's recomputation.

    Args:
        region: from ``region_since``.
        around: makes the new function from the present one.

    Raises:
        SiteError: if this version of torch keeps its recomputation elsewhere.
    """
    for name in ("recompute_fn", "run_function"):
        present = getattr(region, name, None)
        if present is not None:
            setattr(region, name, around(present))
            return
    raise SiteError(
        f"activation checkpointing of torch {torch.__version__} cannot be followed inside a module's forward. "
        "Checkpoint whole modules, or exclude the activations inside."
    )


def check_compiled_part(owner: str) -> None:
    """Refuses, while the compiler is at work, a part whose recomputation would find no frame.

    Args:
        owner: name of the module whose forward it is a part of.

    Raises:
        SiteError: unless torch is told to make the frames again.
    """
    flag = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    if not getattr(cast(Any, torch)._dynamo.config, flag, False):
        raise SiteError(
            f"{owner or 'the model'}: torch.compile cannot follow a part of its forward that is checkpointed with "
            f"use_reentrant=True. Checkpoint with use_reentrant=False, or set torch._dynamo.config.{flag} = True."
        )


vars(check_compiled_part)["_dynamo_marked_constant"] = True  # assume_constant_result without importing the compiler
