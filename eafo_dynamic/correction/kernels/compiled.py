"""The C code of this folder as a shared library: compiled on the user's machine, kept on disk, checked and loaded.

Nothing here knows which functions the library has. ``native`` and ``rounds`` take theirs from it, and each checks its
results before using them.

Compiling takes about 1 s. The code is plain C without torch's headers, so that a run can wait for it: a library that
became available in the middle of a run would make the run's numbers depend on the clock.

A library is kept under a name that stands for everything its code depends on, with its SHA-256 in a file beside it. A
library that was damaged, or that somebody else could have written, is not loaded but built anew.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from eafo_dynamic.correction.kernels.keeping import BUILDING, is_intact, is_private, keep
from eafo_dynamic.errors import one_line

__all__ = [
    "CompiledCodeError",
    "bind",
    "cache_folder",
    "find_compiler",
    "load_library",
    "shared_library",
    "sound_kernel",
]

_SOURCES = Path(__file__).parent
_UNITS = ("mixed.c", "round.c")  # each includes other files; compiled side by side
_COMMON_FLAGS = ("-fPIC", "-fno-math-errno", "-fno-trapping-math")
# compilers tuned for the first processors with AVX-512 use half of its width, a third slower on later ones
_WIDE_FLAGS = ("-march=native", "-mprefer-vector-width=512", "-fopenmp")
# best first; a compiler that does not know an option fails, and the next set is tried
_FLAG_SETS = (
    # -O3 takes a third longer to compile
    ("-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-funswitch-loops", *_WIDE_FLAGS),
    ("-O3", *_WIDE_FLAGS),
    ("-O3", "-march=native", "-fopenmp"),
    ("-O3", "-march=native", "-fopenmp-simd"),
    ("-O3",),
)
# lines of /proc/cpuinfo that decide what -march=native means, on x86, Arm, POWER and RISC-V
_CPU_FIELDS = frozenset(
    {"vendor_id", "cpu family", "model", "model name", "flags"}
    | {"CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"}
    | {"cpu", "isa", "uarch"}
)
_PATIENCE = 60.0  # seconds: for one run of the compiler, and for another process that is building
_STALE = 24 * 3600.0  # seconds after which what another machine has left behind is removed


class CompiledCodeError(Exception):
    """The compiled code cannot be used.

    Args:
        problem: why.
        remedy: what the user can do.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}. {remedy}")
        self.problem = problem
        self.remedy = remedy


class _Kernel(Protocol):
    def is_sound(self) -> bool: ...


_SomeKernel = TypeVar("_SomeKernel", bound=_Kernel)


@functools.cache
def shared_library() -> ctypes.CDLL | None:
    """The library of this process, built now if this machine has not built it before.

    Returns:
        The library. None where there can be none: on Windows, or, with one warning that says why, where it cannot be
        built or loaded.
    """
    if os.name != "posix":
        return None
    try:
        return _load_from_cache()
    except CompiledCodeError as error:
        _warn_of_fallback("activations and update rounds", error)
        return None


def sound_kernel(kind: Callable[[ctypes.CDLL], _SomeKernel], task: str) -> _SomeKernel | None:
    """Functions of the library that have passed their check.

    Args:
        kind: takes its functions from the library.
        task: what they compute, for the warning.

    Returns:
        The functions. None without a library, or, with a warning, where functions are missing or give wrong results.
    """
    library = shared_library()
    if library is None:
        return None
    try:
        kernel = kind(library)
    except CompiledCodeError as error:
        _warn_of_fallback(task, error)
        return None
    if not kernel.is_sound():
        problem = f"the library {library._name} gives wrong results"
        _warn_of_fallback(task, CompiledCodeError(problem, _other_library(library)))
        return None
    return kernel


def bind(
    library: ctypes.CDLL, name: str, arguments: Sequence[type], result: type[ctypes.c_int] | None = None
) -> ctypes._NamedFuncPointer:
    """A function of a library, with its types.

    Args:
        library: the loaded library.
        name: name of the function in C.
        arguments: types of its arguments.
        result: type of its result; None for void.

    Returns:
        The function.

    Raises:
        CompiledCodeError: if the library has no such function.
    """
    try:
        function = library[name]
    except AttributeError as error:
        raise CompiledCodeError(
            f"the library {library._name} has no function {name}", _other_library(library)
        ) from error
    function.argtypes = list(arguments)
    function.restype = result
    return function


