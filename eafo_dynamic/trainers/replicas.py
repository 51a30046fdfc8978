"""Several processes that train one model: what wrappers such as DDP must know of the corrections."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from eafo_dynamic.apply.hosting import Hosting
from eafo_dynamic.density.ranks import world_size
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.internals.torch_internals import DDP_IGNORED, own_buffers, tree_map_only

__all__ = ["Replicas", "average_gradients", "check_strategy", "everyones"]

_SHARDING = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")


def check_strategy(strategy: object) -> None:
    """Refuses the strategies of Lightning that cut parameters into shards, and warns of those that leave the process.

    Args:
        strategy: a trainer's.

    Raises:
        ConfigError: if it is one of them.
    """
    kinds = [kind.__name__ for kind in type(strategy).__mro__]
    if set(kinds) & set(_SHARDING):
        raise ConfigError(
            "strategy",
            kinds[0],
            "cuts parameters into shards, and an amplitude is one number",
            "Use DDPStrategy; in a loop of your own, fully_shard with ignored_params and average_gradients.",
        )
    if getattr(strategy, "_start_method", "popen") != "popen" and getattr(strategy, "global_rank", 0) == 0:
        warnings.warn(
            "EAFO: the strategy trains in processes of its own, and the model of this script gets its weights back "
            "without the corrections. Load the checkpoint with apply_from_checkpoint, or use strategy='ddp'.",
            stacklevel=2,
        )


class _Reach(torch.autograd.Function):
    """A loss as it is, with a gradient of zero for every amplitude; with it each of them gets one in each backward."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *amplitudes: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.like = [(eps.shape, eps.dtype, eps.device) for eps in amplitudes]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
        return (*grads, *zeros)


class Replicas:
    """Lets DistributedDataParallel treat a wrapped model as it treats the plain one.

    A step that skips an activation leaves its amplitude without a gradient. The reducer would wait for it, and the run
    fail or hang, although no parameter of the plain model goes unused. So what the outermost forward returns gets a
    path, of slope zero, to every amplitude. And the sites' buffers, which every rank computes alike, are left out of
    the broadcast of buffers before each forward, which a model without buffers of its own does not have.

    Acts from when it is made, before the model is handed to DistributedDataParallel, until ``release``.

    Args:
        model: the module that DistributedDataParallel wraps.
        amplitudes: called for the amplitudes in each training forward.
    """

    def __init__(self, model: nn.Module, amplitudes: Callable[[], Sequence[nn.Parameter]]) -> None:
        self.model = model
        self._amplitudes = amplitudes
        self._depth = 0
        self._ignored_before: Any = vars(model).get(DDP_IGNORED)
        vars(model)[DDP_IGNORED] = self
        self._hooks = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def release(self) -> None:
        """Takes everything back; what DistributedDataParallel has been told, it keeps."""
        for hook in self._hooks:
            hook.remove()
        if vars(self.model).get(DDP_IGNORED) is self:
            del vars(self.model)[DDP_IGNORED]
            if self._ignored_before is not None:
                vars(self.model)[DDP_IGNORED] = self._ignored_before

    def __iter__(self) -> Iterator[str]:
        """Names to leave alone, as they are when DistributedDataParallel asks.

        Yields:
            The user's own, then the sites' buffers.
        """
        before = self._ignored_before
        yield from getattr(type(self.model), DDP_IGNORED, ()) if before is None else before
        for name, module in self.model.named_modules():
            keys = {key for site in module.eafo_sites for key in site.keys} if isinstance(module, Hosting) else set()
            for key in sorted(keys & own_buffers(cast(nn.Module, module)).keys()):
                yield f"{name}.{key}" if name else key

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        return self  # a copied model must not reach the amplitudes of its original

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module is self.model:
            self._depth += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        if module is not self.model:
            return None
        self._depth -= 1
        trained = [eps for eps in self._amplitudes() if eps.requires_grad]
        if self._depth or not trained or not torch.is_grad_enabled() or world_size() == 1:
            return None
        return _reached(output, trained)


def _reached(output: Any, amplitudes: Sequence[nn.Parameter]) -> Any:
    def reach(value: Tensor) -> Tensor:
        return _Reach.apply(value, *amplitudes) if value.requires_grad else value  # pyright: ignore[reportReturnType]

    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        return type(output)({**output, "loss": reach(output["loss"])})  # pyright: ignore[reportCallIssue]
    return tree_map_only(Tensor, reach, output)


def everyones(value: object) -> list[Any]:
    """One object of every rank; all ranks have to call it.

    Args:
        value: of tensors on the CPU and primitives.

    Returns:
        The objects, by rank.
    """
    gathered: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def average_gradients(amplitudes: Sequence[nn.Parameter]) -> None:
    """Averages the gradients of amplitudes over all ranks, in one collective.

    For wrappers that leave the amplitudes alone: ``fully_shard(model, ignored_params=set(...))``, which cannot cut a
    single number into shards. Call on every rank between backward and the optimiser's step.

    Args:
        amplitudes: the same on every rank; one without a gradient on this rank counts as zero.
    """
    trained = [eps for eps in amplitudes if eps.requires_grad]
    if world_size() == 1 or not trained:
        return
    flat = torch.cat([(torch.zeros_like(eps) if eps.grad is None else eps.grad).reshape(-1) for eps in trained])
    torch.distributed.all_reduce(flat)
    for eps, grad in zip(trained, flat.div_(world_size()).split([eps.numel() for eps in trained]), strict=True):
        eps.grad = grad.view_as(eps).clone()
