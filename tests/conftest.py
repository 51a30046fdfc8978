"""One thread a process: the tensors of tests are small, and threads that wait for each other are slower than none."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(autouse=True)
def _no_process_group_stays() -> Iterator[None]:
    """Lightning's DDP leaves its process group to the end of the process, and later tests would log as ranks do."""
    yield
    if "torch" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
