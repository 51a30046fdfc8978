"""``EAFOCallback``: the controller on Lightning's hooks, and nothing else."""

from __future__ import annotations

import warnings
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from eafo_dynamic.apply.kept import CHECKPOINT_KEY, keep_sites
from eafo_dynamic.apply.manifest import (
    check_form,
    check_manifest,
    check_weights,
    manifest,
    report_from_manifest,
    warn_of_changes,
    wrap_from_manifest,
)
from eafo_dynamic.apply.observing import refuse_corrected
from eafo_dynamic.apply.surgery import is_wrapped, put_back, take_off
from eafo_dynamic.density.ranks import everyones
from eafo_dynamic.errors import SiteError, one_line
from eafo_dynamic.find.sites import SiteReport
from eafo_dynamic.internals.declared import takes
from eafo_dynamic.policy.controller import EAFOController
from eafo_dynamic.policy.schedule import Epochs
from eafo_dynamic.records.notebook import History
from eafo_dynamic.trainers.lightning.adoption import Adoption
from eafo_dynamic.trainers.lightning.example import (
    averaging,
    batch_report,
    cannot_wait,
    first_report,
    report_now,
    swa_rates,
)
from eafo_dynamic.trainers.lightning.listener import LoadListener
from eafo_dynamic.trainers.lightning.reporter import Reporter, announce
from eafo_dynamic.trainers.lightning.restoring import load_module
from eafo_dynamic.trainers.optim import extend_groups, own_group
from eafo_dynamic.trainers.options import CallbackOptions
from eafo_dynamic.trainers.replicas import Replicas, check_strategy, with_mesh
from eafo_dynamic.trainers.runlog import RunLog

__all__ = ["EAFOCallback"]

_Module = TypeVar("_Module")


