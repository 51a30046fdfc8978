"""The one door to private parts of torch and Python: no other module of this package names one of them.

Each entry looks for the part that it needs. Where the installed version does not have it, the entry does the same by
public means, mostly slower, or raises ``UnsupportedTorchError`` from the one feature that cannot do without. Docstrings
say which versions of torch have the part; 2.4 to 2.14 is all of those that this package has been run with or read in.

What the parts are used for stands with the ideas that use them: ``recompute``, ``frames``, ``places``, ``kernels``.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from types import CodeType, FrameType, GeneratorType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as _checkpointing

from eafo_dynamic.errors import UnsupportedTorchError

__all__ = [
    "BACKWARD_HOOKS",
    "CAN_COMPILE_FRAMES",
    "CAN_HEAR_KERNELS",
    "CAN_SWITCH_FORWARD_MODE",
    "DDP_IGNORED",
    "FORWARD_HOOKS",
    "MODULE_TABLES",
    "NAMES_OF_WRAPPERS",
    "OTHERS_PER_GROUP",
    "RATES_PER_GROUP",
    "DispatchMode",
    "after_backward",
    "arrived",
    "autograd_context",
    "caller_of",
    "callers",
    "checkpointed_region",
    "clamp_all_",
    "code_of",
    "compiler_option",
    "constant_result",
    "copy_all_",
    "current_frame",
    "direct_apply",
    "dispatch_modes",
    "forget",
    "forward_mode",
    "forward_mode_active",
    "forward_pre_hooks",
    "function_namespace",
    "gradient_kernel",
    "hide_from_compiler",
    "holds_its_numbers",
    "hook_tables",
    "in_compiled_graph",
    "infers_shapes",
    "inner_schedulers",
    "instruction_of",
    "instructions_until",
    "is_batch_of_gradients",
    "is_flattened",
    "is_joined",
    "is_sharded",
    "is_transformed",
    "is_view",
    "jagged_dim",
    "may_be_compiled",
    "nested_like",
    "nested_sizes",
    "own_buffers",
    "own_children",
    "own_parameters",
    "push_mode",
    "rank_store",
    "region_of",
    "resumed_from",
    "running_backward",
    "shards_layers",
    "share_tables",
    "switch_off",
    "traced_instructions",
    "transforms_active",
    "tree_map",
    "tree_map_only",
    "variable_of",
    "version_of",
    "without_function_modes",
    "wrap_recomputation",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _find(path: str) -> Any:
    """What a path like ``torch._C:_nn.gelu``, module first, leads to; None where a part of it is missing."""
    module, _, names = path.partition(":")
    try:
        found: Any = import_module(module)
    except ImportError:
        return None
    for name in names.split("."):
        found = getattr(found, name, None)
    return found


@functools.cache
def _stands_in(file: str, words: str) -> bool:
    """Whether a file of torch has these words; for names that are looked up in the user's objects."""
    path = Path(torch.__file__).parent / file
    return path.is_file() and words in path.read_text(encoding="utf-8")


# Frames of Python, which lead from a call outwards to those who made it


def _frame_of_traceback(depth: int) -> FrameType:
    frame: FrameType | None = None
    try:
        raise LookupError
    except LookupError as here:
        traceback = here.__traceback__
        frame = None if traceback is None else traceback.tb_frame
    for _ in range(depth + 1):
        frame = None if frame is None else frame.f_back
    if frame is None:
        raise ValueError("call stack is not deep enough")
    return frame


_get_frame: Callable[[int], FrameType] = _find("sys:_getframe") or _frame_of_traceback


def current_frame(outer: int = 0) -> FrameType:
    """The frame of the function that calls this one, or of one further out.

    ``sys._getframe``, of every CPython; elsewhere the frame of a traceback, as in ``logging``.

    Args:
        outer: how many callers further out.

    Returns:
        The frame. Its attributes are those of Python's data model.
    """
    return _get_frame(outer + 1)


def caller_of(frame: FrameType) -> FrameType | None:
    """The frame that has called a frame's function.

    Args:
        frame: any.

    Returns:
        It; None of the outermost one of a thread.
    """
    return frame.f_back


