"""``ActivationEntropy``: the resolution-r entropy of an activation's output as a torchmetrics Metric."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from eafo_dynamic.entropy.output import SmoothedOutput
from eafo_dynamic.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ActivationEntropy"]

_LOWEST, _HIGHEST = -125, 128  # octaves, as frexp counts them: 2^-126 to 2^128, every normal float32
_OCTAVES = _HIGHEST - _LOWEST + 1
_UNIT = 1 << 20  # of the sums of positions: integers keep growing where float32 stops at 2^24 samples
_WIDEST = 2.0  # bins wider than this many times r standard deviations show in the entropy
_TOLERATED = 0.01  # share of the samples in such bins: the tails of a distribution lie in wide ones


@dataclass(frozen=True)
class _Bins:
    """Bins of every normal float32: those of negative numbers, one for what is closer to 0, those of positive ones.

    Args:
        per_octave: number between a power of two and the next.
    """

    per_octave: int

    @classmethod
    def for_resolution(cls, resolution: float) -> _Bins:
        """64 an octave down to r = 0.1; for a smaller r as many times more."""
        return cls(64 * math.ceil(max(1.0, 0.1 / resolution - 1e-9)))

    @property
    def zero(self) -> int:
        """The bin around 0; so many lie on each side of it."""
        return _OCTAVES * self.per_octave

    @property
    def count(self) -> int:
        """Number of bins."""
        return 2 * self.zero + 1

    def place(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The bin of every value, and the position inside it in [0, 1]."""
        safe = torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        mantissa, exponent = torch.frexp(safe.abs())
        fine = (2 * mantissa - 1) * self.per_octave
        of_octave = fine.floor().clamp(0, self.per_octave - 1).long()
        away = 1 + (exponent - _LOWEST) * self.per_octave + of_octave
        tiny = (exponent < _LOWEST) | (safe == 0)
        signed = torch.where(safe > 0, away, -away)
        index = self.zero + torch.where(tiny, 0, signed)
        return index, torch.where(tiny, 0.0, fine - fine.floor())

    def width(self, index: Tensor) -> Tensor:
        """Width of bins; 0 for the one around 0, all of whose values count as 0."""
        away = (index - self.zero).abs()
        octave = torch.div(away - 1, self.per_octave, rounding_mode="floor") + _LOWEST - 1
        width = torch.exp2(octave.double()) / self.per_octave
        return torch.where(away == 0, 0.0, width)

    def value(self, index: Tensor, offset: Tensor) -> Tensor:
        """The value at a position inside each of these bins, shape of the offsets."""
        side = index - self.zero
        steps = self.per_octave + (side.abs() - 1) % self.per_octave
        return side.sign() * self.width(index) * (steps + offset)


