"""A LightningCLI whose mistakes are one line: what the command line and comparisons build their runs with."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import inspect
import itertools
import logging
import re
import traceback
import warnings
from collections.abc import Generator
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from eafo_dynamic import experiments
from eafo_dynamic.errors import ConfigError, EAFOError, one_line
from eafo_dynamic.internals.torch_internals import code_of, variable_of

__all__ = ["TRAINING_OPTIONS", "configured", "quieten"]

for _name in experiments.__all__:
    getattr(experiments, _name)  # jsonargparse finds a class by its name alone once it is imported

_PARSER = {"exit_on_error": False}
_PLACE = re.compile(r"[ -]*(?:Parser key \"|Problem with given class_path ')")
_KINDS = {"<class 'NoneType'>": "null", "dot import path string": "a class (package.module.Class)"}
_COMMANDS = {
    "fit": "Train a model as a YAML configuration says: any LightningModule, any LightningDataModule. Every value can "
    "be changed on the command line, as in --trainer.max_epochs 3 --model.init_args.lr 1e-3; --print_config shows all "
    "values there are; --model.help CLASS and --data.help CLASS list the options of a class. The resolved "
    "configuration is saved in the run's folder.",
    "validate": "Run the validation loop as a YAML configuration says, on the checkpoint of --ckpt_path.",
    "test": "Run the test loop as a YAML configuration says, on the checkpoint of --ckpt_path.",
    "predict": "Run the prediction loop as a YAML configuration says, on the checkpoint of --ckpt_path.",
}
TRAINING_OPTIONS = (
    *("--config", "--print_config", "--seed_everything", "--ckpt_path", "--model", "--model.help"),
    *("--data", "--data.help", "--optimizer", "--lr_scheduler"),
    *(f"--trainer.{name}" for name in inspect.signature(Trainer).parameters),
)


def configured(args: Any, *, run: bool, **options: Any) -> LightningCLI:
    """A trainer, a model and its data as a configuration says; any LightningModule, any data module.

    Args:
        args: command line (None: that of the process), or a configuration as nested mappings.
        run: whether the arguments begin with a command, which is run.
        options: of LightningCLI.

    Returns:
        The LightningCLI, with ``trainer``, ``model`` and ``datamodule``.

    Raises:
        EAFOError: for a user's mistake, whatever layers it has come through.
        Exception: whatever else training raised.
    """
    commands = {name: {**_PARSER, "description": text} for name, text in _COMMANDS.items()} if run else {}
    with _plain_errors():
        return LightningCLI(
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_kwargs={**_PARSER, **commands},
            args=args,
            run=run,
            **options,
        )


@contextlib.contextmanager
def _plain_errors() -> Generator[None]:
    try:
        yield
    except argparse.ArgumentError as error:
        raise _inner(error) or EAFOError(_condensed(str(error))) from None
    except (MisconfigurationException, FileNotFoundError) as error:
        raise EAFOError(str(error)) from None
    except RecursionError as error:
        *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
        if "jsonargparse" in code_of(innermost).co_filename:
            raise EAFOError("the configuration holds a part that contains itself, by an anchor of YAML") from None
        raise
    except Exception as error:
        raise _inner(error) or _of_trainer(error) or _of_checkpoint(error) or error from None


def quieten() -> None:
    """Leaves out what third parties say about themselves: their advertisements and their own deprecations."""
    speaker = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    speaker.addFilter(lambda record: "Tip: For" not in str(record.msg))
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # the data on board is in memory
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="jsonargparse|lightning")


def _inner(error: BaseException | None) -> EAFOError | None:
    """The EAFOError that lies under layers of other exceptions."""
    while error is not None:
        if isinstance(error, EAFOError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _of_trainer(error: Exception) -> EAFOError | None:
    """What the Trainer says when it is made: that one of its options has a value that it does not know."""
    calls = [code_of(frame).co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    return EAFOError(f"trainer: {one_line(error)}") if "instantiate_trainer" in calls else None


def _of_checkpoint(error: Exception) -> EAFOError | None:
    """What went wrong while Lightning restored a checkpoint: the file's fault or its model's, not the training's."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = code_of(frame)
        connector = code.co_filename.endswith("checkpoint_connector.py")
        if (connector and re.match("_?(resume|restore)", code.co_name)) or code.co_name == "_parse_ckpt_path":
            path = variable_of(frame, "checkpoint_path") or variable_of(frame, "ckpt_path")
            where = "" if path is None else f"={str(path)!r}"
            return EAFOError(f"ckpt_path{where}: cannot be read, or does not fit this model ({one_line(error)})")
    return None


def _condensed(text: str) -> str:
    """The part of jsonargparse's message that names the mistake, on one line.

    It lists every reading of a value that failed; the reading that the user meant is the one that got furthest.

    Args:
        text: the whole message.

    Returns:
        One line.
    """
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    if missing := re.match(rf"the following arguments are required: (?:{'|'.join(_COMMANDS)})\.(.+)", text):
        return f"no {missing[1]} is given. Name a configuration that has one: --config FILE."
    places = [place for place, line in enumerate(lines) if _PLACE.match(line)]
    if not places:
        return " ".join(line.strip() for line in lines)
    deepest = max(places, key=lambda place: _indent(lines[place]))  # of several: the first
    owners = [found[1] for line in lines[: deepest + 1] if (found := re.search(r"given class_path '([^']+)'", line))]
    owner = owners[-1] if owners else None
    inner = itertools.takewhile(lambda line: _indent(line) > _indent(lines[deepest]), lines[deepest + 1 :])
    said = [line.strip(" -") for line in inner] or [lines[deepest].partition('":')[2].strip()]
    where = f"{owner}: " if owner else ""
    option = next((found[1] for line in said if (found := re.match(r"Option '([^']+)' is not accepted", line))), None)
    if option is not None:
        return f"{where}unknown option {option!r}. {_nearest(owner, option)}"
    key = re.search(r'Parser key "([^"]+)"', lines[deepest])
    return where + (_refused(key[1], said) if key else said[0])


def _indent(line: str) -> int:
    """How deep in the message a line lies: of its words, behind the dash of a list."""
    return len(line) - len(line.lstrip(" -"))


def _refused(option: str, said: list[str]) -> str:
    """A value of another type than its option's: what was given, and what could have been."""
    given = next((found[1] for line in said if (found := re.search(r"(?:Given|Got) value: (.*)", line))), None)
    expected = [found[1] for line in said if (found := re.match(r"Expected an? (.+?)(?:\. Got value: .*)?$", line))]
    kinds = list(
        dict.fromkeys(_KINDS.get(kind.split(":")[0], _bare(kind)) for kind in expected if "path but" not in kind)
    )
    if given is None or not kinds:
        return f"{option}: {said[0]}"
    return str(ConfigError(option, given, "does not fit", f"It takes {' or '.join(kinds)}."))


def _bare(kind: str) -> str:
    """The name of a type as jsonargparse writes it: ``<class 'int'>``, ``typing.Literal['a', 'b']``."""
    return re.sub(r"^<class '(?:[\w.]*\.)?(\w+)'>$|^typing\.Literal\[(.*)\]$", r"\1\2", kind)


def _nearest(owner: str | None, option: str) -> str:
    """A hint to the option that was probably meant."""
    if owner is None:
        return "See --help for the options there are."
    module, _, name = owner.rpartition(".")
    known = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    near = difflib.get_close_matches(option, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Options are: {', '.join(known)}."
