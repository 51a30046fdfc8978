"""Paired statistics over seeds: differences with intervals, exact tests, verdicts (pure functions)."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from eafo_dynamic.errors import ConfigError, EAFOError

__all__ = [
    "ALPHA",
    "Paired",
    "compare",
    "corrected",
    "holm",
    "interval",
    "is_higher_better",
    "labelled",
    "main_reference",
    "seeds_needed",
    "sign_flip",
]

ALPHA = 0.05

_EXACT = 16  # pairs up to which all 2^n choices of signs are counted
_FLIPS = 100_000  # choices of signs drawn for more pairs
_BATCH = 10_000  # of them in memory at a time
_RESAMPLES = 50_000  # of the bootstrap
_LEAST_FOR_BOOTSTRAP = 5  # differences; with fewer the interval is Student's
_LEAST_EXTRA_TIME = 1.0  # [%]
_HIGHER = ("accuracy", "acc", "auroc", "auc", "f1", "precision", "recall", "r2", "iou", "map", "bleu")
_LOWER = ("loss", "error", "err", "mse", "rmse", "mae", "perplexity", "ppl", "byte", "nll", "entropy", "brier")

_Values = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Paired:
    """One arm compared with its reference. Differences are arm minus reference, in the metric's unit.

    Attributes:
        arm: name of the arm.
        reference: name of the arm it is compared with.
        metric: what is compared.
        higher_is_better: whether a positive difference is a gain.
        seeds: seeds for which both have finished with a finite value; only these are paired.
        missing: seeds that one of the two has not finished.
        diverged: seeds that both have finished, where the arm's value is NaN or infinite.
        reference_diverged: seeds that both have finished, where the reference's value is NaN or infinite.
        differences: one per seed in `seeds`.
        mean: mean of the arm over `seeds`.
        reference_mean: mean of the reference over `seeds`.
        difference: mean of `differences`.
        low: lower end of the 95 % interval of `difference`, see `interval`.
        high: upper end of that interval.
        p: two-sided p-value of the paired sign-flip test, see `sign_flip`; NaN with fewer than two pairs.
        p_corrected: `p`, corrected by Holm's method for the number of pairs that are read together: the arms of a
            table, or the tasks of a question.
        test: name of the test that `p` comes from.
        wins: seeds in which the arm is better.
        ties: seeds in which both are equal.
        losses: seeds in which the arm is worse.
        d_z: `difference` / standard deviation of `differences` (n - 1); None where that is 0.
        relative: 100 `difference` / |`reference_mean`| [%]; None where that is 0.
        time_ratio: median over `seeds` of the arm's step time / the reference's; None without times.
        verdict: `better` or `worse`: p_corrected < 0.05, and the interval lies on that side of 0;
            `no difference found`: neither; `diverged`: a seed has no finite value, and the arm is not worse
            without it; `too few seeds`: fewer than two pairs.
    """

    arm: str
    reference: str
    metric: str
    higher_is_better: bool
    seeds: tuple[int, ...]
    missing: tuple[int, ...]
    diverged: tuple[int, ...]
    reference_diverged: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    reference_mean: float
    difference: float
    low: float
    high: float
    p: float
    p_corrected: float
    test: str
    wins: int
    ties: int
    losses: int
    d_z: float | None
    relative: float | None
    time_ratio: float | None
    verdict: str = ""

    @property
    def sign(self) -> int:
        """1 where higher is better, -1 where lower is better: a gain is `sign` times a difference."""
        return 1 if self.higher_is_better else -1

    @property
    def relative_interval(self) -> tuple[float, float] | None:
        """The interval in percent of the reference's mean, as if that mean were known exactly."""
        if self.relative is None:
            return None
        scale = 100 / abs(self.reference_mean)
        return scale * self.low, scale * self.high

    @property
    def extra_time(self) -> float | None:
        """100 (`time_ratio` - 1): how much longer a step takes than the reference's [%]."""
        if self.time_ratio is None:
            return None
        return 100 * (self.time_ratio - 1)

    @property
    def gain_per_time(self) -> float | None:
        """Relative gain [%] for each percent of extra step time: sign x `relative` / `extra_time`.

        None where a step takes less than 1 % longer: the quotient would be noise, and the gain is free anyway.
        """
        if self.relative is None or self.extra_time is None:
            return None
        if self.extra_time < _LEAST_EXTRA_TIME:
            return None
        return self.sign * self.relative / self.extra_time


