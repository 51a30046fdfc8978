"""Every back end of the corrected function against the formula, the bits of the base, and what surrounds a forward."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_kernels import HALF_WIDTH, assert_same_bits, smooth_table
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from eafo_dynamic.correction.kernels import (
    Backend,
    Terms,
    check_backend,
    compiled,
    corrected,
    corrected_,
    fused,
    known_function,
    known_module,
    native,
    resolve_backend,
)
from eafo_dynamic.correction.kernels.formula import correction
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.policy.controller import EAFOController
from eafo_dynamic.policy.options import Options

BACKENDS: list[Backend] = ["eager", "native"]
BASES = [
    nn.ReLU(),
    nn.LeakyReLU(0.2),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.SiLU(),
    nn.Mish(),
    nn.Hardswish(),
    nn.ELU(0.7),
    nn.SELU(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.Softplus(2.0, 5.0),
    nn.Hardtanh(),  # not known: it stays with autograd
    nn.PReLU(),
]
TABLES = {"closed form": None, "table": smooth_table().float()}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "native" and native.native_kernel() is None:
        pytest.skip("no C compiler here")
    return request.param


def terms(eps: float = 0.3, table: Tensor | None = None) -> Terms:
    return Terms(torch.tensor([eps], requires_grad=True), torch.tensor([0.2, 1.4]), table, HALF_WIDTH)


def points(*size: int, seed: int = 0) -> Tensor:
    return 4.0 * torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def by_formula(z: Tensor, base: nn.Module, given: Terms) -> Tensor:
    return base(z) + correction(z, *given[:3], given.half_width)


def gradients(out: Tensor, z: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    return torch.autograd.grad((out * weight).sum(), (z, eps))


def assert_meets_formula(z: Tensor, base: nn.Module, given: Terms, backend: Backend) -> None:
    actual = corrected(z, base, given, known_module(base), backend)
    double = Terms(*(t if t is None else t.double() for t in given[:3]), HALF_WIDTH)
    expected = by_formula(z.double(), base.double(), double)
    base.float()
    assert actual.shape == z.shape and actual.stride() == z.stride() and actual.dtype == z.dtype
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(
        gradients(actual, z, given.amplitudes), gradients(expected, z, given.amplitudes), rtol=1e-5, atol=5e-5
    )


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("base", BASES, ids=str)
def test_values_and_gradients_are_those_of_the_formula(base: nn.Module, table: Tensor | None, backend: Backend) -> None:
    assert_meets_formula(points(7, 61).requires_grad_(), base, terms(0.3, table), backend)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 255, 256, 257, 4096, 4097, 100_003])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_length_is_covered(n: int, table: Tensor | None, backend: Backend) -> None:
    assert_meets_formula(points(n).requires_grad_(), nn.ReLU(), terms(-0.4, table), backend)


@pytest.mark.parametrize("layout", ["channels last", "transposed", "strided", "expanded"])
def test_every_layout_gives_the_same_function(layout: str, backend: Backend) -> None:
    z = points(2, 6, 4, 4)
    laid = {
        "channels last": z.contiguous(memory_format=torch.channels_last),
        "transposed": z.transpose(1, 3),
        "strided": z[..., ::2],
        "expanded": z[:, :1].expand(2, 6, 4, 4),
    }[layout].requires_grad_()
    given = terms()
    out = corrected(laid, F.silu, given, known_module(nn.SiLU()), backend)
    expected = by_formula(laid.contiguous(), nn.SiLU(), given)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    found, wanted = (gradients(each, laid, given.amplitudes) for each in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("base", BASES, ids=str)
def test_eps_zero_is_the_base_bit_for_bit(base: nn.Module, table: Tensor | None, backend: Backend) -> None:
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e30, -1e30, 1e-30, -1e-30, 1e-40])
    z = torch.cat([special, points(500)])
    plain, ours = z.clone().requires_grad_(), z.clone().requires_grad_()
    given = terms(0.0, table)
    expected, actual = base(plain), corrected(ours, base, given, known_module(base), backend)
    assert_same_bits(actual, expected)
    weight = torch.linspace(-1, 1, z.numel())
    weight[20:40] = -0.0
    (by_z,) = torch.autograd.grad(expected, plain, weight)
    by_ours, by_eps = torch.autograd.grad(actual, (ours, given.amplitudes), weight)
    assert_same_bits(by_ours, by_z)
    assert not by_eps.isnan(), "a NaN input has no correction, and no say in eps"


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_infinite_and_missing_inputs_give_what_the_base_gives(table: Tensor | None, backend: Backend) -> None:
    z = torch.tensor([math.inf, -math.inf, 1e30, -1e30, math.nan] + [0.5] * 11)
    out = corrected(z, torch.relu, terms(0.5, table), known_module(nn.ReLU()), backend)
    torch.testing.assert_close(out[:5], torch.relu(z[:5]), equal_nan=True)
    assert out[5] != 0.5


BASES_TWICE = (nn.Tanh(), nn.Sigmoid(), nn.ReLU(), nn.GELU(), nn.SiLU(), nn.ELU(), nn.Softplus(), nn.Mish())


def test_only_the_input_is_kept_for_the_backward(backend: Backend) -> None:
    kept: list[Tensor] = []
    z = points(1000).requires_grad_()

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    for base in (nn.ReLU(), nn.GELU(), nn.Tanh()):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            corrected(z, base, terms(table=TABLES["table"]), known_module(base), backend)
        large = [tensor for tensor in kept if tensor.untyped_storage().nbytes() >= 4000]
        assert [tensor.data_ptr() for tensor in large] == [z.data_ptr()], base


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_first_and_second_derivatives_in_double(table: Tensor | None) -> None:
    z = (points(24).double() / 4).requires_grad_()
    eps = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    shape = torch.tensor([0.2, 1.4], dtype=torch.float64)
    double = None if table is None else table.double()

    def function(z: Tensor, eps: Tensor) -> Tensor:
        return corrected(z, torch.tanh, Terms(eps, shape, double, HALF_WIDTH), known_module(nn.Tanh()), "eager")

    assert gradcheck(function, (z, eps))
    assert gradgradcheck(function, (z, eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", BASES_TWICE, ids=str)
def test_second_derivatives_without_a_correction_are_torchs_to_the_last_bit(
    base: nn.Module, dtype: torch.dtype, backend: Backend
) -> None:
    """A gradient penalty over layers before and behind: what goes through z twice is summed in torch's order."""
    generator = torch.Generator().manual_seed(0)
    before, behind, x = (torch.randn(8, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3))

    def second(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        out = (function(x @ before) @ behind).square().sum()
        (first,) = torch.autograd.grad(out, x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, before, behind))

    operands = terms(0.0)
    plain = second(base)
    wrapped = second(lambda z: corrected(z, base, operands, known_module(base), backend))
    in_place = second(lambda z: corrected_(z.clone(), base, operands, known_module(base), backend))
    for one, two, three in zip(plain, wrapped, in_place, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_second_derivatives_in_single_are_those_of_the_formula(backend: Backend) -> None:
    z, given = points(200).requires_grad_(), terms()

    def twice(out: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(out.square().sum(), (z, given.amplitudes), create_graph=True)
        return torch.autograd.grad(first[0].square().sum() + first[1], (z, given.amplitudes))

    actual = twice(corrected(z, F.silu, given, known_module(nn.SiLU()), backend))
    torch.testing.assert_close(actual, twice(by_formula(z, nn.SiLU(), given)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("base", [nn.ReLU(inplace=True), nn.Mish(inplace=True), nn.PReLU(), nn.Hardtanh()], ids=str)
def test_in_place_is_the_same_function_written_over_its_input(
    base: nn.Module, table: Tensor | None, backend: Backend
) -> None:
    z, given = points(6, 50).requires_grad_(), terms(0.3, table)
    plain = copy.deepcopy(base)
    plain.inplace = False
    overwritten = z.view(3, 100) * 1.0
    out = corrected_(overwritten[:, 50:], base, given, known_module(base), backend)
    assert out.data_ptr() == overwritten[:, 50:].data_ptr()
    expected = by_formula(z.view(3, 100)[:, 50:], plain, given)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(
        gradients(out, z, given.amplitudes), gradients(expected, z, given.amplitudes), rtol=1e-5, atol=1e-4
    )
    whole = points(6, 50).requires_grad_() * 1.0
    kept = whole.detach().clone()
    assert corrected_(whole, base, given, known_module(base), backend) is whole
    with torch.no_grad():
        assert corrected_(kept, base, given, known_module(base), backend) is kept
    assert_same_bits(kept, whole.detach())
    whole.sum().backward()


def test_in_place_can_be_differentiated_twice(backend: Backend) -> None:
    z, given, known = points(60).requires_grad_(), terms(), known_module(nn.SiLU())

    def twice(out: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(out.square().sum(), (z, given.amplitudes), create_graph=True)
        return torch.autograd.grad(first[0].square().sum() + first[1], (z, given.amplitudes))

    actual = twice(corrected_(z * 1.0, F.silu, given, known, backend))
    torch.testing.assert_close(actual, twice(by_formula(z, nn.SiLU(), given)), rtol=1e-4, atol=1e-3)


def test_gradients_are_computed_for_those_who_want_them(backend: Backend) -> None:
    given = terms()
    out = corrected(points(50), F.gelu, given, known_module(nn.GELU()), backend)
    (by_eps,) = torch.autograd.grad(out.sum(), given.amplitudes)
    assert by_eps != 0
    z, frozen = points(50).requires_grad_(), Terms(given.amplitudes.detach(), *given[1:])
    out = corrected(z, F.gelu, frozen, known_module(nn.GELU()), backend)
    (by_z,) = torch.autograd.grad(out.sum(), z)
    expected = by_formula(z, nn.GELU(), frozen)
    torch.testing.assert_close(by_z, torch.autograd.grad(expected.sum(), z)[0])
    with torch.no_grad():
        assert_same_bits(corrected(z, F.gelu, given, known_module(nn.GELU()), backend), out)


def test_batched_gradients_and_transforms(backend: Backend) -> None:
    z, given = points(5).requires_grad_(), terms()
    known = known_module(nn.SiLU())
    out = corrected(z, F.silu, given, known, backend)
    (jacobian,) = torch.autograd.grad(out, z, torch.eye(5), is_grads_batched=True)
    mapped = torch.func.vmap(torch.func.grad(lambda x: corrected(x, F.silu, given, known, backend)))(z)
    torch.testing.assert_close(jacobian.diagonal(), mapped)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("function", [corrected, corrected_])
def test_what_a_transform_has_left_behind(function: Callable[..., Tensor], grad: bool, backend: Backend) -> None:
    z, left = points(5), []
    torch.func.grad(lambda x: left.append(x) or x.sum())(z.clone())
    with torch.set_grad_enabled(grad):
        out = function(left[0], nn.SiLU(), terms(), known_module(nn.SiLU()), backend)
    torch.testing.assert_close(out.clone(), by_formula(z, nn.SiLU(), terms()).detach())


def test_deterministic_algorithms_fill_no_room_that_is_written_and_fill_again_afterwards(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, known, empty_like = points(100_000).requires_grad_(), known_module(nn.ReLU()), torch.empty_like
    expected = corrected(z, F.relu, terms(), known, backend)
    filled: list[bool] = []

    def watched(values: Tensor) -> Tensor:
        filled.append(torch.utils.deterministic.fill_uninitialized_memory)
        return empty_like(values)

    torch.use_deterministic_algorithms(True)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", watched)
            out = corrected(z, F.relu, terms(), known, backend)
            (by_z,) = torch.autograd.grad(out.sum(), z)
        assert torch.empty(3).isnan().all() and torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
    assert filled and not any(filled)
    assert_same_bits(out, expected)
    assert_same_bits(by_z, torch.autograd.grad(expected.sum(), z)[0])


def test_the_whole_compiles_without_a_break(backend: Backend) -> None:
    given, known = terms(table=TABLES["table"]), known_module(nn.GELU())
    z = points(40).requires_grad_()
    compiled = torch.compile(lambda z: corrected(z, F.gelu, given, known, backend), fullgraph=True, backend="aot_eager")
    expected = by_formula(z, nn.GELU(), given)
    torch.testing.assert_close(compiled(z), expected)
    torch.testing.assert_close(gradients(compiled(z), z, given.amplitudes), gradients(expected, z, given.amplitudes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype, backend: Backend) -> None:
    z = points(64).to(dtype)
    out = corrected(z, F.gelu, terms(), known_module(nn.GELU()), backend)
    assert out.dtype == dtype
    exact = by_formula(z.double(), nn.GELU(), Terms(*(t if t is None else t.double() for t in terms()[:3]), HALF_WIDTH))
    rounding = torch.finfo(dtype).eps  # the traceable form rounds every step, the compiled one its result
    torch.testing.assert_close(out.double(), exact, rtol=2 * rounding, atol=4 * rounding)


def test_numbers_of_threads_give_the_same_bits(backend: Backend) -> None:
    if backend == "eager":
        pytest.skip("torch's own sums depend on the number of threads")
    z, before = points(200_000).requires_grad_(), torch.get_num_threads()
    results: list[list[Tensor]] = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            given = terms(table=TABLES["table"])
            out = corrected(z, F.relu, given, known_module(nn.ReLU()), backend)
            results.append([out, *torch.autograd.grad(out, (z, given.amplitudes), torch.ones_like(out))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_same_bits(one, two)


def test_an_input_overwritten_before_the_backward_is_an_error(backend: Backend) -> None:
    leaf = points(20).requires_grad_()
    z = leaf * 1.0
    out = corrected(z, F.gelu, terms(), known_module(nn.GELU()), backend)
    z.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_known_functions_are_told_by_name_and_options() -> None:
    z, weight = points(100).requires_grad_(), torch.linspace(-1, 1, 100)
    for name, options in (("gelu", {"approximate": "tanh"}), ("leaky_relu", {"negative_slope": 0.3}), ("elu", {})):
        known = known_function(name, (), {**options, "inplace": False})
        assert known is not None
        expected = getattr(F, name)(z, **options)
        assert_same_bits(known.value(z), expected)
        assert_same_bits(known.gradient(weight, z.detach()), torch.autograd.grad(expected, z, weight)[0])
        assert known_function(name, (), dict(options)) is known, "one for all calls, so that nothing grows with them"
    assert known_function("leaky_relu", (), {"negative_slope": torch.tensor(0.3)}) is None
    assert known_function("leaky_relu", (), {"negative_slope": [0.3]}) is None
    assert known_function("leaky_relu", (0.3,), {}) is None
    assert known_function("prelu", (), {}) is None
    assert known_function("gelu", (), {"other": 1}) is None


def test_live_hyper_parameters_and_subclasses() -> None:
    module = nn.LeakyReLU(0.1)
    module.negative_slope = 0.5
    known = known_module(module)
    assert known is not None and known.below == 0.5 and known.code == 1
    z = points(100).requires_grad_()
    for module in (nn.LeakyReLU(np.float32(0.2)), nn.ELU(np.float32(0.9)), nn.Softplus(np.float64(2.0))):
        known = known_module(module)
        assert known is not None
        assert_same_bits(known.value(z), module(z))
        assert_same_bits(known.gradient(z.detach(), z.detach()), torch.autograd.grad(module(z), z, z.detach())[0])

    class Own(nn.GELU):
        def forward(self, input: Tensor) -> Tensor:
            return -input

    assert known_module(Own()) is None


def test_memory_that_holds_the_opposite_sign(backend: Backend) -> None:
    values = points(60).view(6, 10)
    for z in (
        torch._neg_view(values),
        torch.complex(values, values)[:1, :1].conj().imag,
        torch._efficientzerotensor(3),
    ):
        for wants_gradient in (False, True):
            eps = torch.tensor([0.3], requires_grad=wants_gradient)
            of_it = terms()._replace(amplitudes=eps)
            plain = z.clone()
            assert not plain.is_neg()
            out = corrected(z, torch.relu, of_it, known_module(nn.ReLU()), backend)
            torch.testing.assert_close(out, corrected(plain, torch.relu, of_it, known_module(nn.ReLU()), backend))
            if wants_gradient:
                expected = torch.autograd.grad(corrected(plain, torch.relu, of_it, None, backend).sum(), eps)
                torch.testing.assert_close(torch.autograd.grad(out.sum(), eps), expected)


def test_names_of_back_ends() -> None:
    assert check_backend("native") == "native"
    with pytest.raises(ConfigError, match="cuda"):
        check_backend("cuda")
    assert resolve_backend("eager") == "eager"


def test_a_forced_back_end_computes_and_shows(backend: Backend) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1))
    controller = EAFOController.attach(model, backend=backend, eps_init=0.2)
    assert repr(model).count(f"backend={backend}") == 2 and controller.backend == backend
    assert controller.options.primitives()["backend"] == backend
    used: list[str] = []
    kernel = native.native_kernel() if backend == "native" else fused._EAGER
    assert kernel is not None
    add = kernel.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "add", lambda *args: used.append(backend) or add(*args))
        model(torch.randn(8, 4))
    assert used == [backend] * 2


def test_an_unknown_back_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="backend='gpu'"):
        Options(backend="gpu")  # pyright: ignore[reportArgumentType]


WITHOUT_COMPILER = """
from eafo_dynamic.correction.kernels import resolve_backend
print(resolve_backend("auto"))
try:
    resolve_backend("native")
except Exception as error:
    print(error)
"""


def test_without_a_compiler_there_is_the_eager_back_end(tmp_path: Path) -> None:
    nowhere = {"PATH": str(tmp_path), "CC": "", "XDG_CACHE_HOME": str(tmp_path)}
    environment = {**os.environ, **nowhere, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], capture_output=True, text=True, env=environment, check=True
    )
    resolved, refused = result.stdout.splitlines()
    assert resolved == "eager"
    assert "backend='native': needs a C compiler" in refused


BROKEN = {
    "fails": ("exit 1", "failed"),
    "makes nothing": ("exit 0", "cannot be loaded"),
    "makes junk": ('[ "$LAST" = --version ] || touch -- "$LAST"', "cannot be loaded"),
}


@pytest.mark.parametrize(("script", "problem"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_compiler_costs_nothing_but_speed(
    script: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\nfor LAST; do :; done\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "shared_library", compiled.shared_library.__wrapped__)
    with pytest.warns(UserWarning, match=rf"activations .*on the CPU.* {compiler} .*{problem}.* CC") as warned:
        assert native.native_kernel.__wrapped__() is None
    assert len(warned) == 1


def test_a_library_with_wrong_results_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if (compiler := compiled.find_compiler()) is None:
        pytest.skip("no C compiler here")
    source = "".join(path.read_text(encoding="utf-8") for path in compiled._SOURCES.glob("*.[ch]"))
    ln_2 = "0.693147206f"
    assert ln_2 in source, "the fault has nowhere to be put"
    for path in compiled._SOURCES.glob("*.[ch]"):
        wrong = path.read_text(encoding="utf-8").replace(ln_2, "0.7f")
        (tmp_path / path.name).write_text(wrong, encoding="utf-8")
    assert native.NativeKernel(compiled.load_library(compiler, tmp_path)).is_sound()
    monkeypatch.setattr(compiled, "_SOURCES", tmp_path)
    library = compiled.load_library(compiler, tmp_path)
    assert not native.NativeKernel(library).is_sound()
    monkeypatch.setattr(compiled, "shared_library", lambda: library)
    with pytest.warns(UserWarning, match="activations on the CPU.* gives wrong results"):
        assert native.native_kernel.__wrapped__() is None


def test_the_library_is_made_once_and_kept_where_nobody_else_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (compiler := compiled.find_compiler()) is None:
        pytest.skip("no C compiler here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compiled.cache_folder()
    assert folder == tmp_path / "eafo-dynamic" and folder.stat().st_mode & 0o777 == 0o700
    library = Path(compiled.load_library(compiler, folder)._name)
    made = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert made.keys() == {library, library.with_suffix(".sha256")}, "nothing left over"
    assert compiled.load_library(compiler, folder)._name == str(library)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == made, "no second run"
    folder.chmod(0o777)
    assert compiled.cache_folder() is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_amplitudes_of_another_dtype_stay_alive_while_a_large_tensor_is_overwritten(dtype: torch.dtype) -> None:
    if native.native_kernel() is None:
        pytest.skip("no C compiler here")
    z = torch.linspace(-5.0, 5.0, 1 << 17)
    terms = Terms(torch.tensor([0.3], dtype=dtype), torch.tensor([0.2, 1.4], dtype=dtype), None, HALF_WIDTH)
    known = known_module(nn.ReLU())
    expected = corrected(z, torch.relu, terms, known, "native")
    z.requires_grad_()
    assert_same_bits(corrected_(z * 1.0, torch.relu, terms, known, "native"), expected)
