"""``EAFOTrainerCallback``: the controller on the hooks of the Hugging Face Trainer, and nothing else."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from eafo_dynamic.errors import EAFOError
from eafo_dynamic.find.sites import find_sites
from eafo_dynamic.policy.controller import EAFOController
from eafo_dynamic.policy.options import Options
from eafo_dynamic.records import LogWriter
from eafo_dynamic.trainers.optim import LR_MULTIPLE, check_group, own_group

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

    Args:
        example: keyword inputs of one forward, to find activations that are called several times; None: a static
            search.
        lr: learning rate of eps; None: that of the model's own parameters times lr_multiple.
        lr_multiple: see lr.
        weight_decay: of eps.
        **options: see ``eafo_dynamic.policy.options.Options``.

    Attributes:
        controller: the EAFOController; None before the Trainer is made.

    Raises:
        ConfigError: if an option cannot work.
    """

    def __init__(
        self,
        example: dict[str, Any] | None = None,
        lr: float | None = None,
        lr_multiple: float = LR_MULTIPLE,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        self.options = Options(**options)
        self.example = example or {}
        check_group(lr, lr_multiple, weight_decay)
        self.lr, self.lr_multiple, self.weight_decay = lr, lr_multiple, weight_decay
        self.controller: EAFOController | None = None
        self._writer: LogWriter | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wraps the model, before the optimiser is built."""
        model = kwargs["model"]
        report = find_sites(model, selection=self.options.selection, **self.example)
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
            lr=self.lr,
            lr_multiple=self.lr_multiple,
            weight_decay=self.weight_decay,
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
