"""The included data: splits, standardisation, and an order that depends on seeds alone."""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from small_experiments import DATA
from torch import Tensor

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments import (
    DigitsData,
    EpochSampler,
    SplitData,
    StdlibText,
    TabularData,
)
from eafo_dynamic.experiments.scikit import standardise
from eafo_dynamic.experiments.splits import split_indices
from eafo_dynamic.experiments.text.python_source import read_source
from eafo_dynamic.experiments.text.stdlib import ByteWindows, source_files


def parts(data: SplitData) -> tuple[Any, Any, Any]:
    data.setup("fit")
    return data.train_data, data.val_data, data.test_data


def order_of(data: LightningDataModule, epoch: int = 0) -> Tensor:
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return torch.cat([inputs for inputs, _ in loader])


@pytest.mark.parametrize("n", [10, 37, 500])
@pytest.mark.parametrize("classes", [None, 3])
def test_split_is_a_partition_with_even_classes(n: int, classes: int | None) -> None:
    torch.manual_seed(n)
    targets = torch.randn(n) if classes is None else torch.randint(classes, (n,))
    split = split_indices(targets, 0.2, 0.3, seed=1)
    assert sorted(torch.cat(split).tolist()) == list(range(n))
    groups = [torch.ones(n, dtype=torch.bool)] if classes is None else [targets == k for k in range(classes)]
    for group in groups:
        for part, fraction in zip(split, (0.5, 0.2, 0.3), strict=True):
            assert abs(group[part].sum() - fraction * group.sum()) <= 1


def test_split_depends_on_its_seed() -> None:
    targets = torch.arange(100) % 4
    one, again, other = (split_indices(targets, 0.2, 0.2, seed) for seed in (0, 0, 1))
    assert torch.equal(one.train, again.train)
    assert not torch.equal(one.train, other.train)


@pytest.mark.parametrize("name", ["digits", "wine", "breast_cancer", "diabetes"])
def test_parts_hold_every_example_once(name: str) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    train, val, test = parts(DATA[name]())
    inputs = torch.cat([part.tensors[0] for part in (train, val, test)]).flatten(1).double()
    # Standardising is affine and increasing, so each feature keeps the order of its sorted values.
    centred = torch.from_numpy(x).sort(dim=0).values
    fit = (centred - centred.mean(0)) / centred.std(0).clamp_min(1e-12)
    seen = inputs.sort(dim=0).values
    seen = (seen - seen.mean(0)) / seen.std(0).clamp_min(1e-12)
    torch.testing.assert_close(seen, fit, atol=1e-4, rtol=1e-4)
    if name != "diabetes":
        counts = torch.cat([part.tensors[1] for part in (train, val, test)]).bincount()
        assert counts.tolist() == torch.from_numpy(y).bincount().tolist()


