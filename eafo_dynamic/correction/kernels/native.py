"""The correction term in C, compiled once on the user's machine by the compiler it has; about 1 s, then kept on disk.

Plain C without torch's headers, so that compiling is a matter of a blink and can be waited for: a kernel that arrived
in the middle of a run would make the run's numbers depend on the clock.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from eafo_dynamic.correction.kernels.formula import MAX_U, correction_of
from eafo_dynamic.correction.kernels.known import INSIDE, Known
from eafo_dynamic.correction.kernels.rounds import RoundKernel
from eafo_dynamic.correction.kernels.terms import Terms, channels_of, is_dense, uninitialised_like

__all__ = ["NativeKernel", "native_kernel"]

_SOURCES = Path(__file__).parent
_UNITS = ("mixed.c", "round.c")  # each includes another; compiled side by side
_COMMON = ("-fPIC", "-fno-math-errno", "-fno-trapping-math")
# best first; a compiler that does not know an option fails, and the next set is tried
# compilers tuned for the first processors with AVX-512 take half of its width, a third slower on later ones
_WIDE = ("-march=native", "-mprefer-vector-width=512", "-fopenmp")
_FLAGS = (
    ("-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-funswitch-loops", *_WIDE),  # -O3 compiles a third longer
    ("-O3", *_WIDE),
    ("-O3", "-march=native", "-fopenmp"),
    ("-O3", "-march=native", "-fopenmp-simd"),
    ("-O3",),
)
_PATIENCE = 20.0  # seconds for one run of the compiler
_BLOCK, _FEW_BLOCKS = 4096, 64  # as in the source
_LEAST_PARALLEL = 32768  # elements, as torch's own pointwise kernels
_LEAST_KEPT = 65536  # elements, from where on one pass over memory beats a copy and a pass
_MOST_INTERVALS = 1024  # as in the source
_PIECES = 64  # that a gradient by eps is added up from, whatever the number of threads
_TYPES = (torch.float32, torch.bfloat16, torch.float16)  # as in the source


class NativeKernel:
    """The compiled functions.

    Args:
        library: path of the shared library.

    Attributes:
        rounds: the functions for update rounds.
    """

    name = "native"

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        self.rounds = RoundKernel(loaded)
        pointer, real, integer = ctypes.c_void_p, ctypes.c_float, ctypes.c_int
        term = [*[pointer] * 4, integer, real, real, integer, real, integer]  # as in the source
        size = ctypes.c_int64
        layout = [integer, size, size]
        self._forward, self._backward = loaded.eafo_forward, loaded.eafo_backward
        self._forward.argtypes = [pointer, pointer, pointer, size, *term]
        self._backward.argtypes = [pointer, pointer, pointer, size, *term, *[pointer] * 3]
        self._mixed_forward, self._mixed_backward = loaded.eafo_mixed_forward, loaded.eafo_mixed_backward
        self._mixed_forward.argtypes = [pointer, pointer, size, *layout, *term]
        self._mixed_backward.argtypes = [pointer, pointer, pointer, size, *layout, *term, integer, *[pointer] * 3]

    @staticmethod
    def takes(z: Tensor, terms: Terms) -> bool:
        """Whether the compiled functions can work on these tensors.

        Args:
            z: pre-activations, dense, on the CPU.
            terms: the other operands, on the CPU.

        Returns:
            Whether z is float32, bfloat16 or float16, amplitudes are one for all or one a channel, the table is not
            too long, and there is no lift beside a table.
        """
        if terms.lift is not None and (terms.table is not None or terms.lift.shape != terms.eps.shape):
            return False
        if z.dtype not in _TYPES or (terms.eps.dim() and channels_of(z, terms.eps) is None):
            return False
        return terms.table is None or terms.table.shape[-1] <= _MOST_INTERVALS

    @staticmethod
    def inside(z: Tensor, terms: Terms, known: Known) -> Known | None:
        """The base, if it may be computed in the same pass; an eps of 0 wants the bits of torch's own.

        Args:
            z: pre-activations, dense.
            terms: the other operands.
            known: the base.

        Returns:
            The same, or None.
        """
        # the closed form without a lift is that of piecewise linear functions, and compiled for no others
        able = known.code == 1 or (known.code > 1 and (terms.table is not None or terms.lift is not None))
        return known if able and _acts(terms) else None

    def add(self, out: Tensor, z: Tensor, terms: Terms, inside: Known | None = None) -> None:
        """Adds c(z) to the base's output, in place.

        Args:
            out: base(z), strides of z; overwritten whatever it holds where the base is computed inside.
            z: pre-activations, dense.
            terms: the other operands.
            inside: the base, to be computed in the same pass; its values may differ from torch's in the last bits.
        """
        n, given = z.numel(), _float32(terms)
        if _is_simple(z, terms):
            _call(self._forward, z.data_ptr(), out.data_ptr(), None, n, *_arguments(given, inside, n))
        else:
            _call(
                self._mixed_forward, z.data_ptr(), out.data_ptr(), n, *_layout(z, terms), *_arguments(given, inside, n)
            )

    def overwrites(self, z: Tensor, terms: Terms, known: Known) -> bool:
        """Whether :meth:`overwrite` can be used, and is worth it.

        Args:
            z: pre-activations.
            terms: the other operands.
            known: the base.

        Returns:
            Whether one pass does it all, over more than a copy by itself takes at once.
        """
        large = z.numel() >= _LEAST_KEPT and is_dense(z) and _is_simple(z, terms)
        return large and self.inside(z, terms, known) is not None

    def overwrite(self, z: Tensor, kept: Tensor, terms: Terms, known: Known) -> None:
        """Writes f(z) over z and z to `kept`, in one pass over memory in place of two.

        Args:
            z: pre-activations for which :meth:`overwrites` holds.
            kept: room for them, with the same strides.
            terms: the other operands.
            known: the base.
        """
        n, at = z.numel(), z.data_ptr()
        _call(self._forward, at, at, kept.data_ptr(), n, *_arguments(_float32(terms), known, n))

    def add_gradient(
        self, out: Tensor, grad: Tensor, z: Tensor, terms: Terms, inside: Known | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Adds grad * c'(z) to the base's gradient, in place.

        Args:
            out: grad * base'(z), strides of z; overwritten likewise.
            grad: gradient of the loss by the output, strides of z.
            z: pre-activations, dense.
            terms: the other operands.
            inside: see :meth:`add`.

        Returns:
            Gradients by eps and lift, of their shape and dtype; None for a lift that is none.
        """
        n, given = z.numel(), _float32(terms)
        by_eps = uninitialised_like(given.eps)
        by_lift = None if given.lift is None else uninitialised_like(given.lift)
        sums = by_eps.data_ptr(), None if by_lift is None else by_lift.data_ptr()
        pointers, arguments = (z.data_ptr(), grad.data_ptr(), out.data_ptr()), _arguments(given, inside, n)
        if _is_simple(z, terms):
            partial = None if n <= _FEW_BLOCKS * _BLOCK else torch.empty(n // _BLOCK + 1, 2, dtype=torch.float64)
            _call(self._backward, *pointers, n, *arguments, None if partial is None else partial.data_ptr(), *sums)
        else:
            pieces = min(_PIECES, n // _BLOCK + 1)
            partial = torch.zeros(pieces, 2, max(terms.eps.numel(), 1), dtype=torch.float64)
            _call(self._mixed_backward, *pointers, n, *_layout(z, terms), *arguments, pieces, partial.data_ptr(), *sums)
        if given is terms:
            return by_eps, by_lift
        return by_eps.to(terms.eps.dtype), None if by_lift is None else by_lift.to(terms.eps.dtype)


def _call(function: Callable[..., None], *arguments: object) -> None:
    """Calls a compiled function; where Python's stack is at its end, with the error that it has everywhere.

    Raises:
        RecursionError: which ctypes wraps where the conversion of an argument raises it.
        ArgumentError: what else it wraps.
    """
    try:
        function(*arguments)
    except ctypes.ArgumentError as error:
        if "RecursionError" not in str(error):
            raise
        raise RecursionError("maximum recursion depth exceeded") from error


def _acts(terms: Terms) -> bool:
    """Whether no amplitude leaves its part of the tensor as it is."""
    eps, lift = terms.eps, terms.lift
    if not eps.dim():
        return bool(eps.item()) or (lift is not None and bool(lift.item()))
    return bool((eps.ne(0) if lift is None else eps.ne(0) | lift.ne(0)).all().item())


def _is_simple(z: Tensor, terms: Terms) -> bool:
    return z.dtype == torch.float32 and not terms.eps.dim()


def _float32(terms: Terms) -> Terms:
    """The terms in float32; themselves where they are."""
    eps, shape, table, half_width, lift = terms
    # spelled out: every call of every site comes by here, and a generator takes as long as the rest of it
    fits = eps.dtype == shape.dtype == torch.float32 and (lift is None or lift.dtype == torch.float32)
    if fits and (table is None or table.dtype == torch.float32):
        return terms
    table, lift = (None if each is None else each.to(torch.float32) for each in (table, lift))
    return Terms(eps.to(torch.float32), shape.to(torch.float32), table, half_width, lift)


def _layout(z: Tensor, terms: Terms) -> tuple[int, int, int]:
    """Type, number of channels, and how many elements of a channel lie side by side."""
    channels = channels_of(z, terms.eps) if terms.eps.dim() else None
    count, inner = channels or (1, max(z.numel(), 1))
    return _TYPES.index(z.dtype), count, inner


def _arguments(terms: Terms, inside: Known | None, n: int) -> tuple[object, ...]:
    eps, shape, table, half_width, lift = terms
    return (
        eps.data_ptr(),
        None if lift is None else lift.data_ptr(),
        shape.data_ptr(),
        None if table is None else table.data_ptr(),
        0 if table is None else table.shape[-1],
        half_width,
        MAX_U,
        0 if inside is None else inside.code,
        0.0 if inside is None else inside.below,
        torch.get_num_threads() if n >= _LEAST_PARALLEL else 1,
    )


@functools.cache
def native_kernel() -> NativeKernel | None:
    """The compiled kernel, compiled now if this machine has not compiled it before.

    Returns:
        The kernel; None without a compiler, or where its result is not what the formula says.
    """
    compiler = _compiler()
    if compiler is None:
        return None
    try:
        folder = _cache_folder()
        if folder is not None:
            return _checked(_library(compiler, folder))
        with tempfile.TemporaryDirectory() as folder:  # a loaded library stays when its file goes
            return _checked(_library(compiler, Path(folder)))
    except OSError:  # no room, a folder without the right to execute, a library of another machine
        return None


def _compiler() -> str | None:
    if os.name != "posix":
        return None
    candidates = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def _cache_folder() -> Path | None:
    """A folder that nobody else can write to, for what is going to be executed."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home) / "eafo-dynamic"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return None
    open_to_others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    mine = status.st_uid == os.getuid() and not open_to_others and os.access(folder, os.W_OK | os.X_OK)
    return folder if mine else None


def _library(compiler: str, folder: Path) -> Path | None:
    """Compiles the source, unless the folder has what this compiler made of it on such a processor."""
    source = b"".join(path.read_bytes() for path in sorted(_SOURCES.glob("*.[ch]")))
    where = f"{os.path.realpath(compiler)} {os.stat(compiler).st_mtime_ns} {_processor()} {torch.__version__} {_FLAGS}"
    library = folder / f"{hashlib.sha256(source + where.encode()).hexdigest()[:24]}.so"
    if library.exists():
        return library
    # several processes may be at it: each writes a file of its own, and the last one to be done stays
    made = folder / f"{library.stem}.{os.getpid()}.tmp"
    for flags in _FLAGS:
        if _build(compiler, flags, made):
            made.replace(library)
            return library
    return None


def _build(compiler: str, flags: tuple[str, ...], library: Path) -> bool:
    """Compiles the units side by side, and links them.

    Returns:
        Whether the compiler says that all went well.
    """

    def run(*arguments: str | Path) -> None:
        subprocess.run([compiler, *_COMMON, *flags, *arguments], check=True, capture_output=True, timeout=_PATIENCE)

    objects = [library.with_suffix(f".{Path(unit).stem}.o") for unit in _UNITS]
    try:
        with ThreadPoolExecutor(len(_UNITS)) as pool:
            made = [
                pool.submit(run, "-c", _SOURCES / unit, "-o", path) for unit, path in zip(_UNITS, objects, strict=True)
            ]
            for each in made:
                each.result()
        run("-shared", *objects, "-lm", "-o", library)
    except (subprocess.SubprocessError, OSError):
        return False
    finally:
        for path in objects:
            path.unlink(missing_ok=True)
    return True


def _processor() -> str:
    """What tells processors apart whose instructions differ, for a home that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    known = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return " ".join([platform.platform(), platform.machine(), platform.processor(), *sorted(known)])


def _checked(library: Path | None) -> NativeKernel | None:
    """A kernel whose results are those of the formula; a compiler may be broken.

    Returns:
        The kernel, or None.
    """
    if library is None:
        return None
    kernel = NativeKernel(library)
    z = torch.linspace(-9.0, 9.0, 301, dtype=torch.float32, device="cpu")  # whatever the defaults are
    knots = torch.cos(torch.arange(17, dtype=z.dtype, device=z.device))
    # t^2 - t^3 vanishes at both ends: the table is continuous, and a place rounded across a knot does not matter
    table = torch.stack([knots[:-1], knots.diff(), knots[1:], -knots[1:]])
    shape, lift = z.new_tensor([0.2, 1.4]), z.new_tensor(-0.2)
    for each, bell in ((None, None), (None, lift), (table, None)):
        terms = Terms(z.new_tensor(0.3), shape, each, 4.0, bell)
        out = torch.zeros_like(z)
        kernel.add(out, z, terms)
        c = correction_of(z, terms)
        kernels_agree = torch.allclose(out, c, rtol=0.0, atol=1e-5)
        for base in INSIDE if each is not None or bell is not None else INSIDE[:2]:
            kernel.add(out, z, terms, base)
            kernels_agree &= torch.allclose(out, base.value(z) + c, rtol=0.0, atol=1e-5)
        channels = terms._replace(eps=z / 18.0)
        if bell is not None:
            channels = channels._replace(lift=0.05 - z / 20.0)
        c = correction_of(z, channels)
        for dtype in _TYPES:
            out = torch.zeros_like(z, dtype=dtype)
            kernel.add(out, z.to(dtype), channels)
            kernels_agree &= torch.allclose(out.float(), c, rtol=0.0, atol=0.05 if dtype.itemsize == 2 else 1e-5)
        if not kernels_agree:
            return None
    return kernel if kernel.rounds.is_sound() else None
