"""Which modules are activations, by registry or by what they do, and which may call some."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from eafo_dynamic.correction.bases import Base, activation_types, as_base
from eafo_dynamic.find.probe import forked_random_states
from eafo_dynamic.find.wrapped import CarriesCorrection, plain_view

__all__ = ["is_soft_cap", "is_straight", "looks_like_activation", "may_call_functions"]

_CONTAINERS = (nn.ModuleDict, ParametrizationList)
_MOST = 2**16  # parameters of an activation: a few a channel


def may_call_functions(module: nn.Module) -> bool:
    """Whether a module's own code might call an activation: not a plain layer of torch without modules inside.

    Args:
        module: any.

    Returns:
        Whether it might.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return False
    kind = type(module)
    children = list(module.children())
    if is_parametrized(module):
        kind = kind.__bases__[0]
        parametrizations = cast(nn.Module, module.parametrizations)
        parts = [part for part in parametrizations.modules() if type(part) not in _CONTAINERS]
        if any(may_call_functions(part) for part in parts):
            return True
        children.remove(parametrizations)
    plain = kind.__module__.startswith(("torch.nn.modules", "torch.nn.utils.parametrizations")) and not children
    return not plain or isinstance(module, activation_types())


def looks_like_activation(module: nn.Module) -> bool:
    """By registry, or by behaviour: a module that maps a tensor pointwise and deterministically.

    Args:
        module: any.

    Returns:
        Whether the module is an activation.
    """
    if isinstance(module, (nn.Identity, CarriesCorrection)):
        return False
    if isinstance(module, activation_types()):
        return True
    kind = plain_view(module)
    if type(kind).__module__.startswith("torch.nn.") or not _is_small(kind):
        return False
    children = list(module.children())
    if not all(map(looks_like_activation, children)) or not _behaves_pointwise(kind):
        return False
    if not all(as_base(child).traits.gate for child in children):
        return as_base(kind).traits.gate  # relu6(x + 3) / 6; else the hidden activation inside has its own site
    return not any(_same_function(kind, child) for child in children)


def is_soft_cap(base: Base) -> bool:
    """Whether a function is c tanh(z / c) with a c other than 1: it bounds scores, and is no hidden activation.

    Args:
        base: any.

    Returns:
        Whether it is.
    """
    z = torch.tensor([-7.0, -1.0, -0.1, 0.5, 3.0, 40.0, 1e6], dtype=torch.float64, device="cpu")
    with torch.no_grad():
        values = base(z)
    cap = values[-1]
    return bool(cap > 0) and float(cap) != 1.0 and torch.allclose(values, cap * torch.tanh(z / cap))


def is_straight(base: Base) -> bool:
    """Whether the values of a function lie on a straight line, whatever its slope is said to be.

    A gradient scaler, ``x * 0.1 + x.detach() * 0.9``, is the identity with a derivative of 0.1.

    Args:
        base: any.

    Returns:
        Whether they do.
    """
    z = torch.linspace(-30.0, 30.0, 1201, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        values = base(z)
    line = torch.lerp(values[0], values[-1], (z - z[0]) / (z[-1] - z[0]))
    return torch.allclose(values, line, rtol=1e-6, atol=1e-6)


def _is_small(module: nn.Module) -> bool:
    """Whether a module has no more parameters than an activation may have, so that it can be tried out."""
    parameters = list(module.parameters())
    return not any(is_lazy(p) or p.is_meta for p in parameters) and sum(p.numel() for p in parameters) <= _MOST


def _same_function(module: nn.Module, child: nn.Module) -> bool:
    """Whether a module only hands its input to a child: then the child is the activation."""
    values = torch.linspace(-3.0, 3.0, 24, dtype=torch.float32, device="cpu")
    with forked_random_states(), torch.no_grad():
        outer, inner = (copy.deepcopy(each).cpu().float()(values.clone()) for each in (module, child))
    return torch.equal(outer, inner)


def _behaves_pointwise(module: nn.Module) -> bool:
    """Runs a copy of the module on small tensors: f acts on each element alone, twice the same.

    The identity is none, nor is a function of flat steps: a quantiser, or a sign.

    Returns:
        Whether it does.
    """
    values = torch.linspace(-3.0, 3.0, 24, dtype=torch.float32, device="cpu")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0), device="cpu")
    try:
        with forked_random_states(), torch.no_grad():
            probe = copy.deepcopy(module).cpu().float()
            one = probe(values.view(2, 12).clone())
            two = probe(values[order].view(2, 12).clone())
            flat = probe(values.view(1, 2, 3, 4).clone())
            half = probe((values + (values > 0.5) * 2.0).view(2, 12).clone())
            near = probe((values + 1e-3).view(2, 12).clone())
    except Exception:  # whatever a foreign module raises on a tensor it was not made for: it is no activation
        return False
    if not isinstance(one, Tensor) or one.shape != (2, 12) or not one.is_floating_point():
        return False
    before, kept = one.flatten(), values <= 0.5
    pointwise = (
        torch.allclose(before[order], two.flatten())
        and torch.allclose(before, flat.flatten())
        and torch.allclose(before[kept], half.flatten()[kept])  # not even through a mean of all elements
    )
    steps = (before == near.flatten()).sum() > values.numel() - 4 and before.unique().numel() > 1
    return pointwise and not steps and not torch.equal(before, values)
