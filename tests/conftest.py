"""One thread a process: the tensors of tests are small, and threads that wait for each other are slower than none."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("EAFO_DYNAMIC_NODE", "0")  # no test waits for, or depends on, what is built in the background


def pytest_configure(config: pytest.Config) -> None:
    """Adds the filter whose class is Lightning's: the process that only hands out tests need not import it."""
    only_distributes = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    if not only_distributes:
        few_workers = "ignore:.*does not have many workers.*:lightning.fabric.utilities.warnings.PossibleUserWarning"
        config.addinivalue_line("filterwarnings", few_workers)


def pytest_collection_finish() -> None:
    """What the imports have made stays to the end: no full collection need go through it again, for 0.5 s each."""
    gc.collect()
    gc.freeze()


_OF_RANKS = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK", "RANK")


@pytest.fixture(autouse=True)
def _no_process_group_stays() -> Iterator[None]:
    """Lightning's DDP leaves its process group and environment to the end of the process.

    Later tests would log as ranks do, and the processes that they start would wait for others at the same port.
    """
    before = {name: os.environ.get(name) for name in _OF_RANKS}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if "torch" in sys.modules:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
