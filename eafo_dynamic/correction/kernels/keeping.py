"""Files of compiled code that are kept on disk: whole, private, and known by their SHA-256.

Only the standard library is imported here: run as a program, this file builds in the background what no run waits for.

    python keeping.py LIBRARY COMMAND...

runs a command, which is to write the file {made}, and keeps that file as LIBRARY. If another process is at it, it ends.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["BUILDING", "checksum_of", "is_intact", "is_private", "keep", "main", "sha256"]

BUILDING = "build-"
"""Start of the names of folders that are removed when a build ends."""
_PATIENCE = 600.0  # [s]; a machine may be busy, and nobody waits


def checksum_of(library: Path) -> Path:
    """The file beside a library that holds its SHA-256.

    Args:
        library: its path.

    Returns:
        The path of that file.
    """
    return library.with_suffix(".sha256")


def sha256(path: Path) -> bytes:
    """The SHA-256 of a file.

    Args:
        path: the file.

    Returns:
        In hexadecimal digits.
    """
    return hashlib.sha256(path.read_bytes()).hexdigest().encode()


def is_private(status: os.stat_result) -> bool:
    """Whether a file or folder is this user's, and nobody else can write to it.

    Args:
        status: of the file or folder.

    Returns:
        Whether it is.
    """
    open_to_others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid == os.geteuid() and not open_to_others


def is_intact(path: Path) -> bool:
    """Whether a library is as it was built: whole, and written by nobody else.

    Args:
        path: of the library.

    Returns:
        Whether it is there and intact.
    """
    checksum = checksum_of(path)
    try:
        if not _is_private_file(path) or not _is_private_file(checksum):
            return False
        return checksum.read_bytes().strip() == sha256(path)
    except OSError:
        return False  # missing or unreadable


def keep(made: Path, path: Path) -> None:
    """Moves a library to where it is kept.

    A crash at any moment leaves the whole library with its checksum, or something that its checksum does not fit.

    Args:
        made: the library, on the same file system.
        path: where it is kept.
    """
    made.chmod(0o700)
    checksum = checksum_of(made)
    checksum.write_bytes(sha256(made) + b"\n")
    checksum.chmod(0o600)
    for each in (made, checksum):
        with each.open("r+b") as file:
            os.fsync(file.fileno())
    made.replace(path)
    checksum.replace(checksum_of(path))


def _is_private_file(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and is_private(status)


def main(path: Path, command: list[str]) -> None:
    """Builds a library unless another process is at it; what the compiler says about a failure is kept beside it.

    Args:
        path: where the library is kept.
        command: writes the file ``{made}``.
    """
    import fcntl  # Windows does not have it

    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return  # another process builds it, or the file system has no locks
        if is_intact(path):
            return
        with tempfile.TemporaryDirectory(prefix=f"{BUILDING}background-", dir=path.parent) as folder:
            made = Path(folder, path.name)
            words = [word.replace("{made}", str(made)) for word in command]
            environment = {**os.environ, "TMPDIR": folder, "LC_ALL": "C"}
            problem = ""
            try:
                subprocess.run(
                    words,
                    env=environment,
                    timeout=_PATIENCE,
                    check=True,
                    capture_output=True,
                    text=True,
                    errors="replace",
                )
                keep(made, path)
            except subprocess.CalledProcessError as error:
                problem = error.stderr[-10_000:] or f"{error}\n"
            except (subprocess.TimeoutExpired, OSError) as error:
                problem = f"{error}\n"
            said = path.with_suffix(".failed")
            if problem:
                said.write_text(problem)
            else:
                said.unlink(missing_ok=True)


if __name__ == "__main__":
    os.nice(19)
    main(Path(sys.argv[1]), sys.argv[2:])