def find_compiler() -> str | None:
    """Path of the C compiler: the one named in the environment variable CC, else cc, gcc or clang.

    Returns:
        The first that there is, or None.
    """
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path:
            return path
    return None


def cache_folder() -> Path | None:
    """The folder in which libraries are kept: one that nobody else can write to, since they are executed.

    Returns:
        The folder, made if need be; None where there cannot be one that is private.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home) / "eafo-dynamic"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return None  # the caller then builds in a temporary folder
    if not is_private(status) or not os.access(folder, os.W_OK | os.X_OK):
        return None
    return folder


def load_library(compiler: str, folder: Path) -> ctypes.CDLL:
    """Loads the library that a compiler makes on this machine, and builds it unless the folder has it intact.

    Processes may do this at the same time. One of them builds while the others wait; where the file system has no
    locks, each builds a library of its own, and the last one stays.

    Args:
        compiler: path of the compiler.
        folder: where libraries are kept.

    Returns:
        The library.

    Raises:
        CompiledCodeError: if it cannot be built or loaded.
        OSError: if the folder cannot be used.
    """
    path = folder / f"{_key(compiler)}.so"
    library = _load_kept(path)
    if library is not None:
        return library
    with _lock(folder) as locked:
        library = _load_kept(path)  # another process may have built it in the meantime
        if library is None:
            library = _build(compiler, path, locked)
    return library


def _load_from_cache() -> ctypes.CDLL:
    compiler = find_compiler()
    if compiler is None:
        raise CompiledCodeError(
            "no C compiler was found", "Install cc, gcc or clang, or name one in the environment variable CC."
        )
    try:
        folder = cache_folder()
        if folder is not None:
            return load_library(compiler, folder)
        with tempfile.TemporaryDirectory(prefix="eafo-dynamic-") as temporary:
            return load_library(compiler, Path(temporary))  # it stays loaded when its file is removed
    except OSError as error:
        raise CompiledCodeError(
            f"the library cannot be kept ({one_line(error)})",
            "Repair or empty the folder, or name another one in the environment variable XDG_CACHE_HOME.",
        ) from error


def _other_library(library: ctypes.CDLL) -> str:
    return f"Delete {library._name}, or name another compiler in the environment variable CC."


def _warn_of_fallback(task: str, error: CompiledCodeError) -> None:
    warnings.warn(
        f"EAFO: torch's own operations compute {task} on the CPU, more slowly than compiled code would: "
        f"{error} With backend='eager' there is no compiled code and no warning.",
        stacklevel=2,
    )


def _key(compiler: str) -> str:
    """A name for what a library depends on: sources, flags, and the machine's compiler, C library and processor."""
    parts = [path.read_bytes() for path in sorted(_SOURCES.glob("*.[ch]"))]
    described = (_COMMON_FLAGS, _FLAG_SETS, _compiler_version(compiler), platform.libc_ver(), _processor())
    parts.append(repr(described).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _compiler_version(compiler: str) -> str:
    try:
        return _run([compiler, "--version"], os.environ)
    except subprocess.TimeoutExpired as error:
        raise _too_slow(compiler) from error
    except (subprocess.SubprocessError, OSError) as error:
        raise _compiler_failed(compiler, error) from error


def _processor() -> list[str]:
    """What tells processors with different instructions apart."""
    features = [platform.system(), platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return features  # not Linux
    described = {line for line in lines if line.partition(":")[0].strip() in _CPU_FIELDS}
    return features + sorted(described)


def _load_kept(path: Path) -> ctypes.CDLL | None:
    """A library that was kept, if it is intact and can be loaded here."""
    if not is_intact(path):
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None  # what it was linked with is missing on this machine: it is built anew, without that


@contextmanager
def _lock(folder: Path) -> Generator[bool]:
    """Lets one process at a time build in a folder.

    Yields:
        Whether this process is that one. False where the file system has no locks, or the other one takes too long.
    """
    import fcntl  # Windows does not have it

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        locked = _locks_in_time(descriptor)
        yield locked
        if locked:
            # closing is not enough: a process that another thread has forked meanwhile holds the same lock
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _locks_in_time(descriptor: int) -> bool:
    import fcntl

    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:
            return False  # no locks here
    return False


def _build(compiler: str, path: Path, locked: bool) -> ctypes.CDLL:
    """Compiles and loads the library, and keeps it.

    Args:
        compiler: path of the compiler.
        path: where the library is kept.
        locked: whether no other process of this machine builds in that folder.

    Returns:
        The library.

    Raises:
        CompiledCodeError: if no set of flags makes a library that can be loaded.
    """
    if locked:
        _remove_abandoned_builds(path.parent)
    machine = platform.node() if locked else "unlocked"
    # everything a build writes lies in one folder, so that what a killed one leaves can be found and removed
    with tempfile.TemporaryDirectory(prefix=f"{BUILDING}{machine}-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        _compile(compiler, made)
        try:
            ctypes.CDLL(str(made))
        except OSError as error:
            raise CompiledCodeError(
                f"the library that {compiler} makes cannot be loaded ({one_line(error)})",
                "Name another compiler in the environment variable CC, or, where programs may not be executed in that "
                "folder, another folder in XDG_CACHE_HOME.",
            ) from error
        keep(made, path)
    return ctypes.CDLL(str(path))


def _remove_abandoned_builds(folder: Path) -> None:
    """Removes what killed builds have left; those of this machine are dead, since this process has the lock."""
    for entry in folder.iterdir():
        if not entry.name.startswith(BUILDING):
            continue
        is_of_this_machine = entry.name.startswith(f"{BUILDING}{platform.node()}-")
        if is_of_this_machine or _is_stale(entry):
            shutil.rmtree(entry, ignore_errors=True)  # a compiler that outlived its build may still write; next time


def _is_stale(entry: Path) -> bool:
    try:
        return time.time() - entry.stat().st_mtime > _STALE
    except FileNotFoundError:
        return False  # another machine has just removed it


def _compile(compiler: str, library: Path) -> None:
    """Makes the library with the first set of flags that the compiler takes."""
    problem: subprocess.SubprocessError | None = None
    for flags in _FLAG_SETS:
        try:
            _compile_with(compiler, flags, library)
            return
        except subprocess.TimeoutExpired as error:
            raise _too_slow(compiler) from error
        except subprocess.SubprocessError as error:
            problem = error
    assert problem is not None
    raise _compiler_failed(compiler, problem)


def _compile_with(compiler: str, flags: Sequence[str], library: Path) -> None:
    """Compiles the units side by side, and links them."""
    folder = library.parent
    environment = {**os.environ, "TMPDIR": str(folder)}  # for the compiler's own temporary files
    command = [compiler, *_COMMON_FLAGS, *flags]
    objects: list[str] = []
    commands: list[list[str]] = []
    for unit in _UNITS:
        compiled = str(folder / f"{unit}.o")
        objects.append(compiled)
        commands.append([*command, "-c", str(_SOURCES / unit), "-o", compiled])
    _run_side_by_side(commands, environment)
    _run([*command, "-shared", *objects, "-lm", "-o", str(library)], environment)


def _run_side_by_side(commands: Sequence[Sequence[str]], environment: Mapping[str, str]) -> None:
    with ThreadPoolExecutor(len(commands)) as pool:
        try:
            runs = [pool.submit(_run, each, environment) for each in commands]
        except RuntimeError:  # the main thread has ended, and this one trains on
            runs = []
            for each in commands:
                _run(each, environment)
        for run in runs:
            run.result()


def _run(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Runs a program without translated messages, and returns what it writes."""
    result = subprocess.run(
        command,
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=_PATIENCE,
        env={**environment, "LC_ALL": "C"},
    )
    return result.stdout


def _too_slow(compiler: str) -> CompiledCodeError:
    return CompiledCodeError(
        f"{compiler} took longer than {_PATIENCE:.0f} s",
        "Start again when the machine is less busy, or name another compiler in the environment variable CC.",
    )


def _compiler_failed(compiler: str, error: Exception) -> CompiledCodeError:
    message = one_line(error)
    if isinstance(error, subprocess.CalledProcessError):
        message = " ".join(str(error.stderr).split())[:300] or f"exit status {error.returncode}"
    return CompiledCodeError(
        f"{compiler} failed ({message})", "Repair it, or name another compiler in the environment variable CC."
    )
