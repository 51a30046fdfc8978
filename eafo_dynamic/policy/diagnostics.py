"""What an update round tells about every site: the columns of the correction log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from eafo_dynamic.correction.stacked import AmplitudeValues, Functions
from eafo_dynamic.density.estimators import Density
from eafo_dynamic.density.sample_moments import SampleMoments
from eafo_dynamic.policy.estimates import OutputEntropy, entropies
from eafo_dynamic.records.schema import Record

__all__ = ["aggregate", "describe_events", "diagnostics", "snapshot", "state", "to_rows"]


def diagnostics(
    samples: Tensor,
    moments: SampleMoments,
    entropy: OutputEntropy,
    old: Functions,
    new: Functions,
    last: AmplitudeValues,
    gradient: Tensor,
) -> dict[str, Tensor]:
    """Columns that describe one update round, each of shape [S].

    Args:
        samples: pre-activations, shape [S, n]; NaN where missing.
        moments: their moments.
        entropy: entropy of the outputs under the old functions.
        old: functions before the round.
        new: functions after it.
        last: amplitudes after the previous round.
        gradient: dH_r/d amplitude of the old functions in nats, shape [terms, S].

    Returns:
        Columns by name; their meaning and units are documented with the log.
    """
    r = entropy.resolution
    outputs_after = new.outputs(samples, entropy.workspace, "first")
    mixed = entropy.mixed
    entropy_after, entropy_of_samples = entropies(outputs_after, samples, r, entropy.kernel)
    entropy_of_gaussian = 0.5 * math.log(2 * math.pi * math.e * (1 + r * r))
    delta_eps = new.eps - last.eps
    columns = {"eps": new.eps, "delta_eps": delta_eps, "d_entropy_d_eps": gradient[0]}
    if new.lift is not None and last.lift is not None:
        columns |= {"lift": new.lift, "delta_lift": new.lift - last.lift, "d_entropy_d_lift": gradient[1]}
    return {
        **columns,
        "entropy": mixed.entropy,
        "entropy_predicted": entropy.entropy + entropy.change(outputs_after),
        "entropy_after": entropy_after,
        "entropy_drift": gradient[0] * delta_eps,
        "continuous_entropy": mixed.continuous_entropy,
        "atom_mass": mixed.atom_mass,
        "mean": moments.mean,
        "std": moments.std,
        "skew": moments.skew,
        "kurtosis": moments.kurtosis,
        "negentropy": entropy_of_gaussian - entropy_of_samples,
        "n": moments.n,
        "mu": new.shape[:, 0],
        "sigma": new.shape[:, 1],
    }


def state(functions: Functions, last: AmplitudeValues) -> dict[str, Tensor]:
    """Columns that say what the corrections are, each of shape [S].

    Args:
        functions: of all sites.
        last: amplitudes after the previous round.

    Returns:
        ``eps``, ``delta_eps``, ``mu`` and ``sigma``, and ``lift`` and ``delta_lift`` where terms are free.
    """
    columns = {"eps": functions.eps, "delta_eps": functions.eps - last.eps}
    if functions.lift is not None and last.lift is not None:
        columns |= {"lift": functions.lift, "delta_lift": functions.lift - last.lift}
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


def snapshot(sites: Sequence[str], functions: Functions, density: Density | None, points: int = 65) -> list[Record]:
    """Every site's function on a grid of 4 standard deviations around its mean, with the density it was fitted to.

    Args:
        sites: names.
        functions: of all sites.
        density: of all sites; None where no round has followed the data.
        points: of the grid.

    Returns:
        One row per site: site, eps, mu, sigma, z, base, function; with a density u and pdf, per standard deviation.
    """
    u = torch.linspace(-4.0, 4.0, points, dtype=functions.eps.dtype, device=functions.eps.device)
    z = functions.shape[:, :1] + functions.sigma * u
    corrected = functions.outputs(z)
    base = corrected - functions.correction(z)
    pdf = None
    if density is not None:
        pdf = density.pdf(u)
    rows: list[Record] = []
    for row, name in enumerate(sites):
        mu, sigma = functions.shape[row].tolist()
        entry: Record = {"site": name, "eps": functions.eps[row].item(), "mu": mu, "sigma": sigma}
        if functions.lift is not None:
            entry["lift"] = functions.lift[row].item()
        entry.update(z=z[row].tolist(), base=base[row].tolist(), function=corrected[row].tolist())
        if pdf is not None:
            entry.update(u=u.tolist(), pdf=pdf[row].tolist())
        rows.append(entry)
    return rows


def aggregate(rows: Sequence[Record]) -> dict[str, float]:
    """Means over the sites that had samples, for loggers.

    Args:
        rows: of one round.

    Returns:
        ``mean_entropy``, ``mean_eps``, ``mean_atom_mass`` and ``mean_d_entropy_d_eps``.
    """

    def mean(column: str) -> float:
        values = torch.tensor([float(row[column]) for row in rows], dtype=torch.float64)  # pyright: ignore[reportArgumentType]
        return float(values.nanmean())

    return {f"mean_{name}": mean(name) for name in ("entropy", "eps", "atom_mass", "d_entropy_d_eps")}
