"""``EAFOTrainerCallback``: the controller on the hooks of the Hugging Face Trainer, and nothing else."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from eafo_dynamic.errors import EAFOError
from eafo_dynamic.find.sites import find_sites
from eafo_dynamic.internals.declared import takes
from eafo_dynamic.policy.controller import EAFOController
from eafo_dynamic.records import LogWriter
from eafo_dynamic.trainers.optim import own_group
from eafo_dynamic.trainers.options import TrainerCallbackOptions

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise EAFOError("EAFOTrainerCallback needs transformers: pip install transformers") from error

__all__ = ["EAFOTrainerCallback"]


_STATE = "eafo_state.pt"


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


class EAFOTrainerCallback(TrainerCallback):
    """Lets every activation of a model follow its own data under the Hugging Face Trainer.

    Pass it when the Trainer is made, so that eps is in the optimiser::

        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[EAFOTrainerCallback()])

    The correction log goes to ``<output_dir>/eafo``.

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
        self._writer: LogWriter | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wraps the model, before the optimiser is built."""
        model = kwargs["model"]
        report = find_sites(model, selection=self.options.selection, **(self.options.example or {}))
        self.controller = EAFOController(model, self.options, report)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gives eps its parameter group and opens the log."""
        controller = self._controller
        optimizer, scheduler = kwargs["optimizer"], kwargs["lr_scheduler"]
        notes = own_group(
            [optimizer],
            controller.amplitudes,
            controller.model,
            trained=controller.trained,
            schedulers=[getattr(scheduler, "scheduler", scheduler)],  # accelerate wraps it
            lr=self.options.lr,
            lr_multiple=self.options.lr_multiple,
            weight_decay=self.options.weight_decay,
            save_ungrouped=True,  # this Trainer restores optimiser and scheduler before it says that training begins
        )
        for note in notes:
            warnings.warn(f"EAFO: {note}", stacklevel=2)
        if state.is_world_process_zero:
            self._writer = LogWriter(Path(args.output_dir) / "eafo", controller.about())
        if state.global_step:
            self._resume(_checkpoint(args, state), state.global_step)
        controller.begin(state.global_step)

    def _resume(self, folder: Path, step: int) -> None:
        saved = folder / _STATE
        if saved.exists():
            self._controller.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))
        else:
            warnings.warn(f"EAFO: {saved} is missing; density estimates start anew", stacklevel=2)
        if self._writer is not None:
            self._writer.resume(step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the running estimates beside the checkpoint's weights."""
        if state.is_world_process_zero:
            torch.save(self._controller.state_dict(), _checkpoint(args, state) / _STATE)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lets the policy add to eps.grad, or drops it once frozen."""
        self._controller.before_optimizer_step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Acts after each optimiser step: trust region, update round, log."""
        rows = self._controller.step(state.global_step, int(state.epoch or 0))
        if rows and self._writer is not None:
            self._writer.write(rows)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the log; the model keeps its corrections."""
        self._controller.collecting = False
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    @property
    def _controller(self) -> EAFOController:
        if self.controller is None:
            raise EAFOError("EAFOTrainerCallback was not there when the Trainer was made: pass it in callbacks=[...].")
        return self.controller