class ActivationEntropy(Metric):
    """H_r(a) = h((a - E a) / sd(a) + r N) in nats over everything seen since the last reset.

    Streaming: what is kept is a histogram, and the mean position inside each bin, so that atoms stay where they are.
    Both are sums of integers: merging ranks, epochs or chunks of any size equals one pass to the last bit, up to 8e12
    samples.

    Between a power of two and the next there are 64 bins, and 6.4 / r of them for r < 0.1, so that outputs are resolved
    to r standard deviations unless their mean is more than some ten standard deviations. Where it is, so that more
    than 1 % of the samples lie in bins wider than 2 r standard deviations, ``compute`` warns. Magnitudes below 2^-126
    count as 0. Non-finite values are left out.

    Memory for each entropy: 520 kB (512 channels: 270 MB), for r < 0.1 times 0.1 / r.

    Args:
        resolution: r, in standard deviations of the output, in [0.001, 1].
        num_channels: number of channels for one entropy each; None for one entropy of all values.
        channel_dim: dimension of the input that holds the channels.
        **kwargs: options of ``torchmetrics.Metric``.

    Raises:
        ConfigError: resolution or num_channels cannot work.

    Example:
        >>> metric = ActivationEntropy()
        >>> metric.update(torch.tensor([0.0, 0.0, 0.0]))
        >>> metric.compute()  # a constant: 1/2 log(2 pi e r^2)
        tensor(-0.8836)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    counts: Tensor
    offsets: Tensor

    def __init__(
        self, resolution: float = 0.1, num_channels: int | None = None, channel_dim: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not 1e-3 <= resolution <= 1:
            raise ConfigError("resolution", resolution, "is outside [0.001, 1]", "The default is 0.1.")
        if num_channels is not None and num_channels < 1:
            raise ConfigError("num_channels", num_channels, "is no number of channels", "None: all together.")
        self.resolution = resolution
        self.num_channels = num_channels
        self.channel_dim = channel_dim
        self._bins = _Bins.for_resolution(resolution)
        size = (num_channels or 1) * self._bins.count
        self.add_state("counts", torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("offsets", torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")  # in 2^-20 bins

    def update(self, outputs: Tensor) -> None:
        """Take in activation outputs.

        Args:
            outputs: any shape; with channels, ``outputs.shape[channel_dim]`` of them.

        Raises:
            ConfigError: the number of channels is another one.
        """
        values = outputs.detach().float()
        if self.num_channels is None:
            rows = values.reshape(1, -1)
        else:
            found = None
            if -values.dim() <= self.channel_dim < values.dim():
                found = values.shape[self.channel_dim]
            if found != self.num_channels:
                problem = f"the input of shape {tuple(values.shape)} has {found} along dimension {self.channel_dim}"
                raise ConfigError("num_channels", self.num_channels, problem, "Set channel_dim as well.")
            rows = values.movedim(self.channel_dim, 0).reshape(self.num_channels, -1)
        index, offset = self._bins.place(rows)
        known = rows.isfinite()
        index = index + self._bins.count * torch.arange(len(rows), device=rows.device)[:, None]
        # Adding nothing where a value is missing spares a mask, and with it a wait for the device.
        self.counts.index_add_(0, index.flatten(), known.flatten().long())
        self.offsets.index_add_(0, index.flatten(), (offset * known * _UNIT).round().flatten().long())

    def compute(self) -> Tensor:
        """Resolution-r entropy.

        Returns:
            Nats, float32; 0-dim, or [num_channels]; NaN where nothing was seen.

        Warns:
            UserWarning: the bins are too wide for the samples, whose mean is many standard deviations away from 0.
        """
        counts = self.counts.reshape(-1, self._bins.count).cpu()
        offsets = self.offsets.reshape(-1, self._bins.count).cpu()
        filled = counts.any(0)
        filled[self._bins.zero] = True  # at least one bin, also where nothing was seen
        used = filled.nonzero()[:, 0]  # few, unless outputs of many scales are mixed
        counts = counts[:, used].double()
        offsets = offsets[:, used].double() / _UNIT
        values = torch.where(counts > 0, self._bins.value(used, offsets / counts.clamp(min=1)), math.nan)
        smoothed = SmoothedOutput(values, self.resolution, counts, sampled=True)
        self._warn_of_wide_bins(counts, self._bins.width(used), smoothed.std)
        entropy = smoothed.entropy
        if self.num_channels is None:
            entropy = entropy[0]
        return entropy.to(self.counts.device, torch.float32)

    def _warn_of_wide_bins(self, counts: Tensor, width: Tensor, std: Tensor) -> None:
        wide = (width > _WIDEST * self.resolution * std[:, None]) & (std[:, None] > 0)
        share = (counts * wide).sum(1) / counts.sum(1).clamp(min=1)
        worst = float(share.max())
        if worst > _TOLERATED:
            warnings.warn(
                f"ActivationEntropy: {worst:.0%} of the outputs lie in bins wider than {_WIDEST:g} r standard "
                f"deviations (r={self.resolution:g}), since their mean is many standard deviations away from 0: the "
                "entropy is not resolved. Subtract a constant near the mean before update, or use a larger resolution.",
                stacklevel=3,
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Reads a persistent state; one of version 0.1.0 has its positions in float32."""
        saved = state_dict.get(prefix + "counts")
        if isinstance(saved, Tensor) and saved.shape != self.counts.shape:
            problem = f"the saved state has {saved.numel()} bins, this one {self.counts.numel()}"
            mend = "Load it with the resolution and num_channels that it was made with, or start anew."
            raise ConfigError("resolution", self.resolution, problem, mend)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.offsets.is_floating_point():
            self.offsets = (self.offsets.double() * _UNIT).round().long()

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw one entropy or a series of them.

        Args:
            val: a result of ``compute`` or ``forward``, or a sequence of them; None: the present one.
            ax: where to draw; None for a new figure.

        Returns:
            Figure and axes.
        """
        return self._plot(val, ax)
