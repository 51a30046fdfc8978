"""Access to torch_geometric, which only the graph experiments need."""

from __future__ import annotations

import importlib
from types import ModuleType

from eafo_dynamic.errors import ConfigError

__all__ = ["geometric_module"]


def geometric_module(name: str, option: str, value: object) -> ModuleType:
    """A module of torch_geometric.

    Args:
        name: its name inside the package.
        option: the option that needs it, for the message of the error.
        value: the value of that option.

    Returns:
        The module.

    Raises:
        ConfigError: without torch_geometric.
    """
    try:
        return importlib.import_module(f"torch_geometric.{name}")
    except ImportError as error:
        raise ConfigError(
            option, value, "needs torch_geometric", "Install it: pip install 'eafo-dynamic[graphs]'."
        ) from error
