"""The arithmetic of one update round: all sites' functions as stacked tensors, no module in sight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eafo_dynamic.bases import Base
from eafo_dynamic.correction import (
    HALF_WIDTH,
    KNOTS,
    correction_shape,
    evaluate_table,
    faded_table,
    steepest_slope,
    tabulate,
)
from eafo_dynamic.density import Density
from eafo_dynamic.kernels import MAX_U, RoundKernel, bell, ghat_table
from eafo_dynamic.schedule import TrustRegion

__all__ = ["Functions", "bounded_move", "compounded", "mended", "refreshed", "reverted"]

_FRACTIONS = (1.0, 0.5, 0.25, 0.125, 0.0625)
_LEAST_SIGMA = 1e-6  # z / sigma must not become 0 / 0 in float16


@dataclass(frozen=True)
class Functions:
    """The functions of all sites, f(z) = base(z) + eps * sigma * ghat((z - mu) / sigma), plus the lift's bell.

    Args:
        bases: base function of each site, S of them.
        eps: amplitudes, shape [S].
        shape: mu and sigma, shape [S, 2].
        tables: ghat of the tabulated sites, shape [T, 4, intervals].
        tabulated: which sites these are, shape [T], int64; all others have the closed form.
        offsets: what earlier rounds have settled, shape [T, 4, intervals]; None unless corrections compound.
        lift: amplitudes of the bells, shape [S]; None unless terms are free.
        kernel: what computes them for float32 on the CPU; None for torch's operations.
    """

    bases: Sequence[Base]
    eps: Tensor
    shape: Tensor
    tables: Tensor
    tabulated: Tensor
    offsets: Tensor | None = None
    lift: Tensor | None = None
    kernel: RoundKernel | None = None

    @property
    def sigma(self) -> Tensor:
        """Scales, shape [S, 1]."""
        return self.shape[:, 1:]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, for a checkpoint.

        Returns:
            Tensors by the name of their field.
        """
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def direction(self, z: Tensor) -> Tensor:
        """D f / d eps = sigma * ghat(u): what one unit of eps adds.

        Args:
            z: pre-activations, shape [S, n].

        Returns:
            Shape [S, n], units of z.
        """
        if (kernel := self._compiled(z)) is not None:
            return self._by_kernel(kernel, z, torch.ones_like(self.eps))
        u = (z - self.shape[:, :1]) / self.sigma
        if len(self.tabulated) == len(self.bases):  # not first the closed form of all, and no copies
            return self.sigma * evaluate_table(self.tables, u).to(u.dtype)
        read = evaluate_table(self.tables, u[self.tabulated]) if self.tabulated.numel() else None
        value = _closed_form_(u)
        if read is not None:
            value[self.tabulated] = read.to(value.dtype)
        return value.mul_(self.sigma)

    def lift_direction(self, z: Tensor) -> Tensor:
        """D f / d lift = sigma * exp(-u^2 / 2): what one unit of lift adds.

        Args:
            z: pre-activations, shape [S, n].

        Returns:
            Shape [S, n], units of z.
        """
        if (kernel := self._compiled(z)) is not None:
            ones = torch.ones_like(self.eps)
            return self._by_kernel(kernel, z, torch.zeros_like(ones), ones)
        return self.sigma * bell((z - self.shape[:, :1]) / self.sigma)[0]

    def directions(self, z: Tensor) -> tuple[Tensor, ...]:
        """What one unit of each amplitude adds: ``direction``, and ``lift_direction`` where terms are free.

        Args:
            z: pre-activations, shape [S, n].

        Returns:
            One or two of shape [S, n], units of z.
        """
        by_eps = self.direction(z)
        return (by_eps,) if self.lift is None else (by_eps, self.lift_direction(z))

    def correction(self, z: Tensor, directions: Sequence[Tensor] | None = None) -> Tensor:
        """c(z), shape [S, n].

        Args:
            z: pre-activations, shape [S, n].
            directions: ``self.directions(z)``, if somebody has them already.

        Returns:
            Corrections, units of z.
        """
        if (kernel := self._compiled(z)) is not None:
            return self._by_kernel(kernel, z, self.eps, self.lift, self.offsets)
        by_eps, *by_lift = self.directions(z) if directions is None else directions
        c = self.eps.unsqueeze(-1) * by_eps
        if self.offsets is not None:
            u = (z - self.shape[:, :1]) / self.sigma
            c[self.tabulated] += self.sigma[self.tabulated] * evaluate_table(self.offsets, u[self.tabulated]).to(
                c.dtype
            )
        if self.lift is not None:
            c = c + self.lift.unsqueeze(-1) * by_lift[0]
        return c

    def outputs(self, z: Tensor, directions: Sequence[Tensor] | None = None) -> Tensor:
        """f(z), sites with equal bases in one call.

        Args:
            z: pre-activations, shape [S, n].
            directions: ``self.directions(z)``, if somebody has them already.

        Returns:
            Activations, shape [S, n].
        """
        out = self._bases(z)
        if (kernel := self._compiled(z)) is not None and kernel.takes(out):
            return self._by_kernel(kernel, z, self.eps, self.lift, self.offsets, onto=out)
        return out.add_(self.correction(z, directions))

    def _bases(self, z: Tensor) -> Tensor:
        """base(z), shape [S, n], in a new tensor; sites with equal bases in one call."""
        groups = self.groups()
        if len(groups) == 1:
            return next(iter(groups)).fn(z)
        out = torch.empty_like(z)
        for base, rows in groups.items():
            out[rows] = base.fn(z[rows])
        return out

    def _compiled(self, z: Tensor) -> RoundKernel | None:
        """The compiled functions, where they can be used for these pre-activations."""
        mixed = self.lift is not None and self.tabulated.numel() > 0
        if self.kernel is None or mixed or not self.kernel.takes(z, self.shape):
            return None
        return self.kernel

    def _by_kernel(
        self,
        kernel: RoundKernel,
        z: Tensor,
        eps: Tensor,
        lift: Tensor | None = None,
        offsets: Tensor | None = None,
        onto: Tensor | None = None,
    ) -> Tensor:
        """The correction with these amplitudes, in a new tensor or added to one."""
        place = self.tabulated.new_full((len(self.bases),), -1)
        place[self.tabulated] = torch.arange(len(self.tabulated), device=place.device)
        return kernel.corrections(
            *(z, eps, self.shape, self.tables, place, HALF_WIDTH), lift=lift, offsets=offsets, onto=onto
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
        share = fraction[self.tabulated].view(-1, 1, 1)
        settled = self.offsets
        if self.offsets is not None and other.offsets is not None:
            settled = _between(self.offsets, other.offsets, share)
        return replace(
            self,
            eps=_between(self.eps, other.eps, fraction),
            shape=_between(self.shape, other.shape, fraction.unsqueeze(-1)),
            tables=_between(self.tables, other.tables, share),
            offsets=settled,
            lift=self.lift if self.lift is None or other.lift is None else _between(self.lift, other.lift, fraction),
        )


def _closed_form_(u: Tensor) -> Tensor:
    """U exp(-u^2 / 2), written over u."""
    u.clamp_(-MAX_U, MAX_U)
    # exp2 is vectorised by torch itself and takes a third of the time of exp
    return u.mul_(u.square().mul_(-0.5 / math.log(2.0)).exp2_())


def _between(old: Tensor, new: Tensor, share: Tensor) -> Tensor:
    # where, not lerp alone: 0 * NaN of a move that was refused would spoil what is kept
    return torch.where(share == 0, old, torch.where(share == 1, new, torch.lerp(old, new, share)))


def refreshed(old: Functions, density: Density, usable: Tensor, resolution: float) -> Functions:
    """The functions with shapes that fit a new density; eps as before.

    Args:
        old: the functions now.
        density: of all sites.
        usable: sites to refresh, shape [S], bool; the others stay as they are.
        resolution: r of the score route.

    Returns:
        The refreshed functions.
    """
    shape = torch.where(usable.unsqueeze(-1), _fitted(density, old.shape), old.shape)
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


def mended(functions: Functions, eps: Tensor, lift: Tensor | None) -> tuple[Functions, Tensor]:
    """The functions with amplitudes as they were where a gradient that was not finite has broken them.

    Args:
        functions: the functions now.
        eps: amplitudes after the last round, shape [S].
        lift: likewise; None unless terms are free.

    Returns:
        The functions, and which were broken, shape [S], bool; the optimiser itself cannot mend them.
    """
    broken = ~functions.eps.isfinite()
    if functions.lift is None or lift is None:
        return replace(functions, eps=torch.where(broken, eps, functions.eps)), broken
    broken |= ~functions.lift.isfinite()
    lift = torch.where(broken, lift, functions.lift)
    return replace(functions, eps=torch.where(broken, eps, functions.eps), lift=lift), broken


def reverted(old: Functions, before: Functions, trained: Tensor) -> Functions:
    """The functions before the last round; amplitudes that the optimiser moves stay where they are now.

    Args:
        old: the functions now.
        before: the functions before the last round.
        trained: sites whose amplitudes the optimiser moves, shape [S], bool.

    Returns:
        The functions to go back to.
    """
    trained = trained.to(old.eps.device)
    back = replace(before, bases=old.bases, eps=torch.where(trained, old.eps, before.eps))
    if old.lift is None or before.lift is None:
        return back
    return replace(back, lift=torch.where(trained, old.lift, before.lift))


def _fitted(density: Density, like: Tensor) -> Tensor:
    """Mu and sigma of a density, shape [S, 2]; sigma is kept where half precision still has it.

    Returns:
        The two, dtype of ``like``.
    """
    return torch.stack([density.mean, density.std.clamp(min=_LEAST_SIGMA)], dim=-1).to(like)


def compounded(old: Functions, density: Density, usable: Tensor, resolution: float, max_slope: float) -> Functions:
    """Settles the correction so far, and shapes the next one for the function that has been corrected.

    The offset becomes all of c(z), read again in the coordinates of the new density and held to ``max_slope``; eps
    starts again from 0; the new shape is the score route's for base + c, which need not be monotone any more.

    Args:
        old: the functions now, all tabulated, with offsets.
        density: of all sites.
        usable: sites to change, shape [S], bool; the others stay as they are.
        resolution: r of the score route.
        max_slope: bound of the slope of the offset.

    Returns:
        The new functions.
    """
    shape = torch.where(usable.unsqueeze(-1), _fitted(density, old.shape), old.shape)
    settled = _settled(old, shape, max_slope)
    offsets = settled if old.offsets is None else torch.where(usable.view(-1, 1, 1), settled, old.offsets)
    new = replace(old, shape=shape, offsets=offsets, eps=torch.where(usable, 0.0, old.eps), tables=old.tables.clone())
    for row in usable.nonzero().flatten().tolist():
        base = Base("corrected", _one_function(new, row), key=row)
        fresh = correction_shape(base, density.select([row]), "score", resolution, kernel=old.kernel)
        new.tables[row] = tabulate(fresh)[0].to(new.tables.dtype)
    return new


def _settled(old: Functions, shape: Tensor, max_slope: float) -> Tensor:
    """Tables of c(z) / sigma in the coordinates of a new shape, faded out at their ends, no steeper than max_slope.

    Returns:
        Coefficients, shape [S, 4, intervals].
    """
    intervals = old.tables.shape[-1]
    step = 2 * HALF_WIDTH / intervals
    u = torch.linspace(-HALF_WIDTH, HALF_WIDTH, intervals + 1, device=shape.device, dtype=torch.float64)
    with torch.enable_grad():
        z = (shape[:, :1] + shape[:, 1:] * u).requires_grad_()
        c = old.correction(z)
        (slope,) = torch.autograd.grad(c.sum(), z)
    # where sigma has shrunk, c may be large still at the ends of the new table
    table = faded_table(c.detach() / shape[:, 1:], slope)
    steepest = steepest_slope(table)[:, None, None] / step
    return torch.where(steepest > max_slope, table * (max_slope / steepest), table).to(old.tables.dtype)


def _one_function(functions: Functions, row: int) -> Callable[[Tensor], Tensor]:
    """F of one site without its eps term, for points of any shape."""
    mu, sigma = functions.shape[row]
    assert functions.offsets is not None
    offset = functions.offsets[row]

    def function(z: Tensor) -> Tensor:
        value, _ = ghat_table((z - mu) / sigma, offset.to(z.dtype), HALF_WIDTH)
        return functions.bases[row].fn(z) + sigma * value

    return function


def bounded_move(old: Functions, new: Functions, region: TrustRegion) -> tuple[Functions, Tensor]:
    """The largest tried part of a move that keeps max over z of |c_taken(z) - c_old(z)| / sigma within max_delta.

    sigma is the larger one of the functions taken and the old ones; z runs over the tables' range of both, knot by
    knot. A function that is not finite or has no scale is never taken.

    Args:
        old: the functions now.
        new: the functions wanted.
        region: the bounds.

    Returns:
        The functions to take and the part of the way, shape [S]; 0 where nothing was admissible.
    """
    fractions = torch.tensor(_FRACTIONS, device=old.eps.device, dtype=old.eps.dtype)
    whole = _jump(old, old.towards(new, fractions[0].expand_as(old.eps)))
    if bool((whole <= region.max_delta).all()):  # as nearly always: then the smaller parts need no look
        fractions, jumps = fractions[:1], [whole]
    else:
        jumps = [whole, *(_jump(old, old.towards(new, part.expand_as(old.eps))) for part in fractions[1:])]
    fraction = region.admissible(torch.stack(jumps), fractions)
    return old.towards(new, fraction), fraction


def _jump(old: Functions, new: Functions) -> Tensor:
    """Max |c_new - c_old| / sigma, shape [S]; NaN where the new function cannot be used."""
    # every second point is a knot of the tables, the others lie between
    grid = torch.linspace(-HALF_WIDTH, HALF_WIDTH, 2 * KNOTS - 1, device=old.eps.device, dtype=old.eps.dtype)
    z = torch.cat([side.shape[:, :1] + side.sigma * grid for side in (old, new)], dim=-1)
    jump = (new.correction(z) - old.correction(z)).abs().amax(-1) / torch.maximum(old.sigma, new.sigma)[:, 0]
    finite = new.eps.isfinite() if new.lift is None else (new.eps + new.lift).isfinite()
    sound = finite & new.shape.isfinite().all(-1) & (new.shape[:, 1] > 0)
    return torch.where(sound, jump, math.nan)
