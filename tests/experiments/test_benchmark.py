"""The benchmark: that it measures what it says, and that its command writes it; no test asserts a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eafo_dynamic.cli import main
from eafo_dynamic.cli.bench import GROUPS as NAMES
from eafo_dynamic.experiments.benchmark import GROUPS, limits, run_benchmark, time_in_pairs
from eafo_dynamic.experiments.benchmark.gpu_steps import device_steps
from eafo_dynamic.experiments.benchmark.peers import Pade, ThreeLineCRReLU, hook_statistics, observer
from eafo_dynamic.experiments.benchmark.steps import refill
from eafo_dynamic.experiments.benchmark.timing import kept_bytes, milliseconds, peak_bytes
from eafo_dynamic.policy.controller import EAFOController

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device")
FIELDS = {"group", "case", "beside", "value", "unit", "target"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that only moves when it is told to."""
    now = [0.0]
    for name in ("perf_counter", "process_time"):
        monkeypatch.setattr(f"time.{name}", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


@pytest.mark.parametrize("cpu", [False, True])
def test_paired_alternates_and_takes_medians_of_ratios(clock: Callable[[float], None], cpu: bool) -> None:
    calls: list[str] = []
    slow = iter([0.3, 0.3] + [0.3, 0.3] * 20)

    def first() -> None:
        calls.append("a")
        clock(next(slow))

    def second() -> None:
        calls.append("b")
        clock(0.1)

    found = time_in_pairs(first, second, 4, cpu=cpu)
    assert found.ratio == pytest.approx(3.0) and found.low == pytest.approx(3.0)
    assert found.ms == pytest.approx(300.0) and found.beside_ms == pytest.approx(100.0)
    order = "".join(calls[4:])  # after the two runs that find how often to repeat
    assert order == ("abbaabba" if cpu else "aabbbbaaaabbbbaa")


def test_what_is_short_is_repeated(clock: Callable[[float], None]) -> None:
    count = [0]

    def short() -> None:
        count[0] += 1
        clock(1e-4)

    found = time_in_pairs(short, lambda: clock(1.0), 2)
    assert found.ms == pytest.approx(0.1)
    assert count[0] == 2 + 2 * (1 + 20)
    assert milliseconds(lambda: clock(0.5), 3) == pytest.approx(500.0)
    assert milliseconds(lambda: clock(0.5), 3, lambda: clock(9.0), cpu=False) == pytest.approx(500.0)


def test_every_measured_round_has_samples() -> None:
    controller = EAFOController.attach(
        torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    )
    controller.model(torch.randn(32, 4))
    fill = refill(controller)
    for _ in range(3):
        fill()
        assert controller.update(1)[0]["n"] == 256
    assert controller.update(1)[0]["n"] == 0


def test_kept_bytes_counts_each_memory_once() -> None:
    z = torch.randn(1000, requires_grad=True)
    assert kept_bytes(lambda: torch.nn.functional.gelu(z)) == 4000
    assert kept_bytes(lambda: z * z) == 4000
    assert kept_bytes(lambda: torch.exp(z) * z) == 8000


def test_peak_bytes_is_what_is_alive_at_one_time() -> None:
    def chain() -> None:
        a = torch.zeros(1 << 18)  # 1 MiB each
        b = torch.exp(a)
        del a
        c = torch.exp(b)
        d = torch.exp(c)
        del b, c, d

    assert peak_bytes(chain) == 3 << 20
    kept: list[torch.Tensor] = []
    assert peak_bytes(lambda: kept.append(torch.zeros(1 << 18))) == 1 << 20
    assert peak_bytes(lambda: None) == 0


def test_peers_are_what_they_are_called() -> None:
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    pade = Pade().double()
    p, q = pade.p.tolist(), pade.q.tolist()
    expected = [
        sum(c * v**k for k, c in enumerate(p)) / (1 + abs(sum(c * v ** (k + 1) for k, c in enumerate(q))))
        for v in x.tolist()
    ]
    torch.testing.assert_close(pade(x), torch.tensor(expected, dtype=torch.float64))
    assert (pade(x) - nn.functional.leaky_relu(x)).abs().max() < 0.1
    crrelu = [max(v, 0.0) + 0.01 * v * math.exp(-v * v / 2) for v in x.tolist()]
    torch.testing.assert_close(ThreeLineCRReLU()(x), torch.tensor(crrelu, dtype=torch.float64), atol=1e-8, rtol=1e-6)
    mean, std, *counts = hook_statistics(x)
    assert mean == pytest.approx(0.0, abs=1e-12) and std == pytest.approx(float(x.std()))
    assert sum(counts) == 61 and len(counts) == 40


def test_observer_observes() -> None:
    if (theirs := observer()) is None:
        pytest.skip("this torch has no HistogramObserver")
    theirs(torch.linspace(-1, 2, 100))
    assert (theirs.min_val, theirs.max_val) == (-1.0, 2.0)


def assert_rows_are_complete(rows: list[dict[str, Any]]) -> None:
    assert rows
    for row in rows:
        assert set(row) >= FIELDS, row
        assert math.isfinite(row["value"]) and (row["value"] > 0 or row["group"] == "growth"), row
        if "low" in row:
            assert row["low"] <= row["high"]


@pytest.mark.parametrize("group", ["activation", "memory", "floor", "statistics", "round", "start"])
def test_quick_groups_measure(group: str) -> None:
    heard: list[str] = []
    rows = run_benchmark([group], True, lambda name, row: heard.append(row["case"]))
    assert_rows_are_complete(rows)
    assert heard == [row["case"] for row in rows] and {row["group"] for row in rows} == {group}


@pytest.mark.parametrize("group", ["gpu", "gpu_step"])
def test_a_gpu_is_measured_where_there_is_one(group: str) -> None:
    rows = run_benchmark([group], True)
    if not torch.cuda.is_available():
        assert rows == []
        pytest.skip("torch sees no CUDA device")
    assert_rows_are_complete(rows)


@pytest.mark.slow
def test_steps_that_a_gpu_is_to_take_run_on_a_cpu() -> None:
    rows = [{"group": "gpu_step", **found} for found in device_steps(torch.device("cpu"), quick=True)]
    assert_rows_are_complete(rows)
    assert [found["case"] for found in rows] == ["small GPT, bfloat16", "small GPT, bfloat16, compiled"]


@pytest.mark.slow
@pytest.mark.parametrize("group", ["growth", "step", "short", "compiled"])
def test_quick_groups_of_whole_steps_measure(group: str) -> None:
    rows = run_benchmark([group], True)
    assert_rows_are_complete(rows)
    if group == "step":
        assert [row["case"] for row in rows if "SiLU" in row["case"]] == ["small ResNet, torch's SiLU for ReLU"]


def test_the_input_alone_is_kept_for_the_backward() -> None:
    kept = {row["case"]: row["value"] for row in limits.memory_cases(True)}
    assert kept["kept by CRReLU"] <= 1.01 and kept["kept by GELU with a table"] <= 1.01
    assert kept["kept by three-line CRReLU"] > 3
    assert kept["peak of a step with CRReLU"] <= 1.01 and kept["peak of a step with GELU with a table"] <= 1.01
    assert kept["peak of a step with three-line CRReLU"] > 2


def canned(quick: bool) -> Iterator[dict[str, Any]]:
    spread = {"low": 1.0, "high": 1.2, "ms": 2.0, "beside_ms": 1.8}
    yield {"case": "ours", "beside": "theirs", "value": 1.1, "unit": "x", "target": 1.03, **spread}
    yield {"case": "round", "beside": "", "value": 3.0, "unit": "ms", "target": 10.0}
    for at in (1, 10):
        row = {"case": f"sites {at}", "beside": "plain", "value": 40.0, "unit": "us/site", "target": None}
        yield {**row, "over": "sites", "at": at}


@pytest.fixture
def one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GROUPS, "memory", canned)


