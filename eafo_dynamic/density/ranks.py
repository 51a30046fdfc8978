"""Samples of all sites stacked, and those of all processes side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eafo_dynamic.density.collector import spread_places

__all__ = ["RankGroup", "everyones", "gather_ranks", "is_first_rank", "pool_ranks", "stack_samples", "world_size"]


class RankGroup:
    """Ranks that belong together, of the processes that train.

    Args:
        group: their process group, or a DeviceMesh of one dimension.

    Raises:
        TypeError: if it is neither.
        ValueError: if the mesh has several dimensions, or this process is not one of the ranks.
    """

    def __init__(self, group: Any) -> None:
        if isinstance(group, RankGroup):
            group = group.group
        if hasattr(group, "get_group") and hasattr(group, "ndim"):  # a DeviceMesh, whose module is not imported here
            if group.ndim != 1:
                raise ValueError(f"a mesh of {group.ndim} dimensions")
            group = group.get_group()
        if group == torch.distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("this process is not one of its ranks")
        if not isinstance(group, torch.distributed.ProcessGroup):
            raise TypeError("neither a process group nor a DeviceMesh")
        self.group = group

    @property
    def ranks(self) -> list[int]:
        """Their ranks among all processes."""
        return torch.distributed.get_process_group_ranks(self.group)

    def __repr__(self) -> str:
        return f"ranks {', '.join(map(str, self.ranks))}"

    def __deepcopy__(self, memo: dict[int, Any]) -> RankGroup:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _forgotten, ()  # another process has no such group


def _forgotten() -> None:
    return None


def stack_samples(samples: Sequence[Tensor], limit: int) -> Tensor:
    """Stacks samples of unequal length, the shorter ones filled with NaN.

    Args:
        samples: one tensor per site, shape [n_s].
        limit: most samples that are kept of each; a longer one is thinned evenly.

    Returns:
        Shape [sites, n]; a view where all sites share one tensor.
    """
    thinned = [_thin(values, limit) for values in samples]
    if len(thinned) > 1 and all(values is thinned[0] for values in thinned):  # as units of equal sites are
        return thinned[0].expand(len(thinned), -1)
    if len({values.numel() for values in thinned}) == 1:
        return torch.stack(thinned)
    width = max((values.numel() for values in thinned), default=0)
    dtype = max((values.dtype for values in thinned), key=lambda d: torch.finfo(d).bits)
    stacked = torch.full((len(thinned), width), math.nan, dtype=dtype, device=thinned[0].device)
    for row, values in zip(stacked, thinned, strict=True):
        row[: values.numel()] = values
    return stacked


def _thin(values: Tensor, limit: int) -> Tensor:
    if values.numel() <= limit:
        return values
    return values[spread_places(values.numel(), limit, values)]


def world_size(among: RankGroup | None = None) -> int:
    """Number of processes that train together.

    Args:
        among: the ranks that count; None: all.

    Returns:
        1 where there is no process group.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size(_group(among))


def is_first_rank() -> bool:
    """Whether this process is the one of several that speaks.

    Returns:
        True where there is no process group.
    """
    return world_size() == 1 or torch.distributed.get_rank() == 0


def _group(among: RankGroup | None) -> Any:
    if among is None:
        return None
    return among.group


def gather_ranks(samples: Tensor, width: int, among: RankGroup | None = None) -> Tensor:
    """Samples of all ranks side by side, by one collective; every rank gets the same tensor.

    Args:
        samples: this rank's, shape [sites, n] with n <= width, NaN where missing.
        width: columns a rank contributes, equal on all ranks.
        among: the ranks; None: all.

    Returns:
        Shape [sites, ranks * width]; samples itself where there is one process.
    """
    ranks = world_size(among)
    if ranks == 1:
        return samples
    mine = samples.new_full((samples.shape[0], width), math.nan)
    mine[:, : samples.shape[1]] = samples
    everyone = [torch.empty_like(mine) for _ in range(ranks)]
    torch.distributed.all_gather(everyone, mine, group=_group(among))
    return torch.cat(everyone, dim=-1)


def pool_ranks(
    samples: Sequence[Tensor], width: int, beside: Tensor, among: RankGroup | None = None
) -> tuple[Sequence[Tensor], Tensor]:
    """Samples of all ranks side by side, and further numbers of each rank, by one collective.

    Args:
        samples: of this rank, each of shape [sites, n] with n <= width, NaN where missing; dtypes may differ.
        width: columns a rank contributes, equal on all ranks.
        beside: further numbers of this rank, shape [sites, k].
        among: the ranks; None: all.

    Returns:
        Samples, each [sites, ranks * width], and numbers, [sites, ranks, k]; float32, or what was given with one
        process.
    """
    ranks = world_size(among)
    extra = beside.shape[1]
    if ranks == 1:
        return samples, beside.unsqueeze(1)
    # a rank without a sample does not know the dtype of the others'
    rows = torch.cat([each.to(torch.float32) for each in samples])
    mine = torch.cat([beside.to(torch.float32).repeat(len(samples), 1), rows], dim=1)
    everyone = gather_ranks(mine, extra + width, among).unflatten(1, (ranks, extra + width))
    numbers, kept = everyone.split([extra, width], dim=-1)
    return kept.flatten(1).chunk(len(samples)), numbers[: len(beside)]


def everyones(value: object, among: RankGroup | None = None) -> list[Any]:
    """One object of every rank; all ranks have to call it.

    Args:
        value: of tensors on the CPU and primitives.
        among: the ranks; None: all.

    Returns:
        The objects, by rank.
    """
    gathered: list[Any] = [None] * world_size(among)
    torch.distributed.all_gather_object(gathered, value, group=_group(among))
    return gathered
