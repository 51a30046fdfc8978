"""One update round, top to bottom: samples, entropy, wanted functions, bounded move, commit, rows of the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eafo_dynamic.apply.bank import Bank
from eafo_dynamic.correction.kernels import Workspace, round_kernel
from eafo_dynamic.correction.stacked import Functions
from eafo_dynamic.density.bins import BINS, BinCounts, bin_counts
from eafo_dynamic.density.estimators import make_estimator
from eafo_dynamic.density.running import RunningDensity
from eafo_dynamic.density.sample_moments import SampleMoments
from eafo_dynamic.internals.checks import fitting
from eafo_dynamic.policy.agreement import Agreement, describe
from eafo_dynamic.policy.alerts import ranges
from eafo_dynamic.policy.amplitudes import Amplitudes
from eafo_dynamic.policy.diagnostics import describe_events, diagnostics, state, to_rows
from eafo_dynamic.policy.estimates import OutputEntropy, Pooled, pooled
from eafo_dynamic.policy.moves import refreshed, reverted, with_finite_amplitudes
from eafo_dynamic.policy.options import Options
from eafo_dynamic.policy.policies import Observe, Policy
from eafo_dynamic.policy.rollback import LossWatch
from eafo_dynamic.policy.saved import amplitudes_before, stacked_functions
from eafo_dynamic.policy.trust_region import bounded_move, range_of
from eafo_dynamic.records.schema import Record

__all__ = ["Rounds", "unpacked"]

_EXACT = 1 << 24  # whole numbers below it are exact in float32


class Rounds:
    """The update rounds of one model: what a round does, and what it leaves for the next.

    S is the number of sites, n the number of samples per site, T the number of terms; a site has an amplitude for each.

    Args:
        bank: the sites' tensors.
        policies: of every site, S of them.
        options: see Options.
        agreement: of the ranks that train the model.

    Attributes:
        amplitudes: the sites' amplitudes under their policies.
        density: the running estimate of every site's density.
        losses: the training loss since the last round, for ``rollback_factor``.
        gradient: dH_r/d amplitude in nats, shape [T, S], 0 where a site had too few samples: of the functions that
            the last round left where a policy adds it to eps.grad, else of those that it found. None before the
            first round.
        count: rounds so far.
    """

    def __init__(self, bank: Bank, policies: Sequence[Policy], options: Options, agreement: Agreement) -> None:
        self._bank, self._policies, self._options = bank, policies, options
        self._agreement = agreement
        self._region = options.trust_region
        self._kernel = round_kernel(options.backend)
        self._workspace = Workspace()
        self.amplitudes = Amplitudes(bank, policies)
        self.density = RunningDensity(make_estimator(options.density), options.momentum)
        self.losses = LossWatch(options.rollback_factor)
        self.gradient: Tensor | None = None
        self.count = 0
        self._last = bank.functions().amplitudes  # as the last round left them
        self._replaced: Functions | None = None  # what the last round put others in place of
        self._samples: Tensor | None = None  # of the last round, until somebody asks for their histogram
        self._histogram: BinCounts | None = None

    @property
    def histogram(self) -> BinCounts | None:
        """Of the samples of the last round; None before the first one."""
        if self._samples is not None:
            self._histogram, self._samples = bin_counts(self._samples), None
        return self._histogram

    @torch.no_grad()
    def run(self, step: int, epoch: int) -> list[Record]:
        """Runs one round now.

        Args:
            step: optimiser steps taken so far, for the log.
            epoch: for the log.

        Returns:
            One row per site.
        """
        # samples of all ranks since the last round, and their moments
        has_losses = self.losses.has_any
        collected = self._collected(step)
        samples, moments = collected.samples, collected.stats
        usable = _has_spread(moments)

        # the functions now, the entropy H_r of their outputs, and dH_r/d amplitude (Theory, section 4, (1'))
        functions = self._bank.functions(self._kernel)
        self._last = _beside(self._last, functions)
        functions, broken = with_finite_amplitudes(functions, self._last)
        entropy, by_amplitude = self._entropy_and_gradient(functions, samples)
        self.gradient = _where_usable(by_amplitude, usable)

        # the functions wanted: the earlier ones if the last round made the loss jump, else what the policies ask for
        undone: Functions | None = None
        if self.losses.jumped(collected.losses):
            undone = self._replaced
        if undone is not None:
            wanted = reverted(functions, undone, self._trained(functions))
        else:
            wanted = self._with_moved_amplitudes(functions, self.gradient, usable)
            wanted = self._with_followed_shapes(wanted, samples, moments, usable)

        # as much of the way as the trust region admits
        channels = self._bank.channels()
        span = None
        if functions.has_tails:
            span = range_of(samples, functions)
        new, fraction = bounded_move(functions, wanted, self._region, channels, span)
        self._bank.commit(functions, new, self._region.max_eps)
        if channels is not None:
            new = self._bank.functions(self._kernel)  # a channel at its bound stayed there, which changes the mean

        # rows of the log
        columns = diagnostics(collected, entropy, new, self._last, by_amplitude)
        if has_losses:
            total, number = collected.losses
            columns["loss"] = (total / number).expand(len(samples))
        if any(isinstance(policy, Observe) for policy in self._policies):
            columns |= ranges(samples, new)
        events = describe_events(
            moments.n, usable, fraction, undone is not None, collected.nonfinite, broken, collected.passed_over
        )

        # what the optimiser's steps and the next round need
        if self.amplitudes.adds_gradient:
            _, by_amplitude = self._entropy_and_gradient(new, samples)
            self.gradient = _where_usable(by_amplitude, usable)
        self._replaced = None
        if self._options.rollback_factor is not None and undone is None:
            self._replaced = functions
        self._last = new.amplitudes
        self._samples = samples
        self.count += 1
        return self._rows(step, epoch, columns, events)

    def _collected(self, step: int) -> Pooled:
        """What all ranks have collected since the last round; the only collective of a round."""
        self._agreement.meet(lambda: describe(self._bank, self._options), self._bank.device)
        drained, passed_over = self._bank.drain()
        losses = self.losses.drain().to(self._bank.device)
        limit, among = self._options.samples_per_site, self._agreement.among
        collected = pooled(drained, losses, passed_over, limit, self._kernel, self._marks(step), among)
        self._agreement.check(collected.marks, self._bank.names, self._bank.terms)
        return collected

    def _marks(self, step: int) -> Tensor | None:
        """What the ranks have to have in common, shape [S, 2 + terms]: the round, the step, the amplitudes."""
        if self._agreement.size == 1:
            return None
        now = self._bank.functions().amplitudes
        columns = [torch.full_like(now[0], number % _EXACT) for number in (self.count, step)]
        return torch.stack([*columns, *now], dim=1)

    def _entropy_and_gradient(self, functions: Functions, samples: Tensor) -> tuple[OutputEntropy, Tensor]:
        """H_r of the functions' outputs, and dH_r/d amplitude, shape [T, S]; good until the next call."""
        outputs, directions = functions.outputs_and_directions(samples, self._workspace)
        entropy = OutputEntropy(outputs, self._options.resolution, self._kernel, self._workspace)
        return entropy, torch.stack([entropy.gradient(direction) for direction in directions])

    def _with_moved_amplitudes(self, functions: Functions, gradient: Tensor, usable: Tensor) -> Functions:
        """The functions with amplitudes where the policies want them; those that the loss trains stay."""
        moved = self._region.clamp(self.amplitudes.moved(functions.amplitudes, gradient))
        return replace(functions, amplitudes=torch.where(usable, moved, functions.amplitudes))

    def _with_followed_shapes(
        self, functions: Functions, samples: Tensor, moments: SampleMoments, usable: Tensor
    ) -> Functions:
        """The functions with shapes that fit the running density, where the policy follows the data."""
        follows = self.amplitudes.follows.to(usable.device)
        if not follows.any():
            return functions
        density = self.density.follow(samples, usable, moments)
        return refreshed(functions, density, usable & follows, self._options.resolution)

    def _trained(self, functions: Functions) -> Tensor:
        """Sites whose amplitudes the optimiser moves, shape [S], bool."""
        return torch.tensor([policy.trains_eps for policy in self._policies], device=functions.shape.device)

    def _rows(self, step: int, epoch: int, columns: Mapping[str, Tensor], events: Sequence[str | None]) -> list[Record]:
        heads: list[Record] = [{"step": step, "epoch": epoch, "site": name} for name in self._bank.names]
        policies = [policy.name for policy in self._policies]
        tails = [{"policy": name, "event": event} for name, event in zip(policies, events, strict=True)]
        return to_rows(heads, columns, tails)

    @torch.no_grad()
    def end_rows(self, step: int, epoch: int) -> list[Record]:
        """What the corrections are now, between rounds; nothing is measured, moved or forgotten.

        Args:
            step: optimiser steps taken so far, for the log.
            epoch: for the log.

        Returns:
            One row per site with the columns of ``diagnostics.state``.
        """
        heads: list[Record] = [{"step": step, "epoch": epoch, "site": name} for name in self._bank.names]
        tails = [{"policy": policy.name} for policy in self._policies]
        functions = self._bank.functions()
        return to_rows(heads, state(functions, _beside(self._last, functions)), tails)

    def forget(self) -> None:
        """Forgets what ties the next round to the last one; call where another training begins."""
        self.losses = LossWatch(self._options.rollback_factor)
        self.gradient = None
        self._replaced = None

    def grown(self, bank: Bank, policies: Sequence[Policy]) -> Rounds:
        """The rounds of a bank that has sites behind those of this one's, which go on as they are.

        Args:
            bank: the sites, the earlier ones first.
            policies: one per site.

        Returns:
            The rounds. What the last round did cannot be undone in them.
        """
        grown = Rounds(bank, policies, self._options, self._agreement)
        grown.density, grown.losses, grown.count = self.density, self.losses, self.count
        functions = bank.functions()
        of_new = functions.amplitudes[:, self._last.shape[1] :]
        grown.density.grow(of_new.shape[1])
        grown._last = torch.cat([_beside(self._last, functions), of_new], dim=1)
        if self.gradient is not None:
            grown.gradient = torch.cat([self.gradient, torch.zeros_like(of_new)], dim=1)
        return grown

    def state_dict(self) -> dict[str, Any]:
        """What all ranks agree on; tensors and primitives only.

        The keys are always the same. What changes from None into tensors stands in a tuple, which
        torch.distributed.checkpoint takes as one value.

        Returns:
            The state. The functions themselves are in the model's own state_dict.
        """
        gradient, undo, counted = None, None, None
        if self.histogram is not None:
            counted = self.histogram._asdict()
        if self.gradient is not None:
            gradient = self.gradient.flatten()
        if self._replaced is not None:
            undo = self._replaced.tensors()
        return {
            "rounds": self.count,
            "running": (self.density.state_dict(),),
            "gradient": (gradient,),
            "terms": tuple(self._bank.terms),
            "amplitudes_before": self._last,
            "losses": self.losses.state_dict(),
            "undo": (undo,),
            "histogram": (counted,),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` gave.

        Args:
            state: of the same sites; the model's own weights are restored already.

        Raises:
            ValueError: if a tensor does not fit.
        """
        now = self._bank.functions()
        self.count = int(state["rounds"])
        self._last = fitting(amplitudes_before(state, now.names), now.amplitudes)
        gradient, running, undo = (unpacked(state[name]) for name in ("gradient", "running", "undo"))
        self.gradient = None
        if gradient is not None:
            self.gradient = fitting(gradient, now.amplitudes.flatten()).view_as(now.amplitudes)
        self.density.load_state_dict(running, now.shape[:, 0])
        self._replaced = None
        if undo is not None:
            undo = stacked_functions(undo)
            before = {name: fitting(value, getattr(now, name)) for name, value in undo.items()}
            self._replaced = replace(now, **before)
        self.losses.load_state_dict(state["losses"])
        counted = unpacked(state.get("histogram"))
        self._samples, self._histogram = None, None
        if counted is not None:
            edges, counts = (torch.zeros(len(now.bases), size, device=now.shape.device) for size in (BINS + 1, BINS))
            self._histogram = BinCounts(
                fitting(counted["edges"], edges.double()), fitting(counted["counts"], counts.long())
            )


def unpacked(value: Any) -> Any:
    """A value of a state, which stands in a tuple since version 0.2.0, in a list after some kinds of files.

    Args:
        value: from ``Rounds.state_dict``.

    Returns:
        What is in the tuple.
    """
    if isinstance(value, (tuple, list)):
        (value,) = value
    return value


def _beside(last: Tensor, functions: Functions) -> Tensor:
    """Amplitudes on the device of the functions: the model may have moved since, or have left the meta device."""
    if last.is_meta:
        return functions.amplitudes
    return last.to(functions.shape.device)


def _where_usable(by_amplitude: Tensor, usable: Tensor) -> Tensor:
    """A gradient, 0 where samples did not suffice for it; float32, as amplitudes are."""
    return torch.where(usable, by_amplitude, 0.0).nan_to_num().to(torch.float32)


def _has_spread(moments: SampleMoments) -> Tensor:
    """Sites whose samples suffice for an estimate, shape [S], bool."""
    finite = moments.std.isfinite() & moments.mean.isfinite()
    return finite & (moments.n >= 2) & (moments.std > 0)
