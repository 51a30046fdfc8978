"""What a trainer's callback takes beside the options of the corrections: the optimiser group, the log, epochs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.internals.checks import at_least, flag, folder, not_negative
from eafo_dynamic.internals.declared import Checked, option, options_class
from eafo_dynamic.policy.options import MOVES, SITES, WHEN, Options
from eafo_dynamic.policy.schedule import Schedule
from eafo_dynamic.records import COLUMNS

__all__ = ["CallbackOptions", "GroupOptions", "TrainerCallbackOptions", "WrittenOptions"]

WRITTEN = "What is written"


def _columns(name: str, value: object) -> list[str]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(name, value, "not a list of columns", f"Give a list of {', '.join(COLUMNS)}.")
    for column in value:
        if column not in COLUMNS:
            raise ConfigError(name, column, "no such column", f"Choose from {', '.join(COLUMNS)}.")
    return list(value)


def _figures(name: str, value: object) -> bool:
    figures = flag(name, value)
    if figures and find_spec("matplotlib") is None:
        raise ConfigError(name, value, "matplotlib is not installed", "pip install matplotlib.")
    return figures


def _inputs(name: str, value: object) -> object:
    if not isinstance(value, Mapping):
        raise ConfigError(name, value, "not a dictionary", "Give the keyword inputs of one forward.")
    return value


@options_class
class GroupOptions(Checked):
    """Options of the parameter group that eps has in the optimiser."""

    lr: float | None = option(
        default=None,
        part=MOVES,
        text="learning rate of eps; `None`: that of the model's own parameters times `lr_multiple`",
        check=partial(not_negative, mend="Give 0 or more, or leave it out."),
        unit="per step",
        when="where eps should not follow the model's schedule",
    )
    lr_multiple: float = option(
        default=3.0,  # measured over ten tasks, see examples/results; the paper has 1
        part=MOVES,
        text="learning rate of eps over that of the model's own parameters, where `lr` is not given",
        check=not_negative,
        unit="1",
        when=(
            "measured with AdamW; `1.0` as in the paper; 10 where there is plenty of data or the model underfits, "
            "and with SGD: more gain, and more harm where a model can overfit, see "
            "[what was measured](../results/archive/2026-11-28-cpu-2core.md)"
        ),
    )
    weight_decay: float = option(
        default=0.0,
        part=MOVES,
        text="weight decay of eps, which has a parameter group of its own, as the optimiser means it",
        check=not_negative,
        unit="1",
        when=(
            "`1.0` with AdamW, which draws eps to 0 by the learning rate times this at every step, where the model "
            "itself is strongly decayed, see [what was measured](costs.md#does-it-help)"
        ),
    )

    def conflicts(self) -> Iterator[ConfigError]:
        """Looks for options that cannot work together.

        Yields:
            One error per conflict.
        """
        yield from super().conflicts()
        if self.lr is not None and self.lr_multiple != GroupOptions.lr_multiple:
            yield ConfigError("lr_multiple", self.lr_multiple, f"given beside lr={self.lr}", "Give one of the two.")


@options_class
class WrittenOptions(Checked):
    """Options of what a callback writes: to the correction log, the trainer's loggers and the console."""

    log_every_n_steps: int | None = option(
        default=None,
        part=WRITTEN,
        text="distance between aggregates that go to the trainer's loggers; `None`: after every update round",
        check=partial(at_least, least=1),
        unit="optimiser steps",
    )
    log_sites: list[str] | None = option(
        default=None,
        part=WRITTEN,
        text=(
            "columns of the log that the loggers get for every site, as `eafo/<column>/<site>`; `None`: aggregates only"
        ),
        check=_columns,
        when="few sites only: thousands of charts freeze a page",
    )
    log_figures: bool = option(
        default=False,
        part=WRITTEN,
        text="whether the loggers that take figures get every site's function, whenever a snapshot is kept",
        check=_figures,
        when="with TensorBoard and the like",
    )
    dirpath: str | Path | None = option(
        default=None,
        part=WRITTEN,
        text="folder of the correction log; `None`: `eafo` in the run's folder",
        check=folder,
    )
    save_log: bool = option(default=True, part=WRITTEN, text="whether to write the correction log", check=flag)
    verbose: bool = option(
        default=True,
        part=WRITTEN,
        text="whether to print the table of sites at the start",
        check=flag,
    )

    def conflicts(self) -> Iterator[ConfigError]:
        """Looks for options that cannot work together.

        Yields:
            One error per conflict.
        """
        yield from super().conflicts()
        if self.log_figures and not self.save_log:
            yield ConfigError("log_figures", True, "figures are drawn from the log", "Leave save_log=True.")


@options_class
class CallbackOptions(WrittenOptions, GroupOptions, Options):  # the fields of the last base come first
    """Options of ``EAFOCallback``."""

    update_every_n_epochs: int | None = option(
        default=None,
        part=WHEN,
        text="distance between update rounds, in place of `update_every_n_steps`; Lightning only",
        check=partial(at_least, least=1),
        unit="epochs",
        when="to update at the same point of every epoch",
    )
    adopt: bool = option(
        default=False,
        part=SITES,
        text=(
            "whether a call that is first met in mid-training, as where a branch opens, gets a correction then; else "
            "it stays plain, with a warning; Lightning on one device only"
        ),
        check=flag,
        when="the model grows, or calls other parts of itself as it trains",
    )

    @property
    def schedule(self) -> Schedule:
        """The options that say when; with ``update_every_n_epochs``, until the training says how long an epoch is."""
        schedule = super().schedule
        if self.update_every_n_epochs is None:
            return schedule
        period = max(self.update_every_n_steps, self.collect_every_n_steps or 1)
        return replace(schedule, update_every_n_steps=period)


@options_class
class TrainerCallbackOptions(WrittenOptions, GroupOptions, Options):
    """Options of ``EAFOTrainerCallback``."""

    example: Mapping[str, Any] | None = option(
        default=None,
        part=SITES,
        text=(
            "keyword inputs of one forward, to find all activation calls; `None`: the first items of the training "
            "data; Hugging Face only"
        ),
        check=_inputs,
    )
