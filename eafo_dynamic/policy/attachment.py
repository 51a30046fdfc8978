"""Mistakes of attaching too late, in a loop of one's own: said once, where they would cost a whole training."""

from __future__ import annotations

import copy
import functools
import gc
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from eafo_dynamic.errors import SiteError, printable
from eafo_dynamic.internals.torch_internals import is_joined

__all__ = ["JoinWatch", "OptimizerWatch", "refuse_replicas", "thaw_under_adapters", "wrapper_of_shards"]

_FIRST_ATTACH = (
    "Attach first, then wrap: controller = EAFOController.attach(model); model = DistributedDataParallel(model)."
)
_FIRST_ATTACH_FSDP = (
    "Attach first, then wrap: controller = EAFOController.attach(model); fully_shard(model, "
    "**controller.shard_options())."
)


def refuse_replicas(model: nn.Module) -> None:
    """Refuses a model that DistributedDataParallel or a kind of FSDP has wrapped already.

    It has listed the parameters whose gradients it averages, so that the amplitudes would drift apart on the ranks.

    Args:
        model: about to be wrapped.

    Raises:
        SiteError: if the model is a wrapper, has one inside, or has modules that are inside one.
    """
    for module in model.modules():
        kind = wrapper_of_shards(module)
        if kind:
            raise SiteError(f"{type(model).__name__} is wrapped in {kind} already. {_FIRST_ATTACH_FSDP}")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise SiteError(f"{type(model).__name__} is wrapped in DistributedDataParallel already. {_FIRST_ATTACH}")
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return  # nobody can have made one
    if _is_replicated(model):
        gc.collect()  # one that nobody uses any more does not count
        if _is_replicated(model):
            raise SiteError(
                f"a DistributedDataParallel has wrapped this {type(model).__name__} already. {_FIRST_ATTACH}"
            )
    around = _shards_around(model)
    if around:
        raise SiteError(f"{around} has wrapped a model around this {type(model).__name__}. {_FIRST_ATTACH_FSDP}")


def wrapper_of_shards(module: object) -> str:
    """Says what cuts the parameters of a module into shards, if anything.

    Args:
        module: any.

    Returns:
        ``FullyShardedDataParallel``, ``fully_shard`` or nothing.
    """
    wrappers = sys.modules.get("torch.distributed.fsdp")
    for name, said in {"FullyShardedDataParallel": "FullyShardedDataParallel", "FSDPModule": "fully_shard"}.items():
        if issubclass(type(module), getattr(wrappers, name, ())):
            return said
    return ""


def _shards_around(model: nn.Module) -> str:
    """What cuts into shards, of this process, that has the model as a part of it."""
    for each in gc.get_objects():
        kind = wrapper_of_shards(each)
        if kind and any(module is model for module in each.modules()):
            return kind
    return ""


def _is_replicated(model: nn.Module) -> bool:
    """Whether a DistributedDataParallel of this process has the model, or a part of it."""
    return bool(_replicas_of(model))


def _replicas_of(model: nn.Module) -> list[nn.Module]:
    """The objects DistributedDataParallel of this process that have the model, or a part of it."""
    # by type(), since isinstance asks an object's own __class__, which may do anything
    replicas: list[Any] = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
    own = {id(module) for module in model.modules()}
    return [each for each in replicas if any(id(module) in own for module in each.modules())]


