"""The functions of all sites as stacked tensors: their outputs, corrections and directions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from eafo_dynamic.correction.bases import Base
from eafo_dynamic.correction.kernels import (
    BASE_TERM,
    EPS,
    LIFT,
    MAX_U,
    TERMS,
    Known,
    RoundKernel,
    RoundOperands,
    Workspace,
    known_pointwise,
)
from eafo_dynamic.correction.table import HALF_WIDTH, evaluate_table

__all__ = ["Functions"]


@dataclass(frozen=True)
class Functions:
    """The functions of all sites, f(z) = base(z) + sum over the terms of amplitude * direction.

    Args:
        bases: base function of each site, S of them.
        amplitudes: no unit, one row a term, shape [T, S].
        shape: mu and sigma, shape [S, 2].
        tables: ghat of the tabulated sites, shape [N, 4, intervals].
        tabulated: which sites these are, shape [N], int64; all others have the closed form.
        names: of the terms, T of them; the same for all sites.
        kernel: what computes them for float32 on the CPU; None for torch's operations.
    """

    bases: Sequence[Base]
    amplitudes: Tensor
    shape: Tensor
    tables: Tensor
    tabulated: Tensor
    names: tuple[str, ...] = (EPS.name,)
    kernel: RoundKernel | None = None

    @property
    def sigma(self) -> Tensor:
        """Scales, shape [S, 1]."""
        return self.shape[:, 1:]

    @property
    def of_base(self) -> bool:
        """Whether one of the terms is the base itself, so that a correction needs to know it."""
        return BASE_TERM in self.names

    @property
    def has_tails(self) -> bool:
        """Whether one of the terms does not vanish away from the data."""
        return not all(TERMS[name].local for name in self.names)

    def amplitude(self, name: str) -> Tensor:
        """The amplitudes of one term.

        Args:
            name: one of ``names``.

        Returns:
            Shape [S].
        """
        return self.amplitudes[self.names.index(name)]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, for a checkpoint.

        Returns:
            Tensors by the name of their field.
        """
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def direction(self, name: str, z: Tensor) -> Tensor:
        """Direction of a term, df / d amplitude: what one unit of its amplitude adds.

        Args:
            name: one of ``names``.
            z: pre-activations, shape [S, n].

        Returns:
            Shape [S, n], units of z.
        """
        if name == BASE_TERM:
            return self._bases(z)
        term = TERMS[name]
        if not term.local:
            return term.value(z, z, z)
        compiled = self._compiled(z)
        if compiled is not None:
            out = torch.empty_like(z)
            compiled(z, **{f"by_{name}": out})
            return out
        u = (z - self.shape[:, :1]) / self.sigma
        if name == EPS.name:
            return self._ghat_(u).mul_(self.sigma)
        return self.sigma * term.value(u, z, z)

    def _ghat_(self, u: Tensor) -> Tensor:
        """Ghat of all sites by torch's operations; may be written over u."""
        if len(self.tabulated) == len(self.bases):  # not first the closed form of all, and no copies
            return evaluate_table(self.tables, u).to(u.dtype)
        if not self.tabulated.numel():
            return _closed_form_(u)
        read = evaluate_table(self.tables, u[self.tabulated])
        value = _closed_form_(u)
        value[self.tabulated] = read.to(value.dtype)
        return value

    def _bases(self, z: Tensor) -> Tensor:
        """base(z), shape [S, n]."""
        groups = self.groups()
        if len(groups) == 1:
            return next(iter(groups)).fn(z)
        out = torch.empty_like(z)
        for base, rows in groups.items():
            out[rows] = base.fn(z[rows])
        return out

    def directions(self, z: Tensor) -> tuple[Tensor, ...]:
        """What one unit of each amplitude adds, term by term.

        Args:
            z: pre-activations, shape [S, n].

        Returns:
            T of shape [S, n], units of z.
        """
        return tuple(self.direction(name, z) for name in self.names)

    def correction(self, z: Tensor) -> Tensor:
        """c(z), shape [S, n].

        Args:
            z: pre-activations, shape [S, n].

        Returns:
            Corrections, units of z.
        """
        compiled = None if self.of_base else self._compiled(z)
        if compiled is not None:
            out = torch.empty_like(z)
            compiled(z, out, bases=False)
            return out
        return self._combined(self.directions(z))

    def outputs(self, z: Tensor, workspace: Workspace | None = None, name: str = "outputs") -> Tensor:
        """f(z), sites with equal bases in one call.

        Args:
            z: pre-activations, shape [S, n].
            workspace: gives the compiled functions room of this name; None for a new tensor.
            name: of the room.

        Returns:
            Activations, shape [S, n].
        """
        out = self._started(z, workspace or Workspace(), name)
        compiled = self._compiled(z, out)
        if compiled is not None:
            compiled(z, out)
            return out
        return out.add_(self.correction(z))

    def outputs_and_directions(
        self, z: Tensor, workspace: Workspace | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``outputs`` and ``directions``, in one pass where they are compiled.

        Args:
            z: pre-activations, shape [S, n].
            workspace: gives the compiled functions room named "outputs", "first", "second" and "third"; None for new
                tensors.

        Returns:
            Activations, shape [S, n], and T of that shape.
        """
        workspace = workspace or Workspace()
        out = self._started(z, workspace, "outputs")
        compiled = self._compiled(z, out)
        if compiled is None:
            directions = self.directions(z)
            return out.add_(self._combined(directions)), directions
        written = {name: workspace.like(z, room) for name, room in _ROOMS.items() if name in self.names}
        compiled(z, out, **{f"by_{name}": direction for name, direction in written.items()})
        found: list[Tensor] = []
        for name in self.names:
            if name in written:
                found.append(written[name])
            else:
                found.append(self.direction(name, z))
        return out, tuple(found)

    def _combined(self, directions: Sequence[Tensor]) -> Tensor:
        """c(z), the sum of amplitude * direction, by torch's operations."""
        c = self.amplitudes[0].unsqueeze(-1) * directions[0]
        for amplitude, direction in zip(self.amplitudes[1:], directions[1:], strict=True):
            c = c + amplitude.unsqueeze(-1) * direction
        return c

    def _started(self, z: Tensor, workspace: Workspace, name: str) -> Tensor:
        """Shape [S, n], with base(z) in the rows whose base is not compiled, or in all."""
        groups = self.groups()
        compiled = self._compiled(z) is not None
        inside: dict[Base, Known] = {}
        if compiled:
            inside = self._inside
        if len(groups) == 1 and not inside:
            return next(iter(groups)).fn(z)
        out = workspace.like(z, name) if compiled else torch.empty_like(z)
        for base, rows in groups.items():
            if base not in inside:
                out[rows] = base.fn(z[rows])
        return out

    def _compiled(self, *samples: Tensor) -> Callable[..., None] | None:
        """The compiled functions, where they can work on these."""
        mixed = LIFT.name in self.names and self.tabulated.numel() > 0
        if self.kernel is None or mixed or not self.kernel.takes(*samples, self.shape):
            return None
        return functools.partial(self.kernel.functions, self._operands)

    @functools.cached_property
    def _inside(self) -> dict[Base, Known]:
        """The bases that are compiled."""
        inside: dict[Base, Known] = {}
        for base in self.groups():
            known = known_pointwise(base.fn)
            if known is not None:
                inside[base] = known
        return inside

    @functools.cached_property
    def _operands(self) -> RoundOperands:
        place = self.tabulated.new_full((len(self.bases),), -1)
        if len(self.tabulated):
            place[self.tabulated] = torch.arange(len(self.tabulated), device=place.device)
        codes = [0] * len(self.bases)
        below = [0.0] * len(self.bases)
        for base, rows in self.groups().items():
            known = self._inside.get(base)
            if known is None:
                continue
            for row in rows:
                codes[row] = known.code
                below[row] = known.below
        return RoundOperands(
            amplitudes=self.amplitudes.contiguous(),
            names=self.names,
            shape=self.shape.contiguous(),
            tables=self.tables.contiguous(),
            place=place,
            half_width=HALF_WIDTH,
            codes=place.new_tensor(codes, dtype=torch.int32),
            below=self.amplitudes.new_tensor(below),
        )

    def groups(self) -> dict[Base, list[int]]:
        """Rows of the sites with equal bases.

        Returns:
            Rows by base.
        """
        if len({id(base) for base in self.bases}) == 1:  # hashing and comparing bases takes longer
            return {self.bases[0]: list(range(len(self.bases)))}
        rows: dict[Base, list[int]] = {}
        for row, base in enumerate(self.bases):
            rows.setdefault(base, []).append(row)
        return rows

    def towards(self, other: Functions, fraction: Tensor) -> Functions:
        """The functions a fraction of the way to others.

        Args:
            other: where to go.
            fraction: share of the way, shape [S]; a site with 0 stays as it is, whatever the other is.

        Returns:
            Functions between.
        """
        return replace(
            self,
            amplitudes=_between(self.amplitudes, other.amplitudes, fraction),
            shape=_between(self.shape, other.shape, fraction.unsqueeze(-1)),
            tables=_between(self.tables, other.tables, fraction[self.tabulated].view(-1, 1, 1)),
        )


_ROOMS = {EPS.name: "first", LIFT.name: "second", BASE_TERM: "third"}
"""Rooms of a workspace for the directions that the compiled functions write."""


def _closed_form_(u: Tensor) -> Tensor:
    """U exp(-u^2 / 2), written over u."""
    u.clamp_(-MAX_U, MAX_U)
    # exp2 is vectorised by torch itself and takes a third of the time of exp
    return u.mul_(u.square().mul_(-0.5 / math.log(2.0)).exp2_())


def _between(old: Tensor, new: Tensor, share: Tensor) -> Tensor:
    # where, not lerp alone: 0 * NaN of a move that was refused would spoil what is kept
    return torch.where(share == 0, old, torch.where(share == 1, new, torch.lerp(old, new, share)))
