"""The correction log of one trainer's run: where it lies, what it goes on from, what a round adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eafo_dynamic.errors import LogError
from eafo_dynamic.records import CorrectionLog, LogWriter
from eafo_dynamic.records.schema import Record

__all__ = ["RunLog"]


class RunLog:
    """Writes on rank 0 of a run that is not a dry one; elsewhere every method does nothing.

    Args:
        dirpath: folder of the log; None: ``eafo`` in the run's folder.
        wanted: whether to write at all.

    Attributes:
        path: folder of the newest log; None before there was one.
    """

    def __init__(self, dirpath: str | Path | None, wanted: bool) -> None:
        self.dirpath = dirpath
        self.wanted = wanted
        self.path: Path | None = None
        self._writer: LogWriter | None = None
        self._source: str | None = None
        self._aligned = False

    @property
    def location(self) -> str | None:
        """Folder of the log that is being written."""
        return None if self._writer is None else str(self._writer.path)

    def open(self, trainer: Any, about: dict[str, Any]) -> None:
        """Begins a log, or stands ready to continue one.

        Args:
            trainer: the Trainer, on every rank.
            about: what the manifest says.
        """
        run = trainer.log_dir or trainer.default_root_dir  # on every rank: log_dir is a broadcast
        if self.wanted and trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            self._writer = LogWriter(self.dirpath or Path(run) / "eafo", about)
            self.path = self._writer.path

    def resumed(self, source: object) -> None:
        """Takes note of the log of the run that is resumed; of several, the first is the one.

        Args:
            source: its folder, as a checkpoint says it; what is no text says nothing.
        """
        self._source = self._source or (source if isinstance(source, str) else None)

    def align(self, step: int) -> None:
        """Drops rows that lie past the restored step, once.

        Args:
            step: optimiser steps taken.
        """
        if self._writer is not None and step and not self._aligned:
            self._writer.resume(step, source=self._source)
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
        kept = not round_ & (round_ - 1)
        if kept:
            self._writer.write_shapes(step, snapshot())
        return kept

    def end(self, step: int, rounds: int, snapshot: Callable[[], list[Record]]) -> None:
        """Keeps the last snapshot.

        Args:
            step: optimiser steps taken.
            rounds: that there have been.
            snapshot: makes the snapshot's rows.
        """
        trained = self._aligned
        self.align(step)
        if self._writer is None or not rounds & (rounds - 1):
            return
        # a run that was killed after its last step trains no more when it is resumed, and may have got as far as here
        if trained or not self._has_snapshot(step):
            self._writer.write_shapes(step, snapshot())

    def _has_snapshot(self, step: int) -> bool:
        assert self.path is not None
        try:
            return any(row["step"] == step for row in CorrectionLog.load(self.path).shapes())
        except (LogError, OSError):  # what cannot be read will hardly be written; the writer says so
            return False

    def close(self) -> None:
        """Says how many rows are missing, if any."""
        if self._writer is not None:
            self._writer.close()
        self._writer, self._source, self._aligned = None, None, False
