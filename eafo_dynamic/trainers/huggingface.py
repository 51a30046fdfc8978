"""``EAFOTrainerCallback``: the controller on the hooks of the Hugging Face Trainer, and nothing else."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from eafo_dynamic.apply.checkpoints import STATE_NAME
from eafo_dynamic.apply.corrections import FILE_NAME, load_corrections, read_corrections, save_corrections
from eafo_dynamic.apply.manifest import check_form, report_from_manifest, warn_of_changes
from eafo_dynamic.apply.observing import refuse_corrected
from eafo_dynamic.apply.surgery import put_back, take_off
from eafo_dynamic.density.ranks import world_size
from eafo_dynamic.errors import ConfigError, EAFOError, SiteError, legible, one_line
from eafo_dynamic.find.sites import SiteReport, find_sites
from eafo_dynamic.internals.declared import takes
from eafo_dynamic.internals.files import replacing
from eafo_dynamic.internals.torch_internals import callers, current_frame, hide_from_compiler, variable_of
from eafo_dynamic.policy.attachment import thaw_under_adapters
from eafo_dynamic.policy.controller import EAFOController
from eafo_dynamic.records.schema import Record
from eafo_dynamic.trainers.huggingface_example import batch_report
from eafo_dynamic.trainers.optim import own_group
from eafo_dynamic.trainers.options import TrainerCallbackOptions
from eafo_dynamic.trainers.replicas import Replicas
from eafo_dynamic.trainers.reports import FIGURE, Metrics, announce, log_figure, log_options
from eafo_dynamic.trainers.runlog import RunLog

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise EAFOError("EAFOTrainerCallback needs transformers: pip install transformers") from error

__all__ = ["EAFOTrainerCallback"]


_ADAPTER = "adapter_config.json"


class EAFOTrainerCallback(TrainerCallback):
    """Lets every activation of a model follow its own data under the Hugging Face Trainer.

    Pass it when the Trainer is made, so that eps is in the optimiser::

        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[EAFOTrainerCallback()])

    Aggregates go to ``report_to`` as ``eafo/...`` after every update round, unless ``logging_strategy="no"``; every
    site's row goes to ``<output_dir>/eafo/corrections.jsonl``. With ``rollback_factor`` the loss is the one that the
    model returns; where it returns none, ``compute_loss`` has to call ``callback.controller.observe_loss(loss)``.

    All options are given by name; see ``__init__``.

    Attributes:
        controller: the EAFOController; None before the Trainer is made.
        options: what was given, checked.

    Raises:
        ConfigError: if options cannot work; the message has each of them with its value and how to fix it.
    """

    @takes(TrainerCallbackOptions)
    def __init__(self, options: TrainerCallbackOptions) -> None:
        self.options = options
        self.controller: EAFOController | None = None
        self._trainer: Any = None
        self._log = RunLog(options.dirpath, options.save_log, self._say)
        self._metrics = Metrics(options.log_every_n_steps, options.log_sites or ())
        self._replicas: Replicas | None = None
        self._ignored: list[nn.Module] | None = None  # modules that accelerate leaves whole by itself
        self._loss_hook: Any = None
        self._awaits_loss = False  # whether a loss is wanted, and none has been looked for yet
        self._has_ended = False

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wraps the model, before the optimiser is built and before the model is handed to DistributedDataParallel."""
        model = kwargs["model"]
        self._trainer = _calling_trainer()
        _check_sharding(self._trainer, self.options)
        self._watch_training()
        selection = self.options.selection
        if self.options.observes:
            refuse_corrected(model)
        earlier = take_off(model)  # of an earlier training, or of a file
        if self.options.example is not None:
            report = find_sites(model, selection=selection, **self.options.example)
        else:
            report = batch_report(self._trainer, model, selection)
        self.controller = EAFOController(model, self.options, report)
        self._leave_whole()
        put_back(model, earlier)
        if world_size() > 1:
            self._replicas = Replicas(model, self._amplitudes)
        if self.options.verbose and state.is_world_process_zero:
            announce(report)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gives eps its parameter group, restores what a checkpoint has, and opens the log."""
        controller = self._controller
        self._check_model(kwargs["model"])
        thaw_under_adapters(controller.model, controller.trained)
        scheduler = kwargs["lr_scheduler"]
        self._regroup(kwargs["optimizer"], [getattr(scheduler, "scheduler", scheduler)])  # accelerate wraps it
        if state.global_step:
            folder = _resumed_checkpoint(args, state)
            self._restore_corrections(folder)
            self._resume(folder / STATE_NAME)
        controller.begin(state.global_step)
        self._watch_losses()
        self._has_ended = False
        if state.is_world_process_zero:
            self._report_options()
        self._log.open(_run_of(args, state), controller.about())
        self._log.align(state.global_step)

    def _regroup(self, optimizer: Any, schedulers: Sequence[Any] = ()) -> None:
        """Gives eps its parameter group, unless it has one."""
        controller = self._controller
        notes = own_group(
            [optimizer],
            controller.amplitudes,
            controller.model,
            trained=controller.trained,
            schedulers=schedulers,
            lr=self.options.lr,
            lr_multiple=self.options.lr_multiple,
            weight_decay=self.options.weight_decay,
            # this Trainer restores optimiser and scheduler before it says that training begins; shards are restored by
            # the names of their parameters, and the groups have to be there before
            save_ungrouped=_fsdp_plugin(self._trainer) is None,
        )
        for note in notes:
            warnings.warn(f"EAFO: {note}", stacklevel=3)

    def _check_model(self, model: nn.Module) -> None:
        """Refuses to train a model that has not, or no longer, the corrections of the controller."""
        controller = self._controller
        if all(module is not controller.model for module in model.modules()):
            raise EAFOError(
                "the Trainer trains another model than the one that EAFOTrainerCallback wrapped when the Trainer was "
                "made, as it does with model_init. Give it model=... in place of model_init."
            )
        if not controller.attached:
            raise EAFOError(
                "the corrections were taken out of the model after the Trainer was made. Make a new Trainer with a new "
                "EAFOTrainerCallback."
            )

    def _adopt(self, folder: Path | None) -> None:
        """Wraps the model as the checkpoint to go on from says, before the Trainer makes its optimiser."""
        if folder is None or self.options.observes or not (folder / FILE_NAME).is_file():
            return
        controller = self._controller
        self._check_model(self._trainer.model)
        saved = read_corrections(folder / FILE_NAME).sites
        check_form(saved, self.options.form)
        resumed = report_from_manifest(controller.model, saved, controller.report)
        if {site.name for site in resumed.wrapped} != set(controller.bank.names):
            warn_of_changes(saved, controller.report)
            controller.detach()
            self.controller = EAFOController(controller.model, self.options, _in_order_of(resumed, folder))
            self._leave_whole()

    def _leave_whole(self) -> None:
        """Tells accelerate, where it shards the model by FSDP2, to leave the amplitudes whole."""
        plugin = _fsdp_plugin(self._trainer)
        if plugin is None:
            return
        if self._ignored is None:
            self._group_at_once()
            self._ignored = _modules_of(plugin.ignored_modules, self._controller.model)
        amplitudes = nn.ParameterList(self._controller.amplitudes.values())
        plugin.ignored_modules = [*self._ignored, amplitudes]
        self._controller.shard_options()

    def _group_at_once(self) -> None:
        """Gives eps its parameter group as soon as the Trainer has made its optimiser."""
        trainer = self._trainer
        create = trainer.create_optimizer

        @functools.wraps(create)
        def created(*args: Any, **kwargs: Any) -> Any:
            made = create(*args, **kwargs)
            self._regroup(trainer.optimizer)
            return made

        trainer.create_optimizer = created

    def _restore_corrections(self, folder: Path) -> None:
        """Restores corrections beside an adapter: the Trainer restores the adapter alone."""
        if (folder / _ADAPTER).is_file() and (folder / FILE_NAME).is_file():
            load_corrections(self._controller.model, folder)

    def _resume(self, path: Path) -> None:
        if not path.exists():
            warnings.warn(f"EAFO: {path} is missing; density estimates start anew", stacklevel=3)
            return
        way_on = "Resume from an earlier checkpoint, or delete this file: then density estimates start anew"
        with legible(f"{path} is torn or damaged. {way_on}"):
            saved = torch.load(path, map_location="cpu", weights_only=True)
        before = copy.deepcopy(self._controller.state_dict())
        try:
            self._controller.load_state_dict(saved)
        except SiteError as error:
            self._controller.load_state_dict(before)
            raise SiteError(f"{path}: {error} {way_on}.") from error
        self._log.resumed(saved.get("log"))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the running estimates, and what every rank has seen since the last round, beside the weights."""
        saved = {**self._controller.gathered_state(), "log": self._log.location}
        if state.is_world_process_zero:
            folder = _checkpoint(args, state)
            with replacing(folder / STATE_NAME) as file:
                torch.save(saved, file)
            if not self.options.observes:
                save_corrections(self._controller.model, folder)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lets the policy add to eps.grad, or drops it once frozen."""
        self._check_losses()
        self._controller.before_optimizer_step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Acts after each optimiser step: trust region, update round, log, metrics."""
        controller, step = self._controller, state.global_step
        rows = controller.step(step, int(state.epoch or 0))
        has_snapshot = self._log.write(step, rows, controller.rounds, controller.snapshot)
        self._report(args, control, step, rows)
        if has_snapshot:
            self._report_figure(step)

    def _report(self, args: Any, control: Any, step: int, rows: list[Record]) -> None:
        """Sends metrics through the Trainer's own ``log``, on every rank, as the Trainer does."""
        means, of_sites = self._metrics.after_step(step, rows)
        logs = {**means, **of_sites}
        if not logs or self._trainer is None or args.logging_strategy == "no":
            return
        due = control.should_log
        self._trainer.log(logs)
        control.should_log = due  # the Trainer takes one log for the other, and would leave out its own at this step

    def _report_options(self) -> None:
        """Tells the Trainer's reporting callbacks the options, beside its own arguments."""
        if self._trainer is None:
            return
        for callback in self._trainer.callback_handler.callbacks:
            try:
                log_options(callback, self.options.primitives())
            except Exception as error:  # of a service, such as MLflow's where a resumed run has other options
                kind = type(callback).__name__
                warnings.warn(f"EAFO: {kind} does not take the options ({one_line(error)})", stacklevel=3)

    def _report_figure(self, step: int) -> None:
        if not self.options.log_figures or self._trainer is None:
            return
        figure = self.plot("functions")
        for callback in self._trainer.callback_handler.callbacks:
            log_figure(callback, FIGURE, figure, step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sends the last figure with the last metrics: at the end of the training TensorBoard is closed already."""
        is_last = "train_runtime" in kwargs.get("logs", ())
        if is_last and self.options.log_figures and not args.load_best_model_at_end:
            self._end(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the log with the model as the training leaves it, and closes it; the model keeps its corrections."""
        self._controller.collecting = False
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._restore_corrections(Path(state.best_model_checkpoint))
        self._end(state)
        self._log.close()
        self._forget_losses()

    def _end(self, state: Any, how: str = "completed") -> None:
        if self._has_ended:
            return
        self._has_ended = True
        if self._log.end(state.global_step, int(state.epoch or 0), how, self._controller):
            self._report_figure(state.global_step)

    # The Trainer tells no callback of an exception, so its method `train` is wrapped on this one object.

    def _watch_training(self) -> None:
        trainer = self._trainer
        if trainer is None:
            return
        train = trainer.train

        @functools.wraps(train)
        def watched(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
            try:
                self._adopt(_named_checkpoint(trainer, resume_from_checkpoint))
                return train(resume_from_checkpoint, *args, **kwargs)
            except BaseException as error:
                self._failed(trainer.state, error)
                raise

        trainer.train = watched

    def _failed(self, state: Any, error: BaseException) -> None:
        """Ends and closes the log of a training that an exception ends, also when it is interrupted by hand."""
        if self.controller is None:
            return
        self.controller.collecting = False
        how = "failed"
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            how = "interrupted"
        if self._log.began:
            try:
                self._end(state, how)
            except Exception as problem:  # such as a CUDA device that answers no more: the first exception is the cause
                warnings.warn(f"EAFO: the log does not end with the model ({one_line(problem)})", stacklevel=2)
        self._log.close()
        self._forget_losses()

    def _say(self, line: str) -> None:
        if self.options.verbose:
            announce(line)

    def plot(self, what: str = "heatmap", column: str = "entropy") -> Any:
        """Draws the run's log.

        Args:
            what: ``heatmap``, ``trajectories``, ``functions``, ``densities``, ``prediction`` or ``ranking``.
            column: of the log, for the figures that show one.

        Returns:
            A matplotlib figure.

        Raises:
            LogError: if no log has been written.
        """
        return self._log.plot(what, column)

    # The Trainer shows a callback no loss. The model returns it, though, in all but a few trainings.

    def _watch_losses(self) -> None:
        self._forget_losses()  # of a training that was interrupted
        if self.options.rollback_factor is not None:
            self._loss_hook = self._controller.model.register_forward_hook(self._see_loss)
            self._awaits_loss = True

    @hide_from_compiler
    def _see_loss(self, model: nn.Module, args: Any, output: Any) -> None:
        loss = _loss_in(output)
        if loss is not None and model.training and torch.is_grad_enabled():
            self._controller.observe_loss(loss)

    def _check_losses(self) -> None:
        """Says once, at the first step, if no loss has come by."""
        if self._awaits_loss and not self._controller.own_state()["losses"]["count"]:
            warnings.warn(
                f"EAFO: rollback_factor={self.options.rollback_factor} has no effect: the model returns no loss. Call "
                "callback.controller.observe_loss(loss) in compute_loss or compute_loss_func.",
                stacklevel=3,
            )
        self._awaits_loss = False

    def _forget_losses(self) -> None:
        if self._loss_hook is not None:
            self._loss_hook.remove()
        self._loss_hook = None

    def _amplitudes(self) -> list[nn.Parameter]:
        if self.controller is None:
            return []
        return self.controller.bank.amplitudes

    @property
    def _controller(self) -> EAFOController:
        if self.controller is None:
            raise EAFOError("EAFOTrainerCallback was not there when the Trainer was made: pass it in callbacks=[...].")
        return self.controller


def _calling_trainer() -> Any:
    """The Trainer whose ``__init__`` calls a callback, to which it does not make itself known.

    Returns:
        The Trainer; None where something else calls the hooks.
    """
    for frame in callers(current_frame()):
        caller = variable_of(frame, "self")
        if isinstance(caller, Trainer):
            return caller
    return None


def _check_sharding(trainer: Any, options: TrainerCallbackOptions) -> None:
    """Refuses what cuts parameters into shards and cannot leave the amplitudes whole."""
    given: Any = getattr(trainer, "args", None)
    if getattr(trainer, "is_deepspeed_enabled", False):
        raise ConfigError(
            "deepspeed",
            getattr(given, "deepspeed", None),
            "DeepSpeed cuts parameters into shards, and an amplitude is one number",
            "Train with DistributedDataParallel or fsdp=True: leave the option out, of accelerate's configuration too.",
        )
    plugin = _fsdp_plugin(trainer)
    if plugin is None:
        return
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ConfigError(
            "fsdp",
            getattr(given, "fsdp", None),
            "version 1 of FSDP cuts parameters into shards, and an amplitude is one number",
            "Set version 2 in fsdp_config (fsdp_version in accelerate's configuration), or train with "
            "DistributedDataParallel.",
        )
    if plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            "cpu_ram_efficient_loading",
            True,
            "accelerate makes all parameters anew and cuts the amplitudes too, each of which is one number",
            "Set it to False in fsdp_config.",
        )
    if options.per_channel and getattr(given, "max_grad_norm", 0):
        raise ConfigError(
            "max_grad_norm",
            given.max_grad_norm,
            "torch does not clip shards together with whole amplitudes, one a channel",
            "Set max_grad_norm=0.0, or leave per_channel out.",
        )


def _modules_of(ignored: Any, model: nn.Module) -> list[nn.Module]:
    """Modules that accelerate is told to ignore: it takes them, or a pattern of their names."""
    if isinstance(ignored, str):
        pattern = re.compile(ignored)
        return [module for name, module in model.named_modules() if pattern.fullmatch(name)]
    return list(ignored or ())


def _fsdp_plugin(trainer: Any) -> Any:
    """What accelerate knows of FSDP; None where it does not shard."""
    if not getattr(trainer, "is_fsdp_enabled", False):
        return None
    return trainer.accelerator.state.fsdp_plugin


def _named_checkpoint(trainer: Any, named: str | bool | None) -> Path | None:
    """The folder that the Trainer will go on from; None if it begins anew, or there is none and the Trainer says so."""
    if named is True:
        named = get_last_checkpoint(trainer.args.output_dir)
    if not named:
        return None
    return Path(named)


def _in_order_of(report: SiteReport, folder: Path) -> SiteReport:
    """The sites in the order in which a checkpoint's state has them, where it has one that can be read."""
    with contextlib.suppress(Exception):  # what is wrong with it is said when the state is restored
        names: list[str] = list(torch.load(folder / STATE_NAME, map_location="cpu", weights_only=True)["sites"])
        return replace(report, sites=sorted(report.sites, key=lambda site: names.index(site.name)))
    return report


def _resumed_checkpoint(args: Any, state: Any) -> Path:
    """The folder that the Trainer has restored: the one that ``train(resume_from_checkpoint=...)`` names."""
    for frame in callers(current_frame()):
        if isinstance(variable_of(frame, "self"), Trainer):
            folder = variable_of(frame, "resume_from_checkpoint")
            if isinstance(folder, (str, Path)):
                return Path(folder)
    return _checkpoint(args, state)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _run_of(args: Any, state: Any) -> SimpleNamespace:
    """What the log of a run asks of a trainer."""
    return SimpleNamespace(
        log_dir=args.output_dir,
        default_root_dir=args.output_dir,
        logger=None,  # runs of report_to have no folder of their own
        is_global_zero=state.is_world_process_zero,
    )


def _loss_in(output: Any) -> Tensor | None:
    """The loss in what a model returns, where the Trainer looks for it.

    Returns:
        A 0-dim tensor that can be differentiated; None if there is none.
    """
    first: Any = None
    if isinstance(output, Mapping):
        first = output.get("loss")
    elif isinstance(output, tuple) and output:
        first = output[0]
    if isinstance(first, Tensor) and first.dim() == 0 and first.requires_grad:
        return first
    return None
