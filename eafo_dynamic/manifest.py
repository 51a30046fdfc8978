"""What a checkpoint says about its sites, and wrapping a fresh model accordingly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from eafo_dynamic.errors import SiteError
from eafo_dynamic.sites import FoundSite, SiteReport
from eafo_dynamic.surgery import wrap

__all__ = [
    "CHECKPOINT_KEY",
    "LoadListener",
    "apply_from_checkpoint",
    "manifest",
    "report_from_manifest",
    "wrap_from_manifest",
]

CHECKPOINT_KEY = "eafo"

_FORM = ("tabulated", "per_channel", "compounding")


def manifest(
    report: SiteReport, *, tabulated: bool = False, per_channel: bool = False, compounding: bool = False
) -> dict[str, Any]:
    """What has to be known to wrap the same sites again; primitives only.

    Args:
        report: what was wrapped.
        tabulated: see ``wrap``.
        per_channel: see ``wrap``.
        compounding: see ``wrap``.

    Returns:
        Keys ``sites``, ``tabulated``, ``per_channel`` and ``compounding``.
    """
    sites = [
        {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(found).items()}
        for found in report.wrapped
    ]
    return {"sites": sites, "tabulated": tabulated, "per_channel": per_channel, "compounding": compounding}


def _found(saved: Mapping[str, Any]) -> FoundSite:
    # JSON and weights-only loading know lists, a frozen site has tuples
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
    return FoundSite(**values)


def report_from_manifest(model: nn.Module, saved: Mapping[str, Any]) -> SiteReport:
    """The sites that a manifest lists, checked against a model.

    Args:
        model: any module.
        saved: from ``manifest``.

    Returns:
        The report.

    Raises:
        SiteError: if the model lacks one of them; the message lists all that differ.
    """
    sites = [_found(site) for site in saved["sites"]]
    modules = dict(model.named_modules(remove_duplicate=False))
    problems: list[str] = []
    for site in sites:
        for name in (site.module, site.owner):
            if name is not None and name not in modules:
                problems.append(f"{site.name}: the model has no module {name!r}")
        kind = type(modules.get(site.module)).__name__
        if site.parameters is None and site.module in modules and kind != site.class_name:
            problems.append(f"{site.name}: {kind} in the model, {site.class_name} in the checkpoint")
    if problems:
        raise SiteError("the model is not the one the checkpoint was made with: " + "; ".join(problems) + ".")
    return SiteReport(sites, dynamic=True, note="The sites of the checkpoint.")


def wrap_from_manifest(model: nn.Module, saved: Mapping[str, Any]) -> SiteReport:
    """Wraps the sites that a manifest lists.

    Args:
        model: any module, not wrapped yet.
        saved: from ``manifest``.

    Returns:
        The report of these sites.
    """
    report = report_from_manifest(model, saved)
    wrap(model, report, **{key: bool(saved[key]) for key in _FORM})
    return report


def apply_from_checkpoint(model: nn.Module, checkpoint: str | Path | Mapping[str, Any]) -> nn.Module:
    """Wraps a fresh model as a checkpoint's model was wrapped, and loads the checkpoint's weights into it.

    Args:
        model: a model of the same structure, not wrapped.
        checkpoint: a checkpoint saved by a Trainer with an EAFOCallback, or the mapping in it.

    Returns:
        The model.

    Raises:
        SiteError: if the checkpoint holds no sites, or those of another model.
    """
    if not isinstance(checkpoint, Mapping):
        checkpoint = cast("Mapping[str, Any]", torch.load(checkpoint, map_location="cpu", weights_only=True))
    if CHECKPOINT_KEY not in checkpoint:
        raise SiteError("the checkpoint holds no corrections: it was saved without an EAFOCallback.")
    wrap_from_manifest(model, checkpoint[CHECKPOINT_KEY])
    model.load_state_dict(checkpoint["state_dict"])
    return model


class LoadListener:
    """Stands before a LightningModule's own ``on_load_checkpoint``, which sees a checkpoint before its weights load.

    Args:
        module: whose hook it is.
        adopt: called with the module and the checkpoint's manifest, where it has one.
    """

    def __init__(self, module: Any, adopt: Callable[[Any, dict[str, Any]], None]) -> None:
        self.module = module
        self.adopt = adopt

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Adopts the checkpoint's sites, then runs the module's own hook.

        Args:
            checkpoint: as Lightning has loaded it.
        """
        if CHECKPOINT_KEY in checkpoint:
            self.adopt(self.module, checkpoint[CHECKPOINT_KEY])
        type(self.module).on_load_checkpoint(self.module, checkpoint)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadListener:
        return self  # a copied module must not copy the callback
