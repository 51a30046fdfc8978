"""What a LightningModule's loggers and the console get to see of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from eafo_dynamic.policy.diagnostics import aggregate
from eafo_dynamic.records.schema import Record

__all__ = ["Reporter", "announce", "log_figure", "site_scalars"]


def announce(what: object) -> None:
    """Prints a text or a table to the console.

    Args:
        what: anything that rich can print.
    """
    from rich.console import Console

    Console().print(what)


def site_scalars(rows: Iterable[Record], columns: Sequence[str]) -> dict[str, float]:
    """Chosen columns of every site, named for a logger.

    Args:
        rows: of one update round.
        columns: which.

    Returns:
        ``eafo/<column>/<site>``: value; a missing value is left out.
    """
    return {
        f"eafo/{column}/{row['site']}": float(value)
        for row in rows
        for column in columns
        if isinstance(value := row.get(column), (int, float)) and value == value
    }


def log_figure(logger: Any, name: str, figure: Any, step: int) -> bool:
    """Sends a figure through a logger's own interface.

    Knows ``log_image`` (Weights & Biases and others after it), ``add_figure`` (TensorBoard) and ``log_figure``
    (MLflow, Comet).

    Args:
        logger: a Lightning logger.
        name: of the figure.
        figure: a matplotlib figure.
        step: optimiser steps taken.

    Returns:
        Whether the logger takes figures.
    """
    experiment: Any = getattr(logger, "experiment", None)
    if callable(getattr(experiment, "add_figure", None)):
        experiment.add_figure(name, figure, global_step=step, close=False)
        return True
    if callable(getattr(logger, "log_image", None)):
        logger.log_image(key=name, images=[figure], step=step)
        return True
    if callable(getattr(experiment, "log_figure", None)):
        run = getattr(logger, "run_id", None)
        if run is None:
            experiment.log_figure(figure_name=name, figure=figure, step=step)
        else:
            experiment.log_figure(run, figure, f"{name}-{step}.png")
        return True
    return False


class Reporter:
    """What a LightningModule's loggers get after update rounds.

    Args:
        every_n_steps: optimiser steps between aggregates; None: at every round.
        columns: columns of the correction log to send for every site.
        figures: whether to send every site's function when a snapshot is kept.
    """

    def __init__(self, every_n_steps: int | None, columns: Sequence[str], figures: bool) -> None:
        self.every_n_steps = every_n_steps
        self.columns = columns
        self.figures = figures
        self._aggregates: dict[str, float] = {}

    def send(self, trainer: Any, module: Any, rows: Sequence[Record]) -> None:
        """Logs through the module, after every training batch; without a logger nothing happens.

        Args:
            trainer: the Trainer.
            module: the LightningModule.
            rows: of this batch's update round; empty if there was none.
        """
        if trainer.barebones:
            return
        if rows:
            self._aggregates = {f"eafo/{name}": value for name, value in aggregate(rows).items()}
            module.log_dict(site_scalars(rows, self.columns), on_step=True, on_epoch=False)
        due = rows if self.every_n_steps is None else trainer.global_step % self.every_n_steps == 0
        if self._aggregates and due:
            shown = dict(self._aggregates)
            bar = {name: shown.pop(name) for name in ("eafo/mean_entropy", "eafo/mean_eps")}
            module.log_dict(bar, prog_bar=True, on_step=True, on_epoch=False)
            module.log_dict(shown, on_step=True, on_epoch=False)

    def send_figure(self, trainer: Any, draw: Callable[[], Any]) -> None:
        """Sends the figure of all functions to the loggers that take figures.

        Args:
            trainer: the Trainer.
            draw: makes the figure.
        """
        if self.figures and trainer.loggers:
            figure = draw()
            for logger in trainer.loggers:
                log_figure(logger, "eafo/functions", figure, trainer.global_step)
