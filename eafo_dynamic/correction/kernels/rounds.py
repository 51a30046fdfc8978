"""What an update round asks of the samples of all sites, in C: one call for all of them, one thread a site at a time.

The estimators are those of ``statistics`` and ``entropy``, which are the reference; samples are float32, on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eafo_dynamic.correction.kernels.formula import MAX_U, correction

__all__ = ["RoundKernel", "RoundOperands", "Smoothed", "Workspace"]

_LEAST_PARALLEL = 32768  # samples, as torch's own pointwise kernels
_MOST_SAMPLES = 1 << 20  # a site; above it sums need float64, as in grids
_FOUND = ("count", "low", "span", "mean", "std", "entropy", "fisher")  # columns, as in the source


class Workspace:
    """Room for a round's largest tensors that is kept for the next one; who takes it again overwrites the last taker's.

    The pages of tensors that are freed and made anew are cleared by the system each time, a sixth of a round's time.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()  # nothing in it outlasts a round

    def like(self, samples: Tensor, name: str) -> Tensor:
        """Room for a tensor.

        Args:
            samples: shape, dtype and device that it is to have.
            name: whose it is.

        Returns:
            A contiguous tensor that holds anything.
        """
        kept = self._kept.get(name)
        if kept is None or (kept.shape, kept.dtype, kept.device) != (samples.shape, samples.dtype, samples.device):
            with torch.inference_mode(False):  # a later round may not be in inference mode
                kept = torch.empty(samples.shape, dtype=samples.dtype, device=samples.device)
            self._kept[name] = kept
        return kept


class RoundOperands(NamedTuple):
    """The functions of S sites as the compiled code reads them; tensors are contiguous.

    Args:
        eps: amplitudes, shape [S].
        lift: amplitudes of the bells, shape [S], none of a site with a table; None for none.
        shape: mu and sigma, shape [S, 2].
        tables: coefficients, shape [T, 4, intervals].
        place: which table is a site's, -1 for the closed form, int64, shape [S].
        half_width: end of the tables in standard deviations.
        codes: ``Known.code`` of each site's base, 0 for one that is computed elsewhere, int32, shape [S].
        below: ``Known.below`` of each site's base, shape [S].
    """

    eps: Tensor
    lift: Tensor | None
    shape: Tensor
    tables: Tensor
    place: Tensor
    half_width: float
    codes: Tensor
    below: Tensor


class Smoothed(NamedTuple):
    """The resolution-r density of every site's outputs, read off.

    Args:
        found: float64, shape [S, 7]; see ``column``.
        score: sbar_r at every sample, per standard deviation, 0 where missing, shape [S, n]; None if nobody asked.
    """

    found: Tensor
    score: Tensor | None

    def column(self, name: str) -> Tensor:
        """One number a site.

        Args:
            name: count, low, span, mean, std, entropy (nats), or fisher, which is known with a score only.

        Returns:
            Float64, shape [S].
        """
        return self.found[:, _FOUND.index(name)]


