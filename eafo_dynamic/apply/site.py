"""The state that every corrected call keeps; no policy here."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from eafo_dynamic.apply.swaps import Swap, made_swap
from eafo_dynamic.correction.bases import Base
from eafo_dynamic.correction.kernels import (
    EPS,
    TERMS,
    Backend,
    Known,
    Terms,
    corrected,
    corrected_,
    corrected_nested,
    correction_of,
    describe,
    per_channel,
    resolve_backend,
    values_of,
)
from eafo_dynamic.correction.shape import correction_shape, is_closed_form
from eafo_dynamic.correction.table import table_half_width, tabulate
from eafo_dynamic.correction.terms import TIED, TIED_TERM, amplitude_names
from eafo_dynamic.density.collector import Collector
from eafo_dynamic.density.estimators import Density, Gaussian
from eafo_dynamic.find.selection import FoundSite
from eafo_dynamic.internals.torch_internals import (
    arrived,
    forget,
    infers_shapes,
    own_buffers,
    own_parameters,
    running_backward,
    transforms_active,
    version_of,
)

__all__ = [
    "Form",
    "Site",
    "Switch",
    "amplitude_dtype",
    "apply_correction",
    "describe_state",
    "register",
    "shape_table",
    "standard_normal",
]

_PLAIN = (Tensor, nn.Parameter)
_PARTS = ("eps", "shape", "table", "lift", "gain", "slope")  # of a site, as its keys


def standard_normal() -> Gaussian:
    """The density that a correction assumes before it has seen data: mu = 0, sigma = 1.

    Returns:
        A Gaussian of one site.
    """
    # whatever the defaults are: a model may be built in half precision, or on "meta"
    zero = torch.zeros(1, dtype=torch.float32, device="cpu")
    return Gaussian(zero, zero + 1.0)


def amplitude_dtype() -> torch.dtype:
    """The dtype of a new site's tensors: half precision would swallow the optimiser's small steps of an amplitude.

    Returns:
        The default dtype, or float32 where that is narrower.
    """
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def shape_table(base: Base, density: Density, tabulated: bool = False) -> Tensor | None:
    """Table of the correction shape of one base.

    Args:
        base: the base activation.
        density: density of its pre-activations, of one site.
        tabulated: whether to make a table in any case, for densities that will not stay Gaussian.

    Returns:
        Coefficients [4, intervals], float32; None where the closed form u exp(-u^2/2) is exact.
    """
    if not tabulated and is_closed_form(base, density):
        return None
    return tabulate(correction_shape(base, density))[0].to(torch.float32)


@dataclass(frozen=True)
class Form:
    """What the functions of a model's sites are made of; fixed when it is wrapped.

    Args:
        eps_init: starting amplitude.
        tabulated: whether every shape is a table, as densities other than the Gaussian need.
        per_channel: whether every channel has an amplitude of its own.
        terms: what is added to the base, from ``resolve_terms``.
    """

    eps_init: float = 0.01
    tabulated: bool = False
    per_channel: bool = False
    terms: tuple[str, ...] = TIED

    def start(self, name: str) -> float:
        """The amplitude that a term begins with: eps is small, and the others are 0.

        Args:
            name: of the amplitude.

        Returns:
            The amplitude.
        """
        return float(self.eps_init) if name == EPS.name else 0.0


@dataclass
class Switch:
    """What all sites of one model do at the moment.

    Args:
        collecting: whether forwards leave a sample of their pre-activations.
        backend: what computes them for plain tensors.
        options: those of the training that moved them, text and numbers only; None if there was none.
        met_unknown: whether a call has come by that is left plain since no example has made it; whoever has seen that
            sets it back.
    """

    collecting: bool = False
    backend: Backend = "auto"
    options: Mapping[str, object] | None = None
    met_unknown: bool = False

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "collecting": False}  # nobody would fetch the samples of a copy


@dataclass(eq=False)
class Site:
    """One corrected call.

    Its tensors are registered on its host, so they train, move and are saved with the model: one parameter for each of
    its terms, ``eafo_<index>_eps``, ``_lift``, ``_gain`` and ``_slope`` (0-dim, or one a channel), buffers
    ``eafo_<index>_shape`` (mu, sigma) and ``eafo_<index>_table`` (ghat, where it has no closed form).

    Args:
        name: the site's name, as in the report of ``find_sites``.
        index: number of the site on its host.
        module_name: FQN of the activation module; of a functional call, of the module that makes it.
        switch: shared by all sites of the model.
        collector: sample of the pre-activations.
        function: name and hyper-parameters of a functional call; None where a module is called.
        enabled: whether the correction acts.
        base: name of the function that is computed in place of the activation's own; None for its own.
        observes: whether it is watched only: its tensors are no parameters and are not saved.
        start: eps and table that the site begins with; None if it was pickled by version 0.1.0.
        found: what the site was made from, with the form of its function; likewise.
    """

    name: str
    index: int
    module_name: str
    switch: Switch
    collector: Collector = field(default_factory=Collector)
    function: tuple[str, dict[str, object]] | None = None
    enabled: bool = True
    base: str | None = None
    observes: bool = field(default=False, init=False)
    start: tuple[float, Tensor | None] | None = field(default=None, init=False, repr=False)
    found: tuple[FoundSite, Form] | None = field(default=None, init=False, repr=False)
    _names: tuple[str, ...] | None = field(default=None, init=False, repr=False)
    _zero_seen: tuple[tuple[tuple[int, int | None], ...], bool] | None = field(default=None, init=False, repr=False)

    @functools.cached_property
    def swap(self) -> Swap | None:
        """The function in place of the activation's own."""
        return None if self.base is None else made_swap(self.base)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "swap"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # not the keys: a site that was pickled by version 0.1.0 has one more
        vars(self).update({name: value for name, value in state.items() if name != "keys"})

    @functools.cached_property
    def keys(self) -> tuple[str, ...]:
        """Attribute names on the host: eps, shape, table, lift, gain and slope; None there for what there is not."""
        return tuple(f"eafo_{self.index}_{name}" for name in _PARTS)

    def key(self, name: str) -> str:
        """Attribute name of one tensor on the host.

        Args:
            name: of a term, "shape" or "table".

        Returns:
            The name.
        """
        return self.keys[_PARTS.index(name)]

    def names(self, host: nn.Module) -> tuple[str, ...]:
        """The terms of the site.

        Args:
            host: where the site's tensors are registered.

        Returns:
            Names of their amplitudes, in order.
        """
        if self._names is None:  # it was pickled by an earlier version
            self._names = tuple(name for name in TERMS if getattr(host, self.key(name), None) is not None)
        return self._names

    def register(
        self, host: nn.Module, base: Base, form: Form, channels: int | None, device: torch.device | None = None
    ) -> None:
        """Creates the site's tensors on its host, beside the host's own.

        Args:
            host: the activation module itself, or the module that calls it.
            base: the function it computes.
            form: what the site's function is made of.
            channels: number of channels, for one amplitude each; None: one for all.
            device: where the host's inputs live.
        """
        size = () if channels is None else (channels,)
        dtype = amplitude_dtype()
        self._names = amplitude_names(form.terms)
        table = shape_table(base, standard_normal(), form.tabulated) if TIED_TERM in form.terms else None
        self.start = (float(form.eps_init), table)
        for name in TERMS:
            amplitude = None
            if name in self._names:
                amplitude = nn.Parameter(torch.full(size, form.start(name), dtype=dtype, device=device))
            register(host, self.key(name), amplitude)
        host.register_buffer(self.key("shape"), torch.tensor([0.0, 1.0], dtype=dtype, device=device))
        register(host, self.key("table"), None if table is None else table.to(device, copy=True))

    @torch.no_grad()
    def reset(self, host: nn.Module) -> None:
        """Gives the site's tensors the values that they had when the model was wrapped.

        Args:
            host: where they are registered.
        """
        if self.start is None:
            return
        eps_init, table_then = self.start
        for name, amplitude in zip(self.names(host), self.amplitudes(host), strict=True):
            amplitude.fill_(eps_init if name == EPS.name else 0.0)
        shape = getattr(host, self.key("shape"))
        shape.copy_(torch.tensor([0.0, 1.0], dtype=shape.dtype, device="cpu"))
        table = getattr(host, self.key("table"))
        if table is not None and table_then is not None:
            table.copy_(table_then)

    def unregister(self, host: nn.Module) -> None:
        """Removes the site's tensors from its host.

        Args:
            host: where they are registered.
        """
        for key in self.keys:
            forget(host, key)

    def amplitudes(self, host: nn.Module) -> list[nn.Parameter]:
        """The site's amplitudes, one parameter a term.

        Args:
            host: where they are registered.

        Returns:
            As many as the site has names.
        """
        names = self.names(host)
        if is_compiling():
            return [getattr(host, self.key(name)) for name in names]
        # a module's own __getattr__ takes ten times as long as a look where it looks
        parameters: Any = own_parameters(host)
        keys = _amplitude_keys(self.keys, names)
        try:
            return [parameters[key] for key in keys]
        except KeyError:  # kept elsewhere, as where it is parametrized
            return [getattr(host, key) for key in keys]

    def terms(self, host: nn.Module, z: Tensor, amplitudes: Sequence[Tensor] | None = None) -> Terms:
        """The operands of the site's correction.

        Args:
            host: where the site's tensors are registered.
            z: pre-activations, any shape.
            amplitudes: those of the site, where they are known already.

        Returns:
            Amplitudes, shape and table, where z lives.
        """
        if amplitudes is None:
            amplitudes = self.amplitudes(host)
        stacked = amplitudes[0].unsqueeze(0) if len(amplitudes) == 1 else torch.stack(list(amplitudes))
        shape, table = self._shape_and_table(host)
        near = shape.is_cpu and z.is_cpu
        if not near and shape.device != z.device:  # of a model that is spread over several devices
            stacked, shape = stacked.to(z.device), shape.to(z.device)
            table = None if table is None else table.to(z.device)
        if stacked.dim() > 1:
            stacked = per_channel(stacked, z, self.collector.channel_dim)
        return Terms(stacked, shape, table, table_half_width(), self.names(host))

    def _shape_and_table(self, host: nn.Module) -> tuple[Tensor, Tensor | None]:
        _, shape, table, *_ = self.keys
        if is_compiling():
            return getattr(host, shape), getattr(host, table)
        buffers: Any = own_buffers(host)
        return (
            buffers[shape] if shape in buffers else getattr(host, shape),
            buffers[table] if table in buffers else getattr(host, table),
        )

    def correction(self, host: nn.Module, z: Tensor, base: Tensor | None = None) -> Tensor:
        """The site's correction alone.

        Args:
            host: where the site's tensors are registered.
            z: pre-activations, any shape.
            base: base(z), of the shape and dtype of z; needed where there is a gain.

        Returns:
            c(z), of the shape and dtype of z.
        """
        return correction_of(z, self.terms(host, z), base)

    def idle(self, host: nn.Module) -> bool:
        """Whether the site has nothing to do: no sample to take, and a correction that is off or certainly zero.

        Args:
            host: where the site's tensors are registered.

        Returns:
            Whether f is the base itself, in value and gradient.
        """
        if self.switch.collecting and host.training:
            return False
        return not self.enabled or self._is_base(self.amplitudes(host), host.training)

    def _is_base(self, amplitudes: Sequence[Tensor], training: bool) -> bool:
        """Whether a correction that is on is certainly zero, and leaves no gradient."""
        if self.swap is not None:
            return False
        # spelled out: every call of every site comes by here, and a generator takes as long as all that it looks at
        if torch.is_grad_enabled():
            for each in amplitudes:
                if each.requires_grad:
                    return False
        return self._is_zero(amplitudes, training)

    def _is_zero(self, amplitudes: Sequence[Tensor], training: bool) -> bool:
        """Whether amplitudes are known to be zero; on an accelerator a training step never waits for them.

        Elsewhere than in training it is read once after each change there.

        Returns:
            Whether it is; False where it cannot be read.
        """
        if is_compiling() or torch.jit.is_tracing() or transforms_active():
            return False
        far = False
        for each in amplitudes:
            if type(each) not in _PLAIN:
                return False
            if not _costs_nothing_to_read(each):
                far = True
            elif each.any().item() if each.dim() else each.item():
                return False
        return not far or self._seen_zero(amplitudes, training)

    def _seen_zero(self, amplitudes: Sequence[Tensor], training: bool) -> bool:
        if any(each.is_meta or each.is_inference() for each in amplitudes):
            return False
        versions = [version_of(each) for each in amplitudes]
        if None in versions:
            return False
        stamp = tuple(zip((each.data_ptr() for each in amplitudes), versions, strict=True))
        if self._zero_seen is None or self._zero_seen[0] != stamp:
            if training or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                return False
            self._zero_seen = stamp, not any(bool(each.any()) for each in amplitudes)
        return self._zero_seen[1]

    def __call__(
        self,
        host: nn.Module,
        base: Callable[[Tensor], Tensor],
        z: Tensor,
        inplace: bool,
        known: Known | None = None,
    ) -> Tensor:
        """Runs the corrected function.

        Args:
            host: where the site's tensors are registered.
            base: the original forward.
            z: pre-activations, any shape, dense or nested; see ``is_correctable``.
            inplace: whether the base overwrites its input; then so does the corrected function.
            known: what the original forward computes, with its derivative, where that is known.

        Returns:
            f(z); z itself, overwritten, if inplace.
        """
        # as idle does, but with one look at the amplitudes for all that follows
        collects = self.switch.collecting and host.training
        amplitudes: Sequence[Tensor] = ()
        if self.enabled:
            amplitudes = self.amplitudes(host)
        if not collects and (not self.enabled or self._is_base(amplitudes, host.training)):
            return base(z)
        if type(z) is not Tensor:
            z = arrived(z)
        if collects and not _repeats_or_infers():
            self.collector.observe(values_of(z) if z.is_nested else z)
        if not self.enabled:
            return base(z)
        swap = self.swap
        if swap is not None:
            base, known = swap.function, None if is_compiling() else swap.known
        terms = functools.partial(self.terms, host, amplitudes=amplitudes)
        return apply_correction(base, terms, z, inplace, known, self.switch.backend)

    def describe(self, host: nn.Module) -> str:
        """Short text of the site's state.

        Args:
            host: where the site's tensors are registered.

        Returns:
            See ``describe_state``.
        """
        amplitudes = dict(zip(self.names(host), self.amplitudes(host), strict=True))
        return describe_state(amplitudes, getattr(host, self.key("shape")), self.switch.backend)

    def pass_over(self, host: nn.Module, value: object) -> None:
        """Takes down, where samples are taken, that a call could not be corrected.

        Args:
            host: where the site's tensors are registered.
            value: what the activation was called with.
        """
        if self.switch.collecting and host.training and not is_compiling():
            self.collector.passed_over = describe(value)


