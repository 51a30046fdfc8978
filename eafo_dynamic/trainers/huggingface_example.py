"""The example for the dry run from what a Hugging Face Trainer has: the first items of its training data.

The items are read from the data set itself: no iterator advances, no worker starts, and no global random state
changes. They run through a structural copy of the model.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eafo_dynamic.errors import SiteError, printable
from eafo_dynamic.find.sites import Selection, SiteReport, find_sites, forked_random_states
from eafo_dynamic.internals.torch_internals import tree_map

__all__ = ["batch_report"]

_ITEMS = 2


def batch_report(trainer: Any, model: nn.Module, selection: Selection) -> SiteReport:
    """The sites of a model as the first items of its training data show them, or else its module tree.

    Args:
        trainer: its Trainer, or None.
        model: the model to be wrapped.
        selection: which sites to wrap.

    Returns:
        The report.
    """
    why = "the Trainer was not found"
    if trainer is not None:
        try:
            with forked_random_states():
                batch = _first_items(trainer, model)
            if batch is not None:
                return find_sites(model, selection=selection, run=lambda probe: _run(trainer, probe, batch))
            why = "there is no training data, or it is a stream"
        except SiteError as error:
            why = str(error)
        except Exception as error:  # user code that is not ready before the training
            why = f"the training data cannot be read ahead ({type(error).__name__}: {error})"
    warnings.warn(
        f"EAFO looks at the module tree only, since {printable(why)}. Give EAFOTrainerCallback(example={{...}}), the "
        "keyword inputs of one forward, to find functional and repeated calls.",
        stacklevel=2,
    )
    return find_sites(model, selection=selection)


def _run(trainer: Any, probe: nn.Module, batch: Mapping[str, Any]) -> object:
    with trainer.compute_loss_context_manager():
        return probe(**copy.deepcopy(batch))


def _first_items(trainer: Any, model: nn.Module) -> Mapping[str, Any] | None:
    """The first items, collated as the Trainer does and moved to the model's device; None for a stream."""
    data: Any = trainer.train_dataset
    if data is None or isinstance(data, torch.utils.data.IterableDataset) or not hasattr(data, "__getitem__"):
        return None
    items: list[Any] = [data[k] for k in range(min(_ITEMS, len(data)))]
    if trainer.args.remove_unused_columns:
        items = [_asked_for(item, trainer, model) for item in items]
    batch = trainer.data_collator(items)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return dict(tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, dict(batch)))


def _asked_for(item: Any, trainer: Any, model: nn.Module) -> Any:
    """The columns that the model's forward takes, and the labels."""
    if not isinstance(item, Mapping):
        return item
    names = {*inspect.signature(model.forward).parameters, "label", "label_ids", *(trainer.label_names or ())}
    return {key: value for key, value in item.items() if key in names}  # pyright: ignore[reportUnknownVariableType]