def compare(
    values: _Values,
    reference: str,
    metric: str,
    *,
    higher_is_better: bool | None = None,
    step_ms: _Values | None = None,
    seeds: Sequence[int] | None = None,
    against: Mapping[str, str] | None = None,
) -> list[Paired]:
    """Compare every arm with its reference, over the seeds that both have finished.

    Args:
        values: `{arm: {seed: value}}`.
        reference: the arm that the others are compared with.
        metric: name of what is compared.
        higher_is_better: the metric's direction; None: `is_higher_better` tells it from the metric's name.
        step_ms: time of a training step [ms], `{arm: {seed: value}}`.
        seeds: seeds that were planned; None: every seed that any arm has.
        against: `{arm: reference}` for arms that have another reference than `reference`.

    Returns:
        One entry per arm other than `reference`, in the order of `values`.

    Raises:
        ConfigError: if the reference has no value, or the direction cannot be told from the metric's name.
    """
    references = {arm: (against or {}).get(arm, reference) for arm in values if arm != reference}
    for name in dict.fromkeys([reference, *references.values()]):
        if name not in values:
            mend = f"Run its cells, or choose another reference: {', '.join(values)}."
            raise ConfigError("reference", name, "has no finished cell", mend)
    if higher_is_better is None:
        higher_is_better = is_higher_better(metric)
    if seeds is None:
        seeds = [seed for by_seed in values.values() for seed in by_seed]
    planned = sorted(set(seeds))
    pairs = [
        _pair(arm, name, metric, higher_is_better, values, planned, _time_ratios(step_ms or {}, arm, name))
        for arm, name in references.items()
    ]
    return corrected(pairs)


def corrected(pairs: Sequence[Paired]) -> list[Paired]:
    """Corrects the p-values of pairs that are read together, by Holm's method, and gives the verdicts.

    Args:
        pairs: of one table.

    Returns:
        The pairs, in the same order.
    """
    p_values = holm([pair.p for pair in pairs])
    pairs = [replace(pair, p_corrected=p) for pair, p in zip(pairs, p_values, strict=True)]
    return [replace(pair, verdict=_verdict(pair)) for pair in pairs]


def main_reference(pairs: Sequence[Paired]) -> str:
    """Return the reference that is not itself compared with another arm.

    Args:
        pairs: what `compare` returned, of one metric.

    Returns:
        Its name.
    """
    compared = {pair.arm for pair in pairs}
    for pair in pairs:
        if pair.reference not in compared:
            return pair.reference
    return pairs[0].reference


def labelled(pair: Paired, main: str) -> str:
    """Return the arm's name, with its reference where that is not the main one.

    Args:
        pair: one of several that are shown together.
        main: their `main_reference`.

    Returns:
        `gelu learned`, or `gelu learned (against gelu)`.
    """
    if pair.reference == main:
        return pair.arm
    return f"{pair.arm} (against {pair.reference})"


def is_higher_better(metric: str, option: str = "metric", mend: str = "Write higher_is_better: true or false.") -> bool:
    """Tell from a metric's name whether higher is better: yes for `test_accuracy` and `r2`, no for `val_loss`.

    Args:
        metric: the name; its words, separated by anything but letters and digits, are looked up from the last
            to the first.
        option: the option that named the metric, for the message.
        mend: how to fix it where the name does not tell, for the message.

    Returns:
        Whether higher is better.

    Raises:
        ConfigError: if no word of the name is known.
    """
    words = re.split(r"[\W_]+", metric.lower())
    for word in reversed(words):
        if word in _HIGHER:
            return True
        if word in _LOWER:
            return False
    raise ConfigError(option, metric, "does not tell by its name whether higher is better", mend)


