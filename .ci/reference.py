#!/usr/bin/env python
"""Builds the API reference by pdoc, every warning an error.

Run: python .ci/reference.py [FOLDER]     (default: build/reference)
"""

import importlib
import pkgutil
import sys
import typing
import warnings
from pathlib import Path

import pdoc

import eafo_dynamic
from eafo_dynamic import experiments

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/reference")
for package in (eafo_dynamic, experiments):  # they load their names when they are asked for; pdoc reads what is loaded
    for name in package.__all__:
        setattr(package, name, getattr(package, name))
for module in pkgutil.walk_packages(eafo_dynamic.__path__, "eafo_dynamic."):
    if module.name.endswith("__main__"):
        continue
    for kind in vars(importlib.import_module(module.name)).values():
        if isinstance(kind, type) and issubclass(kind, tuple) and kind.__module__.startswith("eafo_dynamic"):
            kind.__new__.__annotations__ = typing.get_type_hints(kind)  # a NamedTuple's own do not say from where
inside = [each.name for each in pkgutil.iter_modules(eafo_dynamic.__path__, "eafo_dynamic.")]
inside.remove("eafo_dynamic.__main__")
pdoc.render.configure(docformat="google", show_source=False)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    pdoc.pdoc("eafo_dynamic", *inside, output_directory=folder)
print(f"{len(list(folder.rglob('*.html')))} pages in {folder}")
