"""Gradients of amplitudes that stay whole where a wrapper cuts the model's own parameters into shards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eafo_dynamic.apply.bank import Bank
from eafo_dynamic.density.ranks import RankGroup, world_size
from eafo_dynamic.errors import SiteError
from eafo_dynamic.internals.torch_internals import (
    after_backward,
    hide_from_compiler,
    is_flattened,
    is_sharded,
    shards_layers,
    tree_map_only,
)
from eafo_dynamic.policy.attachment import wrapper_of_shards

__all__ = ["SharedGradients", "average_gradients", "clip_gradients", "reached"]


class _Reach(torch.autograd.Function):
    """A loss as it is, which also sends a gradient of zero to every amplitude, so that all of them get a gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *amplitudes: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.like = [(eps.shape, eps.dtype, eps.device) for eps in amplitudes]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
        return (*grads, *zeros)


def reached(output: Any, amplitudes: Sequence[nn.Parameter]) -> Any:
    """What a forward returns, with a path of slope zero to every amplitude.

    Args:
        output: any nested structure of tensors; of a mapping with a loss, the loss alone gets the path.
        amplitudes: that require a gradient.

    Returns:
        The same values.
    """

    def reach(value: Tensor) -> Tensor:
        return _Reach.apply(value, *amplitudes) if value.requires_grad else value  # pyright: ignore[reportReturnType]

    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        return type(output)({**output, "loss": reach(output["loss"])})  # pyright: ignore[reportCallIssue]
    return tree_map_only(Tensor, reach, output)


