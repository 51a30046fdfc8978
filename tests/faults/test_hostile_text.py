"""Logs and configurations that are torn, foreign or malicious: one line, exit code 2, nothing executed."""

from __future__ import annotations

import contextlib
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import CONFIG, Payload
from fabricate import fabricate_run

from eafo_dynamic.cli import main
from eafo_dynamic.errors import LogError
from eafo_dynamic.records import CorrectionLog

Tally = Callable[..., None]

# --- logs


VIEWS = [["summary"], ["layers"], ["events"], ["show", "blocks"], ["layers", "--format", "json"]]


@pytest.fixture(scope="module")
def good_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    fabricate_run(folder)
    return folder / "eafo"


def looked_at(folder: Path, capsys: pytest.CaptureFixture[str], view: list[str]) -> None:
    """A view shows the log, or says in one line why not."""
    code = main(["log", view[0], str(folder), *view[1:]])
    err = capsys.readouterr().err
    assert code in (0, 2)
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == (code == 2)
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["manifest.json", "corrections.jsonl", "shapes.jsonl"])
def test_every_view_survives_a_corrupted_log(
    name: str, good_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tally: Tally
) -> None:
    folder, choose = tmp_path / "run" / "eafo", random.Random(1)
    shutil.copytree(good_log, folder)
    whole = (good_log / name).read_bytes()
    corrupted = [whole[: choose.randrange(len(whole))] for _ in range(8)]
    for _ in range(24):
        data = bytearray(whole)
        for _ in range(choose.choice([1, 4])):
            data[choose.randrange(min(len(data), 3000))] = choose.randrange(256)
        corrupted.append(bytes(data))
    corrupted += [b"", b"\0" * 99, b"[]", b"null", b"{}", b'{"step":1}\n', pickle.dumps([1]), "é".encode("latin-1")]
    corrupted += [whole.replace(b'"eps"', b'"step"'), whole.replace(b":0", b":1e999"), whole.replace(b"null", b"[[]]")]
    corrupted += [
        whole.replace(b'"site":"', b'"site":"\\ud800'),
        whole.replace(b'"step":', b'"step":99999999999999999999'),
    ]
    for number, data in enumerate(corrupted):
        (folder / name).write_bytes(data)
        looked_at(folder.parent, capsys, VIEWS[number % len(VIEWS)])
    tally("hostile files tried", len(corrupted))


def test_no_pickle_in_a_log_is_run(good_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(["manifest.json", "corrections.jsonl", "shapes.jsonl", ".corrections.cache"]):
        folder = tmp_path / str(number) / "eafo"
        shutil.copytree(good_log, folder)
        (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
        for view in VIEWS:
            looked_at(folder.parent, capsys, view)
        if name == "manifest.json":
            with pytest.raises(LogError):
                CorrectionLog.load(folder)
    assert not (tmp_path / "owned").exists()


# --- YAML


def configured(**init_args: Any) -> dict[str, Any]:
    config = yaml.safe_load(CONFIG.read_text())
    config["trainer"]["callbacks"][0]["init_args"].update(init_args)
    return config


def fit(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    """As ``eafo-dynamic fit`` in this process, one step."""
    monkeypatch.chdir(folder)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    quick = [
        "--trainer.fast_dev_run=true",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]
    monkeypatch.setattr(sys, "argv", ["eafo-dynamic", "fit", "--config=config.yaml", *quick, *more])
    return main()


def assert_one_line(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]


WRONG: dict[str, Any] = {
    "update_every_n_steps": "often",
    "samples_per_site": 0.5,
    "eps_init": [0.1],
    "max_eps": {"a": 1},
    "momentum": None,
    "per_channel": "perhaps",
    "policy": 3.5,
    "density": {"kind": "gaussian"},
    "target_modules": 7,
    "dirpath": ["a", "b"],
    "log_sites": "eps",
    "filter_fn": "no.such.function",
    "backend": "fast",
    "resolution": "0.1.2",
    "freeze_at_step": "1e3.5",
}


@pytest.mark.parametrize("option", WRONG)
def test_an_option_of_the_wrong_type_costs_one_line(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tally: Tally
) -> None:
    assert fit(tmp_path, yaml.safe_dump(configured(**{option: WRONG[option]})), monkeypatch) == 2
    assert_one_line(capsys, option)
    tally("hostile files tried")


TAGS = {
    "apply": "!!python/object/apply:os.mkdir [owned]",
    "new": "!!python/object/new:os.mkdir [owned]",
    "object": "!!python/object:eafo_dynamic.policy.Entropy {}",
    "name": "!!python/name:os.mkdir",
    "module": "!!python/module:this",
    "tuple": "!!python/tuple [1, 2]",
    "binary": "!!binary aGVsbG8=!!python/object/apply:os.mkdir",
}


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("place", ["dirpath", "policy", "document", "override"])
def test_a_tag_of_python_is_never_run(
    tag: str,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tally: Tally,
) -> None:
    text, more = CONFIG.read_text(), []
    if place == "document":
        text = TAGS[tag]
    elif place == "override":
        more = [f"--trainer.callbacks.init_args.policy={TAGS[tag]}"]
    else:
        text = text.replace("policy: learned", f"{place}: {TAGS[tag]}")
    assert fit(tmp_path, text, monkeypatch, *more) == 2
    assert_one_line(capsys)
    assert not (tmp_path / "owned").exists()
    tally("hostile files tried")


@pytest.mark.parametrize("tag", ["apply", "new"])
def test_a_loader_that_runs_tags_would_run_these(tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(yaml.YAMLError):
        yaml.unsafe_load(TAGS[tag])
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "null",
        "trainer: []",
        "trainer: {max_epochs: [}",
        "\t- a",
        "a: &a [*a]",
        "model: *nowhere",
        "\x00",
    ],
    ids=repr,
)
def test_a_file_that_is_no_configuration_costs_one_line(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tally: Tally
) -> None:
    assert fit(tmp_path, text, monkeypatch) == 2
    assert_one_line(capsys)
    tally("hostile files tried")


def test_anchors_merges_and_numbers_as_text_mean_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = CONFIG.read_text()
    text = text.replace("hidden: [64, 64, 64]", "hidden: [&w 8, *w, *w]").replace("lr: 1.0e-3", "lr: 1e-3")
    text = text.replace("eps_init: 0.01", 'eps_init: "1e-2"').replace("update_every_n_steps: 20", "max_eps: 5e-1")
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, text, monkeypatch, "--print_config")
    assert not stop.value.code
    shown = yaml.safe_load(capsys.readouterr().out)
    (callback,) = shown["trainer"]["callbacks"]
    assert shown["model"]["init_args"]["model"]["init_args"]["hidden"] == [8, 8, 8]
    assert shown["model"]["init_args"]["lr"] == 1e-3
    assert (callback["init_args"]["eps_init"], callback["init_args"]["max_eps"]) == (0.01, 0.5)
    assert fit(tmp_path, text, monkeypatch) == 0
