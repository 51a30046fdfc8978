"""Activations that no example has reached: the first training forward that calls one makes it known."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from eafo_dynamic.apply.site import Site
from eafo_dynamic.errors import printable
from eafo_dynamic.find.sites import NOT_REACHED, SiteReport
from eafo_dynamic.internals.torch_internals import constant_result

__all__ = ["forget_unmet", "watch_unmet"]

_UNMET = "eafo_unmet"  # where a module keeps the handle of its hook

_ALL: weakref.WeakSet[_Unmet] = weakref.WeakSet()


class _Unmet:
    """A hook before the forward of an activation that is left plain; copied and pickled with it.

    Args:
        name: FQN of the activation.
        site: a site of the model, whose next row of the log says it.
    """

    def __init__(self, name: str, site: Site) -> None:
        self.name = name
        self.site = site
        self.is_met = False
        _ALL.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _ALL.add(self)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        if is_compiling():
            _meet_in_graph(self.name)
        else:
            self.meet()

    def meet(self) -> None:
        """Takes note of a call in a training, and warns of the first one."""
        self.site.switch.met_unknown = True
        if self.is_met:
            return
        self.is_met = True
        message = f"{printable(self.name)}, which no example has reached, is called in this training"
        self.site.collector.passed_over = message
        warnings.warn(
            f"EAFO: {message}; it is left plain. Search with an example that reaches it, or adopt it: "
            "EAFOCallback(adopt=True), or controller.adopt(example).",
            stacklevel=2,
        )


@constant_result
def _meet_in_graph(name: str) -> bool:
    """Takes note of a call while ``torch.compile`` reads the code."""
    for unmet in list(_ALL):
        if unmet.name == name:
            unmet.meet()
    return True


def watch_unmet(model: nn.Module, report: SiteReport, site: Site) -> None:
    """Lets the activations that an example has not reached make themselves known when a training reaches them.

    Args:
        model: wrapped.
        report: of the search by which it was wrapped.
        site: one of its sites.
    """
    for module in model.modules():
        forget_unmet(module)
    for found in report.skipped:
        if found.reason.startswith(NOT_REACHED):
            module = model.get_submodule(found.module)
            if not isinstance(module, torch.jit.ScriptModule):
                vars(module)[_UNMET] = module.register_forward_pre_hook(_Unmet(found.module, site))


def forget_unmet(module: nn.Module) -> None:
    """Takes back what ``watch_unmet`` did.

    Args:
        module: any.
    """
    handle = vars(module).pop(_UNMET, None)
    if handle is not None:
        handle.remove()
