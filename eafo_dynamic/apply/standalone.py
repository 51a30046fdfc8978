"""Corrected activations as modules of their own, without a host or a policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from eafo_dynamic.apply.site import (
    amplitude_dtype,
    apply_correction,
    describe_state,
    register,
    shape_table,
    standard_normal,
)
from eafo_dynamic.correction.bases import as_base
from eafo_dynamic.correction.kernels import Terms, correction_value, is_correctable, known_module, per_channel, prepare
from eafo_dynamic.correction.table import table_half_width
from eafo_dynamic.density.estimators import Density
from eafo_dynamic.errors import CompoundingError
from eafo_dynamic.find.wrapped import CarriesCorrection
from eafo_dynamic.internals.torch_internals import own_buffers, own_parameters

__all__ = ["CRReLU", "CorrectedActivation"]

_TENSORS = ("eps", "shape", "table", "lift")


class CorrectedActivation(CarriesCorrection, nn.Module):
    """An activation with its correction, on its own: f(z) = base(z) + eps * sigma * ghat((z - mu) / sigma).

    With eps = 0, ``CorrectedActivation(base)(z)`` equals ``base(z)`` bit for bit.

    Args:
        base: a pointwise activation module; it is not changed.
        eps: starting amplitude, no unit.
        density: density of the pre-activations, of one site; None: standard normal.
        trainable: whether eps and lift are parameters; otherwise buffers.
        lift: starting amplitude of the bell, for free terms: f(z) = base(z) + sigma (eps u + lift) exp(-u^2 / 2);
            None: one amplitude for ghat alone.

    Attributes:
        channel_dim: dimension of the channels where every channel has an amplitude of its own, as after ``merge``: 1 or
            -1; None: 1 with four dimensions or more, the last one otherwise.
    """

    if TYPE_CHECKING:  # torch.jit.script reads the values, and does not understand annotations that are text
        eps: Tensor
        shape: Tensor
        table: Tensor | None
        lift: Tensor | None
        channel_dim: int | None

    def __init__(
        self,
        base: nn.Module,
        eps: float = 0.01,
        density: Density | None = None,
        trainable: bool = True,
        lift: float | None = None,
    ) -> None:
        super().__init__()
        density = density or standard_normal()
        self.base = base
        for name, start in (("eps", eps), ("lift", lift)):
            amplitude = None if start is None else torch.tensor(float(start), dtype=amplitude_dtype())
            register(self, name, nn.Parameter(amplitude) if trainable and amplitude is not None else amplitude)
        self.register_buffer("shape", torch.stack([density.mean[0], density.std[0]]).to(torch.float32))
        register(self, "table", None if lift is not None else shape_table(as_base(base), density))
        self.half_width = table_half_width()
        self.channel_dim = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"channel_dim": None, **state})  # a pickle need not say it
        if self._buffers.get("offset") is not None:
            raise CompoundingError("the pickled model")
        vars(self).pop("offset", None)  # which version 0.1.0 had where nothing compounded, too

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **named: Any) -> None:
        if f"{prefix}offset" in state_dict:  # torch would pass it over where it is not strict
            raise CompoundingError("the merged model")
        super()._load_from_state_dict(state_dict, prefix, *args, **named)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        prepare(self.eps.device)
        return self

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Calls ``forward``.

        Args:
            *args: the pre-activations.
            **named: the same under the name that the base's forward has for it, instead.

        Returns:
            What forward returns.
        """
        return super().__call__(*args, *named.values())

    def forward(self, z: Tensor) -> Tensor:
        """Applies the corrected function; of what torch.jit.script can read.

        Args:
            z: pre-activations, any shape, floating point.

        Returns:
            f(z), of the shape of z; z itself, overwritten, if the base is in place. What is no tensor of real numbers
            goes to the base alone.
        """
        if not torch.jit.is_scripting():
            out = self._run(z)
        elif not z.is_floating_point() or z.is_sparse:
            out = self.base(z)
        else:
            lift = per_channel(self.lift, z, self.channel_dim) if self.lift is not None else None
            eps = per_channel(self.eps, z, self.channel_dim)
            c = correction_value(z, eps, self.shape, self.table, self.half_width, lift)
            c = c.masked_fill(c == 0, -0.0)  # which leaves the base bit for bit
            out = z.copy_(self.base(z.clone()) + c) if getattr(self.base, "inplace", False) else self.base(z) + c
        return out

    def _run(self, z: Tensor) -> Tensor:
        if isinstance(z, torch.fx.Proxy):  # one node, as an activation of torch is; it shows no size to decide by
            tracer: Any = z.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (z,), {})
        if not is_correctable(z):
            return self.base(z)
        base = self.base
        known = None if is_compiling() else known_module(base)
        return apply_correction(base, self._terms, z, getattr(base, "inplace", False), known)

    def _terms(self, z: Tensor) -> Terms:
        if is_compiling():
            eps, shape, table, lift = self.eps, self.shape, self.table, self.lift
        else:
            eps, shape, table, lift = map(self._own, _TENSORS)
        if eps.dim():
            dim = self.channel_dim
            eps, lift = per_channel(eps, z, dim), None if lift is None else per_channel(lift, z, dim)
        return Terms(eps, shape, table, self.half_width, lift)

    def _own(self, name: str) -> Any:
        """A tensor by its name: a look where a module's own __getattr__ looks takes a tenth of its time."""
        found = own_buffers(self).get(name)
        if found is None:
            found = own_parameters(self).get(name)
        return getattr(self, name) if found is None else found

    def extra_repr(self) -> str:
        """Live amplitude and scale, and where the channels are known to be if each has an amplitude of its own.

        Returns:
            For example ``eps=+0.0100, mu=+0.000, sigma=1.000, backend=native``.
        """
        state = describe_state(self.eps, self.shape, lift=self.lift)
        known = self.eps.dim() and self.channel_dim is not None
        return f"{state}, channel_dim={self.channel_dim}" if known else state


class CRReLU(CorrectedActivation):
    """The paper's correction-regularised ReLU: relu(x) + eps x exp(-x^2 / 2), eps learned from 0.01.

    The static special case of the correction: ReLU base, standard normal density (arXiv 2405.12954, section 4). In
    float32 the outputs equal the formula written in three lines up to rounding, not always bit for bit.

    Args:
        eps: starting amplitude.
    """

    def __init__(self, eps: float = 0.01) -> None:
        super().__init__(nn.ReLU(), eps)
