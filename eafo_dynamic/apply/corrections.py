"""Corrections in a file of their own: a few hundred numbers, and what they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eafo_dynamic.apply.cards import card_of, description
from eafo_dynamic.apply.dropped import note_in_load_reports, watch_loads
from eafo_dynamic.apply.kept import Keeper, keep
from eafo_dynamic.apply.manifest import check_manifest, check_weights, report_from_manifest, wrap_from_manifest
from eafo_dynamic.apply.naming import plain_name, plain_names, renamed_sites, resolve
from eafo_dynamic.apply.sitelist import site_tensors, sites_of
from eafo_dynamic.apply.surgery import is_wrapped, unwrap
from eafo_dynamic.errors import SiteError, legible
from eafo_dynamic.find.sites import SiteReport
from eafo_dynamic.internals.files import replacing
from eafo_dynamic.internals.torch_internals import callers, code_of, current_frame, variable_of

__all__ = [
    "CARD_NAME",
    "FILE_NAME",
    "Corrections",
    "check_same",
    "keep_beside",
    "load_corrections",
    "put_on",
    "read_corrections",
    "save_corrections",
]

FILE_NAME = "eafo_dynamic.safetensors"
CARD_NAME = "eafo_dynamic.md"
FILE_VERSION = 1

_ENTRY = "eafo_dynamic"  # of the file's header
_HUB = "hf://"
_DAMAGED = "is damaged or cut short"
_ANEW = "Write it anew with save_corrections, or fetch it again"


@dataclass(frozen=True)
class Corrections:
    """What a file of corrections holds.

    Args:
        sites: the list of sites, as ``manifest`` gives it.
        tensors: amplitudes, shape and table of every site, by their names in the state_dict of the model.
        about: what else is known: base model, options of the training, version of the package.
    """

    sites: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any] = field(default_factory=dict)


def save_corrections(model: nn.Module, path: str | Path) -> Path:
    """Writes the corrections of a model to a safetensors file of their own, with a card in words beside it.

    The file has the tensors of every site, under the names that they have in ``model.state_dict()``: amplitudes
    of all terms, centre and width ``shape``, and tables; in its header stand the sites and the options. It
    serves alone, beside the files of ``save_pretrained``, or beside an adapter of PEFT.

    Args:
        model: wrapped, itself or a part of it.
        path: a file that ends in ``.safetensors``, or a folder, which then gets ``eafo_dynamic.safetensors`` and
            ``eafo_dynamic.md``; it is made if it does not exist.

    Returns:
        The file.

    Raises:
        SiteError: if the model has no corrections.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> plain = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> with TemporaryDirectory() as folder:
        ...     file = save_corrections(wrap(net, eps_init=0.3), folder)
        ...     load_corrections(plain, file)[1]
        ReLU(eps=+0.3000, mu=+0.000, sigma=1.000, backend=...)
    """
    from safetensors.torch import save

    sites = sites_of(model)
    file = Path(path)
    card = file.with_suffix(".md")
    if file.suffix != ".safetensors":
        file, card = file / FILE_NAME, file / CARD_NAME
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in site_tensors(model).items()}
    about = description(model)
    header = {"version": FILE_VERSION, "corrections": sites, "about": about}
    data = save(tensors, metadata={"format": "pt", _ENTRY: json.dumps(header)})
    with replacing(file) as opened:
        opened.write(data)
    with replacing(card) as opened:
        opened.write(card_of(model, sites, about, file.name).encode())
    return file


def load_corrections(model: nn.Module, path: str | Path) -> nn.Module:
    """Wraps a model as the one was whose corrections a file holds, and gives it these corrections.

    Only the corrections: the model's own weights stay. Where the file's model was a part of this one, or this one is a
    part of it, the names are matched by their common ends.

    Args:
        model: of the structure that the corrections were learned with; plain, or wrapped at the same sites.
        path: a file of ``save_corrections``, a folder with ``eafo_dynamic.safetensors`` in it, or ``hf://owner/name``
            for one on the Hugging Face Hub.

    Returns:
        The model.

    Raises:
        SiteError: if there is no such file, it is damaged, of another model or of a newer version. The model is then as
            it was.
    """
    file = _located(path)
    put_on(model, read_corrections(file), str(file))
    return model


def _located(path: str | Path) -> Path:
    if str(path).startswith(_HUB):
        from eafo_dynamic.internals.hub import fetch

        return fetch(str(path).removeprefix(_HUB), FILE_NAME)
    file = Path(path)
    if file.is_dir():
        file = file / FILE_NAME
        if not file.is_file():
            raise SiteError(f"{path} holds no {FILE_NAME}. Write it with save_corrections(model, {str(path)!r}).")
    if not file.is_file():
        raise SiteError(f"{path} does not exist. Give a file or a folder of save_corrections.")
    return file


def read_corrections(file: Path) -> Corrections:
    """Reads a file of corrections.

    Args:
        file: of ``save_corrections``.

    Returns:
        What it holds, checked as far as it can be without a model.

    Raises:
        SiteError: if it is no such file, damaged, or of a newer version.
    """
    from safetensors import safe_open

    opener: Any = safe_open
    with legible(f"{file} {_DAMAGED}, or no safetensors file. {_ANEW}"), opener(file, framework="pt") as opened:
        said = (opened.metadata() or {}).get(_ENTRY)
        tensors = {key: opened.get_tensor(key) for key in list(opened.keys())}
    if said is None:
        raise SiteError(f"{file} was not written by save_corrections: its header has no {_ENTRY!r}.")
    with legible(f"{file} {_DAMAGED}: its header cannot be read. {_ANEW}"):
        header = json.loads(said)
        version = int(header["version"])
    if version > FILE_VERSION:
        raise SiteError(
            f"{file} is of version {version}, and this version of eafo-dynamic reads up to {FILE_VERSION}. "
            "Upgrade eafo-dynamic."
        )
    try:
        sites = check_manifest(header.get("corrections"))
    except SiteError as error:
        raise SiteError(f"{file}: {error}") from None
    about = header.get("about")
    if not isinstance(about, Mapping):
        about = {}
    return Corrections(sites, tensors, about)


def put_on(model: nn.Module, corrections: Corrections, what: str, present: SiteReport | None = None) -> str:
    """Wraps a model, unless it is wrapped at these sites, and gives it the corrections.

    Args:
        model: any module.
        corrections: what it is to have.
        what: where they come from, for errors.
        present: see ``wrap_from_manifest``.

    Returns:
        How names were matched, in words; empty where they are the same.

    Raises:
        SiteError: if they do not fit. The model is then as it was.
    """
    found = resolve(model, corrections.sites)
    if found is None:
        raise SiteError(f"{what}: {_differences(model, corrections.sites)}")
    renaming, names = found
    sites = renamed_sites(corrections.sites, names)
    own = plain_names(name for name, _ in model.named_modules(remove_duplicate=False))
    values: dict[str, Tensor] = {}
    for key, value in corrections.tensors.items():
        host, _, last = key.rpartition(".")
        there = renaming(plain_name(host))
        if there is None or there not in own:
            raise SiteError(f"{what} has corrections of {host!r}, of which its list of sites says nothing. {_ANEW}.")
        values[f"{own[there]}.{last}".removeprefix(".")] = value
    already = is_wrapped(model)
    if already:
        check_same(model, sites, what)
    else:
        wrap_from_manifest(model, sites, present)
    try:
        _copy(model, values, what)
    except SiteError:
        if not already:
            unwrap(model)
        raise
    keep_beside(model)
    return str(renaming)


def _differences(model: nn.Module, saved: Mapping[str, Any]) -> str:
    """What a model lacks for a list of sites."""
    try:
        report_from_manifest(model, saved)
    except SiteError as error:
        return str(error)
    return f"the corrections are not of this {type(model).__name__}."


def check_same(model: nn.Module, sites: Mapping[str, Any], what: str) -> None:
    """Refuses other corrections than those that a model has.

    Args:
        model: wrapped.
        sites: the list of sites of other corrections, under the names of the model.
        what: where they come from, for the error.

    Raises:
        SiteError: if they are others.
    """
    mine = sites_of(model)
    forms = [{key: value for key, value in each.items() if key != "sites"} for each in (mine, sites)]
    named = [sorted(site["name"] for site in each["sites"]) for each in (mine, sites)]
    if forms[0] != forms[1] or named[0] != named[1]:
        differing = ", ".join(sorted(set(named[0]) ^ set(named[1]))[:6]) or "their options"
        raise SiteError(
            f"{what}: this {type(model).__name__} has other corrections already (they differ in {differing}). Call "
            "unwrap(model) first."
        )


@torch.no_grad()
def _copy(model: nn.Module, values: Mapping[str, Tensor], what: str) -> None:
    """Gives the sites their tensors: all of them, or none."""
    own = site_tensors(model)
    problems = [f"{key} is missing" for key in own if key not in values]
    problems += [f"{key} is not known" for key in values if key not in own]
    if problems:
        shown = "; ".join(problems[:6])
        raise SiteError(f"{what} does not hold what its list of sites says: {shown}. {_ANEW}.")
    try:
        check_weights(model, values)
    except SiteError as error:
        raise SiteError(f"{what}: {error}") from None
    for key, value in values.items():
        own[key].copy_(value)


class _Beside(Keeper):
    """Stands before a module's ``save_pretrained``, and writes the corrections beside what that writes."""

    hook = "save_pretrained"

    def __call__(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        result = self.run_own(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            save_corrections(self.module, save_directory)
        return result


class _BesideAdapter(Keeper):
    """Stands before the ``state_dict`` of a model that PEFT may have put into one of its own since it was wrapped.

    The folder to which PEFT saves an adapter is known to its ``save_pretrained`` alone, which asks for these weights.
    """

    hook = "state_dict"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for frame in callers(current_frame(1)):
            around = variable_of(frame, "self")
            is_adapter = isinstance(around, nn.Module) and hasattr(around, "peft_config")
            if is_adapter and code_of(frame).co_name == _Beside.hook and around is not self.module:
                if _Beside.hook not in vars(around) and variable_of(frame, "is_main_process"):
                    save_corrections(around, variable_of(frame, "save_directory"))
                break
        return self.run_own(*args, **kwargs)


def keep_beside(model: nn.Module) -> None:
    """Lets whatever saves a model of transformers or PEFT, or such a part of a model, save the corrections too.

    That is: ``save_pretrained``, as long as the corrections are there. It also warns where weights are loaded that have
    others; see ``watch_loads``.

    Args:
        model: wrapped.
    """
    watch_loads(model)
    for module in model.modules():
        if hasattr(type(module), _Beside.hook) and is_wrapped(module):
            keep(_Beside(module))
            keep(_BesideAdapter(module))


note_in_load_reports()