class EAFOCallback(Callback):
    """Lets every activation of a model follow its own data while the model trains.

    Attach it to any Trainer; the model's code is untouched::

        trainer = Trainer(callbacks=[EAFOCallback()])

    ``setup`` wraps the model's activations, so that eps is in the optimiser and checkpoints restore it. Where they
    cannot be found so early (a stream, manual optimisation), they are wrapped at the first training batch, and eps
    joins the optimiser then. In training, some batches leave a sample of a few thousand pre-activations per site. Every
    ``update_every_n_steps`` optimiser steps, each site's density, entropy and correction are estimated anew. Aggregates
    go to the trainer's loggers as ``eafo/...``, every site's row to ``<run>/eafo/corrections.jsonl``.

    All options are given by name; see ``__init__``.

    Attributes:
        controller: the EAFOController; None before ``setup``.
        options: what was given, checked.

    Raises:
        ConfigError: if options cannot work; the message has each of them with its value and how to fix it.
    """

    @takes(CallbackOptions)
    def __init__(self, options: CallbackOptions) -> None:
        self.options = options
        self.controller: EAFOController | None = None
        self._last_epoch: int | None = None  # that of the last batch of this fit
        self._epochs: Epochs | None = None
        if options.update_every_n_epochs is not None:
            self._epochs = Epochs(options.update_every_n_epochs)
        self._reporter = Reporter(options.log_every_n_steps, options.log_sites or (), options.log_figures)
        self._log = RunLog(options.dirpath, options.save_log, self._say)
        self._resumed: dict[str, Any] | None = None  # a checkpoint's state, until the fit can restore it
        self._awaits_batch = ""  # why the search for sites waits for the first training batch; empty if it does not
        self._earlier: dict[str, Tensor] = {}  # corrections of an earlier fit, until the model is wrapped again
        self._late = False  # whether eps joined the optimisers after they were made
        self._listener: LoadListener | None = None
        self._replicas: Replicas | None = None
        self._adoption = Adoption()

    @staticmethod
    def load_from_checkpoint(module_class: type[_Module], path: str | Path, **options: Any) -> _Module:
        """Makes a LightningModule from a checkpoint, with the corrections in it.

        In place of ``module_class.load_from_checkpoint(path)``, which knows no corrections::

            model = EAFOCallback.load_from_checkpoint(MyModule, "last.ckpt")

        Args:
            module_class: class of the module; it needs no change.
            path: the checkpoint.
            **options: as the ``load_from_checkpoint`` of Lightning takes them, arguments of the class among them.

        Returns:
            The module, wrapped as the checkpoint says.

        Raises:
            SiteError: if the checkpoint cannot be read, holds no corrections, or those of another model.
        """
        return load_module(module_class, path, **options)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wraps the model for a fit, before optimisers are made and weights are restored.

        For other stages the model stays as it is, unless a checkpoint with corrections is loaded later.
        """
        self._listener = LoadListener(pl_module, self._restore)
        if stage != "fit":
            return
        check_strategy(trainer.strategy)
        self.options = with_mesh(self.options, trainer.strategy)
        self._adoption = Adoption(self.options.adopt, trainer, pl_module)
        if trainer.world_size > 1:
            self._replicas = Replicas(pl_module, self._amplitudes)
        if self._has_wrapped(pl_module):
            return
        pl_module.configure_model()  # the base class of either host (lightning, pytorch_lightning) does nothing here
        if self.options.observes:
            refuse_corrected(pl_module)
        self.controller, self._late = None, False
        self._earlier = take_off(pl_module)  # of another callback's fit
        report, self._awaits_batch = first_report(trainer, pl_module, self.options.selection)
        if report is not None:
            self._wrap(trainer, pl_module, report)
        elif self.options.verbose and trainer.is_global_zero:
            announce(f"EAFO: sites will be looked for at the first training batch: {self._awaits_batch}.")
        for earlier in averaging(trainer, until=self):
            earlier.setup(trainer, pl_module, stage)  # again: it has copied the model as it was before

    def _has_wrapped(self, pl_module: Any) -> bool:
        return self.controller is not None and self.controller.model is pl_module and self.controller.attached

    def _wrap(self, trainer: Trainer, pl_module: LightningModule, report: SiteReport) -> None:
        self._attach(pl_module, report)
        if self.options.verbose and trainer.is_global_zero:
            announce(report)

    def _attach(self, pl_module: LightningModule, report: SiteReport) -> None:
        self.controller = EAFOController(pl_module, self.options, report)
        self.controller.collecting = False
        # checkpoints list the sites, so that a plain model can be wrapped the same way before its weights are loaded
        if not self.options.observes:
            keep_sites(pl_module, manifest(report, **self.options.form))
        put_back(pl_module, self._earlier)
        self._awaits_batch, self._earlier = "", {}

    def adopt(self, pl_module: Any, saved: dict[str, Any]) -> None:
        """Wraps a model as a checkpoint's list of sites says, just before its weights are restored.

        Args:
            pl_module: the model.
            saved: the checkpoint's list of sites.

        Raises:
            SiteError: if the model or the options do not fit the checkpoint.
        """
        saved = dict(check_manifest(saved))
        is_fit = self._has_wrapped(pl_module) or bool(self._awaits_batch)
        if not is_fit:
            if not is_wrapped(pl_module):
                wrap_from_manifest(pl_module, saved, report_now(pl_module.trainer, pl_module))
            return
        check_form(saved, self.options.form)
        if self.controller is None:
            self._attach(pl_module, report_from_manifest(pl_module, saved))
            return
        found = self.controller.report
        resumed = report_from_manifest(pl_module, saved, found)
        if resumed.wrapped != found.wrapped:
            self.controller.detach()
            self._attach(pl_module, resumed)
            warn_of_changes(saved, found, adopts=self.options.adopt)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives eps its parameter group, before optimiser states are restored, and opens the log."""
        self._last_epoch = None
        if not self._awaits_batch:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_state()
        schedulers: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
        schedulers.extend(swa_rates(trainer))
        notes = own_group(
            trainer.optimizers,
            self._controller.amplitudes,
            pl_module,
            trained=self._controller.trained,
            schedulers=schedulers,
            lr=self.options.lr,
            lr_multiple=self.options.lr_multiple,
            weight_decay=self.options.weight_decay,
            by_relatives=self._late,
        )
        for note in notes:
            warnings.warn(f"EAFO: {note}", stacklevel=2)
        self._reporter.begin(trainer, self.options.primitives())
        self._log.open(trainer, self._controller.about())

    def _restore_state(self) -> None:
        """Restores a checkpoint's state, also of the checkpoint by which a tuner undoes its trial steps."""
        saved = self._resumed
        if saved is None:
            return
        self._controller.load_state_dict(saved)
        self._controller.collecting = False
        self._log.resumed(saved.get("log"))
        self._late = saved.get("late", False)
        if self._epochs is not None:
            counts = saved.get("epochs", (saved["last_step"],))
            self._epochs = Epochs(self._epochs.every, *counts)
        self._resumed = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Expresses epochs in steps, and drops rows of the log that lie past the restored step."""
        if not self._awaits_batch:
            self._align(trainer)

    def _align(self, trainer: Trainer) -> None:
        self._restore_state()
        self._controller.begin(trainer.global_step)
        if self._epochs is not None:
            if self._epochs.began > trainer.global_step:  # of an earlier fit
                self._epochs = Epochs(self._epochs.every, trainer.global_step)
            promised = trainer.num_training_batches / trainer.accumulate_grad_batches
            self._controller.reschedule(self._epochs.schedule(self.options.schedule, promised))
        self._log.align(trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Finds the sites if their search has waited for a batch; decides whether this batch leaves samples."""
        if self._awaits_batch:
            self._find_in(batch, trainer, pl_module)
        self._restore_state()
        self._adopt_calls(batch, trainer, pl_module)
        due = self._epochs is not None and trainer.is_last_batch and self._epochs.due(trainer.current_epoch)
        self._controller.expect(trainer.global_step, due)

    def _find_in(self, batch: Any, trainer: Trainer, pl_module: LightningModule) -> None:
        self._late = True
        self._wrap(trainer, pl_module, batch_report(trainer, pl_module, self.options.selection, batch))
        self._begin(trainer, pl_module)
        self._align(trainer)

    def _adopt_calls(self, batch: Any, trainer: Trainer, pl_module: LightningModule) -> None:
        before = len(self._controller.bank.sites)
        new = self._adoption.of_batch(batch, self._controller, trainer, pl_module)
        if new is None:
            return
        self._late = True
        keep_sites(pl_module, manifest(self._controller.report, **self.options.form))
        notes = extend_groups(
            trainer.optimizers,
            self._controller.amplitudes,
            new,
            pl_module,
            schedulers=[config.scheduler for config in trainer.lr_scheduler_configs],
            options=self.options,
        )
        for note in notes:
            warnings.warn(f"EAFO: {note}", stacklevel=2)
        self._log.describe_anew(self._controller.about())
        names = ", ".join(self._controller.bank.names[before:])
        self._say(f"EAFO: from step {trainer.global_step} on, these calls are corrected, too: {names}.")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Lets the policy add to eps.grad, or drops it once frozen."""
        self._controller.before_optimizer_step(trainer.global_step, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Acts when the optimiser has stepped: trust region, update round, log."""
        if self._awaits_batch:
            return  # there was no batch: the loader gave None
        controller, step = self._controller, trainer.global_step
        self._adoption.after_batch(controller)
        self._last_epoch = trainer.current_epoch
        self._observe_loss(outputs)
        due: bool | None = None
        if self._epochs is not None:
            due = trainer.is_last_batch and self._epochs.end(trainer.current_epoch, step)
        rows = controller.step(step, trainer.current_epoch, due)
        if self._epochs is not None and trainer.is_last_batch:
            controller.reschedule(self._epochs.schedule(self.options.schedule))
        controller.collecting = False
        if self._log.write(step, rows, controller.rounds, controller.snapshot):
            self._reporter.send_figure(trainer, lambda: self.plot("functions"))
        self._reporter.send(trainer, pl_module, rows)

    def _observe_loss(self, outputs: Any) -> None:
        loss = outputs
        if isinstance(outputs, dict):
            loss = outputs.get("loss")
        if isinstance(loss, Tensor):
            self._controller.observe_loss(loss)

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

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the log, and the loggers' figures, with the model as the fit leaves it."""
        self._end(trainer, "completed")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stops collecting, ends and closes the log, also when a run is interrupted by hand."""
        if self.controller is not None:
            self.controller.collecting = False
        if self._log.began:
            by_hand = isinstance(exception, (KeyboardInterrupt, SystemExit))
            try:
                self._end(trainer, "interrupted" if by_hand else "failed")
            except Exception as error:  # such as a CUDA device that answers no more: the first exception is the cause
                warnings.warn(f"EAFO: the log does not end with the model ({one_line(error)})", stacklevel=2)
        self.teardown(trainer, pl_module, "fit")

    def _end(self, trainer: Trainer, how: str) -> None:
        epoch = self._last_epoch
        if epoch is None:  # nothing was left to train
            epoch = max(0, trainer.fit_loop.epoch_progress.current.ready - 1)
        if self.controller is not None and self._log.end(trainer.global_step, epoch, how, self.controller):
            self._reporter.send_figure(trainer, lambda: self.plot("functions"))

    def _say(self, line: str) -> None:
        if self.options.verbose:
            announce(line)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Closes the log; the model keeps its corrections."""
        for each in (self._listener, self._replicas):
            if each is not None:
                each.release()
        self._listener = self._replicas = None
        if self._earlier:
            warnings.warn("EAFO: no training batch came, and the corrections of an earlier fit are gone", stacklevel=2)
        self._awaits_batch, self._earlier = "", {}
        self._log.close()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds what other ranks have collected since the last round."""
        if self.controller is not None and self._resumed is None and trainer.world_size > 1:
            checkpoint["callbacks"][self.state_key]["ranks"] = everyones(
                self.controller.own_state(), self.controller.agreement.among
            )

    def _restore(self, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.options.observes and (self._has_wrapped(pl_module) or self._awaits_batch):
            if CHECKPOINT_KEY in checkpoint:
                raise SiteError(
                    "policy='observe' leaves a model as it is, and the checkpoint has corrections. Resume it with the "
                    "policy that it was trained with, or with policy='frozen', which keeps and measures them."
                )
            return
        if CHECKPOINT_KEY in checkpoint:
            self.adopt(pl_module, checkpoint[CHECKPOINT_KEY])
            check_weights(pl_module, checkpoint.get("state_dict") or {})
        elif "optimizer_states" in checkpoint and self.controller is not None and not self._late:
            self._postpone(pl_module)

    def _postpone(self, pl_module: Any) -> None:
        """Unwraps the model until the first batch: the optimisers of a plain run can be restored only as they were."""
        if pl_module.trainer.state.fn != "fit":
            return
        obstacle = cannot_wait(pl_module.trainer, pl_module)
        if obstacle:
            raise SiteError(
                f"a run without corrections cannot be resumed with them: {obstacle}. Load its state_dict into the "
                "model, and fit without ckpt_path."
            )
        self._controller.detach()
        self.controller, self._awaits_batch = None, "the checkpoint is of a run without corrections"

    def state_dict(self) -> dict[str, Any]:
        """State beside the model's own: running estimates and counts; tensors and primitives only.

        Returns:
            The state.
        """
        if self._resumed is not None:
            return self._resumed  # a tuner saves it before the fit has restored it
        if self.controller is None:
            return {}
        state = {**self.controller.state_dict(), "log": self._log.location, "late": self._late}
        if self._epochs is not None:
            state["epochs"] = [self._epochs.began, self._epochs.steps]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the restored state until the fit starts, when the model is on its device."""
        self._resumed = state_dict or None

    def __repr__(self) -> str:
        kind = type(self).__name__
        if self.controller is None:
            return f"{kind}: nothing wrapped yet"
        log = "" if self._log.path is None else f", log in {self._log.path}"
        return f"{kind} with {self.controller!r}{log}"

    def _repr_html_(self) -> str:
        if self.controller is None:
            return f"<p>{escape(repr(self))}</p>"
        return f"<p>{escape(repr(self))}</p>{self.controller.sites._repr_html_()}"

    @property
    def log_path(self) -> Path | None:
        """Folder of the newest correction log; None before there was one."""
        return self._log.path

    @property
    def history(self) -> History:
        """The newest rows of the correction log; shows as a table in a notebook."""
        if self.controller is None:
            return History()
        return History(self.controller.records)

    def _amplitudes(self) -> list[nn.Parameter]:
        if self.controller is None:
            return []
        return self.controller.bank.amplitudes

    @property
    def _controller(self) -> EAFOController:
        if self.controller is None:
            raise SiteError("EAFOCallback has not wrapped a model yet: its setup hook did not run.")
        return self.controller