def callers(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and all those further out.

    Args:
        frame: where to begin.

    Yields:
        The frames, innermost first.
    """
    while frame is not None:
        yield frame
        frame = frame.f_back


def code_of(frame: FrameType) -> CodeType:
    """The code that a frame runs.

    Args:
        frame: any.

    Returns:
        The code.
    """
    return frame.f_code


def instruction_of(frame: FrameType) -> int:
    """Where in its code a frame is.

    Args:
        frame: any.

    Returns:
        Offset of the instruction, in bytes.
    """
    return frame.f_lasti


def instructions_until(depth: int, last: int) -> tuple[int, ...]:
    """Which instructions have led to a call, from a frame outwards; see ``instruction_of``.

    Args:
        depth: how many callers further out than the function that calls this one the frame is.
        last: ``id`` of the frame at which to end, which is not counted.

    Returns:
        ``id`` of the code and offset of the instruction, of each frame in turn; valid as long as the code lives.
    """
    innermost = _get_frame(depth + 1)
    frame = innermost.f_back
    if id(frame) == last:
        return id(innermost.f_code), innermost.f_lasti
    found = [id(innermost.f_code), innermost.f_lasti]
    while frame is not None and id(frame) != last:
        found += (id(frame.f_code), frame.f_lasti)
        frame = frame.f_back
    return tuple(found)


def traced_instructions() -> Iterator[tuple[CodeType, int | None]]:
    """What ``instructions_until`` finds, while ``torch.compile`` reads the code instead of running it.

    By ``f_code``, ``current_instruction.offset`` and ``parent`` of the compiler's translators, torch 2.4 to 2.14, which
    lie on the stack as ``self``; beneath them are the frames of the code that runs. Where there are none, the frames
    alone.

    Yields:
        The code and the offset of the instruction, innermost first; None where the offset is not known.
    """
    base = _find("torch._dynamo.symbolic_convert:InstructionTranslatorBase") if "torch._dynamo" in sys.modules else None
    met = False
    for frame in callers(current_frame(1)):
        translator = None if met or base is None else variable_of(frame, "self")
        if base is not None and isinstance(translator, base):
            met = True
            while translator is not None:
                instruction = getattr(translator, "current_instruction", None)
                yield translator.f_code, getattr(instruction, "offset", None)
                translator = getattr(translator, "parent", None)
        else:
            yield frame.f_code, frame.f_lasti


_RESUMED = "torch_dynamo_resume_in_"


def resumed_from(code: CodeType) -> CodeType | None:
    """The code of the user's that a piece of code goes on with, which ``torch.compile`` makes behind a graph break.

    By ``ContinueExecutionCache.generated_code_metadata`` and its ``code``, and by ``orig_code_map``, which has the code
    that the compiler runs in place of the user's; torch 2.4 to 2.14.

    Args:
        code: any.

    Returns:
        The user's code: the same, where it is no such piece; None where that is not known.
    """
    if "torch._dynamo" not in sys.modules:
        return code
    if code in (_find("torch._dynamo.utils:orig_code_map") or ()):
        return None
    made = None
    while code.co_name.startswith(_RESUMED):
        if made is None:
            made = _find("torch._dynamo.resume_execution:ContinueExecutionCache.generated_code_metadata") or {}
        about = made.get(code)
        code = getattr(about, "code", None) or code
        if about is None:
            return None
    return code


def variable_of(frame: FrameType, name: str) -> Any:
    """The value of a local variable.

    Args:
        frame: any.
        name: of the variable.

    Returns:
        Its value; None where it has none.
    """
    return frame.f_locals.get(name)


# What watches operations: transforms of torch.func, forward mode, dispatch modes


_TRANSFORMS = os.path.dirname(torch.func.vmap.__code__.co_filename)


def _in_frames_of_transforms() -> bool:
    files = (code_of(frame).co_filename for frame in callers(current_frame(1)))
    return any(os.path.dirname(file) == _TRANSFORMS for file in files)


transforms_active: Callable[[], bool] = _find("torch._C:_are_functorch_transforms_active") or _in_frames_of_transforms
"""Whether this code runs inside a transform such as ``torch.func.vmap``, at any level.

torch 2.4 to 2.14; else by the frames around it that lie in the folder of ``torch.func.vmap``.
"""


def _has_no_memory(tensor: Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:
        return True
    return False


is_transformed: Callable[[Tensor], bool] = _find("torch._C:_functorch.is_functorch_wrapped_tensor") or _has_no_memory
"""Whether a tensor is one that a transform of ``torch.func`` has made, during the transform or after it.

torch 2.4 to 2.14; else, as such a tensor has none, by asking for its address.
"""

is_batch_of_gradients: Callable[[Tensor], bool] = _find("torch._C:_functorch.is_legacy_batchedtensor") or _has_no_memory
"""Whether a gradient is a batch of them, as in ``torch.autograd.grad(..., is_grads_batched=True)``.

torch 2.4 to 2.14; else, as such a tensor has none, by asking for its address.
"""


def _lies_nowhere(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and (_has_no_memory(tensor) or tensor.data_ptr() == 0)


_is_zeros_without_memory: Any = getattr(Tensor, "_is_zerotensor", None) or _lies_nowhere


def holds_its_numbers(tensor: Tensor) -> bool:
    """Whether the memory of a tensor holds its numbers: not their negatives, as that of ``x.conj().imag`` does.

    ``Tensor._is_zerotensor``, torch 2.4 to 2.14, is True of zeros that have no memory; else, by asking for its address.

    Args:
        tensor: any tensor.

    Returns:
        Whether it does.
    """
    return not (tensor.is_neg() or _is_zeros_without_memory(tensor))


_forward_ad: Any = forward_ad


def _at_a_level() -> bool:
    return _forward_ad._current_level >= 0


def _takes_dual_numbers() -> bool:
    number = torch.zeros((), dtype=torch.float32, device="cpu")
    try:
        forward_ad.make_dual(number, number)
    except RuntimeError:  # of torch, outside any level
        return False
    return True


forward_mode_active: Callable[[], bool] = _at_a_level if hasattr(forward_ad, "_current_level") else _takes_dual_numbers
"""Whether this code runs inside a level of forward-mode differentiation, those of ``torch.func.jvp`` included.

``forward_ad._current_level``, torch 2.4 to 2.14; else by making a dual number, which fails outside any level.
"""

_switch_forward_mode = _find("torch.autograd.forward_ad:_set_fwd_grad_enabled")

CAN_SWITCH_FORWARD_MODE = _switch_forward_mode is not None
"""Whether ``forward_mode`` does anything, torch 2.4 to 2.14. Where it does not, nested forward mode must be left to
torch's own operations."""


def forward_mode() -> AbstractContextManager[Any]:
    """Switches forward mode on where torch has switched it off, as in the ``jvp`` of an autograd function.

    By ``forward_ad._set_fwd_grad_enabled``, torch 2.4 to 2.14.

    Returns:
        A context manager; one that does nothing without ``CAN_SWITCH_FORWARD_MODE``.
    """
    if _switch_forward_mode is None:
        return nullcontext()
    return _switch_forward_mode(True)


def _suppose_one() -> int:
    return 1


dispatch_modes: Callable[[], int] = _find("torch._C:_len_torch_dispatch_stack") or _suppose_one
"""How many dispatch modes see the operations of this code.

torch 2.4 to 2.14; else 1, since operations in Python are right under a mode and without any.
"""

# Backward, and activation checkpointing


_ENGINE = frozenset(
    inspect.unwrap(cast(Any, function)).__code__ for function in (torch.autograd.backward, torch.autograd.grad)
)


def _backward_by_frames() -> int:
    for frame in callers(current_frame(1)):
        if code_of(frame) in _ENGINE:
            return id(frame)
    # autograd's own threads, for devices, have not been started by Python
    return 0 if threading.current_thread().name.startswith("Dummy-") else -1


running_backward: Callable[[], int] = _find("torch._C:_current_graph_task_id") or _backward_by_frames
"""A number of the backward that this code runs in, as a recomputation does; -1 outside any.

torch 2.4 to 2.14; else by the frame of ``torch.autograd.backward`` or ``grad`` around it.
"""

_top_hooks = _find("torch._C:_autograd._top_saved_tensors_default_hooks")
_cells_of_hook = _find("torch.utils.checkpoint:_checkpoint_hook.__init__.__code__.co_cellvars") or ()
_HOOKS_TELL = _top_hooks is not None and "frame" in _cells_of_hook
_CHECKPOINTING = _checkpointing.__file__


def checkpointed_region() -> Any:
    """The innermost region of ``torch.utils.checkpoint`` with ``use_reentrant=False`` that this code runs in.

    By the saved-tensor hooks in force, torch 2.8 to 2.14. Else by the frames of ``checkpoint``, which have had a
    generator ``gen`` with a variable ``new_frame`` from torch 2.4 on.

    Returns:
        torch's object for the region; None outside any, and where neither is there. Then the recomputation is an error:
        ours, see ``frames.route``, or torch's, which counts the tensors that are saved in both passes.
    """
    if not _HOOKS_TELL:
        return _region_by_frames()
    hooks = _top_hooks(True)
    if hooks is None or not getattr(hooks[0], "__qualname__", "").startswith("_checkpoint_hook"):
        return None
    pack = hooks[0]
    return dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))["frame"].cell_contents


