"""Start from the weights of another run: fine-tuning."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from eafo_dynamic.errors import ConfigError

__all__ = ["load_weights"]

_MEND = "Give the network the sizes of the pretrained one, or name what shall start afresh: fresh: ['head.*']."


def load_weights(network: nn.Module, path: str | Path, fresh: Sequence[str] = ()) -> list[str]:
    """Copy the weights in a file into a network; what does not fit is an error, unless it shall start afresh.

    Nothing but tensors is read from the file (`weights_only`), so that a file from elsewhere cannot run code.

    Args:
        network: receives the weights, in place.
        path: a Lightning checkpoint of a task (its `model`), or a state dict of the network.
        fresh: regular expressions over whole names of the network's state; what they match keeps its initial value.

    Returns:
        Names that were loaded, in the network's order.

    Raises:
        ConfigError: for a file that is missing, unreadable or empty, names or shapes that differ from the
            network's, or a pattern that matches nothing.
    """
    own = network.state_dict()
    kept = _matching(own, fresh)
    given = {name: value for name, value in _network_state(Path(path), own).items() if not _matches(name, fresh)}
    expected = {name: value for name, value in own.items() if name not in kept}
    problems = [f"lacks {name}" for name in expected if name not in given]
    problems += [f"has {name}, which the network has not" for name in given if name not in expected]
    problems += [
        f"has {name} of shape {tuple(given[name].shape)}, the network {tuple(value.shape)}"
        for name, value in expected.items()
        if name in given and given[name].shape != value.shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ConfigError("weights", str(path), f"the file {'; '.join(problems[:3])}{more}", _mend(given))
    network.load_state_dict({**own, **given})
    return list(expected)


def _network_state(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a file that describes the network, under the network's own names."""
    tensors = _read(path)
    # A task calls its network `model`. A network may have a child of that name: then its own names decide.
    if not own.keys() & tensors.keys():
        tensors = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    if not tensors:
        raise ConfigError("weights", str(path), "the file holds no weights of a network", "Name a checkpoint of a run.")
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError(
            "weights", str(path), "no such file", "Run the pretraining first, or leave weights out to start afresh."
        )
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            "weights", str(path), f"not a file of weights ({cause})", "Name a Lightning checkpoint or a state dict."
        ) from error
    state = cast("dict[str, Any]", content.get("state_dict", content)) if isinstance(content, dict) else {}
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _matching(names: Mapping[str, Tensor], patterns: Sequence[str]) -> set[str]:
    """What the patterns match; each of them must match something."""
    for pattern in patterns:
        try:
            found = any(re.fullmatch(pattern, name) for name in names)
        except re.error as error:
            raise ConfigError("fresh", pattern, f"not a regular expression ({error})", "See Python's re.") from error
        if not found:
            raise ConfigError("fresh", pattern, "matches nothing in the network", f"There is {', '.join(names)}.")
    return {name for name in names if _matches(name, patterns)}


def _mend(given: Mapping[str, Tensor]) -> str:
    if any("eafo_" in name for name in given):
        return "The run had EAFOCallback attached: pretrain without it, or save the network after `merge`."
    return _MEND
