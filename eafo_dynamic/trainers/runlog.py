"""The correction log of one trainer's run: where it lies, what it continues, what a round adds, how it ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eafo_dynamic.errors import LogError
from eafo_dynamic.policy.controller import EAFOController
from eafo_dynamic.records import CorrectionLog, LogWriter
from eafo_dynamic.records.schema import Record

__all__ = ["RunLog", "run_folder", "run_identity"]


def run_folder(trainer: Any) -> Path:
    """Find the folder of a trainer's run: the one in which ModelCheckpoint makes ``checkpoints``.

    Every run of a logger has a folder of its own there: ``<save_dir>/<name>/<version>``, where the version is
    the run's id for loggers such as those of Weights & Biases and MLflow.

    Args:
        trainer: a Lightning Trainer. Call on every rank.

    Returns:
        The folder; ``default_root_dir`` without a logger.
    """
    folder = trainer.log_dir or trainer.default_root_dir  # on every rank: log_dir is a broadcast
    logger = trainer.logger
    if logger is None or not trainer.is_global_zero:
        return Path(folder)
    save_dir = logger.save_dir
    own = getattr(logger, "log_dir", None)
    if own == folder and own != save_dir:
        return Path(folder)  # TensorBoardLogger and CSVLogger know the folder of their version
    version = logger.version
    if not isinstance(version, str):
        version = f"version_{version}"
    return Path(save_dir or trainer.default_root_dir) / str(logger.name) / version


def run_identity(trainer: Any) -> dict[str, Any]:
    """Say which run a trainer's is, in the words of its logger, and what data it trains on.

    Args:
        trainer: a Lightning Trainer.

    Returns:
        ``logger`` (its class), ``name`` and ``version``, the run's id for some loggers, if there is a logger; ``data``
        (its class) if there is a data module.
    """
    identity: dict[str, Any] = {}
    logger, data = trainer.logger, getattr(trainer, "datamodule", None)
    if logger is not None:
        version = logger.version
        if not isinstance(version, (int, str)):
            version = str(version)
        identity |= {"logger": type(logger).__name__, "name": str(logger.name), "version": version}
    if data is not None:
        identity["data"] = type(data).__name__
    return identity


class RunLog:
    """Writes on rank 0 of a run that is not a dry one; elsewhere every method does nothing.

    Args:
        dirpath: folder of the log; None: ``eafo`` in the run's folder.
        wanted: whether to write at all.
        say: what to do with a line for the user, such as where the log lies.

    Attributes:
        path: folder of the newest log; None before there was one.
    """

    def __init__(self, dirpath: str | Path | None, wanted: bool, say: Callable[[str], None]) -> None:
        self.dirpath = dirpath
        self.wanted = wanted
        self.path: Path | None = None
        self._say = say
        self._writer: LogWriter | None = None
        self._source: str | None = None
        self._aligned = False
        self._told_of_earlier = False

    @property
    def location(self) -> str | None:
        """Folder of the log that is being written."""
        if self._writer is None:
            return None
        return str(self._writer.path)

    def plot(self, what: str, column: str) -> Any:
        """Draws the log.

        Args:
            what: a key of ``records.figures.logs.FIGURES``.
            column: of the log, for the figures that show one.

        Returns:
            A matplotlib figure.

        Raises:
            LogError: if no log has been written.
        """
        from eafo_dynamic.records.figures.logs import plot

        if self.path is None:
            raise LogError("there is no correction log yet: train with save_log=True first.")
        return plot(CorrectionLog.load(self.path), what, column)

    @property
    def began(self) -> bool:
        """Whether rows have been dropped up to the step at which this training begins, so that the log is its own."""
        return self._writer is not None and self._aligned

    def open(self, trainer: Any, about: dict[str, Any]) -> None:
        """Begins a log, or stands ready to continue one.

        Args:
            trainer: the Trainer, on every rank.
            about: what the manifest says.
        """
        folder = Path(self.dirpath or run_folder(trainer) / "eafo")  # on every rank
        if not self.wanted or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        self._writer = LogWriter(self._resumed_beside(folder), {**about, "run": run_identity(trainer)})
        self._told_of_earlier = False
        self.path = self._writer.path

    def describe_anew(self, about: dict[str, Any]) -> None:
        """Says something else about the run.

        Args:
            about: what the manifest is to say.
        """
        if self._writer is not None:
            self._writer.describe_anew(about)

    def _resumed_beside(self, folder: Path) -> Path:
        """Return the folder of the resumed log where it is ``eafo-2`` or the like, beside the usual one."""
        if self._source is None:
            return folder
        source = Path(self._source)
        beside = source.parent.resolve() == folder.parent.resolve()
        if beside and re.fullmatch(rf"{re.escape(folder.name)}-\d+", source.name) and source.is_dir():
            return source
        return folder

    def resumed(self, source: object) -> None:
        """Takes note of the log of the run that is resumed; of several, the first is the one.

        Args:
            source: its folder, as a checkpoint says it; what cannot be the name of one says nothing.
        """
        if self._source is None and isinstance(source, str) and "\0" not in source:
            self._source = source

    def align(self, step: int) -> None:
        """Drops rows that lie past the restored step, and says where the log is; once.

        Args:
            step: optimiser steps taken.
        """
        if self._writer is not None and not self._aligned:
            if step:
                self._writer.resume(step, source=self._source)
            self.path = self._writer.path
            self._tell("EAFO: the correction log goes to")
        self._aligned = True

    def write(self, step: int, rows: Sequence[Record], round_: int, snapshot: Callable[[], list[Record]]) -> bool:
        """Adds a round's rows, and a snapshot after rounds 1, 2, 4, 8, ...

        Args:
            step: optimiser steps taken.
            rows: of the round; nothing is written without any.
            round_: its number, from 1.
            snapshot: makes the snapshot's rows.

        Returns:
            Whether there is a new snapshot.
        """
        if self._writer is None or not rows:
            return False
        self._writer.write(rows)
        self._tell_of_earlier()
        is_power_of_two = not round_ & (round_ - 1)
        if is_power_of_two:
            self._writer.write_shapes(step, snapshot())
        return is_power_of_two

    def end(self, step: int, epoch: int, how: str, controller: EAFOController) -> bool:
        """Adds the state in which the fit leaves the model: a row and a snapshot of every site.

        Args:
            step: optimiser steps taken; with none there is nothing to say.
            epoch: epochs completed.
            how: ``completed``, ``interrupted`` or ``failed``.
            controller: of the corrections.

        Returns:
            Whether the log ends with the model now.
        """
        if self._writer is None or not step:
            return False
        self.align(step)
        self._writer.write_end(step, how, controller.end_rows(step, epoch), controller.snapshot())
        self._tell_of_earlier()
        return True

    def close(self) -> None:
        """Says where the log is and how many rows are missing, if any."""
        if self._writer is not None:
            if self._aligned:
                self._tell("EAFO: the correction log is in")
            self._writer.close()
        self._writer, self._source, self._aligned = None, None, False

    def _tell(self, what: str) -> None:
        assert self._writer is not None
        self._say(f"{what} {self._writer.path}")

    def _tell_of_earlier(self) -> None:
        assert self._writer is not None
        earlier = self._writer.put_aside
        if earlier is not None and not self._told_of_earlier:
            self._told_of_earlier = True
            self._say(f"EAFO: an earlier run's log in this folder is now in {earlier}")
