"""The autograd node in C++: the bits of the node in Python, whatever is asked for, and how it comes about."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from eafo_dynamic.correction.kernels import Terms, fused, node
from eafo_dynamic.correction.kernels.keeping import is_intact
from eafo_dynamic.correction.kernels.known import INSIDE, NOTHING, Known
from eafo_dynamic.correction.kernels.native import LARGEST_SINGLE, NativeKernel, native_kernel
from eafo_dynamic.correction.kernels.node import SWITCH, Node, build_node, kept_node, node_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the node is built on Linux only")

ROOT = Path(__file__).parents[2]
SHAPE = torch.tensor([0.2, 1.3])
AMPLITUDES = {
    ("eps",): [0.3],
    ("eps", "lift"): [0.3, -0.2],
    ("gain", "slope"): [0.1, 0.2],
    ("eps", "lift", "gain", "slope"): [0.3, -0.2, 0.1, -0.05],
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The node, built once for all processes that run tests."""
    folder = tmp_path_factory.getbasetemp().parent / "node"
    folder.mkdir(exist_ok=True, mode=0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "1")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        if node._path() is None:
            pytest.skip("no C++ compiler")
        for _ in range(600):
            path = build_node()
            if path is not None:
                return path
            if any(folder.rglob("*.failed")):
                break
            time.sleep(0.5)  # another process builds it
    failures = [each.read_text() for each in folder.rglob("*.failed")]
    pytest.skip(f"the node cannot be built here: {failures[:1]}")


@pytest.fixture(scope="module")
def kernel() -> NativeKernel:
    kernel = native_kernel()
    if kernel is None:
        pytest.skip("no C compiler")
    return kernel


@pytest.fixture(scope="module")
def in_cpp(built: Path, kernel: NativeKernel) -> Node:
    found = kept_node(built, kernel, fused._gradients_of)
    assert found is not None and found.is_sound()
    return found


def first(out: Tensor, inputs: list[Tensor]) -> Sequence[Tensor]:
    return torch.autograd.grad(out.sin().sum(), inputs)


def second(out: Tensor, inputs: list[Tensor]) -> Sequence[Tensor]:
    once = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
    return [*once, *torch.autograd.grad(sum(each.square().sum() for each in once), inputs)]


def batched(out: Tensor, inputs: list[Tensor]) -> Sequence[Tensor]:
    grads = torch.stack([torch.ones_like(out), out.detach().cos()])
    return torch.autograd.grad(out, inputs, grads, is_grads_batched=True)


def mapped(out: Tensor, inputs: list[Tensor]) -> Sequence[Tensor]:
    grads = torch.stack([torch.ones_like(out), out.detach().cos()])
    return torch.vmap(lambda grad: torch.autograd.grad(out, inputs, grad, retain_graph=True))(grads)


def expanded(out: Tensor, inputs: list[Tensor]) -> Sequence[Tensor]:
    return torch.autograd.grad(out.sum(), inputs)  # its gradient has strides of 0


def by_z(out: Tensor, inputs: list[Tensor]) -> Sequence[Tensor]:
    return torch.autograd.grad(out, inputs[0], torch.ones_like(out))


def by_amplitudes(out: Tensor, inputs: list[Tensor]) -> Sequence[Tensor]:
    return torch.autograd.grad(out, inputs[1], torch.ones_like(out).mT.contiguous().mT if out.dim() > 1 else out)


WAYS = [first, second, batched, mapped, expanded, by_z, by_amplitudes]


