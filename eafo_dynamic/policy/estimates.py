"""What an update round estimates from the samples of all sites: in C where the tensors allow it, by torch otherwise."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eafo_dynamic.correction.kernels import RoundKernel, Smoothed, Workspace
from eafo_dynamic.density.ranks import RankGroup, pool_ranks, stack_samples, world_size
from eafo_dynamic.density.sample_moments import SampleMoments, dead_fractions, sample_moments
from eafo_dynamic.entropy.output import MixedEntropy, SmoothedOutput
from eafo_dynamic.entropy.spacings import sort_rows

__all__ = ["OutputEntropy", "Pooled", "dead_fractions_of_sites", "entropies", "moments_of_sites", "pooled"]

_LETTERS = 64  # of what a site has left alone; a longer text is cut off


class Pooled(NamedTuple):
    """The samples of all sites and ranks.

    Args:
        samples: pre-activations, shape [S, n], NaN where missing.
        stats: their moments.
        dead: fraction of units that never fired, shape [S].
        nonfinite: samples that were not finite, before any were left out, int64, shape [S].
        losses: sum and number of losses, shape [2].
        passed_over: kinds of values that some rank could not correct, one text per site, None where there was none.
        marks: numbers of each rank, float32, shape [S, ranks, k].
    """

    samples: Tensor
    stats: SampleMoments
    dead: Tensor
    nonfinite: Tensor
    losses: Tensor
    passed_over: list[str | None]
    marks: Tensor = torch.empty(0, 0, 0, device="cpu")  # where nothing is compared


def pooled(
    drained: Sequence[tuple[Tensor, Tensor]],
    losses: Tensor,
    passed_over: Sequence[str | None],
    limit: int,
    kernel: RoundKernel | None = None,
    marks: Tensor | None = None,
    among: RankGroup | None = None,
) -> Pooled:
    """Puts together what all ranks have collected: the only collective of a round.

    Args:
        drained: samples and units of every site of this rank, from ``Collector.drain``.
        losses: sum and number of this rank's losses, shape [2], on the device where rounds are computed.
        passed_over: kind of a value that each site of this rank could not correct, None where there was none.
        limit: samples of a site, over all ranks.
        kernel: the compiled functions; None for torch's operations.
        marks: numbers of this rank by which the ranks are compared, shape [S, k]; None: none.
        among: the ranks; None: all.

    Returns:
        The samples of all ranks, and what they say.
    """
    device = losses.device
    values = [sample.to(device) for sample, _ in drained]
    lengths = [sample.numel() for sample in values]
    padded = stack_samples(values, max(lengths))
    own = moments_of_sites(padded, kernel)
    width = math.ceil(limit / world_size(among))
    stacked = padded
    if max(lengths) > width:
        stacked = stack_samples(values, width)
    units = stack_samples(_as_floats([units_of_site for _, units_of_site in drained], device), width)
    nonfinite = torch.tensor(lengths, device=device) - own.n
    if marks is None:
        marks = losses.new_empty(len(values), 0)
    beside = torch.cat(
        [nonfinite.unsqueeze(1), losses.expand(len(values), 2), _as_codes(passed_over, device), marks], dim=1
    )
    (samples, owners), beside = pool_ranks((stacked, units), width, beside, among)
    stats = own
    if samples is not padded:
        stats = moments_of_sites(samples, kernel)
    numbers, codes, marks = beside.split([3, _LETTERS, marks.shape[1]], dim=-1)
    sums = numbers.sum(1)
    dead = dead_fractions_of_sites(samples, owners, kernel)
    return Pooled(samples, stats, dead, sums[:, 0].long(), sums[0, 1:], _as_texts(codes), marks)


def _as_codes(texts: Sequence[str | None], device: torch.device) -> Tensor:
    """Short texts as numbers, shape [S, _LETTERS], so that they travel with the samples."""
    padded = b"".join((text or "").encode(errors="replace")[:_LETTERS].ljust(_LETTERS, b"\0") for text in texts)
    return torch.frombuffer(bytearray(padded), dtype=torch.uint8).view(-1, _LETTERS).to(device, torch.float32)


def _as_texts(codes: Tensor) -> list[str | None]:
    """The texts of all ranks from their numbers, shape [S, ranks, _LETTERS]; each once, one after the other."""
    if not codes.any():  # as nearly always
        return [None] * len(codes)
    joined: list[str | None] = []
    for of_ranks in codes.tolist():
        texts = [bytes(map(int, code)).rstrip(b"\0").decode(errors="ignore") for code in of_ranks]
        joined.append(", ".join(dict.fromkeys(filter(None, texts))) or None)
    return joined


def _as_floats(units: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Units in float32, which is exact, so that they travel with the samples; equal sites share theirs."""
    made: dict[int, Tensor] = {}
    for each in units:
        if id(each) not in made:
            made[id(each)] = each.to(device, torch.float32)
    return [made[id(each)] for each in units]


def moments_of_sites(samples: Tensor, kernel: RoundKernel | None = None) -> SampleMoments:
    """Number, mean, standard deviation, skewness and excess kurtosis; see ``sample_moments``.

    Args:
        samples: shape [S, n]; non-finite entries count as missing.
        kernel: the compiled functions; None for torch's operations.

    Returns:
        The moments, shape [S].
    """
    if kernel is None or not kernel.takes(samples):
        return sample_moments(samples)
    n, *others = kernel.moments(samples).unbind(1)
    return SampleMoments(n.long(), *others)


