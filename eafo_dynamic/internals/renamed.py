"""Module names of version 0.1, which still import the modules that took their place.

Somebody's code says ``import eafo_dynamic.callback``, and a pickle names the modules of its classes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["RENAMED", "Renamed", "install"]

# Old name: new name, both in full.
# A tuple of new names where a module was divided: they are searched in this order for the name that is asked for.
# An empty tuple for a folder of which nothing is left, when modules that were in it have entries of their own.
# A module inside a renamed package needs an entry only if it has left the package or changed its own name.
RENAMED: dict[str, str | tuple[str, ...]] = {
    "eafo_dynamic.activation": "eafo_dynamic.apply.site",
    "eafo_dynamic.amplitudes": "eafo_dynamic.policy.amplitudes",
    "eafo_dynamic.bake": "eafo_dynamic.apply.merge",
    "eafo_dynamic.bank": "eafo_dynamic.apply.bank",
    "eafo_dynamic.bases": "eafo_dynamic.correction.bases",
    "eafo_dynamic.behaviour": "eafo_dynamic.find.behaviour",
    "eafo_dynamic.benchmark": "eafo_dynamic.experiments.benchmark",
    "eafo_dynamic.beneath": "eafo_dynamic.find.beneath",
    "eafo_dynamic.callback": "eafo_dynamic.trainers.lightning.callback",
    "eafo_dynamic.channels": "eafo_dynamic.find.channels",
    "eafo_dynamic.checks": "eafo_dynamic.internals.checks",
    "eafo_dynamic.compare": "eafo_dynamic.experiments.compare",
    "eafo_dynamic.configured": "eafo_dynamic.experiments.configured",
    "eafo_dynamic.controller": "eafo_dynamic.policy.controller",
    "eafo_dynamic.diagnostics": "eafo_dynamic.policy.diagnostics",
    "eafo_dynamic.dryrun": "eafo_dynamic.find.dryrun",
    "eafo_dynamic.estimates": "eafo_dynamic.policy.estimates",
    "eafo_dynamic.example": "eafo_dynamic.trainers.lightning.example",
    "eafo_dynamic.experiments.cifar": "eafo_dynamic.experiments.images.cifar",
    "eafo_dynamic.experiments.data": (
        "eafo_dynamic.experiments.images.digits",
        "eafo_dynamic.experiments.tables.data",
        "eafo_dynamic.experiments.splits",
        "eafo_dynamic.experiments.scikit",
    ),
    "eafo_dynamic.experiments.gpt": "eafo_dynamic.experiments.text.gpt",
    "eafo_dynamic.experiments.hf_text": (
        "eafo_dynamic.experiments.preferences.dpo",
        "eafo_dynamic.experiments.preferences.pairs",
        "eafo_dynamic.experiments.preferences.pretrained",
    ),
    "eafo_dynamic.experiments.mlp": "eafo_dynamic.experiments.tables.mlp",
    "eafo_dynamic.experiments.resnet": "eafo_dynamic.experiments.images.resnet",
    "eafo_dynamic.experiments.sources": "eafo_dynamic.experiments.text.python_source",
    "eafo_dynamic.experiments.tnt": "eafo_dynamic.experiments.images.tnt",
    "eafo_dynamic.experiments.vit": "eafo_dynamic.experiments.images.vit",
    "eafo_dynamic.frames": "eafo_dynamic.apply.frames",
    "eafo_dynamic.functional": "eafo_dynamic.find.functional",
    "eafo_dynamic.grids": "eafo_dynamic.entropy.grids",
    "eafo_dynamic.hosting": ("eafo_dynamic.apply.hosting", "eafo_dynamic.find.wrapped"),
    "eafo_dynamic.huggingface": "eafo_dynamic.trainers.huggingface",
    "eafo_dynamic.kernels": "eafo_dynamic.correction.kernels",
    "eafo_dynamic.lineage": "eafo_dynamic.find.lineage",
    "eafo_dynamic.listener": ("eafo_dynamic.trainers.lightning.listener", "eafo_dynamic.apply.kept"),
    "eafo_dynamic.manifest": ("eafo_dynamic.apply.manifest", "eafo_dynamic.apply.checkpoints"),
    "eafo_dynamic.metrics": "eafo_dynamic.entropy.metric",
    "eafo_dynamic.optim": "eafo_dynamic.trainers.optim",
    "eafo_dynamic.options": "eafo_dynamic.policy.options",
    "eafo_dynamic.places": "eafo_dynamic.find.places",
    "eafo_dynamic.plots": "eafo_dynamic.records.figures",
    "eafo_dynamic.probe": "eafo_dynamic.find.probe",
    "eafo_dynamic.recompute": "eafo_dynamic.apply.recompute",
    "eafo_dynamic.replicas": "eafo_dynamic.trainers.replicas",
    "eafo_dynamic.report": "eafo_dynamic.records.report",
    "eafo_dynamic.runlog": "eafo_dynamic.trainers.runlog",
    "eafo_dynamic.running": ("eafo_dynamic.density.running", "eafo_dynamic.policy.rollback"),
    "eafo_dynamic.schedule": ("eafo_dynamic.policy.schedule", "eafo_dynamic.policy.trust_region"),
    "eafo_dynamic.selection": "eafo_dynamic.find.selection",
    "eafo_dynamic.showing": ("eafo_dynamic.trainers.lightning.reporter", "eafo_dynamic.records.notebook"),
    "eafo_dynamic.sites": "eafo_dynamic.find.sites",
    "eafo_dynamic.stacked": "eafo_dynamic.correction.stacked",
    "eafo_dynamic.standalone": "eafo_dynamic.apply.standalone",
    "eafo_dynamic.statistics": (
        "eafo_dynamic.density.collector",
        "eafo_dynamic.density.sample_moments",
        "eafo_dynamic.density.ranks",
    ),
    "eafo_dynamic.surgery": "eafo_dynamic.apply.surgery",
    "eafo_dynamic.trace": "eafo_dynamic.find.trace",
    "eafo_dynamic.unreached": "eafo_dynamic.find.unreached",
    "eafo_dynamic.update": ("eafo_dynamic.policy.moves", "eafo_dynamic.policy.trust_region"),
    "eafo_dynamic.version": "eafo_dynamic.internals.version",
    "eafo_dynamic.written": "eafo_dynamic.find.written",
}
# Public names, which stay: they import the module at its new place without a warning.
STAYING = frozenset({"eafo_dynamic.huggingface", "eafo_dynamic.optim"})

REMOVED_IN = "0.3"


def install() -> None:
    """Lets old names be imported."""
    if RENAMED:
        # first, since the usual finder would load a second copy of a module inside a renamed package
        sys.meta_path.insert(0, Renamed(RENAMED))


class Renamed:
    """Finds and loads modules by their old names; an entry of ``sys.meta_path``.

    The old name of a module gives the very module object that the new name gives, so classes are the same and pickles
    find them. A module that was divided is stood for by one that looks names up in its parts. Each old name warns once,
    when it is imported first. A module that exists under an old name is never hidden.

    Args:
        names: new names by old names, as in ``RENAMED``.
    """

    def __init__(self, names: Mapping[str, str | tuple[str, ...]]) -> None:
        self.names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Says that this object loads a module, if the name is an old one.

        Args:
            fullname: name of the module to import.
            path: where the modules of its package are.
            target: not used.

        Returns:
            How to load it; None if the name is not an old one.
        """
        if self._new_names(fullname) is None:
            return None
        package = sys.modules.get(fullname.rpartition(".")[0])
        in_renamed_package = package is not None and package.__name__ != fullname.rpartition(".")[0]
        if not in_renamed_package and PathFinder.find_spec(fullname, path) is not None:
            return None
        loader: Any = self
        return ModuleSpec(fullname, loader, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Makes a module that looks names up in the parts of a divided one.

        Args:
            spec: from ``find_spec``.

        Returns:
            The module; ``exec_module`` puts another in its place where the old module was not divided.
        """
        return _Divided(spec.name, self._new_names(spec.name) or ())

    def exec_module(self, module: ModuleType) -> None:
        """Warns, and lets the old name mean the new module.

        Args:
            module: from ``create_module``.
        """
        old = module.__name__
        new = self._new_names(old) or ()
        if new and old not in STAYING:
            warnings.warn(
                f"{old} is now {' and '.join(new)}. Import from there: the old name will be removed in "
                f"version {REMOVED_IN}.",
                DeprecationWarning,
                stacklevel=2,
            )
        if len(new) == 1:
            sys.modules[old] = import_module(new[0])

    def _new_names(self, old: str) -> tuple[str, ...] | None:
        """New names of a module; None if it has not been renamed."""
        if old in self.names:
            new = self.names[old]
            return (new,) if isinstance(new, str) else new
        package, _, name = old.rpartition(".")
        packages = self._new_names(package) if package else None
        if packages is None or len(packages) != 1:
            return None
        moved = f"{packages[0]}.{name}"
        return (moved,) if find_spec(moved) is not None else None


class _Divided(ModuleType):
    """Stands for a module that was divided.

    Args:
        name: the old name.
        parts: the new names.
    """

    def __init__(self, name: str, parts: tuple[str, ...]) -> None:
        super().__init__(name, f"Now {' and '.join(parts)}." if parts else None)
        self.__parts = parts  # mangled: another name could hide one of a part

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":  # for import *
            return sorted({each for part in self.__parts for each in getattr(import_module(part), "__all__", ())})
        own = name.startswith("__") and name.endswith("__")  # such as __file__
        if not own:
            for part in self.__parts:
                module = import_module(part)
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
