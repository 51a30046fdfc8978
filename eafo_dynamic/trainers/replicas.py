"""Several processes that train one model: what wrappers such as DDP must know of the corrections."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import nn

from eafo_dynamic.apply.hosting import Hosting
from eafo_dynamic.density.ranks import world_size
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.internals.torch_internals import DDP_IGNORED, own_buffers
from eafo_dynamic.policy.gradients import average_gradients, reached
from eafo_dynamic.policy.options import Options

__all__ = ["Replicas", "average_gradients", "check_strategy", "with_mesh"]

_SHARDING = ("FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")
_Options = TypeVar("_Options", bound=Options)


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
            "Use DDPStrategy, or ModelParallelStrategy with fully_shard in configure_model.",
        )
    if getattr(strategy, "_start_method", "popen") != "popen" and getattr(strategy, "global_rank", 0) == 0:
        warnings.warn(
            "EAFO: the strategy trains in processes of its own, and the model of this script gets its weights back "
            "without the corrections. Load the checkpoint with apply_from_checkpoint, or use strategy='ddp'.",
            stacklevel=2,
        )


def with_mesh(options: _Options, strategy: object) -> _Options:
    """Tells the options which ranks hold shards of one layer, where a strategy of Lightning knows it.

    Args:
        options: of the corrections.
        strategy: a trainer's, whose processes have found each other.

    Returns:
        The options, with ``tensor_parallel`` where it was None and a ModelParallelStrategy has such ranks.
    """
    kinds = [kind.__name__ for kind in type(strategy).__mro__]
    if "ModelParallelStrategy" not in kinds or options.tensor_parallel is not None:
        return options
    mesh = cast(Any, strategy).device_mesh["tensor_parallel"]
    if mesh.size() == 1:
        return options
    return replace(options, tensor_parallel=mesh)


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
        return reached(output, trained)
