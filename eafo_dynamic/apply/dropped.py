"""Says so where somebody else's code is about to lose corrections, as far as a hook can see it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from eafo_dynamic.apply.kept import Keeper, keep
from eafo_dynamic.apply.sitelist import site_keys
from eafo_dynamic.apply.surgery import is_wrapped

__all__ = ["note_in_load_reports", "watch_loads"]

_LOADERS = "transformers.modeling_utils"
_REPORTS = ("UNEXPECTED", "not used when initializing")
_NOTE = (
    "\n- eafo_...:\tcorrections of eafo-dynamic, which from_pretrained leaves out. Put them on with "
    "eafo_dynamic.load_corrections(model, folder).\n"
)


class _Note(logging.Filter):
    """Explains in the report of ``from_pretrained`` what those unexpected weights are."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Adds to a record; leaves none out.

        Args:
            record: of the logger of transformers.

        Returns:
            True.
        """
        text = record.getMessage()
        if "eafo_" in text and any(words in text for words in _REPORTS):
            record.msg, record.args = text.rstrip("\n") + _NOTE, ()
        return True


_NOTES = _Note()


def note_in_load_reports() -> None:
    """Lets the reports of ``from_pretrained`` say what to do about corrections; once a process."""
    logging.getLogger(_LOADERS).addFilter(_NOTES)  # does nothing the second time


class _Watch(Keeper):
    """Stands before a wrapped model's ``load_state_dict``."""

    hook = "load_state_dict"

    def __call__(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = self.run_own(state_dict, *args, **kwargs)
        dropped = site_keys(getattr(result, "unexpected_keys", ()))
        if dropped:
            warnings.warn(
                f"EAFO: load_state_dict has left out {len(dropped)} tensors of corrections, first of them "
                f"{dropped[0]}: this {type(self.module).__name__} has no such sites. "
                "apply_from_checkpoint(unwrap(model), path) makes them.",
                stacklevel=2,
            )
        return result


def watch_loads(model: nn.Module) -> None:
    """Warns where ``load_state_dict(..., strict=False)`` of a wrapped model leaves corrections out.

    Args:
        model: wrapped.
    """
    if is_wrapped(model):
        keep(_Watch(model))
