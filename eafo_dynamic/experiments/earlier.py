"""Configurations that version 0.1.0 has saved: what they say of options that there are no more."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, cast

import yaml
from jsonargparse import get_loader, set_loader

from eafo_dynamic.errors import CompoundingError

__all__ = ["PARSER_MODE", "drop_compounding", "read_earlier_configurations"]

PARSER_MODE = "eafo_yaml"
"""Mode of jsonargparse in which configurations of version 0.1.0 are read too."""


def read_earlier_configurations() -> None:
    """Lets parsers in ``PARSER_MODE`` read YAML in which ``EAFOCallback`` has the option ``compounding``."""
    set_loader(PARSER_MODE, _load, exceptions=(yaml.YAMLError,))


def _load(text: str) -> Any:
    return drop_compounding(get_loader("yaml")(text))


def drop_compounding(config: Any) -> Any:
    """Takes ``compounding: false`` out of a configuration, with one warning.

    Args:
        config: nested mappings and lists, changed in place; anything else stays as it is.

    Returns:
        The same.

    Raises:
        CompoundingError: for ``compounding: true``.
    """
    found = [arguments for arguments in _arguments_of_callbacks(config) if "compounding" in arguments]
    for arguments in found:
        if arguments.pop("compounding"):
            raise CompoundingError("compounding: true in the configuration: the run")
    if found:
        warnings.warn(
            "EAFO: compounding: false in the configuration is of version 0.1.0 and says nothing now. Delete the line.",
            stacklevel=2,
        )
    return config


def _arguments_of_callbacks(config: Any) -> Iterator[dict[str, Any]]:
    seen: set[int] = set()  # YAML can put a list into itself
    left: list[Any] = [config]
    while left:
        node = left.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, list):
            left += cast("list[Any]", node)
        elif isinstance(node, dict):
            mapping = cast("dict[str, Any]", node)
            arguments = mapping.get("init_args")
            if str(mapping.get("class_path")).rpartition(".")[2] == "EAFOCallback" and isinstance(arguments, dict):
                yield cast("dict[str, Any]", arguments)
            left += mapping.values()
