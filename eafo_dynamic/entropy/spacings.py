"""Sorted samples of every site: atoms, and the differential entropy of the rest by m-spacings."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["ATOM_SHARE", "atoms_and_rest", "sort_rows"]

ATOM_SHARE = 0.01  # a value is an atom when it holds at least this share of the samples, and at least two
_MOST_WINDOWS = 8192  # spacings averaged, at most


def atoms_and_rest(samples: Tensor, *, complete: bool = False, sampled: bool = True) -> tuple[Tensor, Tensor]:
    """Probability on atoms, and differential entropy of the other samples.

    Args:
        samples: samples, shape [sites, n >= 1]; non-finite ones are missing.
        complete: whether it is known that none is missing, which saves looking.
        sampled: whether the samples are random draws; if not they are the quantiles of a known
            distribution, whose spacings have no sampling bias.

    Returns:
        Atom mass and entropy in nats, float64, shape [sites, 1]; NaN without samples; entropy minus
        infinity where fewer than two samples lie off the atoms.
    """
    values = samples.detach()
    values = values.double() if values.dtype == torch.float64 else values.float()
    if complete:
        count = torch.full_like(values[:, :1], values.shape[1], dtype=torch.int64)
    else:
        known = values.isfinite()
        values = torch.where(known, values, math.inf)
        count = known.sum(1, keepdim=True)
    ordered = sort_rows(values)
    start, length = _atoms(ordered, count)
    held = length.sum(1, keepdim=True)
    epsilon = torch.finfo(samples.dtype).eps if samples.is_floating_point() else 0.0
    continuous = _spacing_entropy(ordered, count - held, (start, length), epsilon, sampled)
    return held.double() / count, torch.where(count > 0, continuous, math.nan)


def sort_rows(rows: Tensor, room: Tensor | None = None) -> Tensor:
    """Every row in ascending order, NaN last.

    Args:
        rows: shape [sites, n].
        room: where the result may be written, shape [sites, n]; None for a new tensor.

    Returns:
        Same shape.
    """
    if rows.device.type == "cpu":
        # numpy sorts with vector instructions, some fifty times faster than torch on a CPU
        ordered = room
        if ordered is None:
            ordered = torch.empty_like(rows)
        np.copyto(ordered.numpy(), rows.numpy())
        ordered.numpy().sort(axis=1)
        return ordered
    return rows.sort(dim=1).values


def _atoms(ordered: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Where the atoms of every sorted row begin and how many samples they hold.

    Args:
        ordered: sorted samples, shape [sites, n], missing ones as +inf.
        count: number of samples that are not missing, shape [sites, 1].

    Returns:
        Start and length, shape [sites, most atoms of a row], in ascending order, length 0 for filling.
    """
    sites = ordered.shape[0]
    least = (count * ATOM_SHARE).ceil().long().clamp(min=2)
    # A sample whose value recurs `least - 1` places further on belongs to an atom.
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    for gap in (least - 1).unique().tolist():
        rows = least[:, 0] == gap + 1
        part = ordered if len(ordered) == 1 or bool(rows.all()) else ordered[rows]
        repeated[rows, :-gap] = (part[:, gap:] == part[:, :-gap]) & (part[:, gap:] < math.inf)
    # One sample alone repeats nothing, but is a constant.
    if not bool(repeated.any()):
        return torch.zeros_like(count), (count == 1).long()
    joined = repeated[:, 1:] & repeated[:, :-1] & (ordered[:, 1:] == ordered[:, :-1])
    row, begin = (repeated & ~_pad(joined, 1, 0)).nonzero(as_tuple=True)
    _, final = (repeated & ~_pad(joined, 0, 1)).nonzero(as_tuple=True)
    rank = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    width = 1
    if len(rank):
        width = int(rank.max()) + 1
    start = torch.zeros(sites, width, dtype=torch.int64, device=row.device)
    start[row, rank] = begin
    length = torch.zeros_like(start)
    length[row, rank] = final - begin + least[row, 0]
    # One sample alone repeats nothing, but is a constant.
    length[:, :1] = torch.where(count == 1, 1, length[:, :1])
    return start, length


def _pad(mask: Tensor, left: int, right: int) -> Tensor:
    return torch.nn.functional.pad(mask, (left, right))


def _spacing_entropy(
    ordered: Tensor, count: Tensor, atoms: tuple[Tensor, Tensor], epsilon: float, sampled: bool
) -> Tensor:
    """Mean of log spacings over evenly spaced places, less the mean that a uniform density would give.

    Args:
        ordered: sorted samples, shape [sites, n].
        count: number of valid samples off the atoms, shape [sites, 1].
        atoms: where the atoms begin and how many samples each holds, shape [sites, atoms].
        epsilon: relative rounding of the samples: what lies closer counts as that far apart.
        sampled: whether the samples are random draws.

    Returns:
        Differential entropy, float64, shape [sites, 1]; minus infinity with fewer than two samples.
    """
    enough = count.clamp(min=2)
    # Windows of 2 m samples, m = count^(1/3), one every m / 2 samples.
    places = (2 * enough.double() ** (2 / 3)).ceil().long().minimum(enough).clamp(max=_MOST_WINDOWS)
    j = torch.arange(min(math.ceil(2 * ordered.shape[1] ** (2 / 3)), _MOST_WINDOWS), device=ordered.device)
    centre = ((j + 0.5) * (enough.double() / places)).long().minimum(enough - 1)
    half = (enough.double() ** (1 / 3)).round().long().clamp(min=1)
    low = (centre - half).clamp(min=0)
    high = torch.minimum(centre + half, enough - 1)
    bottom, top = (_off_atoms(ordered, rank, *atoms) for rank in (low, high))
    width = torch.maximum(top - bottom, epsilon * torch.maximum(top.abs(), bottom.abs())).clamp(min=1e-300)
    # The mean log of the share of all samples that this many spacings cover.
    share = _log_share(high - low, enough, 2 * round(ordered.shape[1] ** (1 / 3)) + 1, sampled)
    mean = torch.where(j < places, width.log() - share, 0.0).sum(1, keepdim=True) / places
    return torch.where(count >= 2, mean, -math.inf)


def _log_share(spacings: Tensor, count: Tensor, most: int, sampled: bool) -> Tensor:
    """Return E log of the share that k spacings of random points cover, or log of it for quantiles."""
    if not sampled:
        return (spacings.double() / count).log()
    table = torch.digamma(torch.arange(most + 1, device=count.device, dtype=torch.float64))
    return table[spacings] - torch.digamma((count + 1).double())


def _off_atoms(ordered: Tensor, rank: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """Return the samples with these ranks among those that lie on no atom, float64, shape of the ranks."""
    place = rank
    for begin, held in zip(start.split(1, 1), length.split(1, 1), strict=True):
        place = place + held * (place >= begin)
    return ordered.gather(1, place.clamp(max=ordered.shape[1] - 1)).double()