def interval(differences: Sequence[float], level: float = 1 - ALPHA) -> tuple[float, float]:
    """Return a confidence interval of the mean: bootstrap percentiles, widened for small samples.

    The ends are the quantiles a' and 1 - a' of the resampled means, with a = (1 - level) / 2 and

        a' = Phi(sqrt(n / (n - 1)) t_{a, n-1}),

    the expanded percentile interval of Hesterberg, "What Teachers Should Know About the Bootstrap" (2015),
    section 5. It is the percentile interval of `scipy.stats.bootstrap` at level 1 - 2 a'. Simulated coverage of
    95 % for normal differences at n = 5, 10, 20: 0.92, 0.95, 0.94; plain percentiles give 0.84, 0.91, 0.92, and
    BCa, which corrects for skewness but not for the small spread at small n, 0.85, 0.91, 0.92. Resampling has a
    fixed seed: equal data give equal intervals. Means of resamples never leave the range of the data, which holds
    the true mean with probability 1 - 2 / 2^n for symmetric differences; below n = 5 this is therefore Student's
    interval instead.

    Args:
        differences: one per seed.
        level: coverage wanted.

    Returns:
        Both ends; both NaN with fewer than two differences, and both the common value where all differences are
        equal, since they say nothing about their spread.

    Raises:
        EAFOError: if scipy is not installed.
    """
    stats = _scipy_stats()
    data = np.asarray(differences, dtype=np.float64)
    count = len(data)
    if count < 2:
        return math.nan, math.nan
    if (data == data[0]).all():
        return float(data[0]), float(data[0])
    if count < _LEAST_FOR_BOOTSTRAP:
        found = stats.ttest_1samp(data, 0.0).confidence_interval(level)
        return float(found.low), float(found.high)
    quantile = float(stats.t.ppf((1 - level) / 2, count - 1))
    tail = NormalDist().cdf(math.sqrt(count / (count - 1)) * quantile)
    found = stats.bootstrap(
        (data,),
        np.mean,
        n_resamples=_RESAMPLES,
        confidence_level=1 - 2 * tail,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def sign_flip(differences: Sequence[float]) -> tuple[float, str]:
    """Test whether paired differences are symmetric around 0: then each could as well have the other sign.

    p = share of the 2^n choices of signs for which |sum| is at least the observed one. Up to n = 16 all of them
    are counted; beyond, 100 000 are drawn with a fixed seed and p = (1 + count) / (1 + 100 000). The smallest p
    that n pairs can give is 2 / 2^n: 0.0625 at n = 5, 0.002 at n = 10.

    Args:
        differences: one per seed.

    Returns:
        The two-sided p-value and the name of the test; NaN with fewer than two differences.

    Raises:
        EAFOError: if scipy is not installed.
    """
    stats = _scipy_stats()
    data = np.asarray(differences, dtype=np.float64)
    count = len(data)
    if count < 2:
        return math.nan, "none"
    # Sums that differ by rounding only count as equal: accuracies are multiples of one number, and tie often.
    observed = abs(data.sum()) - 1e-12 * np.abs(data).sum()

    def reaches_observed(flipped: Any, axis: int) -> Any:
        return (np.abs(flipped.sum(axis=axis)) >= observed).astype(np.float64)

    flips = math.inf
    name = "exact sign flips"
    if count > _EXACT:
        flips = _FLIPS
        name = f"sign flips, {_FLIPS} drawn"
    found = stats.permutation_test(
        (data,),
        reaches_observed,
        permutation_type="samples",
        alternative="greater",
        n_resamples=flips,
        batch=_BATCH,
        vectorized=True,
        random_state=np.random.default_rng(0),
    )
    return float(found.pvalue), name


def _scipy_stats() -> Any:
    return _imported("scipy.stats")


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise EAFOError(f"statistics of a comparison need {package}: pip install 'eafo-dynamic[examples]'") from None


def holm(p: Sequence[float]) -> list[float]:
    """Correct p-values for their number by Holm's step-down method, which holds for any dependence.

    p_(k) -> max over j <= k of min(1, (m - j + 1) p_(j)), with p_(1) the smallest of m.

    Args:
        p: p-values; NaN stands for a test that could not be made, and does not count.

    Returns:
        The corrected p-values, in the same order.

    Raises:
        EAFOError: if statsmodels is not installed.
    """
    corrected = [math.nan] * len(p)
    tested = [index for index, value in enumerate(p) if not math.isnan(value)]
    if not tested:
        return corrected
    multitest = _imported("statsmodels.stats.multitest")
    found = multitest.multipletests([p[index] for index in tested], method="holm")[1]
    for index, value in zip(tested, found, strict=True):
        corrected[index] = float(value)
    return corrected


def seeds_needed(arms: int) -> int:
    """Return the fewest seeds with which one arm of several can pass the corrected test.

    Args:
        arms: number of arms that are compared with a reference.

    Returns:
        The smallest n with arms x 2 / 2^n < 0.05.
    """
    count = 2
    while arms * 2.0 / 2**count >= ALPHA:
        count += 1
    return count


def _pair(
    arm: str,
    reference: str,
    metric: str,
    higher_is_better: bool,
    values: _Values,
    planned: Sequence[int],
    time_ratios: Mapping[int, float],
) -> Paired:
    """Everything but the corrected p-value and the verdict, which need the other pairs."""
    ours = values[arm]
    theirs = values[reference]
    both = [seed for seed in planned if seed in ours and seed in theirs]
    seeds = [seed for seed in both if math.isfinite(ours[seed]) and math.isfinite(theirs[seed])]
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    gains = np.array(differences)
    if not higher_is_better:
        gains = -gains
    low, high = interval(differences)
    p, test = sign_flip(differences)
    difference = _mean(differences)
    reference_mean = _mean([theirs[seed] for seed in seeds])
    deviation = _deviation(differences)
    d_z = None
    if deviation > 0:
        d_z = difference / deviation
    relative = None
    if seeds and reference_mean != 0:
        relative = 100 * difference / abs(reference_mean)
    time_ratio = None
    paired_ratios = [time_ratios[seed] for seed in seeds if seed in time_ratios]
    if paired_ratios:
        time_ratio = float(np.median(paired_ratios))
    return Paired(
        arm=arm,
        reference=reference,
        metric=metric,
        higher_is_better=higher_is_better,
        seeds=tuple(seeds),
        missing=tuple(seed for seed in planned if seed not in both),
        diverged=tuple(seed for seed in both if not math.isfinite(ours[seed])),
        reference_diverged=tuple(seed for seed in both if not math.isfinite(theirs[seed])),
        differences=tuple(differences),
        mean=_mean([ours[seed] for seed in seeds]),
        reference_mean=reference_mean,
        difference=difference,
        low=low,
        high=high,
        p=p,
        p_corrected=math.nan,
        test=test,
        wins=int((gains > 0).sum()),
        ties=int((gains == 0).sum()),
        losses=int((gains < 0).sum()),
        d_z=d_z,
        relative=relative,
        time_ratio=time_ratio,
    )


def _mean(values: Sequence[float]) -> float:
    if not values:
        return math.nan
    return math.fsum(values) / len(values)


def _deviation(values: Sequence[float]) -> float:
    """Return the standard deviation (n - 1); 0 where the values differ by rounding only."""
    if len(values) < 2:
        return 0.0
    if max(values) - min(values) <= 1e-12 * max(map(abs, values)):
        return 0.0
    return float(np.std(values, ddof=1))


def _time_ratios(step_ms: _Values, arm: str, reference: str) -> dict[int, float]:
    ours: Mapping[int, float] = step_ms.get(arm, {})
    theirs: Mapping[int, float] = step_ms.get(reference, {})
    return {seed: ours[seed] / theirs[seed] for seed in ours if theirs.get(seed, 0.0) > 0}


def _verdict(pair: Paired) -> str:
    diverged = bool(pair.diverged or pair.reference_diverged)
    if len(pair.seeds) < 2:
        return "diverged" if diverged else "too few seeds"
    significant = pair.p_corrected < ALPHA
    lowest_gain, highest_gain = sorted((pair.sign * pair.low, pair.sign * pair.high))
    if significant and highest_gain < 0:
        return "worse"
    if diverged:
        return "diverged"
    if significant and lowest_gain > 0:
        return "better"
    return "no difference found"
