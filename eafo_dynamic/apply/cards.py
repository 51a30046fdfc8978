"""The card of a file of corrections: what they are, of which model, and what they change, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eafo_dynamic.apply.site import Site
from eafo_dynamic.apply.surgery import hosted_sites
from eafo_dynamic.internals.version import __version__

__all__ = ["card_of", "description"]

_REACH, _POINTS = 4.0, 257  # of the pre-activations that are looked at, in standard deviations

_CARD = """\
---
library_name: eafo_dynamic
{base}tags:
- eafo_dynamic
- activation-function
---

# Corrections of {sites} activations of {model}

{numbers} numbers that [eafo-dynamic](https://arxiv.org/abs/2405.12954) {version} has learned for {model}. They change
the activation functions of the base model, `f(z) = base(z) + c(z)`, and nothing else of it: its weights are not in this
file.

```python
from eafo_dynamic import load_corrections

load_corrections(model, {file!r})  # model: the base model
```

What they change: c(z) for z within {reach:g} sigma of mu.

| site | base | amplitudes | mu | sigma | largest change |
|---|---|---|---|---|---|
{rows}
"""


def description(model: nn.Module) -> dict[str, Any]:
    """What a file says about the model that its corrections were learned with; text and numbers only.

    Args:
        model: wrapped.

    Returns:
        Keys ``model``, ``base_model``, ``eafo_dynamic`` and ``options``.
    """
    hosted = hosted_sites(model)
    options: Mapping[str, object] | None = hosted[0][1].switch.options
    return {
        "model": type(model).__name__,
        "base_model": base_model(model),
        "eafo_dynamic": __version__,
        "options": None if options is None else dict(options),
    }


def base_model(model: nn.Module) -> str | None:
    """The name by which a model of transformers was loaded.

    Args:
        model: any.

    Returns:
        The name; None where none is known.
    """
    for module in model.modules():
        name = getattr(getattr(module, "config", None), "_name_or_path", None)
        if isinstance(name, str) and name:
            return name
    return None


def card_of(model: nn.Module, sites: Mapping[str, Any], about: Mapping[str, Any], file: str) -> str:
    """The card, in Markdown.

    Args:
        model: wrapped.
        sites: its list of sites.
        about: from ``description``.
        file: name of the file that it describes.

    Returns:
        The text; the Hub reads its head.
    """
    hosted = hosted_sites(model)
    rows = [_row(said, host, site) for said, (host, site) in zip(sites["sites"], hosted, strict=True)]
    base = about["base_model"]
    head = ""
    if base is not None and not base.startswith((".", "/")):
        head = f"base_model: {base}\n"
    return _CARD.format(
        base=head,
        sites=len(hosted),
        model=base or about["model"],
        numbers=sum(_count(host, site) for host, site in hosted),
        version=about["eafo_dynamic"],
        file=file,
        reach=_REACH,
        rows="\n".join(rows),
    )


def _count(host: nn.Module, site: Site) -> int:
    tensors: list[Tensor] = [getattr(host, key) for key in site.keys if getattr(host, key, None) is not None]
    return sum(tensor.numel() for tensor in tensors)


def _row(said: Mapping[str, Any], host: nn.Module, site: Site) -> str:
    shape = getattr(host, site.key("shape"))
    mu, sigma = shape.tolist()
    amplitudes = dict(zip(site.names(host), site.amplitudes(host), strict=True))
    values = [f"{name} {float(value.detach().mean()):+.4f}" for name, value in amplitudes.items()]
    cells = [
        f"`{said['name'] or '(root)'}`",
        str(said["base"]),
        ", ".join(values),
        f"{mu:+.3f}",
        f"{sigma:.3f}",
        f"{_largest_change(host, site):.4f}",
    ]
    return f"| {' | '.join(cells)} |"


@torch.no_grad()
def _largest_change(host: nn.Module, site: Site) -> float:
    shape, eps = getattr(host, site.key("shape")), site.amplitudes(host)[0]
    steps = torch.linspace(-_REACH, _REACH, _POINTS, dtype=shape.dtype, device=shape.device)
    z = shape[0] + shape[1] * steps
    if eps.dim():  # one column a channel, wherever the layer before has its channels
        z = z[:, None].expand(-1, eps.numel())
        z = z.reshape(_POINTS, eps.numel(), *[1] * (2 if site.collector.channel_dim == 1 else 0))
    return float(site.correction(host, z).abs().max())
