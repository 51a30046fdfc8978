"""What an update round tells about every site: the columns of the correction log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eafo_dynamic.correction.stacked import Functions
from eafo_dynamic.density.bins import BinCounts
from eafo_dynamic.density.estimators import Density
from eafo_dynamic.density.sample_moments import SampleMoments
from eafo_dynamic.entropy.output import MixedEntropy
from eafo_dynamic.policy.estimates import OutputEntropy, Pooled, entropies
from eafo_dynamic.records.schema import AMPLITUDES, COLUMNS, Record

__all__ = ["RoundFindings", "aggregate", "describe_events", "diagnostics", "snapshot", "state", "to_rows"]


@dataclass(frozen=True)
class RoundFindings:
    """What an update round has found, from which the columns of the log are made; see ``records.schema.COLUMNS``.

    Args:
        moments: of the sampled pre-activations.
        new: functions after the round.
        delta: change of the amplitudes since the previous round, shape [T, S].
        gradient: dH_r/d amplitude of the functions before the round in nats, shape [T, S].
        mixed: atom mass, entropy of the rest and H_r of the outputs before the round, each of shape [S].
        entropy_predicted: H_r after the round to first order, in nats, shape [S].
        entropy_after: H_r after the round on the same samples, in nats, shape [S].
        entropy_of_samples: H_r of the pre-activations themselves, in nats, shape [S].
        entropy_of_gaussian: H_r of a Gaussian, in nats.
        dead: fraction of units that never fired, shape [S].
        nonfinite: samples that were left out, shape [S].
    """

    moments: SampleMoments
    new: Functions
    delta: Tensor
    gradient: Tensor
    mixed: MixedEntropy
    entropy_predicted: Tensor
    entropy_after: Tensor
    entropy_of_samples: Tensor
    entropy_of_gaussian: float
    dead: Tensor
    nonfinite: Tensor

    def of_term(self, name: str, rows: Tensor) -> Tensor | None:
        """One row of what is known of every term.

        Args:
            name: of a term.
            rows: shape [T, S], as ``gradient``.

        Returns:
            Shape [S]; None where the functions do not have the term.
        """
        names = self.new.names
        return rows[names.index(name)] if name in names else None


def diagnostics(
    collected: Pooled, entropy: OutputEntropy, new: Functions, last: Tensor, gradient: Tensor
) -> dict[str, Tensor]:
    """Columns that describe one update round, each of shape [S].

    Args:
        collected: samples of the round, and what they say.
        entropy: entropy of the outputs under the functions before the round.
        new: functions after it.
        last: amplitudes after the previous round, shape [T, S].
        gradient: dH_r/d amplitude of the functions before the round in nats, shape [T, S].

    Returns:
        Columns by name; their meaning and units are documented with the log.
    """
    r = entropy.resolution
    outputs_after = new.outputs(collected.samples, entropy.workspace, "first")
    mixed = entropy.mixed
    entropy_after, entropy_of_samples = entropies(outputs_after, collected.samples, r, entropy.kernel)
    found = RoundFindings(
        moments=collected.stats,
        new=new,
        delta=new.amplitudes - last,
        gradient=gradient,
        mixed=mixed,
        entropy_predicted=entropy.entropy + entropy.change(outputs_after),
        entropy_after=entropy_after,
        entropy_of_samples=entropy_of_samples,
        entropy_of_gaussian=0.5 * math.log(2 * math.pi * math.e * (1 + r * r)),
        dead=collected.dead,
        nonfinite=collected.nonfinite,
    )
    columns = {name: column.of(found) for name, column in COLUMNS.items() if column.of is not None}
    return {name: values for name, values in columns.items() if values is not None}


def state(functions: Functions, last: Tensor) -> dict[str, Tensor]:
    """Columns that say what the corrections are, each of shape [S].

    Args:
        functions: of all sites.
        last: amplitudes after the previous round, shape [T, S].

    Returns:
        Of every term the amplitude and its change, as ``eps`` and ``delta_eps``; ``mu`` and ``sigma``.
    """
    columns: dict[str, Tensor] = {}
    for name, now, before in zip(functions.names, functions.amplitudes, last, strict=True):
        columns |= {name: now, f"delta_{name}": now - before}
    return {**columns, "mu": functions.shape[:, 0], "sigma": functions.shape[:, 1]}


def describe_events(
    n: Tensor,
    usable: Tensor,
    fraction: Tensor,
    rolled_back: bool,
    nonfinite: Tensor,
    broken: Tensor,
    passed_over: Sequence[str | None],
) -> list[str | None]:
    """What was out of the ordinary at each site.

    Args:
        n: finite samples, shape [S].
        usable: whether they sufficed for an estimate, shape [S].
        fraction: part of the wanted move that the trust region admitted, shape [S].
        rolled_back: whether the round undid the previous one.
        nonfinite: NaN and infinite samples, shape [S].
        broken: whether an amplitude was found not finite and was put back, shape [S].
        passed_over: kind of a value that each site could not correct, None where there was none.

    Returns:
        One text per site, None where there is nothing to say.
    """
    columns = (n.tolist(), usable.tolist(), fraction.tolist(), nonfinite.tolist(), broken.tolist(), passed_over)
    events: list[str | None] = []
    for count, has_spread, taken, missing, put_back, kind in zip(*columns, strict=True):
        found: list[str] = []
        if kind:
            found.append(f"left alone: {kind}")
        if put_back:
            found.append("eps was not finite and is back at its last good value")
        if missing:
            found.append("non-finite samples left out")
        if rolled_back:
            found.append("rolled back")
        if count == 0:
            found.append("no samples")
        elif not has_spread:
            found.append("no spread")
        elif taken == 0.0:
            found.append("held")
        elif taken < 1.0:
            found.append("bounded")
        events.append("; ".join(found) or None)
    return events


def to_rows(
    heads: Sequence[Record], columns: Mapping[str, Tensor], tails: Sequence[Mapping[str, object]]
) -> list[Record]:
    """Rows of the log from columns, with one transfer to the host.

    Args:
        heads: first entries of each row.
        columns: tensors of shape [S].
        tails: last entries of each row.

    Returns:
        One row per site.
    """
    first, *others = columns.values()
    table = torch.stack([first.to(torch.float64), *others], dim=-1).tolist()  # all become what the first one is
    rows = [
        {**head, **dict(zip(columns, values, strict=True)), **tail}
        for head, values, tail in zip(heads, table, tails, strict=True)
    ]
    for row in rows:
        for count in {"n", "n_nonfinite"} & row.keys():
            row[count] = int(row[count])  # pyright: ignore[reportArgumentType]
    return rows


def snapshot(
    sites: Sequence[str],
    functions: Functions,
    density: Density | None,
    histogram: BinCounts | None = None,
    points: int = 65,
) -> list[Record]:
    """Every site's function on a grid of 4 standard deviations around its mean, with the density it was fitted to.

    Args:
        sites: names.
        functions: of all sites.
        density: of all sites; None where no round has followed the data.
        histogram: of the samples of the last round; None before the first one.
        points: of the grid.

    Returns:
        One row per site: site, the amplitudes by their names, mu, sigma, z, base, function; with a density u and pdf,
        per standard deviation; with a histogram edges and counts, where the samples had any spread.
    """
    u = torch.linspace(-4.0, 4.0, points, dtype=functions.shape.dtype, device=functions.shape.device)
    z = functions.shape[:, :1] + functions.sigma * u
    corrected = functions.outputs(z)
    base = corrected - functions.correction(z)
    pdf = None
    if density is not None:
        pdf = density.pdf(u)
    rows: list[Record] = []
    for row, name in enumerate(sites):
        mu, sigma = functions.shape[row].tolist()
        entry: Record = {"site": name, **dict(zip(functions.names, functions.amplitudes[:, row].tolist(), strict=True))}
        entry.update(mu=mu, sigma=sigma)
        entry.update(z=z[row].tolist(), base=base[row].tolist(), function=corrected[row].tolist())
        if pdf is not None:
            entry.update(u=u.tolist(), pdf=pdf[row].tolist())
        if histogram is not None and histogram.edges[row, 0] < histogram.edges[row, -1]:
            entry.update(edges=histogram.edges[row].tolist(), counts=histogram.counts[row].tolist())
        rows.append(entry)
    return rows


def aggregate(rows: Sequence[Record]) -> dict[str, float]:
    """Means over the sites that had samples, for loggers.

    Args:
        rows: of one round.

    Returns:
        ``mean_entropy``, ``mean_atom_mass``, and of every term ``mean_eps``, ``mean_abs_eps`` and
        ``mean_d_entropy_d_eps``. Of watched models ``mean_entropy``, ``mean_atom_mass``, ``mean_dead_fraction``,
        ``mean_flat_fraction`` and ``alerts``, the number of sites with something out of the ordinary.
    """

    def values(column: str) -> Tensor:
        return torch.tensor([float(row[column]) for row in rows], dtype=torch.float64)  # pyright: ignore[reportArgumentType]

    def mean(column: str) -> float:
        return float(values(column).nanmean())

    if rows and "flat_fraction" in rows[0]:
        columns = ("entropy", "atom_mass", "dead_fraction", "flat_fraction")
        alerts = sum(row["event"] is not None for row in rows)
        return {**{f"mean_{name}": mean(name) for name in columns}, "alerts": float(alerts)}
    names = [name for name in AMPLITUDES if rows and name in rows[0]]
    columns = ("entropy", *names, "atom_mass", *(f"d_entropy_d_{name}" for name in names))
    sizes = {f"mean_abs_{name}": float(values(name).abs().nanmean()) for name in names}
    return sizes | {f"mean_{name}": mean(name) for name in columns}
