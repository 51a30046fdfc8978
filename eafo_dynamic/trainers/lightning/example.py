"""Examples for the dry run: the module's example input, data read ahead, or the first training batch.

No data is consumed, and nothing is left behind. The dry run works on a structural copy of the model, with loggers and
optimisers that do nothing, and with forked random states.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from eafo_dynamic.errors import SiteError, printable
from eafo_dynamic.find.sites import Selection, SiteReport, find_sites, forked_random_states
from eafo_dynamic.internals.torch_internals import may_be_compiled, tree_map

__all__ = [
    "averaging",
    "batch_report",
    "batch_runs",
    "cannot_wait",
    "example_runs",
    "first_report",
    "report_now",
    "search",
    "static_report",
    "swa_rates",
]

Run = Callable[[nn.Module], object]

_AVERAGING = ("WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging")


def averaging(trainer: Any, until: object = None) -> list[Any]:
    """Callbacks that average the weights, and copy the model for it in their setup.

    Args:
        trainer: a Trainer in its setup.
        until: only the callbacks before this one; None: all.

    Returns:
        Those of Lightning's own classes, and of classes derived from them.
    """
    found: list[Any] = []
    for callback in trainer.callbacks:
        if callback is until:
            break
        if set(_AVERAGING) & _class_names(callback):
            found.append(callback)
    return found


def _class_names(instance: object) -> set[str]:
    # by name: the classes may be those of lightning or of pytorch_lightning, and a fit must not import both
    return {kind.__name__ for kind in type(instance).__mro__}


def swa_rates(trainer: Any) -> list[SimpleNamespace]:
    """Learning rates that StochasticWeightAveraging has for each parameter group, in the form of a scheduler.

    Args:
        trainer: with its optimisers.

    Returns:
        One object per callback that has a list of them.
    """
    found: list[SimpleNamespace] = []
    for each in averaging(trainer):
        if isinstance(getattr(each, "_swa_lrs", None), list):
            each._swa_lrs = list(each._swa_lrs)  # the user's own list may serve another run
            found.append(SimpleNamespace(optimizer=trainer.optimizers[0], lrs=each._swa_lrs))
    return found


def cannot_wait(trainer: Any, module: Any) -> str:
    """Why the search for sites cannot wait for the first training batch.

    By then, wrappers have listed the model's parameters, averages have copied them, and the compiler has read the code.

    Args:
        trainer: a Trainer in its setup.
        module: the LightningModule to be wrapped.

    Returns:
        The reason; empty if they can.
    """
    if "SingleDeviceStrategy" not in _class_names(trainer.strategy):
        return f"{type(trainer.strategy).__name__} knows only parameters that are there when it wraps the model"
    averages = averaging(trainer)
    if averages:
        return f"{type(averages[0]).__name__} copies the model before"
    for name, each in module.named_modules():
        if may_be_compiled(each) or getattr(each, "_compiler_ctx", None) is not None:
            return f"{name or type(each).__name__} is compiled"
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        return "training_step takes the batches from an iterator itself"
    return ""


def example_runs(trainer: Any, module: Any, may_wait: bool) -> tuple[list[Run], str]:
    """Ways to run an example through a copy of a LightningModule before the training begins.

    The example is ``example_input_array`` where the module has one. Otherwise it is the first two items of the training
    data, collated and sent through ``training_step``. Items are read from the data set itself: no iterator advances, no
    worker starts, no global random state changes.

    Args:
        trainer: a Trainer in its setup.
        module: the LightningModule to be wrapped.
        may_wait: whether the search may wait for the first training batch where that shows more.

    Returns:
        The ways, best first; and where the example comes from, or why there is none.
    """
    if getattr(module, "example_input_array", None) is not None:
        return [lambda probe: _forward(probe, probe.example_input_array)], "example_input_array"
    if may_wait and not module.automatic_optimization:
        return [], "optimisation is manual, by optimisers that are not there yet"
    try:
        with forked_random_states():
            batch = _first_items(trainer, module)
    except Exception as error:  # user code that is not ready before the module's own setup
        return [], f"the training data cannot be read ahead ({type(error).__name__}: {error})"
    if batch is None:
        return [], "the training data is a stream"
    return batch_runs(trainer, module, batch), "the first training items"


def batch_runs(trainer: Any, module: Any, batch: Any, *, knows_step: bool = False) -> list[Run]:
    """Ways to run a batch through a copy of a LightningModule: its ``training_step``, or else its ``forward``.

    Logging does nothing. In manual optimisation, ``optimizers()``, ``lr_schedulers()`` and ``manual_backward`` do
    nothing either. ``forward`` gets the parts of the batch that its signature names, or the whole batch.

    Args:
        trainer: its Trainer.
        module: the LightningModule to be wrapped.
        batch: on the module's device; every run gets a copy.
        knows_step: whether the copy has its Trainer, so that the step may go by ``global_step``. Not before a training:
            it may go by the rank as well, and all ranks have to find the same.

    Returns:
        The ways, best first.
    """

    def step(probe: Any) -> object:
        vars(probe).update(dict.fromkeys(("log", "log_dict", "print"), _ignore))
        if knows_step:
            vars(probe)["_trainer"] = trainer
        if not probe.automatic_optimization:
            vars(probe).update(_idle_optimisation(trainer))
        arguments = [copy.deepcopy(batch)]
        if is_param_in_hook_signature(probe.training_step, "batch_idx", min_args=2):
            arguments.append(0)
        with _without_loggers(trainer), trainer.precision_plugin.train_step_context():
            return probe.training_step(*arguments)

    def forward(probe: nn.Module) -> object:
        args, kwargs = _asked_for(probe, copy.deepcopy(batch))
        with trainer.precision_plugin.train_step_context():
            return probe(*args, **kwargs)

    def whole(probe: nn.Module) -> object:
        with trainer.precision_plugin.train_step_context():
            return probe(copy.deepcopy(batch))

    if not module.automatic_optimization and not trainer.optimizers:
        return [forward, whole]  # a manual training_step asks for optimisers
    return [step, forward, whole]


def search(module: nn.Module, selection: Selection, runs: Sequence[Run]) -> tuple[SiteReport | None, str]:
    """Finds sites by the first run that works.

    Args:
        module: the model.
        selection: which sites to wrap.
        runs: ways to run an example through a copy of it, best first.

    Returns:
        The report; None, and why the best way failed, if none works.
    """
    problem = ""
    for run in runs:
        try:
            report = find_sites(module, selection=selection, run=run)
        except SiteError as error:
            problem = problem or str(error)
            continue
        if problem:
            note = f"Found by a forward alone, since training_step could not be followed: {problem}"
            report = replace(report, note=f"{report.note} {note}".strip())
        return report, ""
    return None, problem


def first_report(trainer: Any, module: nn.Module, selection: Selection) -> tuple[SiteReport | None, str]:
    """The sites of a model, if they can be found before the training begins.

    Args:
        trainer: a Trainer in its setup.
        module: the LightningModule to be wrapped.
        selection: which sites to wrap.

    Returns:
        The report; None, and why, if the search has to wait for the first training batch.
    """
    obstacle = cannot_wait(trainer, module)
    runs, source = example_runs(trainer, module, may_wait=not obstacle)
    report, problem = search(module, selection, runs)
    if report is not None:
        return report, ""
    why = source
    if problem:
        why = f"{source}: {problem}"
    if obstacle:
        return static_report(module, selection, f"{why}; {obstacle}"), ""
    return None, why


def batch_report(trainer: Any, module: nn.Module, selection: Selection, batch: Any) -> SiteReport:
    """The sites of a model, found by its first training batch, or else in its module tree.

    Args:
        trainer: its Trainer.
        module: the LightningModule to be wrapped.
        selection: which sites to wrap.
        batch: on the module's device.

    Returns:
        The report.
    """
    report, problem = search(module, selection, batch_runs(trainer, module, batch))
    return report or static_report(module, selection, problem)


def report_now(trainer: Any, module: nn.Module) -> SiteReport | None:
    """The sites of a model that is about to be evaluated, found by the first way that a training would try.

    Args:
        trainer: a Trainer whose stage is no training.
        module: the LightningModule, not wrapped.

    Returns:
        The report; None if that way fails. Another one might not call everything that training does.
    """
    runs, _ = example_runs(trainer, module, may_wait=True)
    if not runs:
        return None
    report, _ = search(module, Selection(), runs[:1])
    return report


def static_report(module: nn.Module, selection: Selection, why: str) -> SiteReport:
    """The sites in the module tree; warns that functional and repeated calls are not among them.

    Args:
        module: the model.
        selection: which sites to wrap.
        why: reason that no example could be run.

    Returns:
        The report.
    """
    message = "Set example_input_array to find functional and repeated calls."
    warnings.warn(f"EAFO looks at the module tree only, since {printable(why)}. {message}", stacklevel=3)
    return find_sites(module, selection=selection)


class _Constant:
    """Stands in for a method: returns the same value, whatever its arguments.

    Args:
        value: what it returns.
    """

    def __init__(self, value: object) -> None:
        self.value = value

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        return self.value


_ignore = _Constant(None)


class _Idle:
    """Stands in for an optimiser or scheduler; its methods do nothing.

    Args:
        real: the optimiser or scheduler.
    """

    def __init__(self, real: Any) -> None:
        groups = getattr(real, "param_groups", ())
        self.param_groups = [{**group, "params": []} for group in groups]

    def step(self, closure: Callable[[], object] | None = None, **kwargs: Any) -> object:
        if callable(closure):
            return closure()
        return None

    @contextmanager
    def toggle_model(self, *args: Any, **kwargs: Any) -> Generator[None]:
        yield

    def __getattr__(self, name: str) -> Callable[..., object]:
        return _ignore


def _idle_optimisation(trainer: Any) -> dict[str, Callable[..., Any]]:
    """Methods without effect, in place of those by which a manual training_step optimises."""
    methods: dict[str, Callable[..., Any]] = dict.fromkeys(
        ("manual_backward", "clip_gradients", "toggle_optimizer", "untoggle_optimizer"), _ignore
    )
    methods["optimizers"] = _returning_idle(trainer.optimizers)
    methods["lr_schedulers"] = _returning_idle([config.scheduler for config in trainer.lr_scheduler_configs])
    return methods


def _returning_idle(real: Sequence[Any]) -> _Constant:
    """As the methods of a LightningModule: one alone is returned itself, several as a list, none as None."""
    idle = [_Idle(each) for each in real]
    if not idle:
        return _Constant(None)
    if len(idle) == 1:
        return _Constant(idle[0])
    return _Constant(idle)


@contextmanager
def _without_loggers(trainer: Any) -> Generator[None]:
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


def _asked_for(module: nn.Module, batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The parts of a batch that a module's forward takes.

    Of a mapping, the entries that have a parameter's name; of a list or tuple, as many as there are parameters without
    a default, from the first on.

    Returns:
        Positional and keyword arguments.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    if isinstance(batch, Mapping):
        return (), {each.name: batch[each.name] for each in parameters if each.name in batch}
    if not isinstance(batch, (list, tuple)):
        return (batch,), {}
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [each for each in parameters if each.kind in positional and each.default is inspect.Parameter.empty]
    return batch[: max(1, len(needed))], {}


def _forward(probe: nn.Module, example: Any) -> object:
    if isinstance(example, Mapping):
        return probe(**example)
    if isinstance(example, tuple):
        return probe(*example)
    return probe(example)


def _first_items(trainer: Any, module: Any) -> Any:
    """The first two items of the data that the trainer will read, collated by the loader, on the module's device.

    Returns:
        The batch; None for a stream, which cannot be read without consuming it.
    """
    loop = trainer._active_loop
    source = loop._data_source
    if not source.is_defined():
        return None
    loaders = source.dataloader()
    loaders = getattr(loaders, "iterables", loaders)  # of a CombinedLoader
    if loop is not trainer.fit_loop and isinstance(loaders, (list, tuple)):
        loaders = loaders[0]  # they are read one after the other
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
    """Puts the random generators of a data set back to where they were."""
    generators: Sequence[torch.Generator] = [
        value for value in getattr(dataset, "__dict__", {}).values() if isinstance(value, torch.Generator)
    ]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
