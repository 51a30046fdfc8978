"""The list of sites in every checkpoint that a LightningModule writes, also in one of weights only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["CHECKPOINT_KEY", "forget_sites", "keep_sites"]

CHECKPOINT_KEY = "eafo"
_SAVE = "on_save_checkpoint"


class _SiteKeeper:
    """Stands before a module's ``on_save_checkpoint``; copied and pickled with the module.

    Args:
        module: whose hook it is.
        saved: the list of sites.
    """

    def __init__(self, module: Any, saved: Mapping[str, Any]) -> None:
        self.module, self.saved = module, saved
        self.own = vars(module).get(_SAVE)  # of the instance alone

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = self.saved
        if self.own is None:
            getattr(type(self.module), _SAVE)(self.module, checkpoint)
        else:
            self.own(checkpoint)


def keep_sites(module: Any, saved: Mapping[str, Any]) -> None:
    """Adds a list of sites to every checkpoint of a module, as long as it is wrapped.

    Not by a hook of a callback: a Trainer runs none of them for a checkpoint of weights only.

    Args:
        module: wrapped; what is no LightningModule has no checkpoints of its own.
        saved: the list of sites; primitives only.
    """
    forget_sites(module)
    if hasattr(type(module), _SAVE):
        vars(module)[_SAVE] = _SiteKeeper(module, saved)


def forget_sites(module: Any) -> None:
    """Takes back what ``keep_sites`` did.

    Args:
        module: any.
    """
    keeper = vars(module).get(_SAVE)
    if isinstance(keeper, _SiteKeeper):
        del vars(module)[_SAVE]
        if keeper.own is not None:
            vars(module)[_SAVE] = keeper.own
