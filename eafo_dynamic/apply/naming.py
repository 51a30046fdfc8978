"""Names of modules in a file and in a model, which differ where one of the two is a part of something larger."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from eafo_dynamic.errors import SiteError
from eafo_dynamic.internals.torch_internals import NAMES_OF_WRAPPERS

__all__ = ["Renaming", "plain_name", "plain_names", "renamed_sites", "resolve"]

_MOST_SHOWN = 6
_AROUND = ("guarded", "through", "beside")


def plain_name(name: str) -> str:
    """A name without the segments that wrappers of torch put into it.

    Args:
        name: of a module, parameter or buffer.

    Returns:
        For example ``net.0.weight`` for ``net._orig_mod.0.weight``.
    """
    return ".".join(segment for segment in name.split(".") if segment not in NAMES_OF_WRAPPERS)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Names as they are, by their plain form.

    Args:
        names: of a model. Where two have one plain form, the outermost is meant.

    Returns:
        Plain name: name.
    """
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(plain_name(name), name)
    return found


@dataclass(frozen=True)
class Renaming:
    """Plain names of a file to plain names of a model: one prefix away, another one before.

    Args:
        strip: the prefix that goes, without its dot; all names if empty.
        add: the prefix that comes.
    """

    strip: str = ""
    add: str = ""

    def __call__(self, name: str) -> str | None:
        """The name in the model.

        Args:
            name: in the file, plain.

        Returns:
            The name; None for one that has not the prefix.
        """
        if self.strip and name != self.strip and not name.startswith(f"{self.strip}."):
            return None
        rest = name[len(self.strip) :].lstrip(".")
        return f"{self.add}.{rest}".strip(".")

    def __str__(self) -> str:
        parts: list[str] = []
        if self.strip:
            parts.append(f"without their prefix {self.strip!r}")
        if self.add:
            parts.append(f"with the prefix {self.add!r}")
        return " and ".join(parts)

    @classmethod
    def between(cls, then: str, now: str) -> Renaming:
        """What a module that has moved says about the names around it.

        Args:
            then: its name.
            now: its name in another model.

        Returns:
            The renaming: the ends that the two names share stay.
        """
        old, new = _segments(then), _segments(now)
        while old and new and old[-1] == new[-1]:
            old.pop()
            new.pop()
        return cls(".".join(old), ".".join(new))


def _segments(name: str) -> list[str]:
    return [segment for segment in name.split(".") if segment]


def renamed_sites(saved: Mapping[str, Any], rename: Mapping[str, str]) -> dict[str, Any]:
    """A list of sites under other names of modules.

    Args:
        saved: from ``manifest``.
        rename: names of modules by the names that they have in the list.

    Returns:
        The list, as a copy.
    """
    sites = [_renamed(site, rename) for site in saved["sites"]]
    renamed = {**saved, "sites": sites}
    if isinstance(saved.get("base"), Mapping):
        now = {then["name"]: site["name"] for then, site in zip(saved["sites"], sites, strict=True)}
        renamed["base"] = {now.get(pattern, pattern): base for pattern, base in saved["base"].items()}
    return renamed


def _renamed(site: Mapping[str, Any], rename: Mapping[str, str]) -> dict[str, Any]:
    module = site["module"]
    name = site["name"]
    if name.startswith(module):
        name = rename[module] + name[len(module) :]
    owner = site.get("owner")
    if owner is not None:
        owner = rename[owner]
    caller = site.get("caller")
    if caller is not None:
        caller = rename[caller]
    renamed: dict[str, Any] = {**site, "name": name, "module": rename[module], "owner": owner, "caller": caller}
    # a module that the code around the call uses, and that only this model has not, has nothing to guard or to tell
    for key in _AROUND:
        renamed[key] = [rename[each] for each in site.get(key, ()) if each in rename]
    return renamed


def _needed(sites: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the modules that a list of sites needs."""
    names = [site[key] for site in sites for key in ("module", "owner", "caller") if site.get(key) is not None]
    return list(dict.fromkeys(names))


def resolve(model: nn.Module, saved: Mapping[str, Any]) -> tuple[Renaming, dict[str, str]] | None:
    """How the modules of a list of sites are called in a model.

    The names as they are come first, then a prefix before them, then one of theirs taken away, then both.

    Args:
        model: any module.
        saved: from ``manifest``, checked.

    Returns:
        The renaming of plain names, and the model's names by those of the list; None if the model has no such modules.

    Raises:
        SiteError: if several parts of the model fit equally well.
    """
    sites = saved["sites"]
    modules = dict(model.named_modules(remove_duplicate=False))
    own = plain_names(modules)
    needed = _needed(sites)
    for stage in _stages([plain_name(name) for name in needed], own):
        fitting: dict[tuple[int, ...], Renaming] = {}
        for renaming in stage:
            names = _names(renaming, needed, own)
            if names is not None and _fits(sites, names, modules):
                parts = tuple(id(modules[name]) for name in names.values())
                fitting.setdefault(parts, renaming)  # one part under two names is one part
        if len(fitting) > 1:
            shown = ", ".join(repr(each.add) for each in list(fitting.values())[:_MOST_SHOWN])
            raise SiteError(
                f"the corrections fit {len(fitting)} parts of this {type(model).__name__}: {shown}. Give the part that "
                "is meant in place of the whole model, such as model.net."
            )
        for renaming in fitting.values():
            guarded = [name for site in sites for key in _AROUND for name in site.get(key, ())]
            names = _names(renaming, needed, own) or {}
            for name in guarded:
                there = renaming(plain_name(name))
                if there in own:
                    names[name] = own[there]
            return renaming, names
    return None


def _stages(needed: Sequence[str], own: Mapping[str, str]) -> Iterator[list[Renaming]]:
    yield [Renaming()]
    added = [name for name in own if name]
    yield [Renaming(add=name) for name in added]
    stripped = _common_prefixes(needed)
    for prefix in stripped:
        yield [Renaming(strip=prefix)]
    for prefix in stripped:
        yield [Renaming(strip=prefix, add=name) for name in added]


def _common_prefixes(names: Sequence[str]) -> list[str]:
    """Prefixes that all names have, the shortest first."""
    split = [_segments(name) for name in names]
    common: list[str] = []
    for column in zip(*split, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return [".".join(common[: k + 1]) for k in range(len(common))]


def _names(renaming: Renaming, needed: Sequence[str], own: Mapping[str, str]) -> dict[str, str] | None:
    names: dict[str, str] = {}
    for name in needed:
        there = renaming(plain_name(name))
        if there is None or there not in own:
            return None
        names[name] = own[there]
    return names


def _fits(sites: Sequence[Mapping[str, Any]], names: Mapping[str, str], modules: Mapping[str, nn.Module]) -> bool:
    """Whether the activations are of the class that they were."""
    return all(
        site.get("parameters") is not None or type(modules[names[site["module"]]]).__name__ == site["class_name"]
        for site in sites
    )
