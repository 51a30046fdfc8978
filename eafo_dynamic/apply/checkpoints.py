"""Checkpoints of every kind, by one road: read, find the sites, match the names, wrap, load."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as _shown
from typing import Any, cast

import torch
from torch import Tensor, nn

from eafo_dynamic.apply.corrections import FILE_NAME, Corrections, check_same, keep_beside, put_on, read_corrections
from eafo_dynamic.apply.kept import CHECKPOINT_KEY
from eafo_dynamic.apply.manifest import check_manifest, check_weights, report_from_manifest, wrap_from_manifest
from eafo_dynamic.apply.naming import Renaming, plain_name, plain_names, renamed_sites, resolve
from eafo_dynamic.apply.sitelist import has_corrections, site_keys, sites_from_keys
from eafo_dynamic.apply.surgery import is_wrapped, unwrap
from eafo_dynamic.errors import SiteError, legible
from eafo_dynamic.find.sites import SiteReport, find_sites

__all__ = ["STATE_NAME", "Checkpoint", "apply_checkpoint", "apply_from_checkpoint", "read_checkpoint"]

STATE_NAME = "eafo_state.pt"
"""What the Hugging Face callback keeps beside the weights of a checkpoint."""

_LOG = logging.getLogger("eafo_dynamic")
_WHOLE = ("model.safetensors", "pytorch_model.bin", "pytorch_model.safetensors")
_SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_DISTRIBUTED = ".metadata"  # of torch.distributed.checkpoint
_REST = "meta.pt"  # of Lightning, beside the shards
_MOST_SHOWN = 6


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, whoever has written it.

    Args:
        what: its kind, in words.
        weights: all of them, corrections included, under their names there; None for a file of corrections alone.
        sites: the list of sites; None where it does not say.
        names: of the sites, where there is no list.
        corrections: a file of corrections beside the weights, or alone.
    """

    what: str
    weights: Mapping[str, Tensor] | None = None
    sites: Mapping[str, Any] | None = None
    names: Sequence[str] | None = None
    corrections: Corrections | None = None


def apply_from_checkpoint(
    model: nn.Module, checkpoint: str | Path | Mapping[str, Any], *example_args: Any, **example_kwargs: Any
) -> nn.Module:
    """Wraps a fresh model as a checkpoint's model was wrapped, and loads the checkpoint's weights into it.

    A checkpoint is any of these: a ``.ckpt`` of Lightning or Fabric; the folder of a checkpoint of the Hugging Face
    Trainer, or of ``save_pretrained``, in one file or in shards; a folder of ``torch.distributed.checkpoint``; a file
    of weights, ``torch.save(model.state_dict(), path)`` or ``.safetensors``; a file of ``save_corrections``, which has
    corrections alone. Where the model was a part of the checkpoint's, or has it as a part, names are matched by their
    common ends. What was taken goes to the logger ``eafo_dynamic``.

    With an example, a warning names the calls that the model's code makes no more, or makes with another function: no
    weight and no module shows that. Weights that come without a list of sites need one if their model calls activations
    as functions.

    Args:
        model: a model of the same structure, not wrapped.
        checkpoint: its path, or the mapping in it.
        *example_args: example input; by default a LightningModule's ``example_input_array``.
        **example_kwargs: example input.

    Returns:
        The model.

    Raises:
        SiteError: if the checkpoint holds no sites, or those of another model. The model is then as it was.
    """
    _LOG.info("%s", apply_checkpoint(model, read_checkpoint(checkpoint), *example_args, **example_kwargs))
    return model


def apply_checkpoint(model: nn.Module, found: Checkpoint, *example_args: Any, **example_kwargs: Any) -> str:
    """As ``apply_from_checkpoint``, for a checkpoint that has been read.

    Args:
        model: a model of the same structure, not wrapped.
        found: from ``read_checkpoint``.
        *example_args: example input.
        **example_kwargs: example input.

    Returns:
        What was taken, in a line.

    Raises:
        SiteError: if they do not fit. The model is then as it was.
    """
    present = _present(model, example_args, example_kwargs)
    if found.weights is None:
        corrections = cast("Corrections", found.corrections)
        renamed = put_on(model, corrections, found.what, present)
        return _told(found.what, f"{len(corrections.sites['sites'])} corrections and no other weights", renamed)
    weights = found.weights
    if found.corrections is not None:
        weights = {**weights, **found.corrections.tensors}
    if found.sites is None:
        renaming, weights, sites = _without_list(model, weights, found, present)
    else:
        renaming, weights, sites = _with_list(model, weights, found.sites)
    was_wrapped = is_wrapped(model)
    if was_wrapped:
        check_same(model, sites, found.what)
    else:
        wrap_from_manifest(model, sites, present)
    try:
        check_weights(model, weights)
        loaded = _load(model, weights, renaming, found.what)
    except SiteError:
        if not was_wrapped:
            unwrap(model)
        raise
    keep_beside(model)
    taken = f"{len(sites['sites'])} corrections and {loaded} weights"
    left = len(found.weights) - len(weights)
    if left > 0:
        taken += f" (of {left} more that are outside of this {type(model).__name__} none)"
    return _told(found.what, taken, str(renaming))