def dead_fractions_of_sites(
    samples: Tensor, units: Tensor, kernel: RoundKernel | None = None, per_unit: int = 8
) -> Tensor:
    """Fraction of units that never fired; see ``dead_fractions``.

    Args:
        samples: shape [S, n]; NaN ones are left out.
        units: unit of each, as floats, NaN where there is no sample.
        kernel: the compiled functions; None for torch's operations.
        per_unit: samples a unit needs on average for the answer to mean something.

    Returns:
        The fractions, float32, shape [S].
    """
    rows = units if units.stride(0) else units[:1]  # the same for all sites, as stack_samples gives them
    if kernel is not None and kernel.takes(samples, rows):
        dead = kernel.dead_fractions(samples, rows, per_unit)
        if dead is not None:
            return dead
    return dead_fractions(samples, units.nan_to_num().long(), per_unit)


class OutputEntropy:
    """Resolution-r entropy of all sites' outputs and its derivatives, from one smoothing.

    Args:
        outputs: a = f(z), shape [S, n]; NaN where missing.
        resolution: r, in standard deviations of the output.
        kernel: the compiled functions; None for torch's operations.
        workspace: gives the kernel room named "score", and "second" when it sorts; None for new tensors.
    """

    def __init__(
        self,
        outputs: Tensor,
        resolution: float,
        kernel: RoundKernel | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        self.workspace = workspace or Workspace()
        self.outputs = outputs
        self.resolution = resolution
        self.kernel = kernel
        self._kernel = None
        if kernel is not None and kernel.takes(outputs):
            self._kernel = kernel

    @functools.cached_property
    def _smoothed(self) -> SmoothedOutput:
        return SmoothedOutput(self.outputs, self.resolution)

    @functools.cached_property
    def _scored(self) -> Smoothed | None:
        if self._kernel is None:
            return None
        room = self.workspace.like(self.outputs, "score")
        return self._kernel.smooth(self.outputs, self.resolution, score=room)

    @functools.cached_property
    def _plain(self) -> Smoothed | None:
        if self._kernel is None or "_scored" in vars(self):
            return self._scored
        return self._kernel.smooth(self.outputs, self.resolution)

    @property
    def entropy(self) -> Tensor:
        """H_r in nats, shape [S]."""
        found = self._plain
        if found is None:
            return self._smoothed.entropy
        return found.column("entropy").to(self.outputs.dtype)

    @property
    def mixed(self) -> MixedEntropy:
        """Atom mass, entropy of the rest and H_r."""
        found = self._plain
        if self._kernel is None or found is None:
            return self._smoothed.mixed
        count = found.column("count")
        values = self.outputs
        if bool((count < values.shape[1]).any()):  # where a sample is missing: it sorts behind the others
            values = values.where(values.isfinite(), math.inf)
        ordered = sort_rows(values, self.workspace.like(values, "second"))
        both = self._kernel.spacings(ordered, count, torch.finfo(values.dtype).eps)
        mass, rest = both.to(values.dtype).unbind(1)
        return MixedEntropy(mass, rest, self.entropy)

    def _score_for(self, values: Tensor) -> Smoothed | None:
        """The smoothed score where the compiled functions take these values as well."""
        if self._kernel is None or not self._kernel.takes(values):
            return None
        return self._scored

    def gradient(self, direction: Tensor) -> Tensor:
        """First-order change of H_r when the outputs move along a direction, equation (1').

        Args:
            direction: g at the samples, shape [S, n], units of the outputs.

        Returns:
            dH_r/d eps in nats, shape [S].
        """
        found = self._score_for(direction)
        if self._kernel is None or found is None:
            return self._smoothed.gradient(direction)
        return self._kernel.gradient(self.outputs, found, direction, self.resolution).to(self.outputs.dtype)

    def change(self, outputs: Tensor) -> Tensor:
        """First-order change of H_r when the outputs become others.

        Args:
            outputs: the others, shape [S, n].

        Returns:
            Nats, shape [S].
        """
        found = self._score_for(outputs)
        if self._kernel is None or found is None:
            return self.gradient(outputs - self.outputs)
        change = self._kernel.gradient(self.outputs, found, outputs, self.resolution, moved=True)
        return change.to(self.outputs.dtype)


def entropies(outputs: Tensor, others: Tensor, resolution: float, kernel: RoundKernel | None = None) -> list[Tensor]:
    """Resolution-r entropies of two kinds of samples of all sites.

    Args:
        outputs: shape [S, n].
        others: shape [S, n].
        resolution: r, in standard deviations.
        kernel: the compiled functions; None for torch's operations.

    Returns:
        Two of shape [S], in nats.
    """
    if kernel is not None and kernel.takes(outputs, others):
        return [OutputEntropy(each, resolution, kernel).entropy for each in (outputs, others)]
    # both at once: without the compiled functions a round costs about as much as it has operations
    return list(SmoothedOutput(torch.cat([outputs, others]), resolution).entropy.chunk(2))
