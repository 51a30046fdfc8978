"""Tables and figures of a comparison: what they show is what the statistics say; the pictures have been looked at."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from browser import AVAILABLE, browser
from fabricate_cells import write_comparison
from figures import assert_inside
from matplotlib.figure import Figure
from rich.console import Console

from eafo_dynamic.errors import ConfigError, LogError
from eafo_dynamic.experiments.compare import figures
from eafo_dynamic.experiments.compare.across import summarise
from eafo_dynamic.experiments.compare.paired import Paired, compare
from eafo_dynamic.experiments.compare.results import Cell, read_cells, step_times, values
from eafo_dynamic.experiments.compare.tables import (
    MEANINGS,
    across_rows,
    html,
    markdown,
    notes,
    rich_table,
    rows,
    write_html,
)

EFFECTS = {"ReLU": 0.0, "learned": -0.05, "entropy": 0.05, "same | <b>@@DATA@@": 0.0}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    return read_cells(write_comparison(tmp_path_factory.mktemp("cells"), EFFECTS), list(EFFECTS))


@pytest.fixture(scope="module")
def pairs(cells: list[Cell]) -> list[Paired]:
    return compare(values(cells, "test_loss"), "ReLU", "test_loss", step_ms=step_times(cells))


def texts(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def test_rows_say_what_the_statistics_say(pairs: list[Paired]) -> None:
    table = rows(pairs)
    assert [row["arm"] for row in table] == ["ReLU (reference)", *list(EFFECTS)[1:]]
    assert [row["verdict"] for row in table[1:]] == ["better", "worse", "no difference found"]
    assert float(table[0]["mean"]) == pytest.approx(pairs[0].reference_mean, rel=1e-3)
    shown = [
        float(part) for part in table[1]["relative [%]"].replace("[", "").replace("]", "").replace(",", "").split()
    ]
    assert shown == pytest.approx([pairs[0].relative, *(pairs[0].relative_interval or ())], abs=0.005)
    assert table[1]["w/t/l"] == "10/0/0"
    assert set(table[0]) <= set(MEANINGS)
    without = rows(compare({"a": {0: 1.0, 1: 2.0}, "b": {0: 1.0, 1: 2.0}}, "a", "loss"))
    assert "step time" not in without[0]
    assert "d_z" not in without[0]


def test_another_reference_is_named_in_tables_and_figures() -> None:
    table = {arm: {seed: seed + shift for seed in range(6)} for arm, shift in (("a", 1.0), ("b", 2.0), ("c", 0.5))}
    pairs = compare(table, "a", "loss", against={"c": "b"})
    shown = rows(pairs)
    assert [row["arm"] for row in shown] == ["a (reference)", "b", "c (against b)"]
    assert shown[2]["relative [%]"].startswith("-33.33")
    for drawn in (figures.forest(pairs), figures.sensitivity(pairs, {"b": 1, "c": 2}, "x")):
        assert "arm minus its reference" in texts(drawn)
    table["b"][3] = math.nan
    lines = notes(compare(table, "a", "loss", against={"c": "b"}))
    assert lines[-2:] == ["b: diverged in seed 3.", "b (reference): diverged in seed 3."]


def test_notes_hide_nothing() -> None:
    table = {
        "base": {seed: 1.0 + seed for seed in range(6)} | {5: math.nan},
        "arm": {0: 1.0, 1: 2.0, 2: math.inf},
        "other": dict.fromkeys(range(6), 1.0),
    }
    lines = notes(compare(table, "base", "loss"), ["arm, seed 0: other initial weights than base"])
    assert lines == [
        "loss: lower is better. Test: exact sign flips; corrected for 2 arms (Holm).",
        "With 2 arms the test needs 7 seeds to find anything at all; too few: every arm.",
        "arm: not paired, as the arm or the reference has not finished seed 3, 4, 5.",
        "arm: diverged in seed 2.",
        "base (reference): diverged in seed 5.",
        "Not a fair pair: arm, seed 0: other initial weights than base.",
    ]


def test_markdown_is_a_table_whatever_the_names(pairs: list[Paired]) -> None:
    lines = markdown(rows(pairs)).splitlines()
    counts = {line.replace("\\|", "").count("|") for line in lines}
    assert counts == {len(rows(pairs)[0]) + 1}
    assert "same \\| <b>" in lines[-1]


@pytest.mark.parametrize("width", [80, 120, 220])
def test_terminal_table_fits_and_names_what_it_leaves_out(pairs: list[Paired], width: int) -> None:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(rich_table(rows(pairs), "test_loss", width))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= width
    assert "no difference found" in text
    assert "…" not in text
    left_out = [name for name in rows(pairs)[0] if name not in text.split("not shown")[0]]
    assert ("not shown at this width" in text) == bool(left_out) == (width < 200)
    assert all(name in text for name in left_out)


def test_table_over_tasks(pairs: list[Paired], cells: list[Cell]) -> None:
    accuracy = compare(values(cells, "test_accuracy"), "ReLU", "test_accuracy")
    table = across_rows(summarise({"one": pairs, "two": accuracy, "three": accuracy[:1]}))
    assert [(row["better"], row["no difference"], row["worse"], row["undecided"]) for row in table] == [
        ("3", "0", "0", "0"),
        ("0", "0", "2", "1"),
        ("0", "2", "0", "1"),
    ]


def test_forest_shows_every_seed(pairs: list[Paired]) -> None:
    figure = figures.forest(pairs)
    clouds = [found.get_offsets() for found in figure.axes[0].collections]
    scale = 100 / pairs[0].reference_mean
    assert np.asarray(clouds[0])[:, 0] == pytest.approx(scale * np.array(pairs[0].differences))
    assert np.asarray(clouds[1])[0, 0] == pytest.approx(pairs[0].relative)
    assert "better is left" in texts(figure)
    assert_inside(figure)


def test_entropy_is_averaged_over_seeds(cells: list[Cell]) -> None:
    figure = figures.entropy_trajectories(cells)
    lines = figure.axes[0].get_lines()
    assert len(lines) == 3  # the reference has no log
    learned = [cell.entropy_mean for cell in cells if cell.arm == "learned"]
    assert lines[0].get_ydata() == pytest.approx(np.mean(learned, 0))
    assert_inside(figure)


def test_first_and_last_entropy(cells: list[Cell]) -> None:
    figure = figures.entropy_change(cells)
    found = [cell for cell in cells if cell.arm == "learned"]
    fell = sum((cell.entropy_last or 0) < (cell.entropy_first or 0) for cell in found)
    assert f"learned  (fell in {fell} of 10)" in texts(figure)
    assert_inside(figure)
    with pytest.raises(LogError, match="no entropy to draw"):
        figures.entropy_change(cells[:10])
    with pytest.raises(LogError, match="no entropy to draw"):
        figures.entropy_trajectories(cells[:10])


@pytest.mark.parametrize(
    ("swept", "scale", "labels"),
    [
        ([0.1, 0.001, 0.01], "log", ["0.001", "0.01", "0.1"]),
        ([1, 3, 2], "linear", ["1", "2", "3"]),
        ([0, 100, 10], "linear", ["0", "10", "100"]),
        (["gelu", "relu", True], "linear", ["gelu", "relu", "True"]),
    ],
)
def test_sensitivity_axis(pairs: list[Paired], swept: list[object], scale: str, labels: list[str]) -> None:
    by_arm = dict(zip([pair.arm for pair in pairs], swept, strict=True))
    figure = figures.sensitivity(pairs, by_arm, "eafo.eps_init")
    axes = figure.axes[0]
    assert axes.get_xscale() == scale
    dots = [100 / pair.reference_mean * value for pair in pairs for value in pair.differences]
    low, high = axes.get_ylim()
    assert low < min(dots)
    assert max(dots) < high
    assert [label.get_text() for label in axes.get_xticklabels()] == labels
    assert "better is down" in texts(figure)
    assert_inside(figure)
    with pytest.raises(LogError, match=r"value of eafo\.x"):
        figures.sensitivity(pairs, {}, "eafo.x")


def test_page_is_self_contained_and_escapes(tmp_path: Path, pairs: list[Paired], cells: list[Cell]) -> None:
    before = dict(matplotlib.rcParams)
    pictures = figures.embedded(figures.forest, pairs)
    assert dict(matplotlib.rcParams) == before
    assert pictures == figures.embedded(figures.forest, pairs)
    for picture in pictures:
        ElementTree.fromstring(base64.b64decode(picture.partition("base64,")[2]))
    page = html("A <title>", {"test_loss": (rows(pairs), notes(pairs))}, {"Paired differences": pictures})
    assert "same | &lt;b&gt;@@DATA@@" in page
    assert "<b>" not in page
    assert "http" not in page.replace("http-equiv", "")
    out = write_html(page, tmp_path / "page.html")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_html(page, tmp_path / "no" / "page.html")
    if not AVAILABLE:
        pytest.skip("no chromium here")
    for width in (390, 1200):
        with browser(width) as window:
            window.open(out)
            assert window.errors() == []
            assert window.run("return document.documentElement.scrollWidth <= innerWidth")
            assert window.run("return [...document.images].every(image => image.naturalWidth > 0)")
            assert window.run("return document.querySelector('td.better').textContent") == "better"
