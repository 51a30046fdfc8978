"""What a LightningModule's loggers get to see of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from eafo_dynamic.records.schema import Record
from eafo_dynamic.trainers.reports import FIGURE, Metrics, announce, log_figure, site_scalars

__all__ = ["Reporter", "announce", "log_figure", "site_scalars"]

_IN_PROGRESS_BAR = ("eafo/mean_entropy", "eafo/mean_eps")


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
            bar = {name: means.pop(name) for name in _IN_PROGRESS_BAR if name in means}
            module.log_dict(bar, prog_bar=True, on_step=True, on_epoch=False)
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
