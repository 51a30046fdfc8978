"""One training of a candidate: its metric after each validation, stopped where somebody says so."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.compare.cell import quiet
from eafo_dynamic.experiments.compare.compose import ACTIVATION, cell_config, flat, put
from eafo_dynamic.experiments.compare.witness import validated
from eafo_dynamic.experiments.search.candidates import Candidate
from eafo_dynamic.experiments.search.swap import ScaleRate, SwapActivations

__all__ = ["ConfiguredTask", "MadeTask", "Run", "Task", "Watch"]

Report = Callable[[int, float], bool]
"""Called with the number of validations so far and the metric; True stops the training."""

SWAP = "eafo_dynamic.experiments.SwapActivations"
_RATE = "model.init_args.lr"


class Run(NamedTuple):
    """What a training gave.

    Attributes:
        curve: the metric after each validation.
        step_ms: time of a training step, CPU time of the process [ms].
        stopped: whether it was stopped before its end.
    """

    curve: list[float]
    step_ms: float
    stopped: bool


class Watch(Callback):
    """Reports the metric after each validation, and times the steps.

    Args:
        metric: name of a metric that is logged in validation.
        report: see `Report`.
    """

    def __init__(self, metric: str, report: Report | None) -> None:
        self.metric = metric
        self.report = report
        self.curve: list[float] = []
        self.stopped = False
        self.steps = 0
        self.seconds = 0.0
        self._start = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock."""
        self._start = time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops the clock."""
        self.seconds += time.process_time() - self._start
        self.steps += 1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports.

        Raises:
            ConfigError: if the metric is not logged.
        """
        if trainer.sanity_checking:
            return
        value = validated(trainer, "metric", self.metric)
        self.curve.append(value)
        if self.report is not None and self.report(len(self.curve), value):
            self.stopped = True
        if self.stopped or not math.isfinite(value):
            trainer.should_stop = True

    @property
    def run(self) -> Run:
        """What was seen."""
        return Run(self.curve, 1000 * self.seconds / max(1, self.steps), self.stopped)


@dataclass(frozen=True)
class ConfiguredTask:
    """A task that a configuration of ``eafo-dynamic fit`` describes.

    Attributes:
        path: the configuration.
        metric: logged in validation.
        settings: configuration keys with dots and their values.
        threads: number of threads that torch uses.
    """

    path: Path
    metric: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    threads: int = 1

    def train(self, candidate: Candidate, seed: int, report: Report | None = None) -> Run:
        """Trains a candidate with one seed, which decides weights, data order and split.

        Args:
            candidate: what to train.
            seed: the seed.
            report: called after each validation.

        Returns:
            What it gave.

        Raises:
            KeyboardInterrupt: if training was interrupted.
        """
        from eafo_dynamic.experiments.configured import configured

        with tempfile.TemporaryDirectory() as folder, quiet(self.threads):
            config = self.composed(candidate, seed, Path(folder))
            watch = Watch(self.metric, report)
            cli = configured(config, run=False, save_config_callback=None, trainer_defaults={"callbacks": [watch]})
            cli.trainer.fit(cli.model, cli.datamodule)
            if cli.trainer.interrupted:  # Lightning has caught the exception
                raise KeyboardInterrupt
        return watch.run

    def composed(self, candidate: Candidate, seed: int, folder: Path) -> dict[str, Any]:
        """The configuration of one training.

        Args:
            candidate: what to train.
            seed: the seed.
            folder: where the run may write.

        Returns:
            A configuration for LightningCLI, in plain values.

        Raises:
            ConfigError: for another rate where the configuration names none.
        """
        config = cell_config(self.path, self.settings, seed)
        put(config, "trainer.default_root_dir", str(folder))
        callbacks = config["trainer"]["callbacks"]
        if candidate.eafo is not None:
            options = {"verbose": False, "save_log": False, **candidate.eafo}
            callbacks.insert(0, {"class_path": "eafo_dynamic.EAFOCallback", "init_args": options})
        for key, value in self.changes(candidate).items():
            put(config, key, value)
        if candidate.base is not None and ACTIVATION not in flat(config):
            swap = {
                "class_path": SWAP,
                "init_args": {"base": candidate.base},
            }
            callbacks.insert(0, swap)
        return config

    def changes(self, candidate: Candidate) -> dict[str, Any]:
        """Keys of the configuration that make the candidate, without callbacks.

        Args:
            candidate: the candidate.

        Returns:
            Keys with dots, and values.

        Raises:
            ConfigError: for another rate where the configuration names none.
        """
        leaves = flat(cell_config(self.path, self.settings, 0))
        changes: dict[str, Any] = {}
        if candidate.base is not None and ACTIVATION in leaves:
            changes[ACTIVATION] = candidate.base
        if candidate.rate != 1.0:
            if not isinstance(leaves.get(_RATE), (int, float)):
                mend = f"Write {_RATE} into it, or leave rates out."
                raise ConfigError("rates", candidate.rate, "the configuration names no learning rate", mend)
            changes[_RATE] = candidate.rate * leaves[_RATE]
        return changes

    def snippet(self, candidate: Candidate) -> str:
        """What to paste into the configuration.

        Args:
            candidate: the candidate.

        Returns:
            YAML.
        """
        config: dict[str, Any] = {}
        callbacks: list[dict[str, Any]] = []
        changes = self.changes(candidate)
        if candidate.base is not None and ACTIVATION not in changes:
            callbacks.append({"class_path": SWAP, "init_args": {"base": candidate.base}})
        if candidate.eafo is not None:
            callback: dict[str, Any] = {"class_path": "eafo_dynamic.EAFOCallback"}
            if candidate.eafo:
                callback["init_args"] = dict(candidate.eafo)
            callbacks.append(callback)
        if callbacks:
            config["trainer"] = {"callbacks": callbacks}
        for key, value in changes.items():
            put(config, key, value)
        return yaml.safe_dump(config, sort_keys=False)

    def identity(self) -> Any:
        """What a stored search must have been made with, to go on with it.

        Returns:
            Plain values.
        """
        return [cell_config(self.path, self.settings, 0), self.metric, self.threads]


