"""What loggers and the console get to see of a run, whichever trainer it has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eafo_dynamic.errors import printable
from eafo_dynamic.policy.diagnostics import aggregate
from eafo_dynamic.records.schema import Record

__all__ = ["FIGURE", "Metrics", "announce", "log_figure", "log_options", "site_scalars"]

FIGURE = "eafo/functions"
_MLFLOW_LETTERS = 250  # of a parameter's value, which every version of MLflow takes


def announce(what: object) -> None:
    """Prints a line or a table to the console.

    Args:
        what: a line, which is printed as it is, never wrapped; or anything else that rich can print.
    """
    from rich.console import Console

    if isinstance(what, str):
        Console().print(printable(what), markup=False, highlight=False, soft_wrap=True)
    else:
        Console().print(what)


def site_scalars(rows: Iterable[Record], columns: Sequence[str]) -> dict[str, float]:
    """Chosen columns of every site, named for a logger.

    Args:
        rows: of one update round.
        columns: which.

    Returns:
        ``eafo/<column>/<site>``: value; a missing value is left out. In the site's name ``:`` and ``#`` become ``-``,
        since MLflow would leave them out.
    """
    scalars: dict[str, float] = {}
    for row in rows:
        for column in columns:
            value = row.get(column)
            if isinstance(value, (int, float)) and value == value:
                scalars[f"eafo/{column}/{_legal(str(row['site']))}"] = float(value)
    return scalars


def _legal(name: str) -> str:
    return re.sub(r"[^\w/. -]", "-", name, flags=re.ASCII)


class Metrics:
    """The numbers that a trainer's loggers get.

    Args:
        every_n_steps: optimiser steps between aggregates; None: after every update round.
        columns: columns of the correction log to send for every site, after every update round.
    """

    def __init__(self, every_n_steps: int | None, columns: Sequence[str]) -> None:
        self.every_n_steps = every_n_steps
        self.columns = columns
        self._aggregates: dict[str, float] = {}

    def after_step(self, step: int, rows: Sequence[Record]) -> tuple[dict[str, float], dict[str, float]]:
        """What is due after an optimiser step.

        Args:
            step: optimiser steps taken.
            rows: of the update round at this step; empty if there was none.

        Returns:
            Means over all sites, such as ``eafo/mean_entropy``, and the chosen columns of every site; each is empty
            where it is not due.
        """
        if rows:
            self._aggregates = {f"eafo/{name}": value for name, value in aggregate(rows).items()}
        due = bool(rows)
        if self.every_n_steps is not None:
            due = step % self.every_n_steps == 0
        means = dict(self._aggregates) if due else {}
        return means, site_scalars(rows, self.columns)


def log_figure(logger: Any, name: str, figure: Any, step: int) -> bool:
    """Sends a figure through a logger's own interface.

    Knows ``log_image`` (Weights & Biases and others after it), ``add_figure`` (TensorBoard) and ``log_figure``
    (MLflow, Comet) of Lightning's loggers, and the reporting callbacks of the Hugging Face Trainer for TensorBoard,
    Weights & Biases and MLflow.

    Args:
        logger: a Lightning logger, or a callback of the Hugging Face Trainer.
        name: of the figure.
        figure: a matplotlib figure.
        step: optimiser steps taken.

    Returns:
        Whether the logger takes figures.
    """
    experiment: Any = getattr(logger, "experiment", None) or getattr(logger, "tb_writer", None)
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
    return _log_figure_of_transformers(logger, name, figure, step)


def log_options(callback: Any, options: Mapping[str, object]) -> bool:
    """Sends the options to where a reporting callback of the Hugging Face Trainer has put the Trainer's own arguments.

    Args:
        callback: that of Weights & Biases, MLflow or TensorBoard, after its ``on_train_begin``.
        options: text and numbers only.

    Returns:
        Whether the callback takes options.
    """
    wandb: Any = getattr(callback, "_wandb", None)
    if getattr(wandb, "run", None) is not None:
        wandb.config.update({"eafo": dict(options)}, allow_val_change=True)
        return True
    mlflow: Any = getattr(callback, "_ml_flow", None)
    if callable(getattr(mlflow, "log_params", None)):
        mlflow.log_params({f"eafo/{name}": str(value)[:_MLFLOW_LETTERS] for name, value in options.items()})
        return True
    board: Any = getattr(callback, "tb_writer", None)
    if board is not None:
        board.add_text("eafo", json.dumps(dict(options), indent=2))
        return True
    return False


def _log_figure_of_transformers(callback: Any, name: str, figure: Any, step: int) -> bool:
    """Sends a figure through the package that a reporting callback of the Hugging Face Trainer has imported."""
    wandb: Any = getattr(callback, "_wandb", None)
    if callable(getattr(wandb, "Image", None)):
        wandb.log({name: wandb.Image(figure), "train/global_step": step})
        return True
    mlflow: Any = getattr(callback, "_ml_flow", None)
    if callable(getattr(mlflow, "log_figure", None)):
        mlflow.log_figure(figure, f"{name}-{step}.png")
        return True
    return False
