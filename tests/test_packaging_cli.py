"""The command line as a user meets it: help, examples in it, exit codes, completion, `python -m`."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from eafo_dynamic.cli import _parser, main
from eafo_dynamic.cli.helptext import EXIT_CODES

ROOT = Path(__file__).parent.parent
TRAINING = ("fit", "validate", "test", "predict")


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next((dict(a.choices or {}) for a in parser._actions if a.nargs == argparse.PARSER), {})


def every_command() -> dict[str, argparse.ArgumentParser]:
    found = {name: parser for name, parser in subcommands(_parser()).items() if name not in TRAINING}
    return {**found, **{f"log {name}": parser for name, parser in subcommands(found["log"]).items()}}


def examples_of(parser: argparse.ArgumentParser) -> list[str]:
    return re.findall(r"^  eafo-dynamic (.*)$", parser.epilog or "", re.MULTILINE)


@pytest.mark.parametrize("name", every_command())
def test_help_reads_well(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    parser = every_command()[name]
    text = parser.format_help()
    assert all(len(line) <= 80 or line.startswith("  eafo-dynamic ") for line in text.splitlines()), text
    assert parser.description and parser.description.rstrip().endswith(".")
    for action in (each for each in parser._actions if each.nargs != argparse.PARSER):
        assert action.help, f"{name} {action.option_strings or action.dest} has no help"
    assert name.startswith("log ") or examples_of(parser), f"{name} shows no example"


@pytest.mark.parametrize("line", [line for parser in every_command().values() for line in examples_of(parser)])
def test_examples_in_the_help_are_commands(line: str) -> None:
    words = shlex.split(line.partition(" > ")[0])
    parsed = _parser().parse_args(words)
    assert callable(parsed.run)
    for word in words:
        if word.startswith("configs/"):
            assert list(ROOT.glob(word)), word


def test_main_help_names_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    for name in (*TRAINING, *subcommands(_parser())):
        assert re.search(rf"^    {name}  +\w", shown, re.MULTILINE), f"{name} and its text are not on one line"
    for code, meaning in EXIT_CODES.items():
        assert f"  {code:<5}{meaning}" in shown


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["rank", "--activations", "relu"], 0),
        (["rank", "--activations", "relux"], 2),
        (["no-such-command"], 2),
        (["log", "summary", "nowhere"], 2),
        (["fit", "--model", "lightning.pytorch.demos.boring_classes.Falling"], 2),
    ],
    ids=str,
)
def test_exit_codes(words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eafo-dynamic", *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("eafo_dynamic", run_name="__main__")
    assert stop.value.code == code


def test_exit_code_of_a_training_that_fails(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "class Failing(BoringModel):\n"
        "    def training_step(self, *_):\n"
        "        raise KeyError('mine')\n"
    )
    data = "lightning.pytorch.demos.boring_classes.BoringDataModule"
    quiet = ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false", "--trainer.max_steps", "1"]
    command = [sys.executable, "-m", "eafo_dynamic", "fit", "--model", "failing.Failing", "--data", data, *quiet]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "KeyError: 'mine'" in done.stderr


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    from eafo_dynamic.cli import rank

    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(rank, "ranking", interrupted)
    assert main(["rank"]) == 130


def test_python_m_is_the_same_program() -> None:
    texts = [
        subprocess.run([*start, *words], capture_output=True, text=True, check=True).stdout
        for words in (["--help"], ["log", "--help"], ["rank", "--format", "csv"])
        for start in ([shutil.which("eafo-dynamic") or "eafo-dynamic"], [sys.executable, "-m", "eafo_dynamic"])
    ]
    assert all(texts)
    assert texts[0::2] == texts[1::2]


@cache
def bash_script() -> str:
    command = [sys.executable, "-m", "eafo_dynamic", "completion", "bash"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("me", "merge"),
        ("log s", "show summary"),
        ("rank --format ", "csv json md table"),
        ("fit --trainer.max_e", "--trainer.max_epochs"),
        ("completion z", "zsh"),
    ],
)
def test_completion_offers_what_there_is(typed: str, offered: str) -> None:
    pytest.importorskip("shtab")
    words = typed.split(" ")
    ask = f"COMP_WORDS=(eafo-dynamic {shlex.join(words)}); COMP_CWORD={len(words)}; _shtab_eafo_dynamic"
    script = f'{bash_script()}\n{ask}\necho; echo "${{COMPREPLY[*]}}"'
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert sorted(result.stdout.splitlines()[-1].split()) == offered.split(), result.stderr


def test_without_shtab_completion_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'eafo-dynamic[completion]'" in capsys.readouterr().err