@dataclass(frozen=True)
class MadeTask:
    """A task that functions make.

    Attributes:
        make_model: called without arguments after all seeds are set; returns a new LightningModule.
        make_data: called with the seed; returns a LightningDataModule, or a training and a validation loader.
        metric: logged in validation.
        trainer: options of the Trainer, such as max_epochs.
        threads: number of threads that torch uses.
    """

    make_model: Callable[[], LightningModule]
    make_data: Callable[[int], Any]
    metric: str
    trainer: Mapping[str, Any]
    threads: int = 1

    def train(self, candidate: Candidate, seed: int, report: Report | None = None) -> Run:
        """Trains a candidate with one seed.

        Args:
            candidate: what to train.
            seed: the seed.
            report: called after each validation.

        Returns:
            What it gave.

        Raises:
            KeyboardInterrupt: if training was interrupted.
        """
        from eafo_dynamic.trainers.lightning.callback import EAFOCallback

        watch = Watch(self.metric, report)
        callbacks: list[Callback] = []
        if candidate.base is not None:
            callbacks.append(SwapActivations(candidate.base))
        if candidate.eafo is not None:
            corrections: dict[str, Any] = {"verbose": False, "save_log": False, **candidate.eafo}
            callbacks.append(EAFOCallback(**corrections))
        if candidate.rate != 1.0:
            callbacks.append(ScaleRate(candidate.rate))
        with tempfile.TemporaryDirectory() as folder, quiet(self.threads):
            seed_everything(seed, verbose=False)
            model = self.make_model()
            data = self.make_data(seed)
            options: dict[str, Any] = {
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": folder,
                **self.trainer,
            }
            given: list[Callback] = list(options.pop("callbacks", None) or [])
            trainer = Trainer(**options, callbacks=[*callbacks, *given, watch])
            if isinstance(data, tuple):
                trainer.fit(model, *data)
            else:
                trainer.fit(model, datamodule=data)
            if trainer.interrupted:  # type: ignore[attr-defined]
                raise KeyboardInterrupt
        return watch.run

    def snippet(self, candidate: Candidate) -> str:
        """What to write in Python.

        Args:
            candidate: the candidate.

        Returns:
            Python.
        """
        lines = ["from lightning.pytorch import Trainer", ""]
        callbacks: list[str] = []
        if candidate.base is not None:
            lines.insert(0, "from eafo_dynamic.experiments import SwapActivations")
            callbacks.append(f"SwapActivations({candidate.base!r})")
        if candidate.eafo is not None:
            options = ", ".join(f"{name}={value!r}" for name, value in candidate.eafo.items())
            lines.insert(0, "from eafo_dynamic import EAFOCallback")
            callbacks.append(f"EAFOCallback({options})")
        if candidate.rate != 1.0:
            lines.append(f"# learning rate times {candidate.rate:g}")
        lines.append(f"trainer = Trainer(callbacks=[{', '.join(callbacks)}])")
        return "\n".join(lines) + "\n"

    def identity(self) -> Any:
        """What a stored search must have been made with, to go on with it.

        Returns:
            Plain values; what the functions do is not seen.
        """
        names = [f"{each.__module__}.{each.__qualname__}" for each in (self.make_model, self.make_data)]
        return [names, self.metric, {name: repr(value) for name, value in self.trainer.items()}, self.threads]


Task = ConfiguredTask | MadeTask
