"""What runs beneath torch's functions in a dry run: kernels of scripted and C++ code, and a compiler's graphs."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from eafo_dynamic.correction.kernels import is_correctable, size_of
from eafo_dynamic.find.functional import kernel_name

__all__ = ["Kernels", "uncompiled"]

_CONTROL_FLOW = ("cond", "while_loop", "map_impl", "scan", "associative_scan")


class Kernels(TorchDispatchMode):
    """Sees what runs beneath the functions: scripted and C++ code calls kernels without them.

    Args:
        hear_kernel: called with the name of an activation and the shape of its input.
        hear_control_flow: called with the name of an operator whose branches no mode sees.
    """

    supports_higher_order_operators = True

    def __init__(
        self, hear_kernel: Callable[[str, tuple[int, ...]], None], hear_control_flow: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.hear_kernel, self.hear_control_flow = hear_kernel, hear_control_flow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = kernel_name(func)
        if name is not None and args and is_correctable(args[0]):
            self.hear_kernel(name, size_of(args[0]))
        elif isinstance(func, HigherOrderOperator) and func.name() in _CONTROL_FLOW:
            self.hear_control_flow(func.name())
        with torch._C.DisableTorchFunction():  # it has been shown, or is not to be
            return func(*args, **(kwargs or {}))


@contextmanager
def uncompiled() -> Generator[None]:
    """Compiled parts run as Python: a compiler would run the listening only once, and compile it."""
    if not hasattr(torch.compiler, "set_stance"):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
