"""The amplitudes in the state of a run, as this version and those before it save them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eafo_dynamic.correction.kernels import EPS, LIFT

__all__ = ["amplitudes_before", "stacked_functions"]

_EARLIER = (EPS.name, LIFT.name)  # the terms that earlier versions had, each a tensor of its own


def amplitudes_before(state: Mapping[str, Any], names: tuple[str, ...]) -> Tensor:
    """The amplitudes that the last round has left.

    Args:
        state: from ``Rounds.state_dict``.
        names: of the terms that the model has.

    Returns:
        Shape [T, S].

    Raises:
        ValueError: if the state is of other terms.
    """
    if "amplitudes_before" in state:
        saved = tuple(state["terms"])
        found = state["amplitudes_before"]
    else:
        saved = tuple(name for name in _EARLIER if state.get(f"{name}_before") is not None)
        found = torch.stack([state[f"{name}_before"] for name in saved])
    if saved != names:
        raise ValueError(f"the terms {', '.join(saved)} in place of {', '.join(names)}")
    return found


def stacked_functions(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of functions, with amplitudes in one.

    Args:
        saved: from ``Functions.tensors``, of this version or an earlier one.

    Returns:
        Tensors by the name of their field.
    """
    stacked = {name: value for name, value in saved.items() if name not in _EARLIER}
    if "amplitudes" not in saved:
        stacked["amplitudes"] = torch.stack([saved[name] for name in _EARLIER if name in saved])
    return stacked