def _told(what: str, taken: str, renamed: str) -> str:
    line = f"took {taken} from {what}"
    if renamed:
        line += f", {renamed}"
    return line


def _with_list(
    model: nn.Module, weights: Mapping[str, Any], saved: Mapping[str, Any]
) -> tuple[Renaming, dict[str, Any], Mapping[str, Any]]:
    """Weights and sites under the names of a model."""
    saved = check_manifest(saved)
    with legible("the checkpoint's list of sites is damaged, or of another version"):
        matched = resolve(model, saved)
    if matched is None:
        report_from_manifest(model, saved)  # says what differs
        raise SiteError(f"the checkpoint is of another model than this {type(model).__name__}.")
    renaming, names = matched
    return renaming, _renamed_weights(model, weights, renaming), renamed_sites(saved, names)


def _without_list(
    model: nn.Module, weights: Mapping[str, Any], found: Checkpoint, present: SiteReport | None
) -> tuple[Renaming, dict[str, Any], Mapping[str, Any]]:
    """The same for weights that do not say of which calls their corrections are."""
    hosts = sorted({key.rpartition("eafo_")[0].rstrip(".") for key in site_keys(weights)})
    anything: dict[str, Any] = {"owner": None, "class_name": "", "parameters": {}}
    matched = resolve(model, {"sites": [{"name": host, "module": host, **anything} for host in hosts]})
    if matched is None:
        shown = ", ".join(map(repr, hosts[:_MOST_SHOWN]))
        raise SiteError(f"{found.what} has corrections of {shown}, which this {type(model).__name__} does not have.")
    renaming, _ = matched
    renamed = _renamed_weights(model, weights, renaming)
    names = None
    if renaming == Renaming():
        names = found.names
    report = present
    if report is None:
        report = find_sites(model)
    return renaming, renamed, sites_from_keys(renamed, report, names)


def _renamed_weights(model: nn.Module, weights: Mapping[str, Any], renaming: Renaming) -> dict[str, Any]:
    """The weights that belong to a model, under its names."""
    own = plain_names(model.state_dict())
    modules = plain_names(_modules(model))
    renamed: dict[str, Any] = {}
    for key, value in weights.items():
        there = renaming(plain_name(key))
        if there is None:
            continue
        host, _, last = there.rpartition(".")
        if there in own:
            there = own[there]
        elif host in modules:  # a correction, which the plain model does not have yet
            there = f"{modules[host]}.{last}".removeprefix(".")
        renamed[there] = value
    return renamed


def _load(model: nn.Module, weights: dict[str, Any], renaming: Renaming, what: str) -> int:
    """Loads weights, all or none.

    Returns:
        How many, but for the corrections.

    Raises:
        SiteError: if they do not fit.
    """
    own = model.state_dict()
    weights = {**_tied(own, weights), **weights}
    scope = ""
    if renaming.add:
        scope = f"{plain_names(_modules(model)).get(renaming.add, renaming.add)}."
    inside = [key for key in own if key.startswith(scope)]
    problems = [f"{key} is missing" for key in inside if key not in weights]
    problems += [f"{key} is not known" for key in weights if key not in own]
    problems += [
        f"{key}: {list(value.shape)} in the checkpoint, {list(own[key].shape)} in the model"
        for key, value in weights.items()
        if isinstance(value, Tensor) and isinstance(own.get(key), Tensor) and value.shape != own[key].shape
    ]
    shown = "; ".join(problems[:_MOST_SHOWN])
    if len(problems) > _MOST_SHOWN:
        shown += f"; and {len(problems) - _MOST_SHOWN} more"
    before: dict[str, Any] = {}
    if problems:  # modules may rename what they are given, so that torch has the last word
        before = {key: value.detach().clone() for key, value in own.items() if isinstance(value, Tensor)}
    try:
        model.load_state_dict(weights, strict=not scope)
    except Exception as error:
        model.load_state_dict(before, strict=False)
        said = shown or " ".join(str(error).split())[:300]
        raise SiteError(f"the checkpoint's weights do not fit the model: {said}.") from error
    if scope and problems:
        model.load_state_dict(before, strict=False)
        raise SiteError(f"the checkpoint's weights do not fit the model: {shown}.")
    outside = [key for key in own if not key.startswith(scope)]
    if outside:
        warnings.warn(
            f"EAFO: {len(outside)} weights of this {type(model).__name__} are not in {what} and stay as they are, "
            f"first of them {outside[0]}.",
            stacklevel=4,
        )
    return len(weights) - len(site_keys(weights))


