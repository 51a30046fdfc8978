"""The order of training data as a function of a seed and the epoch, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DistributedSampler

__all__ = ["EpochSampler"]


class EpochSampler(DistributedSampler[Any]):
    """Indices whose order depends on (seed, epoch) alone.

    The global random state is neither read nor advanced. Two runs with equal seeds see equal batches, whatever their
    models do, and a resumed run sees the batches that the uninterrupted run would have seen. Lightning calls
    `set_epoch`. torch's own `DistributedSampler` seeds with seed + epoch, so that seed 0 in epoch 1 repeats seed 1 in
    epoch 0; runs over several seeds must not share batches in this way.

    Args:
        population: indices are 0 ... population - 1.
        seed: seed of the order.
        draws: None visits every index once, in random order; a number draws that many with replacement.
        replicas: number of processes that share an epoch.
        rank: which of them this process is.
    """

    def __init__(self, population: int, seed: int, draws: int | None = None, replicas: int = 1, rank: int = 0) -> None:
        # Lightning replaces other samplers under DDP, but not a DistributedSampler.
        super().__init__(range(population), num_replicas=replicas, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.population = population
        self.draws = draws
        length = population if draws is None else draws
        self.num_samples = length // replicas
        self.total_size = self.num_samples * replicas

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        if self.draws is None:
            indices = torch.randperm(self.population, generator=generator)
        else:
            indices = torch.randint(self.population, (self.draws,), generator=generator)
        return iter(indices[self.rank : self.total_size : self.num_replicas].tolist())
