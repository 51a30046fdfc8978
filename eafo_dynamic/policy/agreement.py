"""The ranks that train one model: whether they are the same model, with the same corrections, at the same round."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from eafo_dynamic.apply.bank import Bank
from eafo_dynamic.density.ranks import RankGroup, world_size
from eafo_dynamic.errors import EAFOError
from eafo_dynamic.internals.torch_internals import rank_store
from eafo_dynamic.policy.options import Options

__all__ = ["Agreement", "RankError", "describe"]

_PATIENCE = timedelta(seconds=60)
_APART = 1e-4  # amplitudes further apart than rounding takes them
_OWN_MODEL = "If each rank trains a model of its own, attach with process_group=, the ranks that train one model."


class RankError(EAFOError, RuntimeError):
    """Ranks that should train one model differ; the message says which and in what."""


class Agreement:
    """Stops ranks that differ before their samples are mixed.

    Args:
        among: the ranks that train the model; None: all.
    """

    def __init__(self, among: RankGroup | None = None) -> None:
        self.among = among
        self._has_met = False

    @property
    def size(self) -> int:
        """Number of ranks."""
        return world_size(self.among)

    @property
    def ranks(self) -> list[int]:
        """The ranks among all processes, in the order of what they gather."""
        if self.among is None:
            return list(range(self.size))
        return self.among.ranks

    @property
    def rank(self) -> int:
        """Place of this process among them."""
        if self.size == 1:
            return 0
        return torch.distributed.get_rank(self._group)

    @property
    def _group(self) -> Any:
        if self.among is None:
            return None
        return self.among.group

    def announce(self) -> None:
        """Lets the other ranks know that this one has attached; waits for nobody."""
        if self.size > 1:
            rank_store().set(_key(torch.distributed.get_rank()), "1")

    def meet(self, describe: Callable[[], Mapping[str, str]], device: torch.device) -> None:
        """Compares what the ranks have attached, at their first collective; later calls do nothing.

        Args:
            describe: called for sites, options and widths as text.
            device: of the tensors that the ranks exchange.

        Raises:
            RankError: if a rank has attached nothing, or something else.
        """
        if self._has_met or self.size == 1:
            return
        self.announce()
        self._wait_for_all()
        about = dict(describe())
        digest = hashlib.sha256(repr(about).encode()).digest()[:8]
        mine = torch.tensor([int.from_bytes(digest, "little", signed=True)], device=device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        torch.distributed.all_gather(everyone, mine, group=self._group)
        if any(not torch.equal(each, everyone[0]) for each in everyone):
            texts: list[Any] = [None] * self.size
            torch.distributed.all_gather_object(texts, about, group=self._group)
            raise RankError(_first_difference(self.ranks, texts))
        self._has_met = True

    def _wait_for_all(self) -> None:
        store = rank_store()
        for rank in self.ranks:
            try:
                store.wait([_key(rank)], _PATIENCE)
            except (RuntimeError, ValueError) as error:
                raise RankError(
                    f"rank {rank} has attached no corrections, and rank {torch.distributed.get_rank()} would wait for "
                    f"its samples. Attach on every rank that trains the model. {_OWN_MODEL}"
                ) from error

    def check(self, marks: Tensor, names: Sequence[str], terms: Sequence[str]) -> None:
        """Compares the round's number, the step and the amplitudes of all ranks.

        Args:
            marks: of every site and rank, shape [S, ranks, 2 + terms]: round, step, amplitudes.
            names: of the sites.
            terms: names of the amplitudes.

        Raises:
            RankError: if a rank differs from the first.
        """
        if self.size == 1:
            return
        differences = (marks - marks[:, :1]).abs().nan_to_num(0.0)
        limits = differences.new_full((marks.shape[-1],), _APART)
        limits[:2] = 0.5
        apart = differences > limits
        if not apart.any():
            return
        site, place, column = apart.nonzero()[0].tolist()
        first = self.ranks[0]
        other = self.ranks[place]
        if apart[..., :2].any():
            _, place, _ = apart[..., :2].nonzero()[0].tolist()
            round_, step = marks[0, 0, :2].tolist()
            others_round, others_step = marks[0, place, :2].tolist()
            raise RankError(
                f"rank {self.ranks[place]} is at round {others_round:.0f}, step {others_step:.0f}, and rank {first} at "
                f"round {round_:.0f}, step {step:.0f}. Call controller.step with the same step on every rank, and give "
                f"all of them equally many batches. {_OWN_MODEL}"
            )
        amplitude = terms[column - 2]
        raise RankError(
            f"rank {other} has {amplitude}={marks[site, place, column]:+.6f} at {names[site]}, and rank {first} has "
            f"{marks[site, 0, column]:+.6f}, at step {marks[0, 0, 1]:.0f}. Wrap the model in DistributedDataParallel "
            "after attach, or give fully_shard(model, **controller.shard_options()), so that gradients are averaged. "
            f"{_OWN_MODEL}"
        )


def _key(rank: int) -> str:
    return f"eafo_dynamic/attached/{rank}"


def describe(bank: Bank, options: Options) -> dict[str, str]:
    """What the ranks that train one model have in common.

    Args:
        bank: the sites.
        options: of the corrections.

    Returns:
        The options, and the base and widths of every site, as text.
    """
    about = {name: _without_addresses(repr(value)) for name, value in options.primitives().items()}
    for name in ("process_group", "tensor_parallel"):
        about.pop(name, None)
    for name, widths in zip(bank.names, bank.widths(), strict=True):
        about[f"site {name}"] = widths
    return about


def _without_addresses(text: str) -> str:
    """A text without the places of objects in memory, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _first_difference(ranks: Sequence[int], texts: Sequence[Mapping[str, str]]) -> str:
    for rank, about in zip(ranks, texts, strict=True):
        for key in dict.fromkeys([*texts[0], *about]):
            own = about.get(key, "none")
            first = texts[0].get(key, "none")
            if own != first:
                return (
                    f"rank {rank} has {key}: {own}, and rank {ranks[0]} has {key}: {first}. Attach to the same model "
                    f"with the same options on every rank. {_OWN_MODEL}"
                )
    return f"ranks differ in the order of their sites. Attach to the same model on every rank. {_OWN_MODEL}"