def _region_by_frames() -> Any:
    for frame in callers(current_frame(1)):
        region = region_of(frame)
        if region is not None:
            return region
    return None


def region_of(frame: FrameType) -> Any:
    """The region of ``torch.utils.checkpoint`` with ``use_reentrant=False`` that a frame of it runs.

    By the generator ``gen`` of ``checkpoint``, which has a variable ``new_frame``, torch 2.4 to 2.14.

    Args:
        frame: any.

    Returns:
        torch's object for the region; None where the frame is not of ``checkpoint``, or does not tell.
    """
    if code_of(frame).co_filename != _CHECKPOINTING:
        return None
    steps = variable_of(frame, "gen")
    inner = steps.gi_frame if isinstance(steps, GeneratorType) else None
    return None if inner is None else variable_of(inner, "new_frame")


def autograd_context(frame: FrameType) -> FunctionCtx | None:
    """What an autograd function keeps for its backward, while its forward runs.

    By names that torch's documentation has in its examples, torch 2.4 to 2.14.

    Args:
        frame: any.

    Returns:
        Its variable ``ctx``; None where the frame is not of a ``forward`` that has one.
    """
    if code_of(frame).co_name != "forward":
        return None
    context = variable_of(frame, "ctx")
    return context if isinstance(context, FunctionCtx) else None


