"""`eafo-dynamic log`: what a user sees, on golden tables of 80 columns and in every format."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fabricate import SITES, fabricate_run

from eafo_dynamic.cli import log as log_command
from eafo_dynamic.cli import log_views
from eafo_dynamic.errors import ConfigError, EAFOError, LogError
from eafo_dynamic.records import COLUMNS, CorrectionLog, LogWriter

Run = Callable[..., str]

SUMMARY = """\
run              run a/eafo
steps            50 to 600, 12 updates
sites            5 (entropy: 5)
mean entropy     0.84 -> 0.7953 nats
mean eps         -0.07319, mean |eps| 0.07319
largest |eps|    -0.09135  blocks.0.mlp.act
                 -0.08407  blocks.1.mlp.act
                 -0.07389  blocks.2.mlp.act
highest entropy  0.9486  blocks.0.mlp.act
                 0.8716  blocks.1.mlp.act
                 0.7962  blocks.2.mlp.act
lowest entropy   0.6533  head.act
                 0.7068  blocks.3.mlp.act
events           2 (eps held at max_eps: 1, 3 samples not finite: 1)
"""

LAYERS = """\
run a/eafo
site              base       eps            H first       H            dH/deps
──────────────────────────────────────────────────────────────────────────────
blocks.0.mlp.act  gelu  -0.09135  █▇▆▅▄▃▂▁   1.0200  0.9486  █▇▅▄▄▃▂▁   0.6607
blocks.1.mlp.act  gelu  -0.08407  █▇▆▅▄▃▂▁   0.9300  0.8716  █▇▆▅▄▃▂▁   0.5666
blocks.2.mlp.act  gelu  -0.07389  █▇▆▅▄▃▂▁   0.8400  0.7962  █▆▄▃▂▂▁▁   0.4952
blocks.3.mlp.act  gelu  -0.06382  █▇▆▅▄▃▂▁   0.7500  0.7068  █▇▆▅▄▃▂▁   0.3921
head.act          relu  -0.05282  █▇▆▅▄▃▂▁   0.6600  0.6533  ██▇▇▅▂▁▂   0.3064
not shown at this width: atom_mass, dead_fraction, mean, std, n, updates,
policy, event, event_step; --wide shows all
"""

SHOW = """\
head.act  base relu  class_name RELU  call 0  shape [32, 17, 128]
step       eps       deps       H  dH/deps   atoms    dead     mean     std
───────────────────────────────────────────────────────────────────────────
  50   0.00420  -0.005801  0.6600   0.4086  0.5000  0.0000   0.0800  1.0000
 200  -0.01263  -0.005501  0.6590   0.3794  0.5451  0.0722  -0.0779  1.2707
 350  -0.02825  -0.005292  0.6575   0.3598  0.5699  0.1118  -0.1646  1.4193
 450  -0.03852  -0.005208  0.6543   0.3521  0.5798  0.1277  -0.1993  1.4789
 600  -0.05282  -0.004691  0.6533   0.3064  0.5889  0.1423  -0.2312  1.5335
not shown at this width: epoch, skew, kurtosis, mu, sigma, n, event; --wide
shows all
5 of 12 rows, evenly spaced; --limit 0 shows all
"""

EVENTS = """\
step  epoch  site              event
───────────────────────────────────────────────────
 200      0  blocks.2.mlp.act  eps held at max_eps
 350      1  head.act          3 samples not finite
