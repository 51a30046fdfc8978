"""Examples in docstrings are run: every module that has one."""

from __future__ import annotations

import doctest
import importlib
import math
from pathlib import Path

import pytest
import torch
from torch import nn

PACKAGE = Path(__file__).parent.parent / "eafo_dynamic"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = sorted(
    ".".join(["eafo_dynamic", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def test_there_are_examples() -> None:
    assert len(MODULES) >= 10


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    import eafo_dynamic

    torch.manual_seed(0)
    names = {"torch": torch, "nn": nn, "math": math, "wrap": eafo_dynamic.wrap}
    result = doctest.testmod(importlib.import_module(name), extraglobs=names, optionflags=FLAGS)
    assert result.attempted > 0
    assert result.failed == 0