class RoundKernel:
    """The compiled functions for update rounds.

    Args:
        library: the loaded library.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
        self._functions = _typed(
            *(library.eafo_functions, None, pointer, size, size, *[pointer] * 5, integer),
            *(ctypes.c_float, ctypes.c_float, *[pointer] * 5, integer),
        )
        self._smooth = _typed(
            *(library.eafo_smooth, integer, pointer, pointer, size, size, real, integer, integer, pointer, pointer)
        )
        self._gradient = _typed(
            *(library.eafo_entropy_gradient, None, pointer, pointer, pointer, pointer, size, size, real),
            *(integer, integer, pointer),
        )
        self._moments = _typed(library.eafo_moments, None, pointer, size, size, integer, pointer)
        self._dead = _typed(
            *(library.eafo_dead, integer, pointer, pointer, integer, size, size, integer, integer, pointer)
        )
        self._spacings = _typed(
            *(library.eafo_spacings, None, pointer, pointer, size, size, pointer, real, integer, pointer)
        )

    def __reduce__(self) -> tuple[Callable[[], RoundKernel | None], tuple[()]]:
        # addresses cannot be copied; whoever gets a copy has, or compiles, a library of its own
        return _again, ()

    @staticmethod
    def takes(*samples: Tensor) -> bool:
        """Whether the compiled functions can work on these tensors.

        Args:
            *samples: one number a sample each, shape [S, n].

        Returns:
            Whether all are float32 in rows on the CPU, not empty, and not so long that sums need float64.
        """
        return all(
            each.dtype == torch.float32
            and each.device.type == "cpu"
            and each.dim() == 2
            and each.is_contiguous()
            and 0 < each.shape[1] <= _MOST_SAMPLES
            and each.shape[0] > 0
            for each in samples
        )

    def functions(
        self,
        of: RoundOperands,
        z: Tensor,
        out: Tensor | None = None,
        by_eps: Tensor | None = None,
        by_lift: Tensor | None = None,
        *,
        bases: bool = True,
    ) -> None:
        """Every site's function and its directions, in one pass, written into the tensors that are given.

        Args:
            of: the functions.
            z: pre-activations, shape [S, n].
            out: becomes base(z) + c(z), shape [S, n]; holds base(z) in rows whose code is 0.
            by_eps: becomes what one unit of each eps adds, shape [S, n].
            by_lift: likewise of the lifts; of the closed form only.
            bases: False for c(z) alone in ``out``.
        """
        given = of.eps, of.lift, of.shape, of.tables, of.place
        ends = of.codes if bases else None, of.below if bases else None, out, by_eps, by_lift
        scalars = of.tables.shape[-1], of.half_width, MAX_U
        self._functions(_address(z), *z.shape, *map(_address, given), *scalars, *map(_address, ends), _threads(z))

    def smooth(
        self,
        x: Tensor,
        resolution: float,
        weight: Tensor | None = None,
        *,
        sampled: bool = True,
        score: bool | Tensor = False,
    ) -> Smoothed | None:
        """Moments and resolution-r entropy of every site's outputs, and what its gradient needs.

        Args:
            x: outputs, shape [S, n]; non-finite ones are missing.
            resolution: r, in standard deviations of the output.
            weight: nonnegative weights, shape [S, n]; None for 1 each.
            sampled: whether to take the bias of a random sample off the entropy.
            score: whether the score at the samples and the Fisher information are wanted, or room for the former.

        Returns:
            The results; None where a site's numbers are too large, too close or too wide apart for it.
        """
        found = x.new_empty(len(x), len(_FOUND), dtype=torch.float64)
        scores = score if isinstance(score, Tensor) else torch.empty_like(x) if score else None
        refused = self._smooth(
            *(x.data_ptr(), None if weight is None else weight.data_ptr(), *x.shape, resolution, sampled, _threads(x)),
            *(found.data_ptr(), None if scores is None else scores.data_ptr()),
        )
        return None if refused else Smoothed(found, scores)

    def gradient(
        self, x: Tensor, smoothed: Smoothed, direction: Tensor, resolution: float, *, moved: bool = False
    ) -> Tensor:
        """dH_r / d eps when outputs move along a direction, equation (1').

        Args:
            x: the outputs, shape [S, n].
            smoothed: what ``smooth`` says of them, with a score.
            direction: shape [S, n], finite where the outputs are.
            resolution: r.
            moved: whether ``direction`` is where the outputs move to.

        Returns:
            Gradients in nats, float64, shape [S].
        """
        assert smoothed.score is not None
        out = x.new_empty(len(x), dtype=torch.float64)
        addresses = [each.data_ptr() for each in (x, smoothed.score, direction, smoothed.found)]
        self._gradient(*addresses, *x.shape, resolution, moved, _threads(x), out.data_ptr())
        return out

    def moments(self, x: Tensor) -> Tensor:
        """Number, mean, standard deviation, skewness and excess kurtosis of the finite samples.

        Args:
            x: samples, shape [S, n].

        Returns:
            Float64, shape [S, 5].
        """
        out = x.new_empty(len(x), 5, dtype=torch.float64)
        self._moments(x.data_ptr(), *x.shape, _threads(x), out.data_ptr())
        return out

    def dead_fractions(self, x: Tensor, units: Tensor, per_unit: int) -> Tensor | None:
        """Fraction of units that never fired.

        Args:
            x: pre-activations, shape [S, n]; NaN ones are left out.
            units: unit of each, as floats, finite where x is no NaN; shape [S, n], or [1, n] for all sites.
            per_unit: samples a unit needs on average for the answer to mean something.

        Returns:
            The fractions, float32, shape [S]; None where there are too many units to mark them one by one.
        """
        out = x.new_empty(len(x))
        shared = len(units) < len(x)
        refused = self._dead(x.data_ptr(), units.data_ptr(), shared, *x.shape, per_unit, _threads(x), out.data_ptr())
        return None if refused else out

    def spacings(self, ordered: Tensor, count: Tensor, epsilon: float) -> Tensor:
        """Probability on atoms, and differential entropy of the other samples.

        Args:
            ordered: sorted samples, missing ones last, shape [S, n].
            count: number of samples that are not missing, float64, shape [S].
            epsilon: relative rounding of the samples.

        Returns:
            Mass and entropy in nats, float64, shape [S, 2].
        """
        out, count = ordered.new_empty(len(ordered), 2, dtype=torch.float64), count.contiguous()
        table = _digamma(ordered.shape[1] + 2)
        addresses = ordered.data_ptr(), count.data_ptr()
        self._spacings(*addresses, *ordered.shape, table.data_ptr(), epsilon, _threads(ordered), out.data_ptr())
        return out

    def is_sound(self) -> bool:
        """Whether results are what closed forms say; a compiler may be broken.

        Returns:
            Whether they are.
        """
        r, n = 0.1, 64
        pair = torch.tensor([[-1.0, 1.0]], dtype=torch.float32, device="cpu").repeat(1, n // 2)
        found = self.smooth(pair, r, sampled=False, score=True)
        if found is None:
            return False
        # two atoms far apart: log 2 more than the noise alone; nothing changes when the outputs are stretched
        apart = math.log(2) + 0.5 * math.log(2 * math.pi * math.e * r * r)
        stretched = self.gradient(pair, found, pair, r)
        z = torch.linspace(-4.0, 4.0, n, dtype=pair.dtype, device=pair.device).view(1, -1)
        place, tables = pair.new_tensor([-1], dtype=torch.long), pair.new_empty(0, 4, 1)
        eps, shape, out = pair.new_tensor([0.3]), pair.new_tensor([[0.2, 1.4]]), torch.empty_like(z)
        relu = pair.new_tensor([1], dtype=torch.int32), pair.new_zeros(1)
        self.functions(RoundOperands(eps, None, shape, tables, place, 8.0, *relu), z, out)
        dead = self.dead_fractions(pair, (pair > 0).float(), 8)
        expected = pair.new_tensor([n, 0.0, 1.0, 0.0, -2.0], dtype=torch.float64)
        return (
            abs(float(found.column("entropy")) - apart) < 1e-4
            and abs(float(stretched)) < 1e-3
            and torch.allclose(self.moments(pair)[0], expected, atol=1e-9)
            and torch.allclose(out, z.relu() + correction(z, eps[0], shape[0]), rtol=0.0, atol=1e-5)
            and dead is not None
            and float(dead) == 0.5
            and bool(self.spacings(pair.sort().values, expected[:1], 1e-7)[0, 0] == 1.0)
        )


def _typed(
    function: ctypes._NamedFuncPointer, result: type[ctypes.c_int] | None, *arguments: type
) -> ctypes._NamedFuncPointer:
    function.restype, function.argtypes = result, arguments
    return function


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _again() -> RoundKernel | None:
    from eafo_dynamic.correction.kernels.native import native_kernel

    native = native_kernel()
    return None if native is None else native.rounds


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= _LEAST_PARALLEL else 1


@functools.lru_cache(maxsize=16)
def _digamma(count: int) -> Tensor:
    """Digamma function of 0, 1, ..., count - 1."""
    return torch.digamma(torch.arange(count, dtype=torch.float64, device="cpu"))
