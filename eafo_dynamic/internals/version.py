"""Versions of this package and of what it runs on, for the manifest."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__", "package_versions"]

try:
    __version__ = version("eafo-dynamic")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"


def package_versions() -> dict[str, str]:
    """Versions that a result depends on.

    Returns:
        Version by package name; packages that are not installed are left out.
    """
    found = {"python": platform.python_version(), "eafo-dynamic": __version__}
    for name in ("torch", "lightning", "pytorch-lightning", "torchmetrics"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