@functools.lru_cache(maxsize=256)
def _amplitude_keys(keys: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a site's keys under which its amplitudes stand; see ``Site.keys``."""
    return tuple(keys[_PARTS.index(name)] for name in names)


def _costs_nothing_to_read(eps: Tensor) -> bool:
    return eps.is_cpu


def register(host: nn.Module, key: str, value: Tensor | None) -> None:
    """Registers a parameter or buffer; None stays an attribute, since torch.export miscounts buffers that are None."""
    if value is None:
        vars(host)[key] = None
    elif isinstance(value, nn.Parameter):
        host.register_parameter(key, value)
    else:
        host.register_buffer(key, value)


def apply_correction(
    base: Callable[[Tensor], Tensor],
    terms: Callable[[Tensor], Terms],
    z: Tensor,
    inplace: bool,
    known: Known | None,
    backend: Backend = "auto",
) -> Tensor:
    """base(z) + c(z); z itself, overwritten, if inplace."""
    if z.is_nested:
        return corrected_nested(z, base, terms, inplace)
    return (corrected_ if inplace else corrected)(z, base, terms(z), known, backend)


def _recomputing() -> bool:
    """Whether this forward runs inside a backward, as activation checkpointing does; it has been sampled before.

    Returns:
        Whether it does.
    """
    return not is_compiling() and running_backward() != -1


def _repeats_or_infers() -> bool:
    """Whether this forward sees no new data: it runs again in a backward, or for the shapes of a pipeline stage."""
    return _recomputing() or (not is_compiling() and infers_shapes())


def describe_state(amplitudes: Mapping[str, Tensor], shape: Tensor, backend: Backend = "auto") -> str:
    """Short text of a site's state.

    Args:
        amplitudes: by the names of the terms, each 0-dim or one a channel (then their mean is shown).
        shape: mu and sigma.
        backend: what was asked for; shown is what tensors get where the site is.

    Returns:
        For example ``eps=+0.0100, mu=+0.000, sigma=1.000, backend=native``; without the last on other
        devices than a CPU and CUDA.
    """
    if shape.is_meta or any(each.is_meta for each in amplitudes.values()):
        return f"{', '.join(amplitudes)}, mu, sigma on meta"
    mu, sigma = shape.tolist()
    values = {name: float(each.detach().mean()) if each.numel() else math.nan for name, each in amplitudes.items()}
    state = ", ".join(f"{name}={value:+.4f}" for name, value in values.items()) + f", mu={mu:+.3f}, sigma={sigma:.3f}"
    if shape.device.type not in ("cpu", "cuda"):
        return state
    return f"{state}, backend={resolve_backend(backend, shape.device)}"