class JoinWatch:
    """Refuses rounds in torch's context ``Join``: a rank that has ended takes no part in them, and others would wait.

    Args:
        model: the wrapped model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._replicas: list[weakref.ref[Any]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> JoinWatch:
        return JoinWatch(copy.deepcopy(self._model, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return JoinWatch, (self._model,)

    def check(self) -> None:
        """Call before a round.

        Raises:
            SiteError: if the model runs in ``Join`` now.
        """
        if self._replicas is None:
            self._replicas = [weakref.ref(each) for each in _replicas_of(self._model)]
        alive = [replica for replica in (reference() for reference in self._replicas) if replica is not None]
        if any(is_joined(replica) for replica in alive):
            raise SiteError(
                f"{type(self._model).__name__} runs in the context Join, in which a rank that has ended leaves update "
                "rounds waiting. Give every rank equally many batches, such as by DistributedSampler(drop_last=True), "
                "and leave Join out."
            )


def thaw_under_adapters(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> bool:
    """Lets amplitudes train again that PEFT has frozen with the rest of its base model.

    Only if all of them are frozen and layers of PEFT are there: what a user has frozen stays so.

    Args:
        model: the wrapped model, in which PEFT puts its layers.
        trained: the amplitudes that the loss trains, by their parameter names.

    Returns:
        Whether there were any.
    """
    if not trained or any(amplitude.requires_grad for amplitude in trained.values()):
        return False
    if not any(type(module).__module__.startswith("peft.") for module in model.modules()):
        return False
    for amplitude in trained.values():
        amplitude.requires_grad_(True)
    return True


class OptimizerWatch:
    """Warns once if amplitudes that the loss should train are in no optimiser.

    An optimiser that has stepped the parameters around a site and does not hold the site's amplitude has been made
    before it. Where none has stepped those parameters, as in the turns of a GAN, nothing is known yet.

    Args:
        model: the wrapped model.
        trained: called for the amplitudes that the loss trains, by their parameter names; a model that is moved may
            have new ones.
    """

    def __init__(self, model: nn.Module, trained: Callable[[], Mapping[str, nn.Parameter]]) -> None:
        self._model = model
        self._trained = trained
        self._settled: set[str] = set()  # amplitudes that have been seen in an optimiser
        self._stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._steps = 0
        _listen()
        _WATCHES.add(self)

    def note(self, optimizer: Optimizer) -> None:
        """Takes note of an optimiser that has stepped, any of the process.

        Args:
            optimizer: it.
        """
        self._stepped.add(optimizer)

    def is_done(self) -> bool:
        """Looks at the optimisers that have stepped so far, and warns; call it after each step.

        Returns:
            Whether there is nothing left to look for.
        """
        self._steps += 1
        if self._steps & (self._steps - 1):
            return False  # looks after steps 1, 2, 4, 8, ..., since it goes through all parameters
        amplitudes = self._trained()
        waiting = [name for name in amplitudes if name not in self._settled]
        groups = [group for optimizer in self._stepped for group in optimizer.param_groups]
        held: set[int] = set()
        for group in groups:
            held.update(id(parameter) for parameter in group["params"])
        missed: list[str] = []
        for name in waiting:
            if id(amplitudes[name]) in held:
                self._settled.add(name)
            elif amplitudes[name].requires_grad and self._is_stepped_around(name, amplitudes, held):
                missed.append(name)
        if missed:
            warnings.warn(
                f"EAFO: {len(missed)} of {len(amplitudes)} amplitudes are in no optimiser and stay as they are, first "
                f"of them {printable(missed[0])}: the optimiser was made before attach, or leaves them out. Make it "
                "after attach, or call own_group([optimizer], controller.amplitudes, model); or attach with "
                "policy='entropy', which needs no optimiser.",
                stacklevel=3,
            )
        done = bool(missed) or self._settled >= amplitudes.keys()
        if done:
            _WATCHES.discard(self)
        return done

    def _is_stepped_around(self, name: str, amplitudes: Mapping[str, nn.Parameter], held: set[int]) -> bool:
        """Whether an optimiser holds what is trained in the nearest module around an amplitude that trains anything."""
        own = {id(amplitude) for amplitude in amplitudes.values()}
        while name:
            name, _, _ = name.rpartition(".")
            parameters = self._model.get_submodule(name).parameters()
            around = [parameter for parameter in parameters if parameter.requires_grad and id(parameter) not in own]
            if around:
                return any(id(parameter) in held for parameter in around)
        return False


_WATCHES: weakref.WeakSet[OptimizerWatch] = weakref.WeakSet()


@functools.cache
def _listen() -> None:
    """Hears the steps of all optimisers from now on, for good.

    A hook that is taken away, as by garbage collection, while torch goes through its hooks ends the step with an error.
    """
    register_optimizer_step_post_hook(_note)


def _note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return  # in a compiled step nothing can be noted
    for watch in list(_WATCHES):
        watch.note(optimizer)
