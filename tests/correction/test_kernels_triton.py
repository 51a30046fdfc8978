"""The Triton back end: by the interpreter, through the real compiler without a device, its choice, and on a device."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels import assert_same_bits
from torch import Tensor, nn
from triton_cases import BASES, DTYPES, FORMS, LAYOUTS, assert_meets_formula, make_terms, of_layout, points

from eafo_dynamic.apply.standalone import CorrectedActivation
from eafo_dynamic.apply.surgery import wrap
from eafo_dynamic.correction.kernels import choice, corrected, fused, gpu_check, known_module, resolve_backend
from eafo_dynamic.correction.kernels.gpu import TritonKernel
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.policy.controller import EAFOController
from eafo_dynamic.policy.options import Options

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
GPU = torch.device("cuda", 0)


@needs_triton
def test_by_the_interpreter() -> None:
    tests = Path(__file__).with_name("interpreted_kernels.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tests.parent.parent)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


def compiled(way: str, dtype: str, architecture: int, constants: dict[str, Any]) -> str:
    """PTX of a kernel, which ptxas has taken too; no device is needed for that."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from eafo_dynamic.correction.kernels import triton_code

    function = getattr(triton_code, way)
    names: list[str] = function.arg_names
    signature: dict[str, str] = {}
    for name in names:
        wide = name in ("z_pointer", "grad_pointer", "out_pointer")
        pointer = f"*{dtype}" if wide else "*fp32"
        number = "i32" if name in ("rows", "columns", "channels", "partials") else "fp32"
        signature[name] = "constexpr" if name in constants else pointer if name.endswith("pointer") else number
    even = [name for name in names if name.endswith("pointer") or name == "columns"]
    source: Any = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    found: Any = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4})
    assert found.asm["cubin"]
    return found.asm["ptx"]


