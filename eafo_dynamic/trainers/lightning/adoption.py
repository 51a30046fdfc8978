"""Corrections for calls that a training meets for the first time, as where a branch opens: ``adopt=True``."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from eafo_dynamic.errors import SiteError, printable
from eafo_dynamic.policy.controller import EAFOController
from eafo_dynamic.trainers.lightning.example import batch_runs, cannot_wait

__all__ = ["Adoption"]

_MOST_IN_VAIN = 20
"""Searches without a result after which no more are made: each of them runs a batch through a copy of the model."""


class Adoption:
    """Looks through a batch where the one before it has made a call that no example had made.

    Args:
        wanted: whether such calls are adopted; else they stay plain.
        trainer: the Trainer, in its setup.
        module: the LightningModule.
    """

    def __init__(self, wanted: bool = False, trainer: Any = None, module: Any = None) -> None:
        self._wanted = wanted
        self._has_met = False
        self._in_vain = 0
        obstacle = ""
        if wanted:
            obstacle = cannot_wait(trainer, module)
        if obstacle:
            self._give_up(f"adopt=True does nothing: {obstacle}")

    def _give_up(self, why: str) -> None:
        self._wanted = False
        warnings.warn(
            f"EAFO: {printable(why)}. Calls that the example has not made stay plain; give example_input_array, or a "
            "step, that makes them.",
            stacklevel=5,
        )

    def after_batch(self, controller: EAFOController) -> None:
        """Takes note of whether the batch has made such a call.

        Args:
            controller: of the model.
        """
        self._has_met = controller.met_unknown

    def of_batch(
        self, batch: Any, controller: EAFOController, trainer: Any, module: Any
    ) -> dict[str, nn.Parameter] | None:
        """Lets the calls be corrected that a batch is about to make, if the last one made some that are plain.

        Args:
            batch: on the module's device.
            controller: of the model.
            trainer: the Trainer.
            module: the LightningModule.

        Returns:
            The new amplitudes that the loss trains, by parameter name; None if there is no new call.
        """
        has_met = self._has_met
        self._has_met = controller.met_unknown = False  # what a validation has met is nothing for a training
        if not (self._wanted and has_met):
            return None
        before = len(controller.bank.sites)
        try:
            new = controller.adopt(run=batch_runs(trainer, module, batch, knows_step=True)[0])
        except SiteError as error:
            self._give_up(f"adopt=True does nothing more: {error}")
            return None
        if len(controller.bank.sites) > before:
            return new
        self._in_vain += 1
        if self._in_vain == _MOST_IN_VAIN:
            self._give_up(f"adopt=True does nothing more: {_MOST_IN_VAIN} batches have shown no call to adopt")
        return None
