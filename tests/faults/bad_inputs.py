"""What a batch can do to an activation: inputs by name, each made anew, and what a call with one came to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.masked import masked_tensor
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

__all__ = [
    "FLOATS",
    "INPUTS",
    "MODELS",
    "SIZES",
    "assert_same",
    "assert_same_kind",
    "attempt",
    "normal",
    "parts",
    "some",
]


def normal(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def some(value: float) -> Tensor:
    x = normal(8, 16)
    x.view(-1)[::7] = value
    return x


def parts() -> list[Tensor]:
    return [normal(3, 4), normal(5, 4)]


def made_for_inference() -> Tensor:
    with torch.inference_mode():
        return normal(8, 16)


class Tagged(Tensor):
    """A subclass that changes nothing, as torchvision's datapoints."""


FLOATS: dict[str, Callable[[], Any]] = {
    "normal": lambda: normal(8, 16),
    "some NaN": lambda: some(math.nan),
    "all NaN": lambda: torch.full((8, 16), math.nan),
    "some inf": lambda: some(math.inf),
    "some -inf": lambda: some(-math.inf),
    "all inf": lambda: torch.full((8, 16), math.inf),
    "all -inf": lambda: torch.full((8, 16), -math.inf),
    "one finite among NaN": lambda: torch.cat([torch.full((127,), math.nan), torch.ones(1)]),
    "zeros": lambda: torch.zeros(8, 16),
    "constant": lambda: torch.full((8, 16), 2.0),
    "huge": lambda: normal(8, 16) * 1e38,
    "largest float": lambda: torch.full((8, 16), torch.finfo(torch.float32).max),
    "both ends of float32": lambda: torch.tensor([3.4e38, -3.4e38]).repeat(64),
    "denormal": lambda: normal(8, 16) * 1e-40,
    "one outlier": lambda: torch.cat([normal(127), torch.tensor([1e30])]),
}
SIZES: dict[str, Callable[[], Any]] = {
    "empty batch": lambda: torch.empty(0, 16),
    "no features": lambda: torch.empty(8, 0),
    "empty images": lambda: torch.empty(0, 3, 4, 4),
    "0-dim": lambda: torch.tensor(0.7),
    "one element": lambda: torch.tensor([0.7]),
    "two elements": lambda: torch.tensor([0.7, -0.3]),
    "9 dimensions": lambda: normal(1, 2, 1, 2, 1, 2, 1, 2, 2),
}
DTYPES: dict[str, Callable[[], Any]] = {
    "float64": lambda: normal(8, 16).double(),
    "float64 beyond float32": lambda: normal(8, 16).double() * 1e300,
    "float16": lambda: normal(8, 16).half(),
    "float16 near its end": lambda: (normal(8, 16) * 20000).half(),
    "float16 NaN": lambda: some(math.nan).half(),
    "bfloat16": lambda: normal(8, 16).bfloat16(),
    "bfloat16 huge": lambda: (normal(8, 16) * 1e38).bfloat16(),
    "float8": lambda: normal(8, 16).to(torch.float8_e4m3fn),
    "int64": lambda: torch.arange(-8, 8),
    "int32": lambda: torch.arange(-8, 8, dtype=torch.int32),
    "uint8": lambda: torch.arange(8, dtype=torch.uint8),
    "bool": lambda: torch.tensor([True, False]),
    "complex64": lambda: torch.complex(normal(8), normal(8)),
    "complex128": lambda: torch.complex(normal(8).double(), normal(8).double()),
    "quantised": lambda: torch.quantize_per_tensor(normal(4, 4), 0.1, 10, torch.quint8),
}
LAYOUTS: dict[str, Callable[[], Any]] = {
    "nested": lambda: torch.nested.nested_tensor(parts()),
    "nested, NaN": lambda: torch.nested.nested_tensor([*parts(), torch.full((2, 4), math.nan)]),
    "nested without parts": lambda: torch.nested.nested_tensor([]),
    "jagged": lambda: torch.nested.nested_tensor(parts(), layout=torch.jagged),
    "jagged, transposed": lambda: torch.nested.nested_tensor(parts(), layout=torch.jagged).transpose(1, 2),
    "sparse COO": lambda: normal(4, 4).relu().to_sparse(),
    "sparse CSR": lambda: normal(4, 4).relu().to_sparse_csr(),
    "sparse CSC": lambda: normal(4, 4).relu().to_sparse_csc(),
    "sparse BSR": lambda: normal(4, 4).relu().to_sparse_bsr((2, 2)),
    "mkldnn": lambda: normal(4, 4).to_mkldnn(),
    "meta": lambda: torch.empty(4, 4, device="meta"),
    "transposed": lambda: normal(8, 16).t(),
    "every second": lambda: normal(8, 32)[:, ::2],
    "expanded": lambda: normal(8, 1).expand(8, 16),
    "channels last": lambda: normal(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "negative view": lambda: torch._neg_view(normal(8, 16)),
    "real part": lambda: torch.complex(normal(8), normal(8)).real,
    "imaginary part of a conjugate": lambda: torch.complex(normal(8), normal(8)).conj().imag,
}
KINDS: dict[str, Callable[[], Any]] = {
    "parameter": lambda: nn.Parameter(normal(8, 16)),
    "subclass": lambda: normal(8, 16).as_subclass(Tagged),
    "wrapper subclass": lambda: TwoTensor(normal(4, 4), normal(4, 4)),
    "masked": lambda: masked_tensor(normal(4, 4), torch.eye(4).bool()),
    "made in inference mode": made_for_inference,
    "list": lambda: [1.0, 2.0],
    "None": lambda: None,
    "number": lambda: 0.5,
    "NumPy array": lambda: normal(4).numpy(),
}
INPUTS = {**FLOATS, **SIZES, **DTYPES, **LAYOUTS, **KINDS}


class Called(nn.Module):
    """One activation module."""

    def __init__(self, activation: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.act, self.times = activation, times

    def forward(self, z: Any) -> Any:
        for _ in range(self.times):
            z = self.act(z)
        return z


class Function(nn.Module):
    """An activation called in Python code."""


class Relu(Function):
    def forward(self, z: Any) -> Any:
        return F.relu(z)


class InPlace(Function):
    def forward(self, z: Any) -> Any:
        return F.relu_(z)


class Written(Function):
    def forward(self, z: Any) -> Any:
        return z * torch.sigmoid(z)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": lambda: Called(nn.ReLU()),
    "ReLU in place": lambda: Called(nn.ReLU(inplace=True)),
    "SiLU in place": lambda: Called(nn.SiLU(inplace=True)),
    "GELU twice": lambda: Called(nn.GELU(), 2),
    "PReLU": lambda: Called(nn.PReLU()),
    "ELU in place": lambda: Called(nn.ELU(inplace=True)),
    "Hardtanh": lambda: Called(nn.Hardtanh()),
    "Tanh": lambda: Called(nn.Tanh()),
    "F.relu": Relu,
    "F.relu_": InPlace,
    "written out": Written,
}

Outcome = tuple[Any, list[Any]] | Exception


def attempt(model: nn.Module, make: Callable[[], Any], grad: bool) -> Outcome:
    """Calls a model, and differentiates it where that is asked for.

    Args:
        model: to be called.
        make: makes the input.
        grad: whether to run the backward, too.

    Returns:
        The output with the gradients of input and parameters, or what was raised.
    """
    z = make()
    try:
        if not grad:
            out = model(z)
            return out, [z]
        z.requires_grad_()
        out = model(z.clone())
        total(out).backward()
        plain = [p.grad for name, p in model.named_parameters() if "eafo_" not in name]
        return out.detach(), [z.grad, *plain]
    except Exception as error:
        return error


def total(out: Tensor) -> Tensor:
    if out.is_nested:
        return torch.cat([part.flatten() for part in out.unbind()]).sum()
    dense = out if out.layout == torch.strided else out.to_dense()
    return dense.abs().sum() if dense.is_complex() else dense.sum()


def assert_same(found: Any, expected: Any) -> None:
    """Every number, also NaN, and everything else that can be seen of a tensor."""
    assert kind_of(found) == kind_of(expected)
    if not isinstance(found, Tensor) or found.is_meta:
        return
    if found.is_nested:
        for one, two in zip(found.unbind(), expected.unbind(), strict=True):
            assert_same(one, two)
        return
    if hasattr(found, "get_data"):
        found, expected = found.get_data(), expected.get_data()
    if isinstance(found, TwoTensor):
        found, expected = found.a, expected.a
    if found.is_mkldnn:
        found, expected = found.to_dense(), expected.to_dense()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def assert_same_kind(found: Any, expected: Any) -> None:
    """Everything that can be seen without looking at the numbers."""
    assert kind_of(found) == kind_of(expected)


def kind_of(value: Any) -> Any:
    """What can be seen of a value without looking at its numbers."""
    if not isinstance(value, Tensor):
        return type(value)
    size = [tuple(part.shape) for part in value.unbind()] if value.is_nested else tuple(value.shape)
    return type(value), value.dtype, value.layout, value.device, size
