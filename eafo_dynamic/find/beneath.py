"""What runs beneath torch's functions in a dry run: kernels of scripted and C++ code, and a compiler's graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from eafo_dynamic.correction.kernels import is_correctable, size_of
from eafo_dynamic.find.functional import kernel_name
from eafo_dynamic.internals.torch_internals import CAN_HEAR_KERNELS, DispatchMode, without_function_modes

__all__ = ["Kernels", "listening", "uncompiled"]

_CONTROL_FLOW = ("cond", "while_loop", "map_impl", "scan", "associative_scan")


class Kernels(DispatchMode):
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
        elif _is_control_flow(func):
            self.hear_control_flow(func.__name__)
        with without_function_modes():  # it has been shown, or is not to be
            return func(*args, **(kwargs or {}))


def listening(
    hear_kernel: Callable[[str, tuple[int, ...]], None], hear_control_flow: Callable[[str], None]
) -> AbstractContextManager[Any]:
    """A mode that hears kernels, where this version of torch has such modes; else a warning.

    Args:
        hear_kernel: see ``Kernels``.
        hear_control_flow: see ``Kernels``.

    Returns:
        The mode, not on yet.
    """
    if CAN_HEAR_KERNELS:
        return Kernels(hear_kernel, hear_control_flow)
    warnings.warn(
        f"EAFO: torch {torch.__version__} does not let its kernels be heard, so activations inside scripted code and "
        "control-flow operators are neither found nor reported. All others are.",
        stacklevel=2,
    )
    return nullcontext()


def _is_control_flow(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name in _CONTROL_FLOW and func is getattr(torch.ops.higher_order, name, None)


@contextmanager
def uncompiled() -> Generator[None]:
    """Compiled parts run as Python: a compiler would run the listening only once, and compile it."""
    if not hasattr(torch.compiler, "set_stance"):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
