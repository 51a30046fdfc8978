"""What a wrapped model saves beside its weights, by whichever method of its own it is saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["CHECKPOINT_KEY", "Keeper", "forget_sites", "keep", "keep_sites"]

CHECKPOINT_KEY = "eafo"
_SAVE = "on_save_checkpoint"


class Keeper:
    """Stands before a method of one module; copied and pickled with the module.

    Args:
        module: whose method it is.

    Attributes:
        hook: name of the method.
    """

    hook: str

    def __init__(self, module: Any) -> None:
        self.module = module
        self.own = vars(module).get(self.hook)  # of the instance alone

    def run_own(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's own method.

        Args:
            *args: as it takes them.
            **kwargs: as it takes them.

        Returns:
            What it returns.
        """
        if self.own is None:
            return getattr(type(self.module), self.hook)(self.module, *args, **kwargs)
        return self.own(*args, **kwargs)


class _SiteKeeper(Keeper):
    """The list of sites in every checkpoint that a LightningModule writes, also in one of weights only.

    Args:
        module: the LightningModule.
        saved: the list of sites.
    """

    hook = _SAVE

    def __init__(self, module: Any, saved: Mapping[str, Any]) -> None:
        super().__init__(module)
        self.saved = saved

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = self.saved
        self.run_own(checkpoint)


def keep(keeper: Keeper) -> None:
    """Puts a keeper before the method of its module, in place of one that is there already.

    Args:
        keeper: made for the module.
    """
    before = vars(keeper.module).get(keeper.hook)
    if isinstance(before, Keeper):
        keeper.own = before.own
    vars(keeper.module)[keeper.hook] = keeper


def keep_sites(module: Any, saved: Mapping[str, Any]) -> None:
    """Adds a list of sites to every checkpoint of a module, as long as it is wrapped.

    Not by a hook of a callback: a Trainer runs none of them for a checkpoint of weights only.

    Args:
        module: wrapped; what is no LightningModule has no checkpoints of its own.
        saved: the list of sites; primitives only.
    """
    if hasattr(type(module), _SAVE):
        keep(_SiteKeeper(module, saved))


def forget_sites(module: Any) -> None:
    """Takes back what ``keep`` did.

    Args:
        module: any.
    """
    keepers = [value for value in vars(module).values() if isinstance(value, Keeper)]
    for keeper in keepers:
        del vars(module)[keeper.hook]
        if keeper.own is not None:
            vars(module)[keeper.hook] = keeper.own