def wrap_recomputation(region: Any, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Puts a function around the recomputation of a part of a forward.

    Args:
        region: from ``checkpointed_region``, which keeps it as ``recompute_fn``; or the context of
            ``torch.utils.checkpoint.CheckpointFunction``, which keeps it as ``run_function``. torch 2.4 to 2.14.
        around: makes the new function from the present one.

    Raises:
        UnsupportedTorchError: where it keeps it elsewhere.
    """
    for name in ("recompute_fn", "run_function"):
        present = getattr(region, name, None)
        if present is not None:
            setattr(region, name, around(present))
            return
    raise UnsupportedTorchError(
        "activation checkpointing of a part of a module's forward",
        torch.__version__,
        "recompute_fn of torch.utils.checkpoint",
        "Checkpoint whole modules, or exclude the activations inside.",
    )


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``apply`` of an autograd function without the look for transforms, which costs as much as a small activation.

    Up to torch 2.13 ``torch.autograd.Function.apply`` takes that look in Python and hands on to its base class; 2.14
    takes it in C++, and the base class has the same ``apply``.

    Args:
        function: the class.

    Returns:
        Its ``apply``, to be called outside of transforms only.
    """
    base: Any = super(torch.autograd.Function, function)
    return getattr(base, "apply", function.apply)


# The compiler, which nothing here imports before it is needed: that takes a second


def hide_from_compiler(function: _Function) -> _Function:
    """Decorates a function that ``torch.compile`` shall run as it is.

    By ``torch._compile._disable_dynamo``, torch 2.4 to 2.14, which does not import the compiler before the first call;
    else by ``torch.compiler.disable``, which does so at once.

    Args:
        function: any.

    Returns:
        One of the same arguments.
    """
    disable: Any = _find("torch._compile:_disable_dynamo") or torch.compiler.disable
    return disable(function)


CAN_COMPILE_FRAMES = _stands_in("_dynamo/variables/torch_function.py", "class TorchFunctionModeVariable")
"""Whether ``torch.compile`` follows function modes and the frames that go with them, torch 2.5 to 2.14. Where it does
not, modules that need them run as they are."""


def constant_result(function: _Function) -> _Function:
    """Decorates a function whose result is a constant to ``torch.compile``.

    The same as ``torch.compiler.assume_constant_result``, which imports the compiler to set a mark; torch 2.4 to 2.14
    look for it under the name ``_dynamo_marked_constant``. Where they do not, that function is called.

    Args:
        function: of no tensors.

    Returns:
        The same function.
    """
    if not _stands_in("_dynamo/decorators.py", "fn._dynamo_marked_constant = True"):
        return torch.compiler.assume_constant_result(function)
    vars(function)["_dynamo_marked_constant"] = True
    return function


def compiler_option(name: str) -> Any:
    """An option of the compiler, which torch 2.4 to 2.14 keep in ``torch._dynamo.config``; imports it.

    Args:
        name: of the option; they come and go.

    Returns:
        Its value; None where this version has no such option.
    """
    return getattr(_find("torch._dynamo:config"), name, None)


def in_compiled_graph() -> bool:
    """Whether a function that a TorchFunctionMode is shown is called by a graph that ``torch.compile`` has made.

    Not to be asked while the compiler reads the code.

    By the name that ``torch.fx`` gives to the code of graphs, and by ``compile_subgraph_reason``, which graphs of the
    compiler have and a user's do not; torch 2.4 to 2.14.

    Returns:
        Whether it is.

    Raises:
        UnsupportedTorchError: in any graph, where the compiler's are no longer told from a user's by that.
    """
    if "torch._dynamo" not in sys.modules:
        return False
    graph = _name_of_graphs()
    frame: FrameType | None = _get_frame(2)
    for _ in range(3):  # functions of Python lie between: F.relu and handle_torch_function
        if frame is None:
            return False
        if frame.f_code.co_filename.startswith(graph):
            return _is_compilers(variable_of(frame, "self"))
        frame = frame.f_back
    return False


@functools.cache
def _name_of_graphs() -> str:
    """``<eval_with_key>``, torch 2.4 to 2.14: the number behind it counts the graphs."""
    graph = torch.fx.Graph()
    graph.output(graph.placeholder("x"))
    made: Any = torch.fx.GraphModule(nn.Module(), graph)
    return made.forward.__code__.co_filename.partition(".")[0]


def _is_compilers(graph: Any) -> bool:
    if _stands_in("_dynamo/output_graph.py", "gm.compile_subgraph_reason = "):
        return hasattr(graph, "compile_subgraph_reason")
    raise UnsupportedTorchError(
        "correcting the functions of a model beside a graph of torch.fx or torch.compile",
        torch.__version__,
        "compile_subgraph_reason on the compiler's graphs",
        "Call activations as modules (self.act = nn.ReLU()), or compile with the backend inductor.",
    )


def may_be_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``module.compile()`` has been called on a module.

    By ``_compiled_call_impl`` and ``_orig_mod``, torch 2.4 to 2.14.

    Args:
        module: any.

    Returns:
        Whether it has; True where this version does not tell.
    """
    if not hasattr(nn.Module, "_compiled_call_impl") or not _stands_in("_dynamo/eval_frame.py", "_orig_mod"):
        return True
    return cast(Any, module)._compiled_call_impl is not None or "_orig_mod" in dict(module.named_children())


# Function modes, dispatch modes and operators


_push_mode = _find("torch.overrides:_push_mode")
_pop_mode = _find("torch.overrides:_pop_mode")
_CAN_SWITCH_OFF = _push_mode is not None and _pop_mode is not None


def push_mode(mode: TorchFunctionMode) -> None:
    """Switches a mode on again that was switched off, see ``switch_off``.

    Args:
        mode: the mode.
    """
    _push_mode(mode)


def switch_off(mode: TorchFunctionMode) -> bool:
    """Takes a mode off the top of the stack of modes, torch 2.4 to 2.14.

    Args:
        mode: one that may be there.

    Returns:
        Whether it was; if not, it stays on: somebody else's mode lies on top of it, or this version of torch does not
        tell what is there.
    """
    if not _CAN_SWITCH_OFF:
        return False
    top = _pop_mode()
    # the compiler does not always know two ways to the same object for one
    if torch.compiler.is_compiling() or top is mode:
        return True
    _push_mode(top)
    return False


class _NoDispatchMode:
    """In the place of a mode that this version of torch does not have: hears nothing."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *problem: Any) -> None:
        """Has nothing to end."""


_dispatch_mode = _find("torch.utils._python_dispatch:TorchDispatchMode")
_modes_off = _find("torch._C:DisableTorchFunction")

if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode
else:
    DispatchMode = _dispatch_mode or _NoDispatchMode

CAN_HEAR_KERNELS = _dispatch_mode is not None and _modes_off is not None
"""Whether a subclass of ``DispatchMode`` can see kernels and run them ``without_function_modes``, torch 2.4 to 2.14."""


def without_function_modes() -> AbstractContextManager[Any]:
    """Runs operations without showing them to function modes, by ``DisableTorchFunction`` of torch 2.4 to 2.14.

    Returns:
        A context manager; one that does nothing without ``CAN_HEAR_KERNELS``.
    """
    return nullcontext() if _modes_off is None else _modes_off()


function_namespace: Any = _find("torch._C:_nn")
"""Where the functions of ``torch.nn.functional`` that are written in C++ live, torch 2.4 to 2.14; else None. The
namespace ``torch.nn.functional`` has those that users call."""

# Tensors and kernels


def gradient_kernel(function: str) -> Callable[..., Tensor] | None:
    """The kernel in which torch's autograd computes the gradient of an activation function.

    Args:
        function: its name in ATen, as ``gelu``.

    Returns:
        ``torch.ops.aten.<function>_backward``; torch 2.4 to 2.14 for those that ``kernels.known`` names. None where
        there is no such kernel.
    """
    return getattr(getattr(torch.ops.aten, f"{function}_backward", None), "default", None)


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor has been written to.

    Args:
        tensor: any but those of inference mode.

    Returns:
        ``tensor._version``, torch 2.4 to 2.14; None where there is no such count.
    """
    return getattr(tensor, "_version", None)


def is_view(tensor: Tensor) -> bool:
    """Whether a tensor is a view to autograd.

    Args:
        tensor: any.

    Returns:
        ``tensor._is_view()``, torch 2.4 to 2.14; True where it cannot be known: what holds for views holds for others
        too, and costs a copy.
    """
    ask = getattr(tensor, "_is_view", None)
    return True if ask is None else ask()


def _copy_each_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


copy_all_: Callable[[Sequence[Tensor], Sequence[Tensor]], None] = _find("torch:_foreach_copy_") or _copy_each_
"""Copies each of many tensors into another, in few kernels. torch 2.4 to 2.14; else one after the other."""

_clamp_min_ = _find("torch:_foreach_clamp_min_")
_clamp_max_ = _find("torch:_foreach_clamp_max_")


def clamp_all_(tensors: Sequence[Tensor], bound: float) -> None:
    """Brings many tensors into [-bound, bound], in few kernels. torch 2.4 to 2.14; else one after the other.

    Args:
        tensors: to be changed.
        bound: largest absolute value.
    """
    if _clamp_min_ is not None and _clamp_max_ is not None:
        _clamp_min_(tensors, -bound)
        _clamp_max_(tensors, bound)
        return
    for tensor in tensors:
        tensor.clamp_(-bound, bound)


def jagged_dim(nested: Tensor) -> int:
    """The dimension in which the parts of a nested tensor of the layout ``torch.jagged`` differ.

    Args:
        nested: the tensor.

    Returns:
        ``nested._ragged_idx``, torch 2.4 to 2.14; else the dimension whose size is a symbol.
    """
    if hasattr(nested, "_ragged_idx"):
        return cast(Any, nested)._ragged_idx
    return next(dim for dim, size in enumerate(nested.shape) if dim and isinstance(size, torch.SymInt))


_view_from_buffer = _find("torch:_nested_view_from_buffer")


def nested_sizes(nested: Tensor) -> Tensor:
    """Sizes of the parts of a nested tensor of the layout ``torch.strided``.

    Args:
        nested: the tensor.

    Returns:
        ``nested._nested_tensor_size()``, torch 2.4 to 2.14, else the same from the parts: whole numbers, shape
        [parts, dimensions].
    """
    if hasattr(nested, "_nested_tensor_size"):
        return cast(Any, nested)._nested_tensor_size()
    return torch.tensor([list(part.shape) for part in nested.unbind()], dtype=torch.long)


def nested_like(nested: Tensor, values: Tensor) -> Tensor:
    """A nested tensor of the layout ``torch.strided`` with other values.

    Args:
        nested: the structure, contiguous.
        values: its numbers one after the other, shape [numel].

    Returns:
        A view of the values, torch 2.4 to 2.14; else a copy, differentiable likewise.
    """
    given: Any = nested
    names = ("_nested_tensor_strides", "_nested_tensor_storage_offsets")
    if _view_from_buffer is not None and all(hasattr(nested, name) for name in names):
        return _view_from_buffer(
            values, nested_sizes(nested), given._nested_tensor_strides(), given._nested_tensor_storage_offsets()
        )
    parts = nested.unbind()
    pieces = values.split([part.numel() for part in parts])
    return torch.nested.as_nested_tensor(
        [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)], layout=torch.strided
    )


# Modules and nests of containers


MODULE_TABLES = ("_parameters", "_buffers", "_modules")
"""Attributes in which a module has its parameters, buffers and children, torch 2.4 to 2.14."""

_HAS_TABLES = vars(nn.Module()).keys() >= set(MODULE_TABLES)


def own_parameters(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """A module's own parameters by their names, without its ``__getattr__``, which takes ten times as long.

    Args:
        module: any.

    Returns:
        The table in which it keeps them, torch 2.4 to 2.14; else a copy without those that are None.
    """
    if _HAS_TABLES:
        return module._parameters
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


def own_children(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's own children by their names, to put another in the place of one.

    Args:
        module: any.

    Returns:
        The table in which it keeps them, torch 2.4 to 2.14; else a copy, which changes nothing.
    """
    if _HAS_TABLES:
        return module._modules
    return dict(module.named_children())


NAMES_OF_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What ``torch.compile``, FSDP and activation checkpointing put into names of modules; torch 2.4 to 2.14."""


def own_buffers(module: nn.Module) -> Mapping[str, Tensor | None]:
    """A module's own buffers by their names, likewise.

    Args:
        module: any.

    Returns:
        The table in which it keeps them, torch 2.4 to 2.14; else a copy without those that are None.
    """
    if _HAS_TABLES:
        return module._buffers
    return dict(module.named_buffers(recurse=False, remove_duplicate=False))


def forget(module: nn.Module, name: str) -> None:
    """Removes a parameter, buffer or plain attribute of a module, if it has it; see ``own_parameters``.

    Args:
        module: any.
        name: of the attribute.
    """
    if not _HAS_TABLES:
        if name in own_parameters(module) or name in own_buffers(module) or name in vars(module):
            delattr(module, name)
        return
    for table in (module._parameters, module._buffers, vars(module)):
        cast("MutableMapping[str, Any]", table).pop(name, None)
    getattr(module, "_non_persistent_buffers_set", set[str]()).discard(name)


def share_tables(module: nn.Module, source: nn.Module) -> None:
    """Gives a module the parameters, buffers and children of another, so that moving and loading act on both.

    By ``MODULE_TABLES``, torch 2.4 to 2.14.

    Args:
        module: of no parameters of its own.
        source: the other.

    Raises:
        UnsupportedTorchError: where modules have them elsewhere.
    """
    if not _HAS_TABLES:
        raise UnsupportedTorchError(
            "merge(model, example_input) of functions",
            torch.__version__,
            "the table of a module's parameters",
            "Call activations as modules (self.act = nn.ReLU()) to merge them in place.",
        )
    for name in MODULE_TABLES:
        vars(module)[name] = vars(source)[name]


def forward_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks that ``register_forward_pre_hook`` has registered.

    Args:
        module: any.

    Returns:
        ``module._forward_pre_hooks``, torch 2.4 to 2.14, in their order.

    Raises:
        UnsupportedTorchError: where it keeps them elsewhere.
    """
    found = vars(module).get("_forward_pre_hooks")
    if found is None:
        raise UnsupportedTorchError(
            "save_merged of weights",
            torch.__version__,
            "the table of a module's hooks",
            "Write the graph: end the name in .pt2 or .onnx.",
        )
    return list(found.values())


FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Names in ``hook_tables`` of the hooks around a forward, torch 2.4 to 2.14; elsewhere none is found."""

BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
"""Names in ``hook_tables`` of the hooks around a backward, torch 2.4 to 2.14; elsewhere none is found."""


def hook_tables(module: nn.Module) -> dict[str, Any]:
    """All hooks of a module, as attributes that another module can be given in place of its own.

    Args:
        module: any.

    Returns:
        The attributes with ``_hook`` in their names, torch 2.4 to 2.14.

    Raises:
        UnsupportedTorchError: if there is none, as in no version that is known.
    """
    found = {name: value for name, value in vars(module).items() if "_hook" in name}
    if not found:
        raise UnsupportedTorchError(
            "merge(model)",
            torch.__version__,
            "the tables of a module's hooks",
            "Use the wrapped model: in eval mode it computes the same.",
        )
    return found


DDP_IGNORED = "_ddp_params_and_buffers_to_ignore"
"""Attribute of a module in which DistributedDataParallel, of torch 2.4 to 2.14, looks for names to leave alone. Where
it does not, it broadcasts the sites' buffers before each forward like all others, at the cost of that."""

RATES_PER_GROUP = ("lrs", "_last_lr", "base_values")
OTHERS_PER_GROUP = ("lambdas", "momentums")
"""How the names of lists with one entry per parameter group end in torch's schedulers, and in those written after them
(timm); torch 2.4 to 2.14. A list under another name keeps its length."""


def inner_schedulers(scheduler: Any) -> Sequence[Any]:
    """The schedulers inside a SequentialLR or ChainedScheduler.

    Args:
        scheduler: any.

    Returns:
        Its ``_schedulers``, torch 2.4 to 2.14; none for other kinds.

    Raises:
        UnsupportedTorchError: where one of the two kinds keeps them elsewhere.
    """
    found = getattr(scheduler, "_schedulers", None)
    kinds = (torch.optim.lr_scheduler.SequentialLR, torch.optim.lr_scheduler.ChainedScheduler)
    if found is None and isinstance(scheduler, kinds):
        raise UnsupportedTorchError(
            f"a parameter group for eps under {type(scheduler).__name__}",
            torch.__version__,
            "the list of the schedulers inside it",
            "Use a single scheduler, such as LambdaLR, or a policy that trains no amplitude: policy='entropy'.",
        )
    return found or ()


_tree_map = _find("torch.utils._pytree:tree_map")


def tree_map(function: Callable[[Any], Any], tree: Any, is_leaf: Callable[[Any], bool] = lambda node: False) -> Any:
    """Applies a function to every leaf of a nest of containers.

    Args:
        function: for the leaves.
        tree: the nest.
        is_leaf: whether to take a container for a leaf.

    Returns:
        The nest with other leaves. torch 2.4 to 2.14 know containers of all kinds that are registered with torch; else
        those are lists, tuples and dicts.
    """
    if _tree_map is not None:
        return _tree_map(function, tree, is_leaf=is_leaf)
    return _map_builtins(function, tree, is_leaf)


def _map_builtins(function: Callable[[Any], Any], tree: Any, is_leaf: Callable[[Any], bool]) -> Any:
    if is_leaf(tree) or not isinstance(tree, (list, tuple, dict)):
        return function(tree)
    if isinstance(tree, dict):
        items = cast("dict[Any, Any]", tree).items()
        return type(tree)((key, _map_builtins(function, value, is_leaf)) for key, value in items)
    mapped = [_map_builtins(function, each, is_leaf) for each in cast("Sequence[Any]", tree)]
    return cast(Any, type(tree))(*mapped) if hasattr(tree, "_fields") else cast(Any, type(tree))(mapped)


def tree_map_only(kind: type, function: Callable[[Any], Any], tree: Any) -> Any:
    """Applies a function to the leaves of one type in a nest of containers, see ``tree_map``.

    Args:
        kind: the type.
        function: for those leaves.
        tree: the nest.

    Returns:
        The nest with other leaves.
    """
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, kind) else leaf, tree)