"""

COMPARE = """\
run    policy   last step  sites  mean eps  H first  H last        dH  events
─────────────────────────────────────────────────────────────────────────────
run a  entropy        600      5  -0.07319   0.8400  0.7953  -0.04472       2
run b  learned        600      5  -0.07293   0.8400  0.7965  -0.04351       2
not shown at this width: updates, mean_abs_eps; --wide shows all
"""

COMPARE_SITES = """\
eps at each site's last update
site                 run a     run b    spread
──────────────────────────────────────────────
blocks.0.mlp.act  -0.09135  -0.09176  0.000406
blocks.1.mlp.act  -0.08407  -0.08413  0.000065
blocks.2.mlp.act  -0.07389  -0.07352  0.000374
blocks.3.mlp.act  -0.06382  -0.06279  0.001035
head.act          -0.05282  -0.05244  0.000384
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("läufe 1")
    fabricate_run(folder / "run a")
    fabricate_run(folder / "run b", policy="learned", seed=1)
    return folder


@pytest.fixture
def log(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a log command among the runs and returns what it printed."""
    monkeypatch.chdir(runs)
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    parser = argparse.ArgumentParser(prog="eafo-dynamic")
    log_command.register(parser.add_subparsers(required=True))

    def run(*arguments: str) -> str:
        args = parser.parse_args(["log", *arguments])
        assert args.run(args) == 0
        return capsys.readouterr().out

    return run


def assert_fits(text: str, width: int) -> None:
    assert all(len(line) <= width for line in text.splitlines()), text


def assert_plain(text: str) -> None:
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize(
    ("arguments", "golden"),
    [
        (["summary", "run a"], SUMMARY),
        (["layers", "run a"], LAYERS),
        (["show", "run a", "head.act", "--limit", "5"], SHOW),
        (["events", "run a"], EVENTS),
        (["compare", "run a", "run b"], COMPARE),
        (["compare", "run a", "run b", "--by", "site", "--column", "eps"], COMPARE_SITES),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_golden_table(log: Run, arguments: list[str], golden: str) -> None:
    printed = log(*arguments)
    assert printed == golden
    assert_fits(printed, 80)
    assert_plain(printed)


VIEWS = [
    ["summary", "run a"],
    ["layers", "run a"],
    ["show", "run a", "act"],
    ["events", "run a"],
    ["compare", "run a", "run b"],
    ["compare", "run a", "run b", "--by", "site"],
]


@pytest.mark.parametrize("view", VIEWS, ids=" ".join)
@pytest.mark.parametrize("width", [60, 80, 200])
def test_table_fits_the_terminal(log: Run, view: list[str], width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert_fits(log(*view), width)


@pytest.mark.parametrize("view", VIEWS, ids=" ".join)
def test_formats_agree(log: Run, view: list[str]) -> None:
    as_json = json.loads(log(*view, "--format", "json"))
    as_csv = list(csv.DictReader(io.StringIO(log(*view, "--format", "csv"))))
    as_md = log(*view, "--format", "md").splitlines()
    assert len(as_json) == len(as_csv) > 0
    assert all(line.startswith("| ") and line.endswith(" |") for line in as_md)
    if view[0] != "summary":
        assert len(as_md) == len(as_json) + 2
    for left, right in zip(as_json, as_csv, strict=True):
        numbers = {name: value for name, value in left.items() if isinstance(value, float)}
        assert {name: float(right[name]) for name in numbers} == numbers


def test_layers_as_json_is_the_log(log: Run, runs: Path) -> None:
    rows = json.loads(log("layers", "run a", "--format", "json"))
    frame = CorrectionLog.load(runs / "run a")
    assert [entry["site"] for entry in rows] == [name for name, _ in SITES]
    for entry in rows:
        assert entry["entropy_trend"] == frame.series(entry["site"], "entropy")
        assert entry["eps"] == entry["eps_trend"][-1]


def test_the_second_amplitude_has_a_column_where_there_is_one(log: Run, runs: Path) -> None:
    assert "lift" not in log("layers", "run a", "--wide") + log("show", "run a", "head", "--wide")
    writer = LogWriter(runs / "free" / "eafo", {"sites": [{"name": "act", "base": "gelu"}]})
    writer.write([{"step": 1, "site": "act", "eps": 0.1, "lift": -0.25, "entropy": 1.0}])
    writer.close()
    for command in (["layers", "free"], ["show", "free", "act"]):
        heading, line = (text.split() for text in log(*command, "--wide").splitlines()[1:4:2])
        assert "lift" in heading and any(word.startswith("-0.25") for word in line), command


def test_wide_shows_every_column(log: Run) -> None:
    head = log("layers", "run a", "--wide").splitlines()[1].split()
    assert head[-5:] == ["n", "updates", "policy", "event", "event_step"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--sort", "eps"], [0, 1, 2, 3, 4]),
        (["--sort", "eps", "--descending"], [4, 3, 2, 1, 0]),
        (["--sort", "event"], [4, 2, 0, 1, 3]),
        (["--site", "blocks.[13]*", "--site", "head"], [1, 3, 4]),
    ],
)
def test_layers_sorted_and_filtered(log: Run, options: list[str], expected: list[int]) -> None:
    rows = json.loads(log("layers", "run a", *options, "--format", "json"))
    assert [entry["site"] for entry in rows] == [SITES[number][0] for number in expected]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [("100:200", [100, 150, 200]), (":100", [50, 100]), ("550:", [550, 600]), ("300", [300])],
)
def test_range_of_steps(log: Run, steps: str, expected: list[int]) -> None:
    rows = json.loads(log("show", "run a", "head", "--steps", steps, "--format", "json"))
    assert [entry["step"] for entry in rows] == expected


def test_long_table_is_thinned_and_says_so(log: Run, runs: Path) -> None:
    fabricate_run(runs / "long" / "run", updates=200, sites=SITES[:1])
    lines = log("show", "long", "blocks.0").splitlines()
    assert lines[-1] == "40 of 200 rows, evenly spaced; --limit 0 shows all"
    steps = [int(line.split()[0]) for line in lines[3:43]]
    assert (steps[0], steps[-1]) == (50, 10_000)
    assert len(set(steps)) == 40
    assert len(log("show", "long", "blocks.0", "--limit", "0").splitlines()) == 204
    assert len(json.loads(log("show", "long", "blocks.0", "--format", "json"))) == 200


def test_site_shortened_in_a_table_is_accepted_back(log: Run, runs: Path) -> None:
    names = [(f"vit.encoder.layer.{k}.intermediate.intermediate_act_fn", "gelu") for k in (0, 1, 11)]
    fabricate_run(runs / "vit", sites=names)
    short = log("layers", "vit").splitlines()[3:6]
    for line, (name, _) in zip(short, names, strict=True):
        rows = json.loads(log("show", "vit", line.split()[0], "--format", "json"))
        assert {entry["site"] for entry in rows} == {name}


def test_no_events_is_said(log: Run) -> None:
    assert log("events", "run a", "--site", "blocks.0") == "no events in 12 rows of run a/eafo\n"
    assert json.loads(log("events", "run a", "--site", "blocks.0", "--format", "json")) == []


def test_torn_line_is_noted_beside_the_output(log: Run, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fabricate_run(runs / "torn")
    with (run / "eafo" / "corrections.jsonl").open("a") as file:
        file.write('{"step":650,"si')
    args = ["layers", "torn", "--format", "json"]
    parser = argparse.ArgumentParser()
    log_command.register(parser.add_subparsers())
    parsed = parser.parse_args(["log", *args])
    assert parsed.run(parsed) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == 5
    assert err.startswith("note: ")
    assert err.count("\n") == 1
    assert "line 61, the last, is torn" in err


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        (["summary", "nowhere"], LogError, ["nowhere: there is no such folder"]),
        (["summary", "."], LogError, ["correction logs below"]),
        (["layers", "run a", "--site", "haed"], LogError, ["site='haed'", "Nearest: head.act"]),
        (["layers", "run a", "--sort", "epsilon"], ConfigError, ["--sort='epsilon'", "eps,"]),
        (["show", "run a", "conv"], LogError, ["site='conv'"]),
        (["layers", "run a", "--steps", "9000:"], LogError, ["no update at these steps", "50:600"]),
        (["compare", "run a", "gone"], LogError, ["gone: there is no such folder"]),
        (
            ["compare", "run a", "run b", "--by", "site", "--column", "x"],
            ConfigError,
            ["--column='x'", "entropy"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(log: Run, arguments: list[str], error: type[EAFOError], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        log(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_log_without_rows_is_said(log: Run, runs: Path) -> None:
    LogWriter(runs / "fresh" / "eafo", {})
    with pytest.raises(LogError, match="no rows yet"):
        log("summary", "fresh")


@pytest.mark.parametrize(
    "arguments",
    [
        ["layers"],
        ["layers", "run", "--steps", "a:b"],
        ["layers", "run", "--steps", "9:1"],
        ["layers", "run", "--follow", "0"],
        ["show", "run", "site", "--limit", "-1"],
        ["layers", "run", "--format", "xml"],
        [],
    ],
    ids=" ".join,
)
def test_wrong_option_exits_with_2(log: Run, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        log(*arguments)
    assert caught.value.code == 2


def test_help_explains_every_column(log: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        log("--help")
    text = capsys.readouterr().out
    assert_fits(text, 80)
    for name in COLUMNS:
        assert f"\n  {name} " in text


def test_logs_of_nan_only(log: Run, runs: Path) -> None:
    writer = LogWriter(runs / "nan" / "eafo", {})
    for step in (1, 2):
        writer.write([{"step": step, "site": "s", **dict.fromkeys(["eps", "entropy", "mean"], math.nan)}])
    for view in ("summary", "layers"):
        for fmt in ("table", "json", "csv", "md"):
            assert "nan" not in log(view, "nan", "--format", fmt).replace("nan/eafo", "")


def test_follow_misses_no_row_that_comes_while_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LogWriter(tmp_path / "eafo", {})
    writer.write([{"step": 1, "site": "s", "eps": 0.1}])
    shown: list[int] = []

    def show(part: CorrectionLog) -> None:
        shown.append(len(part))
        if len(shown) == 1:
            writer.write([{"step": 2, "site": "s", "eps": 0.2}])

    waits = iter([None, None])

    def wait(seconds: float) -> None:
        if next(waits, seconds) == seconds:
            raise KeyboardInterrupt

    monkeypatch.setattr(log_views.time, "sleep", wait)
    args = argparse.Namespace(folder=str(tmp_path), steps=None, site=None, follow=0.1)
    assert log_views._shown(args, show) == 0
    assert shown == [1, 2]


FOLLOW = """
import argparse, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a script inherit that it is ignored
from eafo_dynamic.cli import log
parser = argparse.ArgumentParser()
log.register(parser.add_subparsers())
args = parser.parse_args()
raise SystemExit(args.run(args))
"""


def test_follow_prints_again_when_the_run_goes_on(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "eafo", {})
    writer.write([{"step": 1, "site": "s", "eps": 0.1}])
    command = [
        sys.executable,
        "-c",
        FOLLOW,
        "log",
        "layers",
        str(tmp_path),
        "--follow",
        "0.05",
        "--format",
        "csv",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(120, process.kill)  # a line that does not come is an empty one then
        watchdog.start()
        assert process.stdout.readline().startswith("step,")
        assert process.stdout.readline().startswith("1,")
        writer.write([{"step": 2, "site": "s", "eps": 0.2}])
        assert process.stdout.readline() == "\n"
        assert process.stdout.readline().startswith("step,")
        assert process.stdout.readline().startswith("2,")
        process.send_signal(signal.SIGINT)
        process.stdout.close()
        process.wait()
        watchdog.cancel()
    assert process.returncode == 0


def test_import_stays_light() -> None:
    heavy = ("torch", "pandas", "matplotlib", "rich")
    code = f"import sys, eafo_dynamic.cli.log; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"
