"""What a LightningModule's loggers get to see of a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eafo_dynamic.errors import one_line
from eafo_dynamic.records.schema import Record
from eafo_dynamic.trainers.reports import FIGURE, Metrics, announce, log_figure, site_scalars

__all__ = ["Reporter", "announce", "log_figure", "site_scalars"]


class Reporter:
    """What a LightningModule's loggers get after update rounds.

    Args:
        every_n_steps: optimiser steps between aggregates; None: at every round.
        columns: columns of the correction log to send for every site.
        figures: whether to send every site's function when a snapshot is kept.
    """

    def __init__(self, every_n_steps: int | None, columns: Sequence[str], figures: bool) -> None:
        self.figures = figures
        self._metrics = Metrics(every_n_steps, columns)

    def begin(self, trainer: Any, options: Mapping[str, object]) -> None:
        """Tells the loggers the options, beside the hyper-parameters of the run.

        Args:
            trainer: the Trainer.
            options: text and numbers only.
        """
        for logger in trainer.loggers:
            known = getattr(logger, "hparams", None)  # TensorBoard's keeps the newest only
            before = known if isinstance(known, Mapping) else {}
            try:
                logger.log_hyperparams({**before, "eafo": dict(options)})
            except Exception as error:  # of a service, such as MLflow's where a resumed run has other options
                kind = type(logger).__name__
                warnings.warn(f"EAFO: {kind} does not take the options ({one_line(error)})", stacklevel=2)

    def send(self, trainer: Any, module: Any, rows: Sequence[Record]) -> None:
        """Logs through the module, after every training batch; without a logger nothing happens.

        Args:
            trainer: the Trainer.
            module: the LightningModule.
            rows: of this batch's update round; empty if there was none.
        """
        if trainer.barebones:
            return
        means, of_sites = self._metrics.after_step(trainer.global_step, rows)
        if rows:
            module.log_dict(of_sites, on_step=True, on_epoch=False)
        if means:
            module.log_dict(means, on_step=True, on_epoch=False)

    def send_figure(self, trainer: Any, draw: Callable[[], Any]) -> None:
        """Sends the figure of all functions to the loggers that take figures.

        Args:
            trainer: the Trainer.
            draw: makes the figure.
        """
        if self.figures and trainer.loggers:
            figure = draw()
            for logger in trainer.loggers:
                log_figure(logger, FIGURE, figure, trainer.global_step)
