"""Exceptions that write their own message: what was given, what is wrong with it, what to do instead."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = [
    "CompoundingError",
    "ConfigError",
    "EAFOError",
    "LogError",
    "PatternError",
    "SiteError",
    "UnsupportedTorchError",
    "interruptible",
    "legible",
    "one_line",
    "printable",
]

# C0 and C1 control characters and DELETE: a terminal acts on them. Line ends and tabs are what they seem.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    r"""Replace control characters by their codes, so that a terminal shows them instead of acting on them.

    Args:
        text: such as the name of a site; module names may hold any character.

    Returns:
        The text, with `\x1b` for an escape character. Line ends and tabs stay.
    """
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class EAFOError(Exception):
    """Base of every error that this package raises for a user's input; the command line exits with 2."""

    def __str__(self) -> str:
        return printable(super().__str__())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the message as it stands: a subclass may have been made from other arguments."""
        return _rebuilt, (type(self), self.args), self.__dict__


def _rebuilt(kind: type[EAFOError], args: tuple[Any, ...]) -> EAFOError:
    return kind.__new__(kind, *args)


class ConfigError(EAFOError, ValueError):
    """An option has a value that cannot work.

    Args:
        option: name of the option as the user writes it.
        value: the value given.
        problem: what is wrong with it.
        mend: what to write instead.
    """

    def __init__(self, option: str, value: object, problem: str, mend: str) -> None:
        super().__init__(f"{option}={value!r}: {problem}. {mend}")
        self.option, self.problem, self.mend = option, problem, mend

    @classmethod
    def joined(cls, errors: Sequence[ConfigError]) -> ConfigError:
        """One error that says what several say, so that a user need not correct one option after the other.

        Args:
            errors: at least one.

        Returns:
            An error with all messages on one line; its ``option`` is that of the first.
        """
        if len(errors) == 1:
            return errors[0]
        error = cls.__new__(cls, " Also: ".join(str(each) for each in errors))
        error.option = errors[0].option
        return error


class PatternError(EAFOError, ValueError):
    """A pattern that selects sites matches nothing.

    Args:
        option: name of the option that holds the pattern.
        pattern: the pattern given.
        available: what could have been matched.
    """

    def __init__(self, option: str, pattern: str, available: list[str]) -> None:
        shown = ", ".join(available[:12]) + (f", ... ({len(available)} in all)" if len(available) > 12 else "")
        super().__init__(
            f"{option}={pattern!r} matches no activation of this model. "
            f"Use a class name, the end of a module's name or a regular expression that matches one of: "
            f"{shown or 'none, the model has no activation module'}."
        )


class SiteError(EAFOError, RuntimeError):
    """A model, or one site of it, cannot be handled; the message names the site."""


class CompoundingError(SiteError):
    """A file of version 0.1.0 holds corrections that compound; later versions cannot compute them.

    Args:
        what: the file, or what was read from it.
    """

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} was trained with compounding=True, which eafo-dynamic 0.2.0 no longer has. Use it with version "
            "0.1.0, or merge it there into a .pt2 or .onnx file, which needs no eafo-dynamic."
        )


class LogError(EAFOError, ValueError):
    """A correction log is missing, damaged, foreign or of a newer schema; the message names the file."""


class UnsupportedTorchError(EAFOError, RuntimeError):
    """One feature needs a private part of torch that the installed version does not have; the rest works.

    Args:
        feature: what does not work.
        version: of torch.
        missing: the part.
        remedy: what to do instead.
    """

    def __init__(self, feature: str, version: str, missing: str, remedy: str) -> None:
        super().__init__(f"{feature} needs {missing}, which torch {version} does not have. {remedy}")


def one_line(error: BaseException) -> str:
    """Kind and first words of an exception that somebody else has written.

    Args:
        error: any exception.

    Returns:
        At most 300 characters, without a line end.
    """
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:297]}..."


@contextmanager
def interruptible() -> Generator[None]:
    """Ctrl-C stays a KeyboardInterrupt where Lightning makes an exit with code 1 of it. Also serves as a decorator.

    Yields:
        Nothing.

    Raises:
        KeyboardInterrupt: in place of a SystemExit that was raised while one was handled.
        SystemExit: any other, as it was.
    """
    try:
        yield
    except SystemExit as stop:
        reason: BaseException | None = stop
        while reason is not None:
            if isinstance(reason, KeyboardInterrupt):
                raise KeyboardInterrupt from stop
            reason = reason.__cause__ or reason.__context__
        raise


@contextmanager
def legible(what: str) -> Generator[None]:
    """Turns whatever a damaged file makes the code raise that reads it into one line. Also serves as a decorator.

    Args:
        what: which file, or part of one, and what to use instead.

    Yields:
        Nothing.

    Raises:
        EAFOError: as it was.
        SiteError: in place of any other exception.
    """
    try:
        yield
    except EAFOError:
        raise
    except Exception as error:
        raise SiteError(f"{what} ({one_line(error)})") from error