def assert_equal(
    z: Tensor,
    names: tuple[str, ...],
    known: Known,
    in_cpp: Node,
    way: Callable[[Tensor, list[Tensor]], Sequence[Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results: list[list[Tensor]] = []
    for found in (None, in_cpp):
        monkeypatch.setattr(fused, "node_of", lambda *_, found=found: found)
        inputs = [z.detach().clone().requires_grad_(), torch.tensor(AMPLITUDES[names], requires_grad=True)]
        out = fused.corrected(inputs[0], known.value, Terms(inputs[1], SHAPE, None, 8.0, names), known)
        assert out.grad_fn is not None and ("CppNode" in out.grad_fn.name()) == (found is in_cpp)
        results.append([out.detach(), *way(out, inputs)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", range(len(INSIDE)))
def test_values_and_gradients_are_those_of_the_node_in_python(
    base: int, way: Callable[[Tensor, list[Tensor]], Sequence[Tensor]], in_cpp: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(base)
    shapes = [(5,), (32, 64), (3, 4, 5, 6), (0, 4), (300, 400)]
    inputs = [3 * torch.randn(shape, generator=generator) for shape in shapes]
    inputs.append(inputs[2].to(memory_format=torch.channels_last))
    for names in AMPLITUDES:
        for z in inputs:
            assert_equal(z, names, INSIDE[base], in_cpp, way, monkeypatch)


@pytest.mark.parametrize(
    "unpack",
    [
        pytest.param(lambda kept: kept.clone(), id="elsewhere"),
        pytest.param(lambda kept: kept.repeat_interleave(2, -1)[..., ::2] if kept.dim() else kept, id="with gaps"),
        pytest.param(lambda kept: kept.double() if kept.numel() > 4 else kept, id="in another dtype"),
    ],
)
def test_what_is_kept_may_come_back_otherwise(
    unpack: Callable[[Tensor], Tensor], in_cpp: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found_by(node: Node | None) -> list[Tensor] | str:
        monkeypatch.setattr(fused, "node_of", lambda *_: node)
        inputs = [torch.linspace(-3, 3, 60).view(6, 10).requires_grad_(), torch.tensor([0.3, 0.1], requires_grad=True)]
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, unpack):
            out = fused.corrected(inputs[0], torch.relu, Terms(inputs[1], SHAPE, None, 8.0, ("eps", "lift")), INSIDE[0])
        try:
            return [out, *torch.autograd.grad(out.cos().sum(), inputs)]
        except RuntimeError as error:
            return str(error)

    in_python, beside = found_by(None), found_by(in_cpp)
    if isinstance(in_python, str):
        assert in_python == beside
    else:
        assert not isinstance(beside, str)
        assert all(torch.equal(one, other) for one, other in zip(in_python, beside, strict=True))


def test_what_is_overwritten_between_is_an_error(in_cpp: Node) -> None:
    z = torch.randn(8, requires_grad=True)
    inside = z * 1
    out = in_cpp(inside, Terms(torch.tensor([0.3], requires_grad=True), SHAPE, None, 8.0), INSIDE[0])
    inside.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_what_comes_back_in_another_size_is_an_error(in_cpp: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (None, in_cpp):
        monkeypatch.setattr(fused, "node_of", lambda *_, found=found: found)
        z, eps = torch.randn(8), torch.tensor([0.3], requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept[:4] if kept.dim() else kept):
            out = fused.corrected(z, torch.relu, Terms(eps, SHAPE, None, 8.0), INSIDE[0])
        with pytest.raises(RuntimeError, match=r"has kept \(4,\) for a gradient of \(8,\)"):
            out.sum().backward()


@pytest.mark.parametrize("known", INSIDE, ids=["relu", "leaky", "silu", "gelu", "gelu tanh"])
def test_gradients_whose_memory_does_not_hold_their_numbers(
    known: Known, in_cpp: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.linspace(-2, 2, 12).view(3, 4)
    for found in (None, in_cpp):
        monkeypatch.setattr(fused, "node_of", lambda *_, found=found: found)
        for grad in (torch._neg_view(values), torch._efficientzerotensor((3, 4))):
            inputs = [values.clone().requires_grad_(), torch.tensor([0.3, 0.1], requires_grad=True)]
            out = fused.corrected(inputs[0], known.value, Terms(inputs[1], SHAPE, None, 8.0, ("eps", "lift")), known)
            other = torch.autograd.grad(out, inputs, grad.clone(), retain_graph=True)
            for one, expected in zip(torch.autograd.grad(out, inputs, grad), other, strict=True):
                torch.testing.assert_close(one, expected)


def test_the_tangent_of_a_gradient_goes_on(in_cpp: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    tangents: list[Tensor] = []
    for found in (None, in_cpp):
        monkeypatch.setattr(fused, "node_of", lambda *_, found=found: found)
        z = torch.linspace(-2, 2, 6).requires_grad_()
        out = fused.corrected(z, torch.relu, Terms(torch.tensor([0.3]), SHAPE, None, 8.0), INSIDE[0])
        (slope,) = torch.autograd.grad(out.sum(), z, retain_graph=True)
        with forward_ad.dual_level():
            grad = forward_ad.make_dual(torch.ones(6), torch.full((6,), 2.0))
            (by_z,) = torch.autograd.grad(out, z, grad)
            tangents.append(forward_ad.unpack_dual(by_z).tangent)
        torch.testing.assert_close(tangents[-1], 2 * slope)
    assert torch.equal(*tangents)


def test_errors_of_the_backward_in_python_arrive(built: Path, kernel: NativeKernel) -> None:
    def fails(*_: object) -> tuple[Tensor | None, Tensor | None]:
        if torch.is_grad_enabled():
            raise ValueError("as asked")
        return fused._gradients_of(*_)  # pyright: ignore[reportArgumentType]

    found = kept_node(built, kernel, fails)
    assert found is not None
    z = torch.randn(8, requires_grad=True)
    out = found(z, Terms(torch.tensor([0.3]), SHAPE, None, 8.0), INSIDE[0])
    with pytest.raises(ValueError, match="as asked"):
        torch.autograd.grad(out.sum(), z, create_graph=True)


def test_a_second_node_leaves_the_first_its_bases(in_cpp: Node, built: Path, kernel: NativeKernel) -> None:
    z = torch.randn(8, requires_grad=True)
    terms = Terms(torch.tensor([0.3]), SHAPE, None, 8.0)
    before = [in_cpp(z, terms, known) for known in INSIDE]
    other = kept_node(built, kernel, fused._gradients_of)
    assert other is not None
    other(z, terms, INSIDE[-1])
    for out, known in zip(before, INSIDE, strict=True):
        (found,) = torch.autograd.grad(out.sum(), z, create_graph=True)
        (expected,) = torch.autograd.grad(fused.corrected(z, known.value, terms, known).sum(), z, create_graph=True)
        assert torch.equal(found, expected)


def test_memory_that_is_written_is_not_filled_before(in_cpp: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(8, requires_grad=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        in_cpp(z, Terms(torch.tensor([0.3]), SHAPE, None, 8.0), INSIDE[0]).sum().backward()
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_only_what_it_computes_is_taken() -> None:
    z = torch.randn(4, 8)
    amplitudes = torch.tensor([0.1, 0.0])
    names = ("eps", "lift")
    terms = Terms(amplitudes, SHAPE, None, 8.0, names)
    relu = INSIDE[0]
    assert Node.takes(z, terms, relu) and not Node.takes(z.mT, terms, relu)
    assert not Node.takes(z, terms, NOTHING)
    assert not Node.takes(z, terms._replace(amplitudes=torch.zeros(2)), relu)
    assert not Node.takes(z, terms._replace(amplitudes=amplitudes.double()), relu)
    assert not Node.takes(z, terms._replace(amplitudes=amplitudes[:, None].expand(2, 8)), relu)
    assert not Node.takes(z, terms._replace(table=torch.zeros(4, 3)), relu)
    assert not Node.takes(z.double(), terms, relu) and not Node.takes(z[:, ::2], terms, relu)
    assert Node.takes(torch.empty(LARGEST_SINGLE), terms, relu)
    assert not Node.takes(torch.empty(LARGEST_SINGLE + 1), terms, relu)


def test_a_node_with_wrong_results_is_not_used(built: Path, kernel: NativeKernel) -> None:
    def wrong(z: Tensor, terms: Terms, *_: object) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(z), torch.zeros_like(terms.amplitudes)

    with pytest.warns(UserWarning, match="gives wrong results; a slower one in Python serves"):
        assert kept_node(built, kernel, wrong) is None


def test_a_damaged_node_is_not_loaded(built: Path, kernel: NativeKernel, tmp_path: Path) -> None:
    copy = tmp_path / built.name
    copy.write_bytes(built.read_bytes()[:-1])
    copy.with_suffix(".sha256").write_bytes(built.with_suffix(".sha256").read_bytes())
    assert kept_node(copy, kernel, fused._gradients_of) is None


USES = """
import torch, warnings
from torch.utils.checkpoint import checkpoint
warnings.simplefilter("error")
from eafo_dynamic import CRReLU
unit, z = CRReLU(), torch.ones(3, requires_grad=True)
checkpoint(unit, z, use_reentrant=False).sum().backward()  # which counts what its first forward keeps
print("CppNode" in unit(z).grad_fn.name())
"""


def uses_the_node(environment: dict[str, str]) -> bool:
    done = subprocess.run(
        [sys.executable, "-c", USES],
        env={**os.environ, "PYTHONPATH": str(ROOT), SWITCH: "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.strip() == "True"


def waits_for(condition: Callable[[], bool]) -> bool:
    for _ in range(240):
        if condition():
            return True
        time.sleep(0.25)
    return False


def with_compiler(folder: Path, script: str) -> dict[str, str]:
    """The environment of a machine that has built nothing, with a shell script for a compiler."""
    compiler = folder / "c++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o700)
    return {"XDG_CACHE_HOME": str(folder / "cache"), "CXX": str(compiler)}


def test_it_is_built_in_the_background_and_used_by_the_next_process(built: Path, tmp_path: Path) -> None:
    environment = with_compiler(tmp_path, f'while [ "$1" != -o ]; do shift; done\ncp {built} "$2"')
    assert not uses_the_node(environment)
    assert waits_for(lambda: any((tmp_path / "cache").rglob("node-*.sha256")))
    assert uses_the_node(environment)
    assert not uses_the_node({**environment, SWITCH: "0"})


def test_one_that_was_damaged_is_built_anew(built: Path, tmp_path: Path) -> None:
    environment = with_compiler(tmp_path, f'while [ "$1" != -o ]; do shift; done\ncp {built} "$2"')
    assert not uses_the_node(environment)
    assert waits_for(lambda: any((tmp_path / "cache").rglob("node-*.sha256")))
    (kept,) = (tmp_path / "cache").rglob("node-*.so")
    kept.write_bytes(built.read_bytes()[:-1])
    assert not uses_the_node(environment)
    assert waits_for(lambda: is_intact(kept))
    assert uses_the_node(environment)


def test_a_compiler_that_fails_is_asked_once(tmp_path: Path) -> None:
    environment = with_compiler(tmp_path, f'echo asked >> {tmp_path}/calls\necho "no such header" >&2\nexit 1')
    assert not uses_the_node(environment)
    assert waits_for(lambda: any((tmp_path / "cache").rglob("node-*.failed")))
    assert not uses_the_node(environment)
    (said,) = (tmp_path / "cache").rglob("node-*.failed")
    assert said.read_text() == "no such header\n"
    assert (tmp_path / "calls").read_text() == "asked\n"


def test_a_failure_is_forgiven_after_a_day(built: Path, tmp_path: Path) -> None:
    assert not uses_the_node(with_compiler(tmp_path, "exit 1"))
    assert waits_for(lambda: any((tmp_path / "cache").rglob("node-*.failed")))
    (said,) = (tmp_path / "cache").rglob("node-*.failed")
    long_ago = time.time() - 25 * 3600
    os.utime(said, (long_ago, long_ago))
    environment = with_compiler(tmp_path, f'while [ "$1" != -o ]; do shift; done\ncp {built} "$2"')
    assert not uses_the_node(environment)
    assert waits_for(lambda: uses_the_node(environment))
    assert not said.exists()


def test_a_program_that_has_python_inside_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("was started"))
    monkeypatch.setattr(sys, "executable", None)
    node._build_in_background(tmp_path / "node.so")
    monkeypatch.undo()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("was started"))
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    node._build_in_background(tmp_path / "node.so")


OUTLIVES = """
import threading, torch
from eafo_dynamic import CRReLU
unit, main = CRReLU(), threading.main_thread()
def train():
    main.join()
    out = unit(torch.ones(3, requires_grad=True))
    out.sum().backward()
    print("trained")
threading.Thread(target=train).start()
"""


@pytest.mark.parametrize("is_built", [True, False])
def test_a_thread_that_outlives_the_main_one_trains(is_built: bool, built: Path, tmp_path: Path) -> None:
    cache = built.parents[1] if is_built else tmp_path
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        SWITCH: "1" if is_built else "0",
        "XDG_CACHE_HOME": str(cache),
    }
    done = subprocess.run([sys.executable, "-c", OUTLIVES], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("trained\n", "")


def test_without_a_shell_the_node_in_python_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.touch(0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setenv("CXX", str(compiler))
    kernel = native_kernel()
    assert kernel is not None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert node_of.__wrapped__(kernel, fused._gradients_of) is None


def test_the_switch_keeps_it_from_being_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(SWITCH, "0")
    kernel = native_kernel()
    assert kernel is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert node_of.__wrapped__(kernel, fused._gradients_of) is None
    assert build_node() is None and node._path() is None
    assert not list(tmp_path.iterdir())
