"""Merged models keep the signature and the sizes of the model, and come back in a fresh process from every format."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from eafo_dynamic import find_sites, load_merged, merge, save_merged, unwrap, wrap
from eafo_dynamic.apply.merge import MergedGraph
from eafo_dynamic.errors import SiteError

ROOT = Path(__file__).parents[2]
ROUNDING = {"rtol": 1e-5, "atol": 2e-6}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:.*LeafSpec", "ignore::torch.jit.TracerWarning"
)


class Image(nn.Module):
    """A linear layer behind a flattened image: height and width are fixed, though torch notes their product only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 8 * 8, 5)

    def forward(self, x: Tensor, scale: float = 1.0, *, mask: Tensor | None = None) -> Tensor:
        y = self.head(F.relu(self.conv(x)).flatten(1)) * scale
        return y if mask is None else y * mask


class Sequence(nn.Module):
    """Any batch, any length; two inputs of one length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return F.gelu(self.layer(self.embed(ids))) * mask[..., None]


class Modules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def wrapped(kind: type[nn.Module], *example: Tensor, **named: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = kind().eval()
    return wrap(model, find_sites(model, *example, **named), 0.3)


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MORE = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def image() -> tuple[nn.Module, MergedGraph]:
    model = wrapped(Image, X)
    merged = merge(model, X)
    assert isinstance(merged, MergedGraph)
    return model, merged


class TestSignature:
    def test_it_is_that_of_the_forward(self, image: tuple[nn.Module, MergedGraph]) -> None:
        model, merged = image
        assert str(inspect.signature(merged.forward)) == "(x, scale=1.0, *, mask=None)"
        for call in (lambda: merged(MORE), lambda: merged(x=MORE), lambda: merged(MORE, float("1.0"), mask=None)):
            torch.testing.assert_close(call(), model(MORE), **ROUNDING)

    def test_what_the_example_did_not_have_is_refused(self, image: tuple[nn.Module, MergedGraph]) -> None:
        _, merged = image
        for call, name in ((lambda: merged(X, 2.0), "scale"), (lambda: merged(X, mask=X), "mask")):
            with pytest.raises(SiteError, match=rf"was merged without '{name}' .* merge\(model, ..., {name}=...\)"):
                call()
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
            merged()

    def test_an_example_with_all_of_it(self) -> None:
        model, mask = wrapped(Image, X), torch.rand(2, 5)
        merged = merge(model, X, mask=mask)
        big = torch.rand(5, 5)
        torch.testing.assert_close(merged(x=MORE, mask=big), model(MORE, mask=big), **ROUNDING)
        assert str(inspect.signature(merged.forward)) == "(x, scale=1.0, *, mask)"

    def test_copies_and_pickles_have_it(self, image: tuple[nn.Module, MergedGraph]) -> None:
        _, merged = image
        for copied in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
            assert inspect.signature(copied.forward) == inspect.signature(merged.forward)
            assert torch.equal(copied(x=MORE), merged(MORE))

    def test_torch_export_takes_it_again(self, image: tuple[nn.Module, MergedGraph]) -> None:
        _, merged = image
        batch = {0: Dim("batch")}
        by_name = torch.export.export(merged, (), {"x": X}, dynamic_shapes={"x": batch})
        assert torch.equal(by_name.module()(x=MORE), merged(MORE))
        by_place = torch.export.export(merged, (X,), dynamic_shapes=(batch,))
        assert torch.equal(by_place.module()(MORE), merged(MORE))

    def test_torch_onnx_export_takes_it(self, image: tuple[nn.Module, MergedGraph], tmp_path: Path) -> None:
        pytest.importorskip("onnxscript")
        onnxruntime = pytest.importorskip("onnxruntime")
        _, merged = image
        torch.onnx.export(merged, (X,), tmp_path / "own.onnx", dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(tmp_path / "own.onnx", providers=["CPUExecutionProvider"])
        (out,) = session.run(None, {"x": X.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), merged(X).detach(), rtol=1e-5, atol=1e-5)


class TestSizes:
    def test_the_batch_is_free_and_what_the_model_fixes_is_fixed(self, image: tuple[nn.Module, MergedGraph]) -> None:
        _, merged = image
        assert len(merged.program.range_constraints) == 1
        for other in (torch.randn(2, 3, 16, 4), torch.randn(2, 3, 9, 8)):
            with pytest.raises(Exception, match=r"Guard failed|Expected|shape|size"):
                merged(other)

    def test_lengths_that_a_model_leaves_free_are_free(self) -> None:
        ids, mask = torch.randint(0, 20, (3, 6)), torch.rand(3, 6)
        model = wrapped(Sequence, ids, mask)
        merged = merge(model, ids, mask=mask)
        for batch, length in ((2, 4), (7, 9)):
            more = torch.randint(0, 20, (batch, length)), torch.rand(batch, length)
            torch.testing.assert_close(merged(*more), model(*more), **ROUNDING)

    def test_an_example_of_one_item_does_not_fix_the_batch(self) -> None:
        model = wrapped(Image, X)
        merged = merge(model, X[:1])
        for batch in (X[:1], X, MORE):
            torch.testing.assert_close(merged(batch), model(batch), **ROUNDING)

    def test_a_first_dimension_that_is_no_batch(self) -> None:
        class Row(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.gelu(x.reshape(3))

        x = torch.randn(1, 3)
        model = wrapped(Row, x)
        torch.testing.assert_close(merge(model, x)(x), model(x), **ROUNDING)

    def test_looking_at_sizes_leaves_no_trace(self) -> None:
        class Normed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm2d(3)

            def forward(self, x: Tensor) -> Tensor:
                return F.relu(F.dropout(self.norm(x)))

        model = Normed()
        wrap(model, find_sites(model, X), 0.3)
        before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        merged = merge(model.train(), X)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        merged(MORE)
        assert model.norm.num_batches_tracked == 1, "the weights and buffers are the model's"

    def test_onnx_declares_them(self, image: tuple[nn.Module, MergedGraph], tmp_path: Path) -> None:
        pytest.importorskip("onnxscript")
        onnxruntime = pytest.importorskip("onnxruntime")
        _, merged = image
        save_merged(merged, tmp_path / "image.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "image.onnx", providers=["CPUExecutionProvider"])
        (given,), (out,) = session.get_inputs(), session.get_outputs()
        assert given.name == "x"
        assert isinstance(given.shape[0], str)
        assert given.shape[1:] == [3, 8, 8]
        assert out.shape[1:] == [5]
        (found,) = session.run(None, {"x": MORE.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), merged(MORE).detach(), rtol=1e-5, atol=1e-5)


def test_a_merge_exports_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It took ten seconds for a ResNet-18 that was exported twice and decomposed twice."""
    ids, mask = torch.randint(0, 20, (3, 6)), torch.rand(3, 6)
    model = wrapped(Sequence, ids, mask)
    calls = 0
    export = torch.export.export

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    merge(model, ids, mask)
    assert calls == 1


