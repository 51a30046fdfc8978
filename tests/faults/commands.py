"""The command line in processes of its own, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

import eafo_dynamic.cli
import eafo_dynamic.cli.fit  # noqa: F401  (what every child needs, so that it need not import it)

CONFIG = Path(__file__).parents[2] / "configs" / "wine_mlp.yaml"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["training_process", "children", "crash_points", "commands"])


@dataclass(frozen=True)
class Done:
    """How a process ended.

    Args:
        code: exit code.
        out: standard output.
        err: standard error.
    """

    code: int
    out: str
    err: str

    def assert_one_line(self, *words: str) -> None:
        """Wrong input: exit code 2, and one line that says what to change."""
        assert self.code == 2, self.err[-2000:]
        assert "Traceback" not in self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(line) < 1000
        for word in words:
            assert word in line, line


def _child(folder: str, arguments: Sequence[str]) -> None:
    for number, name in ((1, "out.txt"), (2, "err.txt")):
        with Path(folder, name).open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv = ["eafo-dynamic", *arguments]
    raise SystemExit(eafo_dynamic.cli.main())


def command(folder: Path, *arguments: str, timeout: float = 120) -> Done:
    """Runs ``eafo-dynamic`` in a folder.

    Args:
        folder: where.
        *arguments: of the command line.
        timeout: seconds.

    Returns:
        How it ended.
    """
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # Python 3.11's server has no other way to it
        forkserver.ensure_running()
    process = CONTEXT.Process(target=_child, args=(str(folder), arguments), daemon=True)
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
    texts = (Path(folder, name).read_text(errors="replace") for name in ("out.txt", "err.txt"))
    return Done(process.exitcode or 0, *texts)


class Payload:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)
