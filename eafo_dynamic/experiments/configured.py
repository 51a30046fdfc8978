"""A LightningCLI whose mistakes are one line: what the command line and comparisons build their runs with."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import logging
import sys
import traceback
import warnings
from collections.abc import Generator
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from eafo_dynamic import experiments
from eafo_dynamic.errors import EAFOError, one_line
from eafo_dynamic.experiments.earlier import PARSER_MODE, drop_compounding, read_earlier_configurations
from eafo_dynamic.experiments.mistakes import find_mistake
from eafo_dynamic.internals.torch_internals import code_of, variable_of

__all__ = ["AGAINST_PLAIN", "TRAINING_OPTIONS", "configured", "quieten"]

AGAINST_PLAIN = "--against-plain"

# jsonargparse finds a class by its name without a path if it has been imported.
for _name in experiments.__all__:
    getattr(experiments, _name)

_COMMANDS = {
    "fit": "Train a model as a YAML configuration says: any LightningModule, any LightningDataModule. Every value can "
    "be changed on the command line, as in --trainer.max_epochs 3 --model.init_args.lr 1e-3; --print_config shows all "
    "values there are; --model.help CLASS and --data.help CLASS list the options of a class. The resolved "
    f"configuration is saved in the run's folder. {AGAINST_PLAIN} trains the same model without corrections "
    "afterwards, with the same seed, and prints the test results of both.",
    "validate": "Run the validation loop as a YAML configuration says, on the checkpoint of --ckpt_path.",
    "test": "Run the test loop as a YAML configuration says, on the checkpoint of --ckpt_path.",
    "predict": "Run the prediction loop as a YAML configuration says, on the checkpoint of --ckpt_path.",
}
TRAINING_OPTIONS = (
    "--config",
    "--print_config",
    "--seed_everything",
    "--ckpt_path",
    "--model",
    "--model.help",
    "--data",
    "--data.help",
    "--optimizer",
    "--lr_scheduler",
    *(f"--trainer.{name}" for name in inspect.signature(Trainer).parameters),
)
"""Options of the training commands, for the completion of shells."""


def configured(args: Any, *, run: bool, corrected: bool = True, **options: Any) -> LightningCLI:
    """A trainer, a model and its data as a configuration says; any LightningModule, any data module.

    Args:
        args: command line (None: that of the process), or a configuration as nested mappings.
        run: whether the arguments begin with a command, which is run.
        corrected: whether the callbacks that correct or watch activations stay in.
        options: options of LightningCLI.

    Returns:
        The LightningCLI, with ``trainer``, ``model`` and ``datamodule``.

    Raises:
        EAFOError: for a user's mistake, whatever layers it has come through.
        Exception: whatever else training raised.
    """
    parser_options: dict[str, Any] = {"exit_on_error": False, "parser_mode": PARSER_MODE}
    if run:
        for command, text in _COMMANDS.items():
            parser_options[command] = {"exit_on_error": False, "parser_mode": PARSER_MODE, "description": text}
    read_earlier_configurations()
    kind = _PlainCLI if corrected else _UncorrectedCLI
    with _one_line_for_mistakes():
        return kind(
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_kwargs=parser_options,
            args=drop_compounding(args),
            run=run,
            **options,
        )


class _PlainCLI(LightningCLI):
    """Says what is wrong with its arguments, or with the trainer's options, in one line."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            mistake = find_mistake(sys.argv[1:] if args is None else args)
            raise EAFOError(mistake or " ".join(str(error).split())) from None
        except RecursionError as error:
            *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
            if "jsonargparse" in code_of(innermost).co_filename:
                raise EAFOError(
                    "the configuration holds a part that contains itself, by an anchor of YAML. Remove the anchor."
                ) from None
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        try:
            return super().instantiate_trainer(**kwargs)
        except MisconfigurationException:
            raise
        except Exception as error:  # an option has a value that the Trainer does not know
            raise _wrapped(error) or EAFOError(f"trainer: {one_line(error)}") from error


class _UncorrectedCLI(_PlainCLI):
    """Trains what the configuration says, but for its corrections."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        from eafo_dynamic.trainers.lightning.callback import EAFOCallback

        trainer = super().instantiate_trainer(**kwargs)
        kept = [callback for callback in trainer.callbacks if not isinstance(callback, EAFOCallback)]  # pyright: ignore[reportAttributeAccessIssue]
        trainer.callbacks = kept  # pyright: ignore[reportAttributeAccessIssue]
        return trainer


@contextlib.contextmanager
def _one_line_for_mistakes() -> Generator[None]:
    try:
        yield
    except EAFOError:
        raise
    except (MisconfigurationException, FileNotFoundError) as error:
        raise EAFOError(str(error)) from None
    except Exception as error:
        mistake = _wrapped(error) or _of_checkpoint(error)
        if mistake is None:
            raise
        raise mistake from None


def _wrapped(error: BaseException | None) -> EAFOError | None:
    """The EAFOError that other exceptions have been raised on top of."""
    while error is not None:
        if isinstance(error, EAFOError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _of_checkpoint(error: Exception) -> EAFOError | None:
    """A line for what went wrong while Lightning restored a checkpoint: the file or its model is at fault."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = code_of(frame)
        restores = code.co_filename.endswith("checkpoint_connector.py") and code.co_name.lstrip("_").startswith(
            ("resume", "restore")
        )
        if restores or code.co_name == "_parse_ckpt_path":
            path = variable_of(frame, "checkpoint_path") or variable_of(frame, "ckpt_path")
            where = "ckpt_path"
            if path is not None:
                where = f"ckpt_path={str(path)!r}"
            return EAFOError(f"{where}: cannot be read, or does not fit this model ({one_line(error)})")
    return None


def quieten() -> None:
    """Leaves out what third parties say about themselves: their advertisements and their own deprecations."""
    speaker = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    speaker.addFilter(lambda record: "Tip: For" not in str(record.msg))
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # the included data is in memory
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="jsonargparse|lightning")
