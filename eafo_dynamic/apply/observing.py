"""Sites that are watched and never corrected: no parameter, nothing in the state_dict, the plain outputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from eafo_dynamic.apply.site import Site
from eafo_dynamic.apply.surgery import hosted_sites
from eafo_dynamic.errors import SiteError
from eafo_dynamic.internals.torch_internals import forget, own_buffers, own_parameters

__all__ = ["observe_only", "refuse_corrected"]


@torch.no_grad()
def observe_only(hosted: Iterable[tuple[nn.Module, Site]]) -> None:
    """Switches corrections off for good.

    A site's tensors become buffers that are not saved, its amplitudes 0.

    Args:
        hosted: sites of a model that has just been wrapped, each with its host.
    """
    for host, site in hosted:
        site.observes, site.enabled = True, False
        for key in site.keys:
            amplitude, buffer = own_parameters(host).get(key), own_buffers(host).get(key)
            if amplitude is not None:
                buffer = torch.zeros_like(amplitude, requires_grad=False)
            if buffer is not None:
                forget(host, key)
                host.register_buffer(key, buffer, persistent=False)


def refuse_corrected(model: nn.Module) -> None:
    """Refuses to observe a model that has corrections: taking them out would change what it computes.

    Args:
        model: wrapped or not.

    Raises:
        SiteError: if it has any.
    """
    corrected = [site.name for _, site in hosted_sites(model) if not site.observes]
    if corrected:
        raise SiteError(
            f"policy='observe' leaves a model as it is, and this one has corrections, first of them {corrected[0]}. "
            "Use policy='frozen', which keeps and measures them; or call unwrap(model) first."
        )