def test_tables_are_standardised_by_the_training_part() -> None:
    train, val, _ = parts(DATA["diabetes"]())
    for tensor in train.tensors:
        torch.testing.assert_close(tensor.mean(0), torch.zeros_like(tensor[0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(tensor.std(0), torch.ones_like(tensor[0]), atol=1e-5, rtol=0)
    assert val.tensors[0].mean(0).abs().max() > 1e-3  # another part, other statistics


def test_digits_are_standardised_as_one() -> None:
    train, _, _ = parts(DigitsData())
    images, classes = train.tensors
    assert images.shape[1:] == (1, 8, 8)
    assert classes.dtype == torch.int64
    assert abs(images.mean().item()) < 1e-5
    assert abs(images.std().item() - 1) < 1e-5
    assert len(images[:, 0, 0, 0].unique()) == 1  # a corner without ink: pixels are not scaled one by one


def test_digits_of_some_classes_are_relabelled() -> None:
    whole, some = DigitsData(), DigitsData(classes=[7, 2])
    counts = torch.cat([part.tensors[1] for part in parts(whole)]).bincount()
    images = torch.cat([part.tensors[0] for part in parts(some)])
    labels = torch.cat([part.tensors[1] for part in parts(some)])
    assert labels.bincount().tolist() == [counts[7], counts[2]]
    # The same sevens as in the whole set: standardising is affine, so their normalised mean image is equal.
    sevens = torch.cat([part.tensors[0][part.tensors[1] == 7] for part in parts(whole)]).mean(0)
    mine = images[labels == 0].mean(0)
    normalised = [(image - image.mean()) / image.std() for image in (sevens, mine)]
    torch.testing.assert_close(*normalised, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("classes", [[], [3], [1, 1], [1, 10], [-1, 2]])
def test_classes_that_are_not_digits(classes: list[int]) -> None:
    with pytest.raises(ConfigError, match="classes="):
        DigitsData(classes=classes)


def test_constant_features_become_zero() -> None:
    x = torch.tensor([[1.0, 3.0], [2.0, 3.0], [9.0, 9.0]])
    out = standardise(x, torch.tensor([0, 1]), (0,))
    assert out[:2, 1].tolist() == [0.0, 0.0]
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", DATA)
def test_order_is_a_function_of_seed_and_epoch(name: str) -> None:
    build = DATA[name]
    reference = order_of(build(seed=3), epoch=2)
    torch.manual_seed(17)  # another global state, equal batches
    assert torch.equal(order_of(build(seed=3), epoch=2), reference)
    assert not torch.equal(order_of(build(seed=4), epoch=2), reference)
    assert not torch.equal(order_of(build(seed=3), epoch=3), reference)


@pytest.mark.parametrize("draws", [None, 30])
def test_sampler_streams_of_neighbouring_seeds_differ(draws: int | None) -> None:
    one, other = EpochSampler(100, seed=0, draws=draws), EpochSampler(100, seed=1, draws=draws)
    one.set_epoch(1)
    assert list(one) != list(other)
    state = torch.get_rng_state()
    indices = list(one)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(indices) == len(one) == (draws or 100)
    assert (len(set(indices)) == 100) is (draws is None)


@pytest.mark.parametrize("draws", [None, 31])
def test_ranks_share_an_epoch(draws: int | None) -> None:
    whole = list(EpochSampler(50, seed=0, draws=draws))
    shares = [list(EpochSampler(50, 0, draws, replicas=3, rank=rank)) for rank in range(3)]
    assert {len(share) for share in shares} == {len(whole) // 3}
    interleaved = [index for group in zip(*shares, strict=True) for index in group]
    assert interleaved == whole[: len(interleaved)]


def test_training_batches_are_equally_large() -> None:
    data = TabularData("wine", batch_size=32)
    data.setup("fit")
    sizes = {len(targets) for _, targets in data.train_dataloader()}
    assert sizes == {32}
    assert sum(len(targets) for _, targets in data.val_dataloader()) == len(data.val_data)
    whole = TabularData("wine", batch_size=1000)
    whole.setup("fit")
    assert len(whole.train_dataloader()) == 1


def test_data_options_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match=r"name='iris'.*wine, breast_cancer, diabetes"):
        TabularData("iris")
    with pytest.raises(ConfigError, match="batch_size=0"):
        DigitsData(batch_size=0)
    with pytest.raises(ConfigError, match="val_fraction"):
        DigitsData(val_fraction=0.6, test_fraction=0.5)
    with pytest.raises(ConfigError, match="block_size=0"):
        StdlibText(block_size=0)


def test_missing_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"needs scikit-learn.*pip install 'eafo-dynamic\[examples\]'"):
        DigitsData().setup("fit")


# Text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.py", "a.py", "pkg/c.py", "pkg/d.py", "pkg/e.py", "f.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((name * 100).encode())
    for name in ("test/t.py", "site-packages/s.py", "pkg/tests/u.py", "note.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("no")
    return tmp_path


def test_source_files_are_sorted_and_without_tests(folder: Path) -> None:
    names = [path.relative_to(folder).as_posix() for path in source_files(folder)]
    assert names == ["a.py", "b.py", "f.py", "pkg/c.py", "pkg/d.py", "pkg/e.py"]


def test_every_file_is_in_one_part(folder: Path) -> None:
    data = StdlibText(16, root=str(folder), val_fraction=0.2, test_fraction=0.2)
    data.setup("fit")
    files = [path for part in data.files.values() for path in part]
    assert sorted(files) == sorted(source_files(folder))
    assert data.train_data.text.numel() == sum(path.stat().st_size for path in data.files["train"])


@pytest.mark.parametrize("split_seed", range(7))
def test_one_large_file_leaves_text_for_every_part(folder: Path, split_seed: int) -> None:
    (folder / "large.py").write_bytes(bytes(100_000))
    data = StdlibText(16, root=str(folder), max_megabytes=0.002, split_seed=split_seed)
    data.setup("fit")
    assert all(data.files.values())


def test_stdlib_text_keeps_to_its_cap_and_fractions() -> None:
    data = StdlibText(max_megabytes=2.0)
    data.setup("fit")
    sizes = {part: sum(path.stat().st_size for path in files) for part, files in data.files.items()}
    largest = max(path.stat().st_size for files in data.files.values() for path in files)
    for part, fraction in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        assert fraction * 2e6 <= sizes[part] < fraction * 2e6 + largest
    chosen = [set(files) for files in data.files.values()]
    assert sum(map(len, chosen)) == len(set.union(*chosen))


def test_windows_are_text_and_the_byte_after() -> None:
    text = torch.arange(50, dtype=torch.uint8)
    windows = ByteWindows(text, block_size=8, stride=1)
    assert len(windows) == 42
    for start in (0, 41):
        inputs, following = windows[start]
        assert inputs.tolist() == list(range(start, start + 8))
        assert following.tolist() == list(range(start + 1, start + 9))


def test_evaluation_windows_are_fixed_spread_and_apart() -> None:
    data = StdlibText(block_size=64, eval_windows=50, max_megabytes=1.0)
    data.setup("fit")
    windows = data.val_data
    assert 45 <= len(windows) <= 50
    assert windows.stride >= 64
    assert len(windows) * windows.stride > 0.9 * len(windows.text)  # to the end of the text
    crowded = StdlibText(block_size=64, eval_windows=10**6, max_megabytes=1.0)
    crowded.setup("fit")
    assert crowded.val_data.stride == 64


def test_too_little_text_is_said(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"root=.*0 bytes of \.py files"):
            StdlibText(root=str(root)).setup("fit")


SOURCE = b'''"""About the module."""
import os  # why


class A:
    """About A.

    Indented.
    """

    async def f(self):
        'about f'
        return "not a docstring"

    if os.name:
        def g(self): pass
'''


def test_code_and_docstrings_share_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_bytes(SOURCE)
    assert read_source(path, "all") == SOURCE
    assert read_source(path, "docstrings") == b"About the module.\n\nAbout A.\n\nIndented.\n\nabout f\n\n"
    code = read_source(path, "code")
    assert b"# why" in code
    assert b"not a docstring" in code
    assert b"bout" not in code
    tree = ast.parse(code)
    assert not any(ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef)))


def test_docstrings_are_those_that_python_sees() -> None:
    for module in (argparse, textwrap):
        found = read_source(Path(module.__file__), "docstrings").decode()
        own = [thing for thing in vars(module).values() if getattr(thing, "__module__", "") == module.__name__]
        written = [inspect.cleandoc(thing.__doc__) for thing in own if thing.__doc__]
        assert len(written) > 3
        assert all(text in found for text in written)


def test_text_of_one_kind_and_of_the_other() -> None:
    sizes = {}
    for content in ("all", "code", "docstrings"):
        data = StdlibText(max_megabytes=0.5, content=content)
        data.setup("fit")
        sizes[content] = len(data.train_data.text)
    assert sizes["docstrings"] > 0.02 * sizes["all"]
    assert sizes["code"] + sizes["docstrings"] < sizes["all"]
    with pytest.raises(ConfigError, match=r"content='prose'.*all, code, docstrings"):
        StdlibText(content="prose")


def test_a_file_that_cannot_be_parsed_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def f(:")
    with pytest.raises(ConfigError, match=r"content='code': .*bad\.py cannot be parsed"):
        StdlibText(root=str(tmp_path), content="code").setup("fit")
