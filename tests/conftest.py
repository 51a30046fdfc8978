"""One thread a process: the tensors of tests are small, and threads that wait for each other are slower than none."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; subprocesses inherit it
os.environ.setdefault("MPLBACKEND", "Agg")
