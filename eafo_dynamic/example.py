"""An example for the dry run from what a Lightning trainer already has, without consuming any of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset

from eafo_dynamic.sites import forked_random_states

__all__ = ["example_run"]


def example_run(trainer: Any, module: Any) -> tuple[Callable[[nn.Module], object] | None, str]:
    """A function that runs one example through a copy of a LightningModule.

    The example is ``example_input_array`` where the module has one; otherwise the first two items of the training data,
    collated and sent through ``training_step`` with logging switched off. Items are read from the data set itself: no
    iterator advances, no worker starts, no global random state changes.

    Args:
        trainer: a Trainer in its setup.
        module: the LightningModule to be wrapped.

    Returns:
        The function, or None, and where the example comes from or why there is none.
    """
    if getattr(module, "example_input_array", None) is not None:
        return lambda probe: _forward(probe, probe.example_input_array), "example_input_array"
    if not module.automatic_optimization:
        return None, "manual optimisation: training_step would step the optimisers; set example_input_array"
    try:
        with forked_random_states():
            batch = _first_items(trainer, module)
    except Exception as error:  # user code that is not ready before the module's own setup
        return (
            None,
            f"the training data cannot be read ahead ({type(error).__name__}: {error}); set example_input_array",
        )
    if batch is None:
        return None, "the training data is a stream; set example_input_array"

    def run(probe: Any) -> object:
        vars(probe).update(log=_ignore, log_dict=_ignore)
        return probe.training_step(batch, 0)

    return run, "the first training batch"


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for LightningModule.log, which has nowhere to log to before the loops run."""


def _forward(probe: nn.Module, example: Any) -> object:
    if isinstance(example, Mapping):
        return probe(**example)
    return probe(*example) if isinstance(example, tuple) else probe(example)


def _first_items(trainer: Any, module: Any) -> Any:
    """Two items of the training data, collated as its loader does and moved to the module's device.

    Returns:
        The batch; None for a stream, which could not be read without consuming it.
    """
    source = trainer.fit_loop._data_source
    if not source.is_defined():
        return None
    loaders = source.dataloader()
    loaders = getattr(loaders, "iterables", loaders)  # of a CombinedLoader
    streams: list[object] = []

    def first(loader: Any) -> Any:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            streams.append(loader)
            return None
        return _collated(loader)

    batch = tree_map(first, loaders, is_leaf=lambda node: not isinstance(node, (Mapping, list, tuple)))
    if streams:
        return None
    batch = module.on_before_batch_transfer(batch, 0)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    batch = module.transfer_batch_to_device(batch, device, 0)
    return module.on_after_batch_transfer(batch, 0)


def _collated(loader: DataLoader[Any]) -> Any:
    dataset: Any = loader.dataset
    with _kept_generators(dataset):
        if loader.batch_size is None and loader.batch_sampler is None:
            return loader.collate_fn(dataset[0])
        return loader.collate_fn([dataset[i] for i in range(min(2, len(dataset)))])


@contextmanager
def _kept_generators(dataset: object) -> Generator[None]:
    generators: Sequence[torch.Generator] = [
        value for value in getattr(dataset, "__dict__", {}).values() if isinstance(value, torch.Generator)
    ]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
