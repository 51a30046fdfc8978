"""Folders of ``torch.distributed.checkpoint``, read in one process and without running anything in them."""

from __future__ import annotations

import inspect
import pickle
import warnings
from collections.abc import Callable
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

__all__ = ["read_distributed"]

_METADATA = ".metadata"
_OURS = "torch.distributed.checkpoint."
_PLAIN = {("collections", "OrderedDict"), ("torch", "Size"), ("torch.serialization", "_get_layout")}
_PROPERTIES = (torch.dtype, torch.layout, torch.memory_format)


class _Metadata(pickle.Unpickler):
    """Reads what a folder says of its tensors, and nothing else: a pickle could run code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Finds a class that such a file needs.

        Args:
            module_name: where it is.
            global_name: its name.

        Returns:
            The class, or a dtype and the like.

        Raises:
            UnpicklingError: for anything else.
        """
        if module_name.split(".")[0] == "pathlib":
            return PurePath  # where the folder was when it was written, which nobody needs
        if (module_name, global_name) == ("builtins", "getattr"):
            return _member  # so newer versions name the members of an enumeration
        found: Any = super().find_class(module_name, global_name) if self._is_needed(module_name, global_name) else None
        if found is None or (module_name.startswith(_OURS) and not isinstance(found, type)):
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is nothing that says what tensors are")
        return found

    @staticmethod
    def _is_needed(module_name: str, global_name: str) -> bool:
        if module_name.startswith(_OURS) or (module_name, global_name) in _PLAIN:
            return True
        return module_name == "torch" and isinstance(getattr(torch, global_name, None), _PROPERTIES)


def _member(kind: Any, name: Any) -> Any:
    if not isinstance(kind, type) or not issubclass(kind, Enum) or name not in kind.__members__:
        raise pickle.UnpicklingError(f"{name!r} is no member of an enumeration")
    return kind[name]


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Reads the list of tensors.

        Args:
            *args: not needed.
            **kwargs: not needed.

        Returns:
            The list.
        """
        with (Path(self.path) / _METADATA).open("rb") as file:
            found: Any = _Metadata(file).load()
        found.storage_meta = None
        return found


def read_distributed(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of a folder, whole, on the CPU.

    Args:
        folder: of ``torch.distributed.checkpoint``.
        wanted: whether a tensor of that name is.

    Returns:
        Tensors by their names there.
    """
    reader = _Reader(str(folder))
    state: dict[str, Any] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata) and wanted(name):
            state[name] = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
    alone: dict[str, Any] = {}
    if "no_dist" in inspect.signature(dcp.load).parameters:
        alone["no_dist"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.load(state, storage_reader=reader, **alone)
    return state
