"""Code in a process of its own, forked from one that has imported the libraries but nothing of the package.

The code imports and finds what it would after ``python``, and need not wait for the libraries' imports, of six seconds.
Code whose point is what is imported starts a real ``python`` instead.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import os
import pickle
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARIES = ("lightning.pytorch", "torch.distributed.checkpoint")


@dataclass(frozen=True)
class _Request:
    script: str
    words: list[str]
    folder: str
    environment: dict[str, str]
    path: list[str]
    outputs: list[str]


class _Server:
    """The process that forks; its standard input takes requests, its standard output gives exit codes."""

    def __init__(self, libraries: Iterable[str]) -> None:
        command = [sys.executable, "-W", "ignore", __file__, *libraries]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=os.sep)
        atexit.register(self.process.communicate)

    def answer(self, request: _Request) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        pickle.dump(vars(request), self.process.stdin)
        self.process.stdin.flush()
        return pickle.load(self.process.stdout)


_server = functools.cache(_Server)


def script(
    file: Path,
    *words: str,
    folder: Path = ROOT,
    path: Iterable[Path] = (ROOT,),
    environment: dict[str, str] | None = None,
    libraries: Iterable[str] = LIBRARIES,
) -> subprocess.CompletedProcess[str]:
    """Runs ``python -W ignore file words...``.

    Args:
        file: of Python.
        *words: its arguments.
        folder: the working directory.
        path: ``PYTHONPATH``.
        environment: additional variables.
        libraries: that are imported already.

    Returns:
        As of ``subprocess.run``.
    """
    variables = {**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(map(str, path))}
    with tempfile.TemporaryDirectory() as outputs:
        files = [Path(outputs, name) for name in ("out", "err")]
        first = [str(file.parent), *map(str, path)]
        request = _Request(str(file), list(words), str(folder), variables, first, list(map(str, files)))
        code = _server(tuple(libraries)).answer(request)
        out, err = (each.read_text() for each in files)
    return subprocess.CompletedProcess([str(file), *words], code, out, err)


def python(code: str, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs ``python -W ignore -c code words...``; for the options see ``script``."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "code.py")
        file.write_text(code)
        return script(file, *words, **options)  # pyright: ignore[reportArgumentType]


def _requested() -> _Request:
    """Forks for every request; returns in the child."""
    while True:
        try:
            request = _Request(**pickle.load(sys.stdin.buffer))
        except EOFError:
            sys.exit()
        child = os.fork()
        if child == 0:
            return request
        _, status = os.waitpid(child, 0)
        pickle.dump(os.waitstatus_to_exitcode(status), sys.stdout.buffer)
        sys.stdout.flush()


def _serve(libraries: Iterable[str]) -> None:
    warnings.simplefilter("ignore")
    own = str(Path(__file__).parent)
    without_own = [place for place in sys.path if place not in (own, str(ROOT))]
    for library in libraries:
        importlib.import_module(library)
    gc.freeze()  # the children leave it as it is, at their end as well
    request = _requested()
    for number, output in enumerate(request.outputs, start=1):
        with Path(output).open("wb") as file:
            os.dup2(file.fileno(), number)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.argv[:] = [request.script, *request.words]
    sys.path[:] = [*request.path, *without_own]
    tempfile.tempdir = None  # a library may have asked where it is, before TMPDIR was set
    runpy.run_path(request.script, run_name="__main__")


if __name__ == "__main__":
    _serve(sys.argv[1:])
