"""Where an update round wants the functions to go: after their data, or back to what they were."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from eafo_dynamic.correction.shape import correction_shape
from eafo_dynamic.correction.stacked import Functions
from eafo_dynamic.correction.table import tabulate
from eafo_dynamic.density.estimators import Density

__all__ = ["refreshed", "reverted", "with_finite_amplitudes"]

_LEAST_SIGMA = 1e-6  # z / sigma must not become 0 / 0 in float16


def refreshed(old: Functions, density: Density, usable: Tensor, resolution: float) -> Functions:
    """The functions with shapes that fit a new density; amplitudes as before.

    Args:
        old: the functions now.
        density: of all sites.
        usable: sites to refresh, shape [S], bool; the others stay as they are.
        resolution: r of the score route.

    Returns:
        The refreshed functions.
    """
    shape = torch.where(usable.unsqueeze(-1), _fitted(density, old.shape), old.shape)
    if not old.tabulated.numel():
        return replace(old, shape=shape)
    tables = old.tables.clone()
    place = {row: k for k, row in enumerate(old.tabulated.tolist())}
    good = usable.tolist()
    for base, rows in old.groups().items():
        wanted = [row for row in rows if row in place and good[row]]
        if wanted:
            shapes = correction_shape(base, density.select(wanted), resolution=resolution, kernel=old.kernel)
            fresh = tabulate(shapes)
            tables[[place[row] for row in wanted]] = fresh.to(tables.dtype)
    return replace(old, shape=shape, tables=tables)


def with_finite_amplitudes(functions: Functions, last: Tensor) -> tuple[Functions, Tensor]:
    """The functions, with the last round's amplitudes where a gradient that was not finite has broken them.

    Args:
        functions: the functions now.
        last: amplitudes after the last round, shape [T, S].

    Returns:
        The functions, and which sites were broken, shape [S], bool. The optimiser itself cannot repair them.
    """
    broken = ~functions.amplitudes.isfinite().all(0)
    return replace(functions, amplitudes=torch.where(broken, last, functions.amplitudes)), broken


def reverted(old: Functions, before: Functions, trained: Tensor) -> Functions:
    """The functions before the last round; amplitudes that the optimiser moves stay where they are now.

    Args:
        old: the functions now.
        before: the functions before the last round.
        trained: sites whose amplitudes the optimiser moves, shape [S], bool.

    Returns:
        The functions to go back to.
    """
    amplitudes = torch.where(trained.to(old.shape.device), old.amplitudes, before.amplitudes)
    # a checkpoint has no bases and no kernel
    return replace(before, bases=old.bases, kernel=old.kernel, amplitudes=amplitudes)


def _fitted(density: Density, like: Tensor) -> Tensor:
    """Mu and sigma of a density, shape [S, 2]; sigma is kept where half precision still has it.

    Returns:
        The two, dtype of ``like``.
    """
    return torch.stack([density.mean, density.std.clamp(min=_LEAST_SIGMA)], dim=-1).to(like)