def _modules(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules(remove_duplicate=False)]


def _tied(own: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights that a file leaves out because they are others of the model under a second name."""
    places = {
        (value.data_ptr(), value.shape): key
        for key, value in own.items()
        if key in weights and isinstance(value, Tensor) and value.numel()
    }
    found: dict[str, Any] = {}
    for key, value in own.items():
        if key not in weights and isinstance(value, Tensor) and value.numel():
            twin = places.get((value.data_ptr(), value.shape))
            if twin is not None:
                found[key] = weights[twin]
    return found


def _present(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> SiteReport | None:
    """The sites of a model as an example shows them; None without one."""
    if args or kwargs:
        return find_sites(model, *args, **kwargs)
    example = getattr(model, "example_input_array", None)
    if example is None:
        return None
    named = example if isinstance(example, Mapping) else {}
    rest = () if named else example if isinstance(example, tuple) else (example,)
    try:
        return find_sites(model, *rest, **named)
    except SiteError:  # nobody has asked for it
        return None


# ------------------------------------------------------------------ reading


def read_checkpoint(source: str | Path | Mapping[str, Any]) -> Checkpoint:
    """Reads a checkpoint of any kind, without running anything in it.

    Args:
        source: its path, or the mapping in it.

    Returns:
        What it holds.

    Raises:
        SiteError: if it cannot be read, or holds no corrections.
    """
    if isinstance(source, Mapping):
        return _from_mapping(source, "the checkpoint")
    path = Path(source)
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    found = _unpickled(path)
    if not isinstance(found, Mapping):
        raise SiteError(f"{path}: no checkpoint of a Trainer, but {_shown(found)}.")
    read = _from_mapping(cast("Mapping[str, Any]", found), str(path))
    return _with_siblings(read, path.parent)


def _unpickled(path: Path) -> object:
    """What torch.save has written; without running anything in it."""
    with legible(f"{path}: cannot be read as a checkpoint"):
        return torch.load(path, map_location="cpu", weights_only=True)


def _from_mapping(saved: Mapping[str, Any], where: str) -> Checkpoint:
    sites = saved.get(CHECKPOINT_KEY)
    weights: object = saved.get("state_dict")
    kind = "state_dict"
    if not isinstance(weights, Mapping):
        kind, weights = _weights_in(saved, where)
    if sites is None and not has_corrections(weights or ()):
        raise SiteError("the checkpoint holds no corrections: it was saved without an EAFOCallback.")
    if not isinstance(weights, Mapping):
        raise SiteError(
            "the checkpoint holds no weights under 'state_dict' or another key. Use one that a Trainer has saved."
        )
    what = where
    if kind:
        what = f"{kind!r} of {where}"
    return Checkpoint(what, cast("Mapping[str, Tensor]", weights), sites)


def _weights_in(saved: Mapping[str, Any], where: str) -> tuple[str, Mapping[str, Any] | None]:
    """The weights in a mapping that is itself weights, or has them under some key.

    Returns:
        The key, empty for the mapping itself, and the weights; None if there are none.

    Raises:
        SiteError: if there are several.
    """
    if has_corrections(saved):
        return "", saved
    found = {str(key): value for key, value in saved.items() if isinstance(value, Mapping) and has_corrections(value)}
    if len(found) > 1:
        keys = ", ".join(map(repr, found))
        raise SiteError(
            f"{where} has corrections under {keys}. Give the one that is meant: "
            f"apply_from_checkpoint(model, torch.load(path)[{next(iter(found))!r}])."
        )
    return next(iter(found.items()), ("", None))


def _from_safetensors(file: Path) -> Checkpoint:
    from safetensors import safe_open

    opener: Any = safe_open
    with legible(f"{file}: cannot be read as a checkpoint"), opener(file, framework="pt") as opened:
        has_list = "eafo_dynamic" in (opened.metadata() or {})
        weights: dict[str, Tensor] = {}
        if not has_list:
            weights = {key: opened.get_tensor(key) for key in list(opened.keys())}
    if has_list:
        return Checkpoint(str(file), corrections=read_corrections(file))
    return _with_siblings(Checkpoint(str(file), weights), file.parent)


def _with_siblings(read: Checkpoint, folder: Path) -> Checkpoint:
    """Adds what the files beside some weights say of their sites."""
    if read.sites is not None or read.weights is None:
        return read
    beside = folder / FILE_NAME
    if beside.is_file():
        corrections = read_corrections(beside)
        return Checkpoint(read.what, read.weights, corrections.sites, corrections=corrections)
    if not has_corrections(read.weights):
        raise SiteError(
            f"{read.what} holds no corrections, and there is no {FILE_NAME} beside it: it was saved without a callback "
            "of eafo-dynamic."
        )
    return Checkpoint(read.what, read.weights, names=_names(folder / STATE_NAME))


def _names(state: Path) -> list[str] | None:
    """Names of the sites in the state that the Hugging Face callback of version 0.1.0 keeps beside the weights."""
    if not state.is_file():
        return None
    found = _unpickled(state)
    names: object = found.get("sites") if isinstance(found, Mapping) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return cast("list[str]", names)


def _from_folder(folder: Path) -> Checkpoint:
    for name in _WHOLE:
        if (folder / name).is_file():
            return read_checkpoint(folder / name)
    for name in _SHARDED:
        if (folder / name).is_file():
            return _with_siblings(Checkpoint(str(folder), _from_shards(folder / name)), folder)
    if (folder / _DISTRIBUTED).is_file():
        return _from_distributed(folder)
    if (folder / FILE_NAME).is_file():  # alone, or beside an adapter, which is for PEFT to load
        return Checkpoint(str(folder / FILE_NAME), corrections=read_corrections(folder / FILE_NAME))
    inside = [child for child in sorted(folder.iterdir()) if child.is_dir() and _looks_like_one(child)]
    if inside:
        shown = ", ".join(child.name for child in inside[:_MOST_SHOWN])
        raise SiteError(f"{folder} has checkpoints in it ({shown}). Give one of them.")
    if (folder / "latest").is_file():
        raise SiteError(f"{folder} is of DeepSpeed. Run the zero_to_fp32.py in it, and give the file that it writes.")
    raise SiteError(
        f"{folder} holds no weights that are known ({', '.join((*_WHOLE, FILE_NAME))}, or shards). Give a file."
    )


def _looks_like_one(folder: Path) -> bool:
    names = (*_WHOLE, *_SHARDED, *_ADAPTERS, _DISTRIBUTED, FILE_NAME)
    return any((folder / name).is_file() for name in names)


def _from_shards(index: Path) -> dict[str, Tensor]:
    """Weights that several files share, as the list of them says."""
    with legible(f"{index}: cannot be read as a list of shards"):
        places: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({index.parent / Path(name).name for name in places.values()})
    weights: dict[str, Tensor] = {}
    for file in files:
        with legible(f"{file}: cannot be read as a shard of {index.name}"):
            weights.update(_shard(file))
    missing = [key for key in places if key not in weights]
    if missing:
        raise SiteError(f"{index.parent} lacks {len(missing)} weights that {index.name} lists, such as {missing[0]}.")
    return weights


def _shard(file: Path) -> Mapping[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return cast("Mapping[str, Tensor]", _unpickled(file))


def _from_distributed(folder: Path) -> Checkpoint:
    # not at the top: builds of torch without torch.distributed read every other kind
    from eafo_dynamic.internals.distributed import read_distributed

    with legible(f"{folder}: cannot be read as a checkpoint of torch.distributed.checkpoint"):
        weights = read_distributed(folder, lambda name: not name.startswith("optim"))
    sites = None
    if (folder / _REST).is_file():
        rest = _unpickled(folder / _REST)
        if isinstance(rest, Mapping):
            sites = rest.get(CHECKPOINT_KEY)
    return _with_siblings(Checkpoint(str(folder), weights, sites), folder)
