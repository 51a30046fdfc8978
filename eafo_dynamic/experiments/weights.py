"""Start a network from the weights of another run: fine-tuning."""

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


def load_weights(network: nn.Module, path: str | Path, fresh: Sequence[str] = ()) -> list[str]:
    """Copies the weights in a file into a network. Weights that do not fit are an error, unless `fresh` names them.

    Only tensors are read from the file (`weights_only`), so that a file from elsewhere cannot run code.

    Args:
        network: receives the weights, in place.
        path: a Lightning checkpoint of a task (its `model`), or a state dict of the network.
        fresh: regular expressions; entries of the network's state whose whole name matches one of them keep their
            initial value.

    Returns:
        Names that were loaded, in the network's order.

    Raises:
        ConfigError: for a file that is missing, unreadable or empty, names or shapes that differ from the
            network's, or a pattern that matches nothing.
    """
    own = network.state_dict()
    _check_patterns(fresh, own)
    in_file = _network_state(Path(path), own)
    given = {name: value for name, value in in_file.items() if not _matches(name, fresh)}
    expected = {name: value for name, value in own.items() if not _matches(name, fresh)}
    problems = _differences(given, expected)
    if problems:
        said = "; ".join(problems[:3])
        if len(problems) > 3:
            said += f", and {len(problems) - 3} more"
        raise ConfigError("weights", str(path), f"the file {said}", _how_to_fix(given))
    network.load_state_dict({**own, **given})
    return list(expected)


def _check_patterns(patterns: Sequence[str], names: Mapping[str, Tensor]) -> None:
    for pattern in patterns:
        try:
            found = any(re.fullmatch(pattern, name) for name in names)
        except re.error as error:
            raise ConfigError("fresh", pattern, f"not a regular expression ({error})", "See Python's re.") from error
        if not found:
            raise ConfigError("fresh", pattern, "matches nothing in the network", f"There is {', '.join(names)}.")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _network_state(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a file that describes the network, under the network's own names."""
    tensors = _read(path)
    # A task calls its network `model`. A network that has names of the file itself needs no prefix removed, even if
    # one of its own children is called `model`.
    if own.keys().isdisjoint(tensors.keys()):
        tensors = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    if not tensors:
        raise ConfigError("weights", str(path), "the file holds no weights of a network", "Name a checkpoint of a run.")
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint or of a state dict, by name."""
    if not path.is_file():
        raise ConfigError(
            "weights", str(path), "no such file", "Run the pretraining first, or leave weights out to start afresh."
        )
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            "weights", str(path), f"not a file of weights ({lines[0]})", "Name a Lightning checkpoint or a state dict."
        ) from error
    if not isinstance(content, dict):
        return {}
    state = cast("dict[str, Any]", content.get("state_dict", content))
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _differences(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What the file lacks, should not have or has in another shape, as ends of sentences that begin "the file"."""
    problems = [f"lacks {name}" for name in expected if name not in given]
    problems += [f"has {name}, which the network has not" for name in given if name not in expected]
    for name, value in expected.items():
        if name in given and given[name].shape != value.shape:
            shape = tuple(given[name].shape)
            wanted = tuple(value.shape)
            problems.append(f"has {name} of shape {shape}, the network {wanted}")
    return problems


def _how_to_fix(given: Mapping[str, Tensor]) -> str:
    if any("eafo_" in name for name in given):
        return "The run had EAFOCallback attached: pretrain without it, or save the network after `merge`."
    return "Give the network the sizes of the pretrained one, or name what shall start afresh: fresh: ['head.*']."
