"""Files that are there whole or not at all, and the folder in which a command finds the user's own modules."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["replacing", "see_working_directory"]


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO]:
    """Writes a file so that whoever opens it sees the earlier one or the new one, whole; also after a loss of power.

    Args:
        path: the file; it need not exist.

    Yields:
        A temporary file beside it, which takes its place at the end of the block unless the block raises.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Lets a rename outlive a loss of power, where the system can open a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems cannot
    finally:
        os.close(descriptor)


def see_working_directory() -> None:
    """Lets imports find modules in the working directory, as ``python -m`` does and an installed command does not."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