def specialisations() -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Every base, every form and every layout, each with one of the others; dtypes and architectures in turn."""
    forms = [(0, 1), (0, 3), (256, 1), (0, 15), (0, 12), (256, 13), (0, 6)]
    tiles = {0: (1, 1024), 1: (16, 64), 2: (16, 64)}
    places = [(base, 1 if base < 5 else 0, 0) for base in range(7)]
    places += [(2, form, axis) for axis in tiles for form in range(len(forms))]
    places += [(0, 3, 0), (3, 3, 1), (6, 4, 2)]
    for place, (base, form, axis) in enumerate(places):
        intervals, terms = forms[form]
        rows, columns = tiles[axis]
        constants = {"BASE": base, "INTERVALS": intervals, "TERMS": terms, "AXIS": axis}
        constants |= {"PRECISE": True, "ROWS": rows, "COLUMNS": columns}
        dtype, architecture = ("bf16", "fp32", "fp16")[place % 3], (80, 90)[place % 2]
        yield "forward", dtype, architecture, constants
        yield "backward", dtype, architecture, {**constants, "STEPS": (1, 4)[place // 2 % 2]}


@needs_triton
def test_the_compiler_takes_every_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("this Triton describes its sources otherwise")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for way, dtype, architecture, constants in specialisations():
        code = compiled(way, dtype, architecture, constants)
        where = f"{way} {dtype} sm_{architecture} {constants}"
        assert "ld.global.v4" in code and "st.global.v4" in code, f"16 bytes at a time: {where}"
        assert not re.search(r"\b(atom|red)\.(global|gpu|relaxed)", code), f"the order of sums is fixed: {where}"


class TestChoice:
    """Which back end a device gets; torch is told here that there is one."""

    @pytest.fixture(autouse=True)
    def nothing_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_check, "_kernels", {})
        monkeypatch.setattr(gpu_check, "_problems", {})

    @pytest.fixture
    def device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_check, "_has_triton", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")

    def test_without_triton_the_formula_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_check, "_has_triton", lambda: False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert resolve_backend("auto", GPU) == "formula"
        with pytest.raises(ConfigError, match="backend='triton': needs the package triton"):
            Options(backend="triton")

    def test_without_a_device_it_cannot_be_forced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_check, "_has_triton", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ConfigError, match="backend='triton': needs a CUDA device"):
            Options(backend="triton")

    @pytest.mark.usefixtures("device")
    def test_a_failing_check_is_said_once_and_the_formula_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def failing(device: torch.device, dtype: torch.dtype) -> frozenset[int]:
            raise RuntimeError("no compiler\nhere")

        monkeypatch.setattr(gpu_check, "exact_bases", failing)
        with pytest.warns(UserWarning, match="EAFO: the Triton kernel does not work on Some GPU .*no compiler here"):
            assert resolve_backend("auto", GPU) == "formula"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert choice.demanded_kernel(GPU, "auto") is None
        with pytest.raises(ConfigError, match="backend='triton': does not work on Some GPU"):
            choice.prepare(GPU, "triton")

    @needs_triton
    @pytest.mark.usefixtures("device")
    def test_one_dtype_may_fail_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[torch.dtype] = []

        def half_failing(device: torch.device, dtype: torch.dtype) -> frozenset[int]:
            asked.append(dtype)
            if dtype == torch.float16:
                raise ArithmeticError("its results differ")
            return frozenset((1,))

        monkeypatch.setattr(gpu_check, "exact_bases", half_failing)
        with pytest.warns(UserWarning, match=r"\(float16: ArithmeticError: its results differ\)"):
            kernel = gpu_check.gpu_kernel(GPU)
        assert asked == [torch.float32, torch.float16], "bfloat16 begins with Ampere"
        assert kernel is not None and resolve_backend("auto", GPU) == "triton"
        z, terms = points(8), make_terms("closed form")
        assert kernel.takes(z, terms) and not kernel.takes(z.half(), terms) and not kernel.takes(z.bfloat16(), terms)
        assert [resolve_backend(each, GPU) for each in ("eager", "native")] == ["formula", "formula"]

    @pytest.mark.usefixtures("device")
    def test_nothing_is_checked_while_a_graph_is_captured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choice.demanded_kernel(GPU, "auto") is None and choice.demanded_kernel(GPU, "triton") is None
        assert not gpu_check._kernels, "the next call outside may find one"

    def test_tensors_elsewhere_go_as_with_auto(self) -> None:
        cpu = torch.device("cpu")
        assert resolve_backend("triton", cpu) == resolve_backend("auto", cpu)
        choice.prepare(cpu, "triton")

    def test_a_model_is_prepared_where_it_comes_to_be(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[str, str]] = []

        def prepare(device: torch.device, backend: str = "auto") -> None:
            asked.append((device.type, backend))

        for name in ("apply.surgery", "apply.hosting", "apply.standalone"):
            monkeypatch.setattr(f"eafo_dynamic.{name}.prepare", prepare)
        model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        EAFOController.attach(model, backend="eager")
        assert asked == [("cpu", "eager")]
        model.to("meta")
        assert asked[1:] == [("meta", "eager")]
        CorrectedActivation(nn.GELU()).to("meta")
        assert asked[2:] == [("meta", "auto")]


@pytest.fixture
def kernel() -> TritonKernel:
    found = gpu_check.gpu_kernel(GPU)
    assert found is not None
    return found


@needs_gpu
@needs_triton
@pytest.mark.filterwarnings("ignore:Synchronization debug mode", "ignore:TensorFloat32 tensor cores")
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream", "ignore:.*torch.jit.script_method")
class TestOnADevice:
    """What a machine with a GPU runs."""

    def test_it_is_chosen_and_shown(self, kernel: TritonKernel) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)).cuda()
        controller = EAFOController.attach(model)
        assert "backend=triton" in repr(model) and controller.about()["backend"] == "triton"
        z, terms = points(9, device="cuda"), make_terms("free terms", device="cuda")
        assert fused._kernel_for(z, terms, "auto") is kernel is fused._kernel_for(z, terms, "triton")
        assert fused._kernel_for(z, terms, "eager") is None and fused._kernel_for(z.double(), terms, "auto") is None
        assert "backend=triton" in repr(CorrectedActivation(nn.GELU()).cuda())

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("base", BASES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_base_form_and_type(self, dtype: torch.dtype, base: nn.Module, form: str) -> None:
        assert_meets_formula(points(7, 61, dtype=dtype, device="cuda"), base, make_terms(form, device="cuda"))

    @pytest.mark.parametrize("n", [0, 1, 127, 1025, 5_000_001])
    def test_every_length_is_covered(self, n: int) -> None:
        z = points(n, device="cuda") / (1 + n // 10**6)
        assert_meets_formula(z, nn.SiLU(), make_terms("free terms", device="cuda"), sums=1e-3 * max(n, 1) ** 0.5)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    def test_one_amplitude_a_channel_in_every_layout(self, dtype: torch.dtype, form: str, layout: str) -> None:
        z, amplitudes = of_layout(layout, dtype, "cuda")
        assert_meets_formula(z, nn.SiLU(), make_terms(form, *amplitudes, device="cuda"))

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("base", [*BASES, nn.Tanh(), nn.ELU()], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_eps_zero_is_the_base_bit_for_bit(self, dtype: torch.dtype, base: nn.Module, form: str) -> None:
        special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 1e-30, -1e-30, 1e-40])
        z = torch.cat([special.cuda(), points(50_000, device="cuda")]).to(dtype).requires_grad_()
        twin = z.detach().clone().requires_grad_()
        terms = make_terms(form, 0.0, 0.0, device="cuda")
        out, plain = corrected(z, base, terms, known_module(base)), base(twin)
        assert_same_bits(out, plain)
        weight = torch.linspace(-1, 1, z.numel()).to(z)
        by_z, by_plain = torch.autograd.grad(out, z, weight)[0], torch.autograd.grad(plain, twin, weight)[0]
        assert_same_bits(by_z, by_plain)

    def test_sums_have_the_same_bits_every_time(self) -> None:
        z, terms = points(3_000_001, device="cuda").requires_grad_(), make_terms("free terms", device="cuda")
        out = corrected(z, nn.ReLU(), terms, known_module(nn.ReLU()))
        first, *others = (
            torch.autograd.grad(out, terms.amplitudes, torch.ones_like(z), retain_graph=True)[0] for _ in range(5)
        )
        for each in others:
            assert_same_bits(each, first)

    def test_more_elements_than_32_bits_count(self, kernel: TritonKernel) -> None:
        n = 2**31 + 2048
        if torch.cuda.mem_get_info()[0] < 6 * n + 2**30:
            pytest.skip("not enough memory on the device")
        z = torch.full((n,), -0.5, dtype=torch.bfloat16, device="cuda")
        terms, known = make_terms("free terms", device="cuda"), known_module(nn.ReLU())
        out = torch.empty_like(z)
        kernel.add(out, z, terms, known)
        few = torch.empty_like(z[:16])
        kernel.add(few, z[:16].clone(), terms, known)
        assert out[-1] == few[0] and bool((out == few[0]).all())
        by_amplitudes = kernel.add_gradient(out, z, z, terms, known)
        fewer = kernel.add_gradient(few, z[:16].clone(), z[:16].clone(), terms, known)
        torch.testing.assert_close(by_amplitudes / n, fewer / 16, rtol=1e-3, atol=0.0)

    @pytest.mark.parametrize("functional", [False, True])
    def test_no_step_waits_for_the_device(self, functional: bool) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second, self.act = nn.Linear(32, 64), nn.Linear(64, 32), nn.GELU()

            def forward(self, x: Tensor) -> Tensor:
                hidden = self.first(x)
                return self.second(torch.relu(hidden) if functional else self.act(hidden))

        model, x = Net().cuda(), torch.randn(16, 32, device="cuda")
        controller = EAFOController.attach(model, x)
        controller.collecting = False
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(1001, 1004):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
                assert not controller.step(step), "no step with a round"
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_graph_reads_the_amplitudes_of_its_replay(self) -> None:
        model = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 64), nn.ReLU()).cuda()
        hosted = wrap(model, eps_init=0.1, free=True)
        x = torch.randn(32, 8, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model.zero_grad(set_to_none=True)
                model(x).square().mean().backward()
        torch.cuda.current_stream().wait_stream(stream)
        model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
            out.square().mean().backward()
        for eps in (0.4, -0.3):
            for host, site in hosted:
                getattr(host, site.keys[0]).data.fill_(eps)
            graph.replay()
            parameters = dict(model.named_parameters())
            captured = {name: each.grad.clone() for name, each in parameters.items() if each.grad is not None}
            found = out.clone()
            again = model(x)
            torch.testing.assert_close(found, again)
            grads = torch.autograd.grad(again.square().mean(), list(parameters.values()))
            for (name, _), grad in zip(parameters.items(), grads, strict=True):
                torch.testing.assert_close(captured[name], grad, msg=name)

    @pytest.mark.filterwarnings("ignore")  # the compiler's own
    def test_compiled_with_reduced_overhead(self) -> None:
        model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)).cuda()
        wrap(model, eps_init=0.3, free=True)
        x = torch.randn(32, 8, device="cuda")
        expected = model(x)
        wanted = torch.autograd.grad(expected.sum(), list(model.parameters()))
        fast = torch.compile(model, mode="reduce-overhead")
        for _ in range(3):
            found = fast(x)
            grads = torch.autograd.grad(found.sum(), list(model.parameters()))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(grads, wanted, rtol=1e-3, atol=1e-3)
            del found, grads