def rank_store() -> Any:
    """The store by which the processes of the default group have found each other.

    Returns:
        A ``torch.distributed.Store``.

    Raises:
        UnsupportedTorchError: if torch keeps it elsewhere; torch 2.4 to 2.14 have it here.
    """
    found = getattr(torch.distributed.distributed_c10d, "_get_default_store", None)
    if found is None:
        raise UnsupportedTorchError(
            "training with several processes", torch.__version__, "the store of the processes", "Train in one process."
        )
    return found()


def is_sharded(value: object) -> bool:
    """Whether a tensor is a DTensor, as FSDP2 and tensor parallelism of torch 2.4 to 2.14 make of parameters.

    Args:
        value: any object.

    Returns:
        Whether it is.
    """
    return any(each.__name__ == "DTensor" for each in type(value).__mro__)


def is_flattened(parameter: nn.Parameter) -> bool:
    """Whether FullyShardedDataParallel has put a parameter into a flat one, or it is that flat one.

    By ``_fsdp_flattened``, torch 2.4 to 2.14; else no parameter is known as one.

    Args:
        parameter: of any model.

    Returns:
        Whether it is.
    """
    return bool(getattr(parameter, "_fsdp_flattened", False))


def shards_layers(model: nn.Module) -> bool:
    """Whether parameters are sharded by something else than FSDP2 of torch 2.6 to 2.14, or by it and something else.

    Args:
        model: any.

    Returns:
        Whether a parameter is a DTensor that no module of FSDP2 has around it, or is cut along two dimensions of its
        mesh.
    """
    wrapper: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    roots = [module for module in model.modules() if issubclass(type(module), wrapper)]
    managed = {id(parameter) for root in roots for parameter in root.parameters()}
    for parameter in model.parameters():
        placements: Any = getattr(parameter, "placements", ())
        cuts = sum(not each.is_replicate() for each in placements)
        if is_sharded(parameter) and (id(parameter) not in managed or cuts > 1):
            return True
    return False


