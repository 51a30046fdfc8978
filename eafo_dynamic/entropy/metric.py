"""``ActivationEntropy``: the resolution-r entropy of an activation's output as a torchmetrics Metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
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

_PER_OCTAVE = 64  # bins between a power of two and the next
_LOWEST, _HIGHEST = -125, 128  # octaves, as frexp counts them: 2^-126 to 2^128, every normal float32
_SIDE = (_HIGHEST - _LOWEST + 1) * _PER_OCTAVE  # bins of one sign
_BINS = 2 * _SIDE + 1  # and one for what is closer to 0


class ActivationEntropy(Metric):
    """H_r(a) = h((a - E a) / sd(a) + r N) in nats over everything seen since the last reset.

    Streaming: what is kept is a histogram with 64 bins an octave on both sides of 0, and the mean
    position inside each bin, so that atoms stay where they are. Both are sums: merging ranks, epochs or
    chunks of any size equals one pass. Outputs are resolved to 1/64 of their magnitude; for r = 0.1 that
    is ample unless their mean is more than some ten standard deviations. The bins cover every normal
    float32, 390 kB for each entropy (512 channels: 200 MB); magnitudes below 2^-126 count as 0. Non-finite
    values are left out.

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
        size = (num_channels or 1) * _BINS
        self.add_state("counts", torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("offsets", torch.zeros(size, dtype=torch.float32), dist_reduce_fx="sum")

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
            found = values.shape[self.channel_dim] if -values.dim() <= self.channel_dim < values.dim() else None
            if found != self.num_channels:
                problem = f"the input of shape {tuple(values.shape)} has {found} along dimension {self.channel_dim}"
                raise ConfigError("num_channels", self.num_channels, problem, "Set channel_dim as well.")
            rows = values.movedim(self.channel_dim, 0).reshape(self.num_channels, -1)
        index, offset = _bin(rows)
        known = rows.isfinite()
        index = index + _BINS * torch.arange(len(rows), device=rows.device)[:, None]
        # Adding nothing where a value is missing spares a mask, and with it a wait for the device.
        self.counts.index_add_(0, index.flatten(), known.flatten().long())
        self.offsets.index_add_(0, index.flatten(), (offset * known).flatten().to(self.offsets.dtype))

    def compute(self) -> Tensor:
        """Resolution-r entropy.

        Returns:
            Nats, float32; 0-dim, or [num_channels]; NaN where nothing was seen.
        """
        counts, offsets = self.counts.reshape(-1, _BINS).cpu(), self.offsets.reshape(-1, _BINS).cpu()
        filled = counts.any(0)
        filled[_SIDE] = True  # one at least, also where nothing was seen
        used = filled.nonzero()[:, 0]  # few, unless outputs of many scales are mixed
        counts, offsets = counts[:, used].double(), offsets[:, used].double()
        values = torch.where(counts > 0, _position(used, offsets / counts.clamp(min=1)), math.nan)
        entropy = SmoothedOutput(values, self.resolution, counts, sampled=True).entropy
        return (entropy if self.num_channels else entropy[0]).to(self.counts.device, torch.float32)

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw one entropy or a series of them.

        Args:
            val: a result of ``compute`` or ``forward``, or a sequence of them; None: the present one.
            ax: where to draw; None for a new figure.

        Returns:
            Figure and axes.
        """
        return self._plot(val, ax)


def _bin(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bin of every value, and the position inside it in [0, 1]."""
    safe = torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    mantissa, exponent = torch.frexp(safe.abs())
    fine = (2 * mantissa - 1) * _PER_OCTAVE
    place = (exponent - _LOWEST) * _PER_OCTAVE + fine.floor().clamp(0, _PER_OCTAVE - 1).long()
    offset = fine - fine.floor()
    tiny = (exponent < _LOWEST) | (safe == 0)
    index = torch.where(tiny, _SIDE, torch.where(safe > 0, _SIDE + 1 + place, _SIDE - 1 - place))
    return index, torch.where(tiny, 0.0, offset)


def _position(index: Tensor, offset: Tensor) -> Tensor:
    """Return the value at a position inside each of these bins, shape of the offsets."""
    side = (index - _SIDE).double()
    place = side.abs() - 1
    octave = torch.exp2(torch.div(place, _PER_OCTAVE, rounding_mode="floor") + _LOWEST - 1)
    low, width = octave * (1 + place % _PER_OCTAVE / _PER_OCTAVE), octave / _PER_OCTAVE
    return side.sign() * (low + width * offset)