@pytest.mark.usefixtures("one_group")
def test_command_prints_a_table_and_writes_json_and_a_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "120")
    data, figure = tmp_path / "bench.json", tmp_path / "bench.png"
    assert main(["bench", "--quick", "--only", "memory", "--json", str(data), "--out", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "1.1 x" in out and "1.03 x" in out and "3 ms" in out and "no" in out and "yes" in out
    written = json.loads(data.read_text(encoding="utf-8"))
    assert written["quick"] is True and [row["value"] for row in written["rows"]] == [1.1, 3.0, 40.0, 40.0]
    assert written["machine"]["backend"] in ("native", "eager") and written["machine"]["threads"] >= 1
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("one_group")
def test_command_prints_rows_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--only", "memory", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["case"] == "ours" and rows[0]["value"] == 1.1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--only", "kernel"], "kernel"),
        (["--threads", "0"], "--threads"),
        pytest.param(["--only", "gpu"], "CUDA", marks=no_gpu),
        pytest.param(["--only", "gpu", "gpu_step"], "CUDA", marks=no_gpu),
        (["--json", "/no/such/folder/x.json"], "--json"),
        (["--out", "figure.bmp"], "picture"),
    ],
)
def test_wrong_arguments_cost_a_line_and_no_minute(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eafo_dynamic.cli.bench._measured", lambda *_: pytest.fail("measured before it looked"))
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and word in error and error.count("\n") == 1


def test_the_command_knows_every_group() -> None:
    assert tuple(GROUPS) == NAMES