class SharedGradients:
    """Averages the gradients of amplitudes over the ranks at the end of each backward, in one collective.

    The mean of equal numbers is that number, so that gradients which add up over several backwards stay right.
    Gradients are equal on all ranks before they are clipped. A site whose pre-activations are sharded over
    tensor-parallel ranks has a part of its gradient on each of them: it is summed over these.

    Acts from the first forward at which a parameter of the model is sharded, or from ``start``.

    Args:
        model: the wrapped model.
        bank: its sites.
        among: the ranks that train the model; None: all.
        tensor_parallel: those of them that hold shards of one layer; None: there are none.
        collect: called to let the coming forward leave samples.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank,
        among: RankGroup | None,
        tensor_parallel: RankGroup | None,
        collect: Callable[[], None],
    ) -> None:
        self._model = model
        self._bank = bank
        self._among = among
        self._tensor_parallel = tensor_parallel
        self._collect = collect
        self._acts = False
        self._awaits_end = False
        self._depth = 0
        self._seen: dict[int, nn.Parameter] = {}  # amplitudes that have their hooks
        self._is_split: dict[str, bool] = {}  # whether a site's pre-activations are sharded
        self._hooks: list[Any] = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedGradients:
        return self  # a copied model must not reach the amplitudes of its original

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()

    def release(self) -> None:
        """Takes all hooks back."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._seen.clear()

    def start(self) -> None:
        """Acts from now on, whether a parameter is sharded yet or not."""
        self._acts = True

    @property
    def acts(self) -> bool:
        """Whether the gradients of amplitudes are averaged here."""
        return self._acts

    def settle(self) -> None:
        """Call after the first step: a model whose parameters are whole by then is no sharded one."""
        if not self._acts:
            self.release()

    @property
    def _trained(self) -> list[nn.Parameter]:
        return [amplitude for amplitude in self._bank.amplitudes if amplitude.requires_grad]

    @hide_from_compiler
    def _enter(self, module: nn.Module, args: Any) -> None:
        if module is not self._model:
            return
        self._depth += 1
        if self._depth > 1 or not torch.is_grad_enabled():
            return
        if not self._acts:
            self._look()
        if not self._acts:
            return
        for name, amplitude in zip(self._names(), self._bank.amplitudes, strict=True):
            if is_sharded(amplitude):
                raise SiteError(
                    f"the amplitudes of {name} have been cut into shards. Attach first, then leave them whole: "
                    "fully_shard(model, **controller.shard_options())."
                )
            if id(amplitude) not in self._seen and amplitude.requires_grad:
                self._seen[id(amplitude)] = amplitude
                self._hooks.append(amplitude.register_hook(functools.partial(self._summed, name=name)))
                self._hooks.append(amplitude.register_post_accumulate_grad_hook(self._arrived))
        if self._unknown():
            self._collect()

    def _names(self) -> list[str]:
        names = self._bank.names
        return names * (len(self._bank.amplitudes) // len(names))

    def _look(self) -> None:
        """Finds out whether parameters are sharded."""
        if any(is_flattened(parameter) for parameter in self._model.parameters()):
            raise SiteError(
                "FullyShardedDataParallel puts parameters into flat ones, and an amplitude has to stay whole. Use "
                "fully_shard(model, **controller.shard_options()), or DistributedDataParallel."
            )
        sharded = [name for name, parameter in self._model.named_parameters() if is_sharded(parameter)]
        if sharded and self._tensor_parallel is None and shards_layers(self._model):
            raise SiteError(
                f"{sharded[0]} is sharded over tensor-parallel ranks, whose gradients of amplitudes are to be summed. "
                "Attach with tensor_parallel=, the mesh of these ranks, such as mesh['tensor']."
            )
        # a part that FSDP2 has gathered for its forward has whole parameters now
        is_gathered = any(wrapper_of_shards(module) for module in self._model.modules())
        self._acts = bool(sharded) or is_gathered or self._tensor_parallel is not None

    @hide_from_compiler
    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        if module is not self._model:
            return None
        self._depth -= 1
        if self._depth or not self._acts or not torch.is_grad_enabled() or not self._model.training:
            return None
        self._tell_split()
        trained = self._trained
        if not trained:
            return None
        return reached(output, trained)

    def _unknown(self) -> list[str]:
        if self._tensor_parallel is None:
            return []
        return [name for name in self._bank.names if name not in self._is_split]

    def _tell_split(self) -> None:
        """Tells sites whose pre-activations differ between tensor-parallel ranks, as shards do, from the others."""
        unknown = self._unknown()
        if self._tensor_parallel is None or not unknown:
            return
        of_sites = dict(zip(self._bank.names, self._bank.pending()["samples"], strict=True))
        rows = [_fingerprint([values for values, *_ in of_sites[name]]) for name in unknown]
        mine = torch.tensor(rows, dtype=torch.float32, device=self._bank.device)
        everyone = [torch.empty_like(mine) for _ in range(world_size(self._tensor_parallel))]
        torch.distributed.all_gather(everyone, mine, group=self._tensor_parallel.group)
        stacked = torch.stack(everyone)
        is_split = ~torch.isclose(stacked, stacked[:1], rtol=1e-4, equal_nan=True).all(0).all(-1)
        was_reached = (stacked[..., 0] > 0).all(0)
        for name, split, known in zip(unknown, is_split.tolist(), was_reached.tolist(), strict=True):
            if known:
                self._is_split[name] = split

    def _summed(self, grad: Tensor, name: str) -> Tensor:
        if not self._is_split.get(name, False):
            return grad
        return grad * world_size(self._tensor_parallel)  # the mean over all ranks then is the sum over these

    def _arrived(self, amplitude: Tensor) -> None:
        if not self._awaits_end:
            self._awaits_end = True
            after_backward(self._average)

    def _average(self) -> None:
        self._awaits_end = False
        average_gradients(self._trained, self._among)


def _fingerprint(samples: Sequence[Tensor]) -> list[float]:
    """Numbers by which samples can be told apart: how many, their sum and their sum of squares."""
    if not samples:
        return [0.0, 0.0, 0.0]
    values = torch.cat(list(samples)).to(torch.float64)
    return [float(values.numel()), float(values.abs().sum()), float(values.square().sum())]


def _nothing() -> None:
    return None


@torch.no_grad()
def average_gradients(amplitudes: Sequence[nn.Parameter], among: RankGroup | None = None) -> None:
    """Averages the gradients of amplitudes over ranks, in one collective.

    ``EAFOController`` does it by itself where the model's parameters are sharded; once more changes nothing.

    Args:
        amplitudes: the same on every rank; one without a gradient on this rank counts as zero.
        among: the ranks; None: all.
    """
    trained = [eps for eps in amplitudes if eps.requires_grad]
    ranks = world_size(among)
    if ranks == 1 or not trained:
        return
    gradients = [torch.zeros_like(eps) if eps.grad is None else eps.grad for eps in trained]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    torch.distributed.all_reduce(flat, group=None if among is None else among.group)
    means = flat.div_(ranks).split([eps.numel() for eps in trained])
    for eps, mean in zip(trained, means, strict=True):
        eps.grad = mean.view_as(eps).clone()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Clips the norm of all gradients together, those of whole parameters and of shards.

    Args:
        parameters: equal on all ranks, as far as they are whole.
        max_norm: of the gradients.
        norm_type: p of the p-norm.

    Returns:
        The norm before, 0-dim, equal on all ranks.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros(())
    by_mesh: dict[Any, list[Tensor]] = {}
    for grad in grads:
        by_mesh.setdefault(getattr(grad, "device_mesh", None), []).append(grad)
    norms = [_norm(group, norm_type) for group in by_mesh.values()]
    norm = torch.linalg.vector_norm(torch.stack([each.to(norms[0].device) for each in norms]), norm_type)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factor.to(grad.device))
    return norm


def _norm(grads: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norm of gradients that are whole, or of one mesh; whole on every rank."""
    norms = [torch.linalg.vector_norm(grad, norm_type).to(grads[0].device) for grad in grads]
    norm: Any = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if is_sharded(norm):
        return norm.full_tensor()
    return norm
