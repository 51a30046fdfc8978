"""``wrap`` as most people want it: a model in, the model out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    terms: str | Sequence[str] | None = None,
    base: str | Mapping[str, str] | None = None,
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
        free: the older name of ``terms="local"``.
        terms: what is added to the base: "full", "local", "tails", "tied" or a list of terms, see Options; None:
            "local" if ``free``, else "tied".
        base: name of the function that takes the place of every activation, or names by patterns of sites; None: each
            its own. ``unwrap`` gives them back.
        backend: what computes the functions, see Options; of new models, not of one that is wrapped already.

    Returns:
        The model. ``apply.surgery.hosted_sites(model)`` gives its sites, each with the module that hosts it.

    Raises:
        SiteError: if the report selects no site, or one in a lazy module that is not initialised.
        ConfigError: if a base is unknown, or a site that would get one is a gate; the model is then as it was.
        PatternError: if a pattern of ``base`` matches nothing.
    """
    form: dict[str, Any] = {"tabulated": tabulated, "per_channel": per_channel, "free": free}
    surgery.wrap(model, report, eps_init, terms=terms, base=base, backend=backend, **form)
    keep_beside(model)
    return model
