"""When samples are collected and when update rounds run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from eafo_dynamic.errors import ConfigError

__all__ = ["Epochs", "Pace", "Schedule"]


@dataclass(frozen=True)
class Schedule:
    """When statistics are collected and when an update round runs, counted in optimiser steps.

    The first round runs after step max(1, update_starting_at_step), so that the log shows how training began. From
    then on the distance between rounds doubles until it is update_every_n_steps: pre-activations change by factors
    at the start of a training, and a shape that lags behind them harms more than its correction helps (measured: see
    examples/results). The other rounds run after every multiple of update_every_n_steps. Counted from the last such
    multiple, every ``collect_every_n_steps``-th step is sampled, and so is the step of every round. The steps of all
    optimisers count; a round that falls due between two batches runs after the later one.

    Args:
        update_every_n_steps: optimiser steps from one update round to the next, but for the first few.
        update_starting_at_step: first step after which a round may run.
        freeze_at_step: from this step on nothing is collected, updated or learned; None: never.
        collect_every_n_steps: optimiser steps from one sampled step to the next; None: at most five per round.

    Example:
        >>> schedule = Schedule(50, update_starting_at_step=0, freeze_at_step=None, collect_every_n_steps=None)
        >>> [step for step in range(201) if schedule.updates(step)]
        [1, 2, 4, 8, 16, 32, 50, 100, 150, 200]
    """

    update_every_n_steps: int
    update_starting_at_step: int
    freeze_at_step: int | None
    collect_every_n_steps: int | None

    @property
    def collect_period(self) -> int:
        """Optimiser steps from one sampled step to the next."""
        return self.collect_every_n_steps or math.ceil(self.update_every_n_steps / 5)

    @property
    def first_update(self) -> int:
        """The step after which the first round runs."""
        return max(1, self.update_starting_at_step)

    def updates(self, step: int, since: int | None = None, due: bool | None = None) -> bool:
        """Whether an update round runs after this many optimiser steps.

        Args:
            step: optimiser steps taken so far.
            since: how many there were when this was asked last, if more than one step ago: a round that has fallen
                due in between runs now.
            due: whether a round is due for another reason than a multiple of update_every_n_steps; None: only the
                multiples count.

        Returns:
            Whether it is time.
        """
        if self.frozen(step):
            return False
        if due and step >= self.first_update:
            return True
        earliest = step
        if since is not None:
            earliest = max(since + 1, step - self.update_every_n_steps)
        return any(self._falls_due(each, multiples=due is None) for each in range(earliest, step + 1))

    def _falls_due(self, step: int, *, multiples: bool) -> bool:
        """Whether a round runs after just this step: one of the first, or one of the multiples."""
        if step < self.first_update:
            return False
        is_multiple = step % self.update_every_n_steps == 0
        return self._early(step) or (multiples and is_multiple)

    def collects(self, step: int, stride: int = 1, overrun: int = 0) -> bool:
        """Whether the coming batches are sampled.

        Args:
            step: optimiser steps taken so far, so that the coming one is step + 1.
            stride: optimiser steps that a batch takes.
            overrun: how many more steps the last batch took than expected: if one of them should have been sampled, the
                coming batches are.

        Returns:
            Whether to collect.
        """
        most = self.update_every_n_steps
        first = step + 1 - min(overrun, most)
        last = step + min(stride, most)
        return any(self._samples(coming) for coming in range(first, last + 1))

    def _samples(self, coming: int) -> bool:
        if coming < self.first_update or self.frozen(coming):
            return False
        return self._early(coming) or coming % self.update_every_n_steps % self.collect_period == 0

    def _early(self, step: int) -> bool:
        """Whether the round after this step is one of those at doubling distance: the 1st, 2nd, 4th, 8th, ... step."""
        count = step - self.first_update + 1
        return 0 < count < max(2, self.update_every_n_steps) and count.bit_count() == 1

    def frozen(self, step: int) -> bool:
        """Whether everything is frozen after this many optimiser steps.

        Args:
            step: optimiser steps taken so far.

        Returns:
            Whether it is.
        """
        return self.freeze_at_step is not None and step >= self.freeze_at_step


@dataclass
class Pace:
    """How far a training comes from one look at the schedule to the next: several optimisers take several steps.

    Args:
        last: optimiser steps at the last look; -1 before the first.
        stride: optimiser steps from one look to the next: the largest of late, one less with each shorter one.
        overrun: by how many the last ones were more than that.
    """

    last: int = -1
    stride: int = 1
    overrun: int = 0

    def advance(self, step: int) -> int:
        """Records how many steps have been taken.

        Args:
            step: optimiser steps taken so far.

        Returns:
            How many there were at the last look; one less than now where this is the first.
        """
        since = step - 1
        if 0 <= self.last < step:
            since = self.last
        self.overrun = max(0, step - since - self.stride)
        self.last = step
        self.stride = max(step - since, self.stride - 1)
        return since


@dataclass
class Epochs:
    """The ends of epochs, at which rounds are due, whatever number of optimiser steps an epoch takes.

    Args:
        every: epochs from one round to the next.
        began: optimiser steps when the epoch began.
        steps: that the last epoch took; 0 before the first has ended.
    """

    every: int
    began: int = 0
    steps: int = 0

    def end(self, epoch: int, step: int) -> bool:
        """Records that an epoch has ended.

        Args:
            epoch: its number, from 0.
            step: optimiser steps taken so far.

        Returns:
            Whether a round is due.
        """
        self.steps = step - self.began
        self.began = step
        return self.due(epoch)

    def due(self, epoch: int) -> bool:
        """Whether a round is due at the end of an epoch.

        Args:
            epoch: its number, from 0.

        Returns:
            Whether it is.
        """
        return (epoch + 1) % self.every == 0

    def schedule(self, schedule: Schedule, promised: float = 1.0) -> Schedule:
        """A schedule with a round every so many epochs.

        Args:
            schedule: gives everything but the distance between rounds.
            promised: optimiser steps of an epoch by its batches, for the first one; infinite for a stream.

        Returns:
            The schedule, in optimiser steps; every round has a sampled step.

        Raises:
            ConfigError: if an epoch has no known length.

        Example:
            >>> Epochs(every=2).schedule(Schedule(10, 0, None, None), promised=25.0).update_every_n_steps
            50
        """
        if not math.isfinite(promised):
            mend = "Use update_every_n_steps."
            raise ConfigError("update_every_n_epochs", self.every, "the training data has no known length", mend)
        period = max(1, self.steps or math.ceil(promised)) * self.every
        collect = schedule.collect_every_n_steps
        if collect is not None:
            collect = min(collect, period)
        return replace(schedule, update_every_n_steps=period, collect_every_n_steps=collect)
