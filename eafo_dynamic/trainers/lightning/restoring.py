"""``load_from_checkpoint`` of somebody's own LightningModule, with the corrections of the checkpoint."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from eafo_dynamic.apply.checkpoints import read_checkpoint
from eafo_dynamic.apply.corrections import Corrections, put_on
from eafo_dynamic.apply.kept import CHECKPOINT_KEY
from eafo_dynamic.apply.manifest import check_manifest
from eafo_dynamic.apply.sitelist import site_keys
from eafo_dynamic.errors import SiteError, legible

__all__ = ["load_module"]

_Module = TypeVar("_Module")


def load_module(kind: type[_Module], path: str | Path, **options: Any) -> _Module:
    """Makes a LightningModule from a checkpoint, wrapped as the checkpoint says, with all its weights.

    Its own ``load_from_checkpoint`` makes the plain one: it gets the checkpoint without the corrections, which are put
    on afterwards.

    Args:
        kind: class of the module.
        path: the checkpoint.
        **options: as ``load_from_checkpoint`` takes them.

    Returns:
        The module.

    Raises:
        SiteError: if the checkpoint cannot be read, holds no corrections, or those of another model.
    """
    safe = options.get("weights_only") is not False
    with legible(f"{path}: cannot be read as a checkpoint"):
        saved: object = torch.load(path, map_location="cpu", weights_only=safe)
    if not isinstance(saved, Mapping):
        raise SiteError(f"{path}: no checkpoint of a Trainer.")
    checkpoint = cast("Mapping[str, Any]", saved)
    read_checkpoint(checkpoint)  # says what is missing
    if CHECKPOINT_KEY not in checkpoint:
        raise SiteError(f"{path} has no list of sites. Use apply_from_checkpoint({kind.__name__}(...), path).")
    sites = check_manifest(checkpoint[CHECKPOINT_KEY])
    weights = checkpoint["state_dict"]
    own = {key: weights[key] for key in site_keys(weights)}
    rest = {key: value for key, value in weights.items() if key not in own}
    plain = io.BytesIO()
    torch.save({**checkpoint, "state_dict": rest}, plain)
    plain.seek(0)
    module: Any = cast("Any", kind).load_from_checkpoint(plain, **options)
    put_on(module, Corrections(sites, own), str(path))
    return module
