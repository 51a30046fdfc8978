"""What an update round asks of the samples of all sites, in C: one call for all sites, which threads share out.

The estimators are those of ``density`` and ``entropy``, which are the reference. Samples are float32, on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eafo_dynamic.correction.kernels.compiled import bind, sound_kernel
from eafo_dynamic.correction.kernels.directions import MAX_U, TERMS, code_of_terms
from eafo_dynamic.correction.kernels.formula import correction

__all__ = ["RoundKernel", "RoundOperands", "Smoothed", "Workspace", "compiled_rounds"]

_LEAST_PARALLEL = 32768  # samples from which on several threads work, as in torch's own pointwise kernels
_MOST_SAMPLES = 1 << 20  # per site; above it sums need float64, as in entropy.grids
_FOUND = ("count", "low", "span", "mean", "std", "entropy", "fisher")  # columns, as in entropy.c


class Workspace:
    """Memory for a round's largest tensors, kept for the next round; each use overwrites the one before it.

    The system clears the pages of tensors that are freed and allocated again each time, which takes a sixth of a
    round's time.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()  # nothing in it outlasts a round

    def like(self, samples: Tensor, name: str) -> Tensor:
        """A tensor to write into.

        Args:
            samples: has the shape, dtype and device that the tensor is to have.
            name: the same memory is returned for the same name.

        Returns:
            A contiguous tensor with arbitrary values.
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
        amplitudes: one row a term, shape [T, S]; the lift's is 0 for a site with a table.
        names: of the terms.
        shape: mu and sigma, shape [S, 2].
        tables: coefficients, shape [T, 4, intervals].
        place: index of each site's table, -1 for the closed form, int64, shape [S].
        half_width: end of the tables in standard deviations.
        codes: ``Known.code`` of each site's base, 0 for one that is computed elsewhere, int32, shape [S].
        below: ``Known.below`` of each site's base, shape [S].
    """

    amplitudes: Tensor
    names: tuple[str, ...]
    shape: Tensor
    tables: Tensor
    place: Tensor
    half_width: float
    codes: Tensor
    below: Tensor


