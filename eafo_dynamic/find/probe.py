"""A structural copy of a model, to be run without a trace in the model itself or in anybody's random state."""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from eafo_dynamic.errors import SiteError
from eafo_dynamic.internals.torch_internals import MODULE_TABLES

__all__ = ["forked_random_states", "structural_copy"]

_COPIED_BYTES = 2**28
"""Parameters up to this size are copied for the dry run, so that not even a forward that overwrites them can do harm;
larger ones are shared."""


@contextmanager
def structural_copy(model: nn.Module, kept: Mapping[int, Any] | None = None) -> Generator[nn.Module]:
    """A structural copy of the model, to be run without a trace.

    Args:
        model: any.
        kept: objects that are to be shared with the copy, by their id.

    Yields:
        The copy.

    Raises:
        SiteError: if the model refuses to be copied.
    """
    memo = {**_shared(model), **(kept or {})}
    try:
        try:
            probe = copy.deepcopy(model, dict(memo))
        except Exception:
            probe = copy.deepcopy(model, {**memo, **_uncopyable(model, memo)})
    except Exception as error:
        raise SiteError(
            f"{type(model).__name__} cannot be copied for a dry run ({type(error).__name__}: {error}). "
            "Search without an example input."
        ) from error
    with forked_random_states(), torch.no_grad():
        yield probe


def _shared(model: nn.Module) -> dict[int, Any]:
    """What a deep copy of the model must not copy, or must copy in its own way, as a memo of deepcopy."""
    memo: dict[int, Any] = {}
    parameters = [p for p in model.parameters() if not is_lazy(p)]
    if sum(p.numel() * p.element_size() for p in parameters) > _COPIED_BYTES:
        for parameter in parameters:
            memo[id(parameter)] = parameter
            if type(parameter) is nn.Parameter:  # the same values, but not the same .grad
                memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    for buffer in model.buffers():
        if is_lazy(buffer):  # torch copies lazy parameters, and no lazy buffers
            lazy: Any = UninitializedBuffer
            memo[id(buffer)] = lazy(device=buffer.device, dtype=buffer.dtype)
    for module in model.modules():
        for key, value in vars(module).items():
            if type(value) is OrderedDict and not value:
                memo[id(value)] = OrderedDict()  # tables of hooks: deepcopy takes most of its time for them
            elif key in ("_trainer", "_fabric") and value is not None:
                memo[id(value)] = value  # a LightningModule's trainer holds the whole experiment
            elif isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
            elif isinstance(value, torch.Generator):
                memo[id(value)] = torch.Generator(value.device).set_state(value.get_state())
    return memo


def _uncopyable(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """Attributes that refuse to be copied (locks, files, handles) are shared."""
    shared: dict[int, Any] = {}
    for module in model.modules():
        for key, value in vars(module).items():
            if key in MODULE_TABLES or isinstance(value, (nn.Module, Tensor)):
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                shared[id(value)] = value
    return shared


@contextmanager
def forked_random_states() -> Generator[None]:
    """Restores the global random states of torch (all devices in use), numpy and Python afterwards.

    Yields:
        Nothing.
    """
    numpy_random = sys.modules["numpy"].random if "numpy" in sys.modules else None
    python_state = random.getstate()
    numpy_state = None if numpy_random is None else numpy_random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)
