"""Python's standard library as text: bytes, cut into windows; each file is in one part only."""

from __future__ import annotations

import functools
import math
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments.splits import SplitData
from eafo_dynamic.experiments.text.python_source import Content, read_source

__all__ = ["ByteWindows", "StdlibText", "source_files"]

_PACKAGES_AND_TESTS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_GENERATED_TABLES = {"encodings", "pydoc_data"}


class ByteWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text and, for each byte of a window, the byte that follows it.

    Args:
        text: bytes, uint8, shape [n] with n > block_size.
        block_size: bytes of a window.
        stride: bytes from the start of a window to the start of the next.
    """

    def __init__(self, text: Tensor, block_size: int, stride: int) -> None:
        self.text = text
        self.block_size = block_size
        self.stride = stride

    def __len__(self) -> int:
        return (len(self.text) - self.block_size - 1) // self.stride + 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.stride
        window = self.text[start : start + self.block_size + 1].long()
        return window[:-1], window[1:]


class StdlibText(SplitData):
    """Bytes of the .py files of the running Python's standard library, without tests and installed packages.

    The sorted files are shuffled by `split_seed`. The first ones are for validation, the next for testing, the next
    for training; each part takes whole files until it has its share of `max_megabytes`. Training windows start at any
    byte and are drawn anew in each epoch; evaluation windows are fixed and do not overlap. Another version of Python
    has another standard library: compare losses within one version only.

    Args:
        block_size: bytes of a window.
        batch_size: windows per batch.
        windows_per_epoch: training windows per epoch.
        eval_windows: largest number of windows for validation, and for testing.
        max_megabytes: cap on the text, in units of 10^6 bytes.
        seed: seed of the training windows; see `SplitData`.
        split_seed: seed of the choice and the cut of the files.
        val_fraction: fraction of the bytes for validation.
        test_fraction: fraction of the bytes for testing.
        root: folder whose .py files are read instead of the standard library.
        num_workers: loader processes.
        content: what to take of each file: "all", the "code" without its docstrings, or the "docstrings" alone.
            `max_megabytes` counts whole files in any case.

    Raises:
        ConfigError: for an unknown content, a size below 1, or a folder with too little text for three parts.
    """

    def __init__(
        self,
        block_size: int = 128,
        batch_size: int = 32,
        windows_per_epoch: int = 3200,
        eval_windows: int = 256,
        max_megabytes: float = 4.0,
        seed: int = 0,
        split_seed: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        root: str | None = None,
        num_workers: int = 0,
        content: Content = "all",
    ) -> None:
        super().__init__(batch_size, seed, split_seed, val_fraction, test_fraction, num_workers)
        if content not in get_args(Content):
            raise ConfigError("content", content, "no such content", f"Use one of {', '.join(get_args(Content))}.")
        sizes = {
            "block_size": block_size,
            "windows_per_epoch": windows_per_epoch,
            "eval_windows": eval_windows,
        }
        for option, size in sizes.items():
            if size < 1:
                raise ConfigError(option, size, "must be at least 1", "Choose 1 or more.")
        self.block_size = block_size
        self.draws = windows_per_epoch
        self.eval_windows = eval_windows
        self.max_megabytes = max_megabytes
        self.content: Content = content
        if root is None:
            root = sysconfig.get_path("stdlib")
        self.root = Path(root)
        self.files: dict[str, list[Path]] = {}

    def setup(self, stage: str) -> None:
        """Chooses and reads the files and cuts them into windows; the same for every stage.

        Args:
            stage: what Lightning is about to do; not used.

        Raises:
            ConfigError: when a part has less text than one window.
        """
        self.files = self._choose_files()
        text = {part: _read(files, self.content) for part, files in self.files.items()}
        shortest = min(len(part) for part in text.values())
        if shortest <= self.block_size:
            raise ConfigError(
                "root",
                str(self.root),
                f"one of the three parts has {shortest} bytes of .py files, a window {self.block_size}",
                "Name a folder with more Python files, raise max_megabytes or lower block_size.",
            )
        self.train_data = ByteWindows(text["train"], self.block_size, stride=1)
        self.val_data = self._evaluation_windows(text["val"])
        self.test_data = self._evaluation_windows(text["test"])

    def _evaluation_windows(self, text: Tensor) -> ByteWindows:
        """At most `eval_windows` windows, evenly spread over the whole text rather than over its first files."""
        stride = math.ceil((len(text) - self.block_size) / self.eval_windows)
        return ByteWindows(text, self.block_size, max(self.block_size, stride))

    def _choose_files(self) -> dict[str, list[Path]]:
        files = source_files(self.root)
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(self.split_seed))
        shuffled = iter([files[index] for index in order.tolist()])
        total_bytes = min(self.max_megabytes * 1e6, sum(path.stat().st_size for path in files))
        train_fraction = 1 - self.val_fraction - self.test_fraction
        return {
            "val": _take(shuffled, self.val_fraction * total_bytes),
            "test": _take(shuffled, self.test_fraction * total_bytes),
            "train": _take(shuffled, train_fraction * total_bytes),
        }


def _take(files: Iterator[Path], total_bytes: float) -> list[Path]:
    """The next files, whole, until together they have at least that many bytes or there are no more."""
    taken: list[Path] = []
    while total_bytes > 0:
        path = next(files, None)
        if path is None:
            break
        taken.append(path)
        total_bytes -= path.stat().st_size
    return taken


def source_files(root: Path) -> list[Path]:
    """The .py files below a folder, sorted, without tests, installed packages and generated tables.

    Args:
        root: the folder.

    Returns:
        Paths, in an order that depends on their names below `root` only.
    """
    skipped = _PACKAGES_AND_TESTS | _GENERATED_TABLES
    kept: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        # in place: os.walk then does not go through installed packages, which may be a hundred times as much
        subfolders[:] = [name for name in subfolders if name not in skipped]
        kept += [Path(folder, name) for name in files if name.endswith(".py") and name not in skipped]
    return sorted(kept, key=lambda path: path.relative_to(root).as_posix())


def _read(files: list[Path], content: Content) -> Tensor:
    text = bytearray()
    for path in files:
        state = path.stat()
        text += _source(path, content, state.st_mtime_ns, state.st_size)
    if not text:  # torch.frombuffer refuses an empty buffer
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(text, dtype=torch.uint8)


@functools.lru_cache(maxsize=4096)
def _source(path: Path, content: Content, modified_ns: int, size: int) -> bytes:
    """What `read_source` returns, parsed once per process: Lightning sets data up for each stage anew."""
    return read_source(path, content)
