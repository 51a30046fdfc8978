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
from eafo_dynamic.correction.bases import PointwiseActivation, as_base
from eafo_dynamic.correction.kernels import (
    TERMS,
    Terms,
    correction_value,
    is_correctable,
    known_base,
    known_module,
    per_channel,
    prepare,
)
from eafo_dynamic.correction.table import table_half_width
from eafo_dynamic.density.estimators import Density
from eafo_dynamic.errors import CompoundingError, ConfigError
from eafo_dynamic.find.wrapped import CarriesCorrection
from eafo_dynamic.internals.torch_internals import own_buffers, own_parameters

__all__ = ["CRReLU", "CorrectedActivation"]


class CorrectedActivation(CarriesCorrection, nn.Module):
    """An activation with its correction, on its own.

        f(z) = (1 + gain) base(z) + slope z + sigma (eps ghat(u) + lift exp(-u^2 / 2)),   u = (z - mu) / sigma

    With all amplitudes 0, ``CorrectedActivation(base)(z)`` equals ``base(z)`` bit for bit.

    Args:
        base: a pointwise activation module; it is not changed.
        eps: starting amplitude, no unit; None: no such term.
        density: density of the pre-activations, of one site; None: standard normal.
        trainable: whether the amplitudes are parameters; otherwise buffers.
        lift: starting amplitude of the bell; with it ghat(u) = u exp(-u^2 / 2) whatever the base. None: one amplitude,
            for the ghat of base and density.
        gain: starting amplitude of the base itself; None: no such term.
        slope: starting amplitude of z; None: no such term.

    Attributes:
        names: of the terms that there are.
        channel_dim: dimension of the channels where every channel has an amplitude of its own, as after ``merge``: 1 or
            -1; None: 1 with four dimensions or more, the last one otherwise.
        other_base: name of the base, where ``merge`` has put another one in the place of the model's own.
    """

    if TYPE_CHECKING:  # torch.jit.script reads the values, and does not understand annotations that are text
        eps: Tensor | None
        shape: Tensor
        table: Tensor | None
        lift: Tensor | None
        gain: Tensor | None
        slope: Tensor | None
        names: list[str]
        channel_dim: int | None
        other_base: str | None

    def __init__(
        self,
        base: nn.Module,
        eps: float | None = 0.01,
        density: Density | None = None,
        trainable: bool = True,
        lift: float | None = None,
        gain: float | None = None,
        slope: float | None = None,
    ) -> None:
        super().__init__()
        density = density or standard_normal()
        self.base = base
        starts = {"eps": eps, "lift": lift, "gain": gain, "slope": slope}
        for name, start in starts.items():
            amplitude = None if start is None else torch.tensor(float(start), dtype=amplitude_dtype())
            register(self, name, nn.Parameter(amplitude) if trainable and amplitude is not None else amplitude)
        self.names = [name for name, start in starts.items() if start is not None]
        if not self.names:
            raise ConfigError("eps", eps, "a correction needs a term", "Give eps, lift, gain or slope.")
        self.register_buffer("shape", torch.stack([density.mean[0], density.std[0]]).to(torch.float32))
        tied = lift is None and eps is not None
        register(self, "table", shape_table(as_base(base), density) if tied else None)
        self.half_width = table_half_width()
        self.channel_dim = None
        self.other_base = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"channel_dim": None, "other_base": None, **state})  # a pickle need not say it
        if "names" not in vars(self):  # of an earlier version, which had no tails
            vars(self).update(gain=None, slope=None)
            self.names = [name for name in TERMS if getattr(self, name) is not None]
        if self._buffers.get("offset") is not None:
            raise CompoundingError("the pickled model")
        vars(self).pop("offset", None)  # which version 0.1.0 had where nothing compounded, too

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **named: Any) -> None:
        if f"{prefix}offset" in state_dict:  # torch would pass it over where it is not strict
            raise CompoundingError("the merged model")
        super()._load_from_state_dict(state_dict, prefix, *args, **named)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        prepare(self.shape.device)
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
            plain = self.base(z.clone() if getattr(self.base, "inplace", False) else z)
            amplitudes = per_channel(self.amplitudes(), z, self.channel_dim)
            c = correction_value(z, amplitudes, self.shape, self.table, self.half_width, self.names, plain)
            c = c.masked_fill(c == 0, -0.0)  # which leaves the base bit for bit
            out = z.copy_(plain + c) if getattr(self.base, "inplace", False) else plain + c
        return out

    def _run(self, z: Tensor) -> Tensor:
        if isinstance(z, torch.fx.Proxy):  # one node, as an activation of torch is; it shows no size to decide by
            tracer: Any = z.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (z,), {})
        if not is_correctable(z):
            return self.base(z)
        base = self.base
        known = None
        if not is_compiling():
            known = known_base(base.base.fn) if isinstance(base, PointwiseActivation) else known_module(base)
        return apply_correction(base, self._terms, z, getattr(base, "inplace", False), known)

    def _terms(self, z: Tensor) -> Terms:
        if is_compiling():
            rows, shape, table = [getattr(self, name) for name in self.names], self.shape, self.table
        else:
            rows, shape, table = [self._own(name) for name in self.names], self._own("shape"), self._own("table")
        amplitudes = rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)
        return Terms(per_channel(amplitudes, z, self.channel_dim), shape, table, self.half_width, tuple(self.names))

    def amplitudes(self) -> Tensor:
        """The amplitudes in one tensor; of what torch.jit.script can read.

        Returns:
            Shape [T], or [T, channels], in the order of ``names``.
        """
        rows: list[Tensor] = []
        if self.eps is not None:
            rows.append(self.eps)
        if self.lift is not None:
            rows.append(self.lift)
        if self.gain is not None:
            rows.append(self.gain)
        if self.slope is not None:
            rows.append(self.slope)
        return torch.stack(rows)

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
        amplitudes = {name: getattr(self, name) for name in self.names}
        state = describe_state(amplitudes, self.shape)
        known = self.channel_dim is not None and any(each.dim() for each in amplitudes.values())
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
