"""The Hugging Face Hub, where ``huggingface_hub`` is installed."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from eafo_dynamic.errors import EAFOError, SiteError, one_line

__all__ = ["fetch", "hub"]


def hub() -> Any:
    """The package ``huggingface_hub``.

    Returns:
        It.

    Raises:
        EAFOError: if it is not installed.
    """
    try:
        return import_module("huggingface_hub")
    except ImportError as error:
        raise EAFOError("the Hugging Face Hub needs huggingface_hub: pip install huggingface_hub") from error


def fetch(repository: str, name: str) -> Path:
    """Fetches a file from the Hub, or from the cache of an earlier fetch.

    Args:
        repository: ``owner/name``.
        name: of the file in it.

    Returns:
        The file here.

    Raises:
        SiteError: if it cannot be had.
    """
    package = hub()
    try:
        return Path(package.hf_hub_download(repository, name))
    except Exception as error:
        raise SiteError(f"hf://{repository} cannot be fetched ({one_line(error)}). Give owner/name.") from error