def test_the_model_stays_as_it_was(image: tuple[nn.Module, MergedGraph]) -> None:
    model, merged = image
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    merge(model, X)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert merged.get_parameter("conv.weight") is model.get_parameter("conv.weight")


class TestPrograms:
    def test_load_merged_takes_what_save_merged_wrote(
        self, image: tuple[nn.Module, MergedGraph], tmp_path: Path
    ) -> None:
        _, merged = image
        file = save_merged(merged, tmp_path / "image.pt2")
        for given in (None, Image()):
            loaded = load_merged(given, file)
            assert isinstance(loaded, MergedGraph)
            assert inspect.signature(loaded.forward) == inspect.signature(merged.forward)
            assert torch.equal(loaded(x=MORE), merged(MORE))
        with pytest.raises(SiteError, match="merged in evaluation mode"):
            load_merged(None, file).train()

    def test_a_model_of_modules(self, tmp_path: Path) -> None:
        model = merge(wrapped(Modules, X))
        loaded = load_merged(None, save_merged(model, tmp_path / "modules.pt2", X))
        for batch in (MORE, torch.randn(3, 3, 12, 20)):
            torch.testing.assert_close(loaded(x=batch), model(batch), **ROUNDING)

    def test_what_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "text.pt2").write_text("no program")
        with pytest.raises(SiteError, match=r"is damaged, or no program of torch\.export") as caught:
            load_merged(None, tmp_path / "text.pt2")
        assert "\n" not in str(caught.value)
        with pytest.raises(SiteError, match="does not exist"):
            load_merged(None, tmp_path / "absent.pt2")
        with pytest.raises(SiteError, match="is for ONNX runtimes"):
            load_merged(None, tmp_path / "model.onnx")
        with pytest.raises(SiteError, match=r"has weights for a model\. Give the plain model"):
            load_merged(None, tmp_path / "model.pt")

    def test_weights_of_other_sizes_change_nothing(self, tmp_path: Path) -> None:
        model = merge(wrapped(Modules, X))
        file = save_merged(model, tmp_path / "modules.pt")
        other = Modules()
        other.net[4] = nn.Linear(16, 7)
        with pytest.raises(SiteError, match=r"sizes differ \(net.4.bias: \[2\], here \[7\]"):
            load_merged(other, file)
        assert type(other.net[1]) is nn.ReLU


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["pt", "ckpt", "safetensors", "pt2", "onnx"])
def test_every_format_in_a_fresh_process(ending: str, tmp_path: Path) -> None:
    if ending == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    model = wrapped(Modules, X)
    plain = unwrap(copy.deepcopy(model))
    expected = model(MORE).detach()
    merged = merge(model)
    file = save_merged(merged, tmp_path / f"model.{ending}", X)
    torch.save({"weights": plain.state_dict(), "x": MORE, "expected": expected}, tmp_path / "rest.pt")
    code = f"""
import torch
rest = torch.load({str(tmp_path / "rest.pt")!r})
x, file = rest["x"], {str(file)!r}
if file.endswith("onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    out = torch.from_numpy(session.run(None, {{"x": x.numpy()}})[0])
else:
    from eafo_dynamic import load_merged
    from tests.apply.test_merge_files import Modules
    model = Modules().eval()
    out = load_merged(model, file)(x)
torch.testing.assert_close(out, rest["expected"], rtol=1e-5, atol=1e-5)
if file.endswith(("pt", "ckpt", "safetensors")):
    assert torch.equal(out, rest["expected"])
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