def arrived(value: Tensor) -> Tensor:
    """A tensor whose memory can be read: the result of a collective of torch 2.4 to 2.14 may be on its way.

    Args:
        value: any tensor.

    Returns:
        The same values, differentiable.
    """
    if type(value).__name__ == "AsyncCollectiveTensor":
        return value.clone()  # an operation waits, and takes the values out of the wrapper
    return value


def after_backward(function: Callable[[], None]) -> None:
    """Lets the running backward pass call a function at its end; call it in a backward. In torch 2.4 to 2.14.

    Args:
        function: without arguments.

    Raises:
        UnsupportedTorchError: if torch cannot.
    """
    engine: Any = getattr(torch.autograd.Variable, "_execution_engine", None)
    if engine is None:
        raise UnsupportedTorchError(
            "averaging gradients of amplitudes",
            torch.__version__,
            "a call at the end of a backward",
            "Wrap the model in DistributedDataParallel.",
        )
    engine.queue_callback(function)


def is_joined(module: nn.Module) -> bool:
    """Whether a wrapper runs in the context ``Join`` of torch 2.4 to 2.14, which lets ranks end early.

    Args:
        module: such as a DistributedDataParallel.

    Returns:
        Whether it does.
    """
    return bool(getattr(vars(module).get("_join_config"), "enable", False))


_PIPELINE = "torch.distributed.pipelining.stage"
_INFERENCES = ("_shape_inference", "_forward_metadata_inference")


def infers_shapes() -> bool:
    """Whether a pipeline stage runs this forward for the shapes alone, on memory that nobody has written to.

    Returns:
        Whether it does; torch 2.5 to 2.14.
    """
    if _PIPELINE not in sys.modules:
        return False
    return any(
        frame.f_code.co_name in _INFERENCES and frame.f_globals.get("__name__") == _PIPELINE
        for frame in callers(sys._getframe())
    )
