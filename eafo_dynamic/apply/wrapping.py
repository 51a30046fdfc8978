"""``wrap`` as most people want it: a model in, the model out."""

from __future__ import annotations

from torch import nn

from eafo_dynamic.apply import surgery
from eafo_dynamic.apply.corrections import keep_beside
from eafo_dynamic.correction.kernels import Backend
from eafo_dynamic.find.sites import SiteReport

__all__ = ["wrap"]


def wrap(
    model: nn.Module,
    report: SiteReport | None = None,
    eps_init: float = 0.01,
    *,
    tabulated: bool = False,
    per_channel: bool = False,
    free: bool = False,
    backend: Backend = "auto",
) -> nn.Module:
    """Gives every selected activation call of a model its correction, in place.

    With all eps = 0 the wrapped model equals the plain one bit for bit, outputs and gradients. A site that is there
    already stays as it is: wrapping again adds only what is missing, and a model may be wrapped of which a part is.

    Args:
        model: any module.
        report: the sites to wrap, from ``find_sites``; None: a static search.
        eps_init: starting amplitude of every new site.
        tabulated: whether every shape is a table, as densities other than the Gaussian need.
        per_channel: whether every channel has an amplitude of its own.
        free: whether the two terms of a correction have an amplitude each.
        backend: what computes the functions, see Options; of new models, not of one that is wrapped already.

    Returns:
        The model. ``apply.surgery.hosted_sites(model)`` gives its sites, each with the module that hosts it.

    Raises:
        SiteError: if the report selects no site.
    """
    surgery.wrap(model, report, eps_init, tabulated=tabulated, per_channel=per_channel, free=free, backend=backend)
    keep_beside(model)
    return model
