"""A hook of a LightningModule that sees every checkpoint that is loaded, also one of weights only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["LoadListener"]

_LOAD = "on_load_checkpoint"


class LoadListener:
    """Stands before a module's ``on_load_checkpoint``, which runs before the weights are restored.

    Args:
        module: whose hook it is.
        action: what to do with the module and a checkpoint first.
    """

    def __init__(self, module: Any, action: Callable[[Any, dict[str, Any]], None]) -> None:
        self.module, self.action = module, action
        vars(module)[_LOAD] = self

    def release(self) -> None:
        """Leaves the hook to the module."""
        if vars(self.module).get(_LOAD) is self:
            del vars(self.module)[_LOAD]

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Acts, then runs the module's own hook.

        Args:
            checkpoint: that is loaded.
        """
        self.action(self.module, checkpoint)
        getattr(type(self.module), _LOAD)(self.module, checkpoint)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadListener:
        return self  # a copied module must not copy the callback