class Smoothed(NamedTuple):
    """What the resolution-r density of every site's outputs says.

    Args:
        found: one row per site, float64, shape [S, 7]; see :meth:`column`.
        score: sbar_r at every sample, per standard deviation, 0 for missing samples, shape [S, n]; None if it was not
            asked for.
    """

    found: Tensor
    score: Tensor | None

    def column(self, name: str) -> Tensor:
        """One number per site.

        Args:
            name: count, low, span, mean, std, entropy (in nats) or fisher, which is known only with a score.

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
        pointer = ctypes.c_void_p
        size = ctypes.c_int64
        integer = ctypes.c_int
        single = ctypes.c_float
        double = ctypes.c_double
        samples = [pointer, size, size]  # x, sites, n
        given = [pointer, integer, pointer, pointer, pointer]  # amplitudes, which, shape, tables, place
        table = [integer, single, single]  # intervals, half_width, clamp
        wanted = [pointer] * 6  # base, below, out, by_eps, by_lift, by_gain
        self._functions = bind(library, "eafo_functions", [*samples, *given, *table, *wanted, integer])
        # x, weight, sites, n, resolution, sampled, threads, found, score
        self._smooth = bind(
            library,
            "eafo_smooth",
            [pointer, pointer, size, size, double, integer, integer, pointer, pointer],
            result=integer,
        )
        # x, score, direction, found, sites, n, resolution, moved, threads, out
        self._gradient = bind(
            library,
            "eafo_entropy_gradient",
            [pointer, pointer, pointer, pointer, size, size, double, integer, integer, pointer],
        )
        self._moments = bind(library, "eafo_moments", [*samples, integer, pointer])  # threads, out
        # x, unit, shared, sites, n, per_unit, threads, out
        self._dead = bind(
            library, "eafo_dead", [pointer, pointer, integer, size, size, integer, integer, pointer], result=integer
        )
        # sorted, count, sites, n, digamma, epsilon, threads, out
        self._spacings = bind(
            library, "eafo_spacings", [pointer, pointer, size, size, pointer, double, integer, pointer]
        )

    def __reduce__(self) -> tuple[Callable[[], RoundKernel | None], tuple[()]]:
        # addresses cannot be copied; the process that gets a copy has, or compiles, a library of its own
        return compiled_rounds, ()

    @staticmethod
    def takes(*samples: Tensor) -> bool:
        """Whether the compiled functions can compute with these tensors.

        Args:
            *samples: one number per sample, shape [S, n] each.

        Returns:
            Whether all are contiguous float32 matrices on the CPU, not empty, and not so long that sums need float64.
        """
        for each in samples:
            if not (each.is_cpu and each.dtype == torch.float32 and each.dim() == 2 and each.is_contiguous()):
                return False
            sites, count = each.shape
            if not (sites > 0 and 0 < count <= _MOST_SAMPLES):
                return False
        return True

    def functions(
        self,
        of: RoundOperands,
        z: Tensor,
        out: Tensor | None = None,
        by_eps: Tensor | None = None,
        by_lift: Tensor | None = None,
        by_gain: Tensor | None = None,
        *,
        bases: bool = True,
    ) -> None:
        """Computes every site's function and its directions in one pass, into the tensors that are given.

        Args:
            of: the functions.
            z: pre-activations, shape [S, n].
            out: receives base(z) + c(z), shape [S, n]; holds base(z) before, in rows whose code is 0.
            by_eps: receives the derivative of c(z) by eps, shape [S, n].
            by_lift: receives the derivative of c(z) by the lift; for the closed form only.
            by_gain: receives base(z), the derivative of c(z) by the gain; rows whose code is 0 are copied from ``out``.
            bases: False for c(z) alone in ``out``, which then has no gain.
        """
        codes = of.codes if bases else None
        below = of.below if bases else None
        self._functions(
            z.data_ptr(),
            z.shape[0],
            z.shape[1],
            of.amplitudes.data_ptr(),
            code_of_terms(of.names),
            of.shape.data_ptr(),
            of.tables.data_ptr(),
            of.place.data_ptr(),
            of.tables.shape[-1],
            of.half_width,
            MAX_U,
            _address(codes),
            _address(below),
            _address(out),
            _address(by_eps),
            _address(by_lift),
            _address(by_gain),
            _threads(z),
        )

    def smooth(
        self,
        x: Tensor,
        resolution: float,
        weight: Tensor | None = None,
        *,
        sampled: bool = True,
        score: bool | Tensor = False,
    ) -> Smoothed | None:
        """Moments and resolution-r entropy of every site's outputs, and what the entropy's gradient needs.

        Args:
            x: outputs, shape [S, n]; non-finite ones are missing.
            resolution: r, in standard deviations of the output.
            weight: nonnegative weights, shape [S, n]; None for 1 each.
            sampled: whether to subtract the bias that the entropy of a random sample has.
            score: whether to compute the score at the samples and the Fisher information; or a tensor of the shape of
                x that receives the score.

        Returns:
            The results; None where the numbers of a site are too large, too close together or too far apart for it.
        """
        found = x.new_empty(len(x), len(_FOUND), dtype=torch.float64)
        scores = None
        if isinstance(score, Tensor):
            scores = score
        elif score:
            scores = torch.empty_like(x)
        refused = self._smooth(
            x.data_ptr(),
            _address(weight),
            x.shape[0],
            x.shape[1],
            resolution,
            sampled,
            _threads(x),
            found.data_ptr(),
            _address(scores),
        )
        return None if refused else Smoothed(found, scores)

    def gradient(
        self, x: Tensor, smoothed: Smoothed, direction: Tensor, resolution: float, *, moved: bool = False
    ) -> Tensor:
        """dH_r / d eps when outputs move along a direction (Theory, section 4, (1')).

        Args:
            x: the outputs, shape [S, n].
            smoothed: what :meth:`smooth` found for them, with a score.
            direction: change of the outputs per unit of eps, shape [S, n], finite where the outputs are.
            resolution: r.
            moved: whether ``direction`` is the outputs after the move instead, x plus their change.

        Returns:
            Gradients in nats, float64, shape [S].
        """
        assert smoothed.score is not None
        out = x.new_empty(len(x), dtype=torch.float64)
        self._gradient(
            x.data_ptr(),
            smoothed.score.data_ptr(),
            direction.data_ptr(),
            smoothed.found.data_ptr(),
            x.shape[0],
            x.shape[1],
            resolution,
            moved,
            _threads(x),
            out.data_ptr(),
        )
        return out

    def moments(self, x: Tensor) -> Tensor:
        """Number, mean, standard deviation, skewness and excess kurtosis of the finite samples.

        Args:
            x: samples, shape [S, n].

        Returns:
            Float64, shape [S, 5].
        """
        out = x.new_empty(len(x), 5, dtype=torch.float64)
        self._moments(x.data_ptr(), x.shape[0], x.shape[1], _threads(x), out.data_ptr())
        return out

    def dead_fractions(self, x: Tensor, units: Tensor, per_unit: int) -> Tensor | None:
        """Fraction of the units that never fired.

        Args:
            x: pre-activations, shape [S, n]; NaN ones are left out.
            units: number of the unit that each sample comes from, as floats, finite where x is not NaN; shape [S, n],
                or [1, n] if all sites share them.
            per_unit: the fraction is NaN with fewer samples per unit, on average.

        Returns:
            The fractions, float32, shape [S]; None where there are too many units to mark them one by one.
        """
        out = x.new_empty(len(x))
        shared = len(units) < len(x)
        refused = self._dead(
            x.data_ptr(),
            units.data_ptr(),
            shared,
            x.shape[0],
            x.shape[1],
            per_unit,
            _threads(x),
            out.data_ptr(),
        )
        return None if refused else out

    def spacings(self, ordered: Tensor, count: Tensor, epsilon: float) -> Tensor:
        """Probability on atoms, and differential entropy of the other samples.

        Args:
            ordered: sorted samples, missing ones last, shape [S, n].
            count: number of samples that are not missing, float64, shape [S].
            epsilon: relative rounding error of the samples.

        Returns:
            Probability and entropy in nats, float64, shape [S, 2].
        """
        out = ordered.new_empty(len(ordered), 2, dtype=torch.float64)
        count = count.contiguous()
        digamma = _digamma(ordered.shape[1] + 2)
        self._spacings(
            ordered.data_ptr(),
            count.data_ptr(),
            ordered.shape[0],
            ordered.shape[1],
            digamma.data_ptr(),
            epsilon,
            _threads(ordered),
            out.data_ptr(),
        )
        return out

    def is_sound(self) -> bool:
        """Whether the results are those of closed forms; a compiler may be broken.

        Returns:
            Whether they are, for each function.
        """
        # two atoms of equal mass, as float32 on the CPU whatever torch's defaults are
        pair = torch.tensor([[-1.0, 1.0]], dtype=torch.float32, device="cpu").repeat(1, 32)
        return (
            self._entropy_is_sound(pair)
            and self._functions_are_sound(pair)
            and self._moments_are_sound(pair)
            and self._dead_fractions_are_sound(pair)
        )

    def _entropy_is_sound(self, pair: Tensor) -> bool:
        r = 0.1
        smoothed = self.smooth(pair, r, sampled=False, score=True)
        if smoothed is None:
            return False
        # the atoms are far apart: the entropy of the noise, and log 2 for the choice of the atom
        expected = math.log(2) + 0.5 * math.log(2 * math.pi * math.e * r * r)
        # stretching the outputs changes nothing
        stretched = self.gradient(pair, smoothed, pair, r)
        return abs(float(smoothed.column("entropy")) - expected) < 1e-4 and abs(float(stretched)) < 1e-3

    def _functions_are_sound(self, pair: Tensor) -> bool:
        z = torch.linspace(-4.0, 4.0, 64, dtype=pair.dtype, device=pair.device).view(1, -1)
        amplitudes = pair.new_tensor([[0.3], [-0.2], [0.15], [-0.1]])
        names = tuple(TERMS)
        shape = pair.new_tensor([[0.2, 1.4]])
        relu = RoundOperands(
            amplitudes,
            names,
            shape=shape,
            tables=pair.new_empty(0, 4, 1),
            place=pair.new_tensor([-1], dtype=torch.long),
            half_width=8.0,
            codes=pair.new_tensor([1], dtype=torch.int32),
            below=pair.new_zeros(1),
        )
        out = torch.empty_like(z)
        by_gain = torch.empty_like(z)
        self.functions(relu, z, out, by_gain=by_gain)
        base = z.relu()
        exact = base + correction(z, amplitudes[:, 0], shape[0], names=names, base=base)
        return torch.allclose(out, exact, rtol=0.0, atol=1e-5) and torch.equal(by_gain, base)

    def _moments_are_sound(self, pair: Tensor) -> bool:
        n = pair.shape[1]
        expected = pair.new_tensor([n, 0.0, 1.0, 0.0, -2.0], dtype=torch.float64)
        spacings = self.spacings(pair.sort().values, expected[:1], 1e-7)
        atom_mass = float(spacings[0, 0])
        return torch.allclose(self.moments(pair)[0], expected, atol=1e-9) and atom_mass == 1.0

    def _dead_fractions_are_sound(self, pair: Tensor) -> bool:
        dead = self.dead_fractions(pair, (pair > 0).float(), 8)
        return dead is not None and float(dead) == 0.5


@functools.cache
def compiled_rounds() -> RoundKernel | None:
    """The compiled functions for update rounds, compiled now if this machine has not compiled them before.

    Returns:
        The functions; None, with one warning that says why, where they cannot be compiled or give wrong results.
    """
    return sound_kernel(RoundKernel, "update rounds")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= _LEAST_PARALLEL else 1


@functools.lru_cache(maxsize=16)
def _digamma(count: int) -> Tensor:
    """Digamma function of 0, 1, ..., count - 1."""
    return torch.digamma(torch.arange(count, dtype=torch.float64, device="cpu"))
