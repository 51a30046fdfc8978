"""A lock on a log's folder, so that two processes never write to one log."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from weakref import WeakValueDictionary

__all__ = ["FolderLock", "lock_folder"]

LOCK = ".lock"


class FolderLock:
    """A lock that this process holds on a folder; it ends with the last reference to it, or with the process.

    The system holds it on the open file ``.lock``, and releases it when the process dies, however it dies. The file
    stays behind and means nothing by itself.

    Args:
        folder: the folder.
        descriptor: of its ``.lock``, locked.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder = folder
        self.descriptor = descriptor

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.descriptor >= 0:
            close(self.descriptor)

    def __reduce__(self) -> tuple[Callable[[Path], FolderLock | None], tuple[Path]]:
        """Copies share the lock; a copy in another process asks for one of its own."""
        return lock_folder, (self.folder,)


_held: WeakValueDictionary[str, FolderLock] = WeakValueDictionary()


def lock_folder(folder: Path) -> FolderLock | None:
    """Lock a folder against other processes. Inside one process all callers share the lock.

    Args:
        folder: the folder, which exists.

    Returns:
        The lock; None if another process has it.

    Raises:
        OSError: if the folder cannot be written to, or its file system knows no locks.
    """
    key = os.path.realpath(folder)
    shared = _held.get(key)
    if shared is not None:
        return shared
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        free = _try_lock(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    if not free:
        os.close(descriptor)
        return None
    lock = _held[key] = FolderLock(folder, descriptor)
    return lock


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _leave_to_parent() -> None:
        """Close the descriptors in a forked child, such as a data loader's worker: it may outlive a killed parent."""
        for lock in list(_held.values()):
            os.close(lock.descriptor)
            lock.descriptor = -1
        _held.clear()

    os.register_at_fork(after_in_child=_leave_to_parent)
