"""Pre-activations for `rank` and `shape`: from a named density, a file of samples, or the log of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eafo_dynamic.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from eafo_dynamic.density.estimators import Density

__all__ = ["DENSITIES", "Source", "from_density", "from_file", "from_log"]

DENSITIES = ("normal", "student-t3", "logistic", "bimodal")

_QUANTILES = 8001


@dataclass(frozen=True)
class Source:
    """Pre-activations of one or more sites.

    Args:
        label: what they are, for a title.
        names: one name per site.
        points: pre-activations, float64, shape [sites, n].
        sampled: whether they are random samples; if not, they are quantiles of a known density.
        density: their density, for the correction.
    """

    label: str
    names: tuple[str, ...]
    points: Tensor
    sampled: bool
    density: Density


def from_density(name: str, mean: float = 0.0, std: float = 1.0) -> Source:
    """A named density with a mean and a standard deviation, as 8001 quantiles.

    Args:
        name: one of `DENSITIES`.
        mean: mean of the pre-activation.
        std: its standard deviation.

    Returns:
        The source; its density is Gaussian for "normal", a histogram for the others.

    Raises:
        ConfigError: for an unknown name, or a standard deviation that is not positive.
    """
    import torch

    from eafo_dynamic.density.estimators import Gaussian, histogram

    if name not in DENSITIES:
        mend = f"Use one of {', '.join(DENSITIES)}, or a file of samples."
        raise ConfigError("--density", name, "is neither a known density nor a file", mend)
    if not 0 < std < float("inf"):
        raise ConfigError("--std", std, "is not a positive number", "Give a standard deviation above 0.")
    points = (mean + std * _standard(name))[None]
    if name == "normal":
        density = Gaussian(torch.tensor([mean], dtype=torch.float64), torch.tensor([std], dtype=torch.float64))
    else:
        density = histogram(points, weights=torch.ones_like(points))
    return Source(f"{name} density, mean {mean:g}, std {std:g}", (name,), points, False, density)


def _standard(name: str) -> Tensor:
    """Return the quantiles of a named density with mean 0 and standard deviation 1."""
    import torch

    probabilities = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES
    quantiles = _quantile_functions()[name](probabilities)
    return (quantiles - quantiles.mean()) / quantiles.std(correction=0)


def _quantile_functions() -> dict[str, Callable[[Tensor], Tensor]]:
    import torch

    def student_t3(probability: Tensor) -> Tensor:
        # Hill's substitution t = sqrt(3) tan(theta) turns the distribution function into
        # theta + sin(theta) cos(theta) = pi (probability - 1/2), solved by Newton's method.
        target = torch.pi * (probability - 0.5)
        theta = target / 2
        for _ in range(60):
            slope = 2 * torch.cos(theta).square()
            step = (theta + torch.sin(theta) * torch.cos(theta) - target) / slope.clamp(min=1e-12)
            theta = (theta - step).clamp(-torch.pi / 2 + 1e-9, torch.pi / 2 - 1e-9)
        return 3**0.5 * torch.tan(theta)

    def bimodal(probability: Tensor) -> Tensor:
        # Half normal around -1, half around 1, both with standard deviation 0.4; by bisection.
        low = torch.full_like(probability, -8.0)
        high = torch.full_like(probability, 8.0)
        for _ in range(60):
            middle = (low + high) / 2
            left = torch.special.ndtr((middle + 1) / 0.4)
            right = torch.special.ndtr((middle - 1) / 0.4)
            too_low = (left + right) / 2 < probability
            low = torch.where(too_low, middle, low)
            high = torch.where(too_low, high, middle)
        return (low + high) / 2

    return {
        "normal": torch.special.ndtri,
        "student-t3": student_t3,
        "logistic": torch.logit,
        "bimodal": bimodal,
    }


def from_file(path: str) -> Source:
    """Samples from a file: `.npy`, or text with numbers separated by blanks, commas, semicolons or line ends.

    Args:
        path: the file. The shape of its array does not matter; values that are not finite are left out.

    Returns:
        The source, with a smoothed histogram as its density.

    Raises:
        ConfigError: if the file is missing, or holds no two different numbers.
    """
    import numpy
    import torch

    from eafo_dynamic.density.estimators import histogram

    file = Path(path)
    try:
        flat = numpy.asarray(_values(file), dtype=numpy.float64).ravel()
    except (OSError, ValueError, TypeError, EOFError) as error:
        problem = f"cannot be read as samples ({error})"
        raise ConfigError("--samples", path, problem, "Give a .npy file or a text file of numbers.") from None
    flat = flat[numpy.isfinite(flat)]
    if flat.size < 2 or flat.min() == flat.max():
        problem = f"holds {flat.size} finite numbers"
        if flat.size > 1:
            problem += ", all equal"
        raise ConfigError("--samples", path, problem, "Give at least two different samples.")
    points = torch.from_numpy(flat)[None]
    label = f"{flat.size} samples of {file.name}, mean {flat.mean():.3g}, std {flat.std():.3g}"
    return Source(label, (file.name,), points, True, histogram(points))


def _values(file: Path) -> object:
    import numpy

    if file.suffix == ".npy":
        return numpy.load(file, allow_pickle=False)
    return _numbers(file)


def _numbers(file: Path) -> list[float]:
    """Return the numbers of a text file; a first line without any number is a heading."""
    lines = file.read_text(encoding="utf-8").replace(",", " ").replace(";", " ").splitlines()
    rows = [line.split() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if rows and not any(_is_number(word) for word in rows[0]):
        rows = rows[1:]
    return [float(word) for row in rows for word in row]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def from_log(run: str, site: str | None = None) -> Source:
    """Normal densities with the mean and standard deviation that each site had at its last update.

    Args:
        run: folder of a run, or of its log.
        site: pattern of the sites wanted; None for all.

    Returns:
        The source, one row per site.

    Raises:
        ConfigError: if no site has a mean and a standard deviation.
    """
    import torch

    from eafo_dynamic.density.estimators import Gaussian
    from eafo_dynamic.records import CorrectionLog

    log = CorrectionLog.load(run)
    if site is not None:
        log = log.select(site=site)
    found: dict[str, tuple[float, float]] = {}
    for row in log.last():
        mean = row.get("mean")
        std = row.get("std")
        if isinstance(mean, (int, float)) and isinstance(std, (int, float)) and std > 0:
            found[str(row["site"])] = (float(mean), float(std))
    if not found:
        problem = "has no site with a mean and a positive standard deviation"
        raise ConfigError("--log", run, problem, "Let the run reach its first update.")
    mean, std = torch.tensor(list(found.values()), dtype=torch.float64).unbind(1)
    points = mean[:, None] + std[:, None] * _standard("normal")
    label = f"normal densities of {len(found)} sites of {Path(run).name or run}"
    return Source(label, tuple(found), points, False, Gaussian(mean, std))
