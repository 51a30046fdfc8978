"""Figures of a log: what is drawn is what the log says; the pictures themselves have been looked at."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from fabricate import SITES, fabricate_run
from figures import assert_inside
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from eafo_dynamic.errors import ConfigError, LogError
from eafo_dynamic.records import CorrectionLog, LogWriter
from eafo_dynamic.records.figures.logs import FIGURES, plot
from eafo_dynamic.records.figures.style import DARK, LIGHT, Style, save
from eafo_dynamic.records.summary import entropy_changes


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> CorrectionLog:
    return CorrectionLog.load(fabricate_run(tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> CorrectionLog:
    sites = [(f"vit.encoder.layer.{k}.intermediate.intermediate_act_fn", "gelu") for k in range(60)]
    return CorrectionLog.load(fabricate_run(tmp_path_factory.mktemp("runs") / "many", updates=4, sites=sites))


def mesh_of(figure: Figure) -> QuadMesh:
    return next(child for child in figure.axes[0].get_children() if isinstance(child, QuadMesh))


def texts(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def luminance(colour: str) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("what", FIGURES)
@pytest.mark.parametrize(("suffix", "dark"), [(".png", True), (".svg", False), (".pdf", True)])
def test_figure_is_written(log: CorrectionLog, tmp_path: Path, what: str, dark: bool, suffix: str) -> None:
    before = dict(matplotlib.rcParams)
    out = save(plot(log, what, dark=dark), tmp_path / f"ein Bild{suffix}")
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert out.read_bytes().startswith(start)
    if suffix == ".svg":
        ElementTree.parse(out)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("what", FIGURES)
@pytest.mark.parametrize("which", ["log", "many"])
def test_no_text_is_cut_off(what: str, which: str, request: pytest.FixtureRequest) -> None:
    assert_inside(plot(request.getfixturevalue(which), what))


def test_same_log_gives_the_same_svg(log: CorrectionLog, tmp_path: Path) -> None:
    first = save(plot(log, "ranking"), tmp_path / "a.svg").read_bytes()
    assert first == save(plot(log, "ranking"), tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize("column", ["entropy", "eps", "dead_fraction"])
def test_heatmap_holds_the_log(log: CorrectionLog, column: str) -> None:
    mesh = mesh_of(plot(log, "heatmap", column))
    expected = np.array([log.series(site, column) for site in log.sites])
    np.testing.assert_array_equal(np.asarray(mesh.get_array()).reshape(expected.shape), expected)
    low, high = mesh.get_clim()
    if (expected < 0).any() and (expected > 0).any():
        assert low == -high, "zero is in the middle of the colours"


def test_heatmap_leaves_gaps_where_a_site_has_no_row(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "eafo", {})
    writer.write([{"step": 1, "site": "a", "entropy": 1.0}, {"step": 1, "site": "b", "entropy": None}])
    writer.write([{"step": 2, "site": "b", "entropy": 2.0}])
    values = np.ma.filled(mesh_of(plot(CorrectionLog.load(tmp_path), "heatmap")).get_array(), np.nan)
    np.testing.assert_array_equal(values.reshape(2, 2), [[1.0, np.nan], [np.nan, 2.0]])


def test_heatmap_of_many_updates_averages_neighbours(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "eafo", {})
    for step in range(1200):
        writer.write([{"step": step, "site": "a", "entropy": step if step % 4 else math.nan}])
    values = np.ma.filled(mesh_of(plot(CorrectionLog.load(tmp_path), "heatmap")).get_array(), np.nan).ravel()
    assert values.shape == (600,)
    np.testing.assert_array_equal(values[:4], [1.0, 2.5, 5.0, 6.5])


def test_trajectories_hold_the_log_and_mark_events(log: CorrectionLog) -> None:
    axes = plot(log, "trajectories", "eps").axes[0]
    assert [line.get_label() for line in axes.lines] == log.sites
    for line in axes.lines:
        np.testing.assert_array_equal(line.get_ydata(), log.series(str(line.get_label()), "eps"))
    marks = next(child for child in axes.collections if isinstance(child, PathCollection))
    expected = [[entry["step"], entry["eps"]] for entry in log.rows if entry["event"]]
    np.testing.assert_array_equal(sorted(np.asarray(marks.get_offsets()).tolist()), sorted(expected))


def test_functions_end_with_the_last_snapshot(log: CorrectionLog) -> None:
    figure = plot(log.select(site="head"), "functions")
    upper, lower = figure.axes[:2]
    last = log.shapes("head.act")[-1]
    np.testing.assert_array_equal(upper.lines[-1].get_ydata(), last["function"])
    np.testing.assert_allclose(
        np.asarray(lower.lines[-2].get_ydata()), np.subtract(last["function"], last["base"]), atol=1e-12
    )
    assert f"eps {last['eps']:+.3f}" in texts(figure)


def test_densities_have_area_one(log: CorrectionLog) -> None:
    axes = plot(log.select(site="head"), "densities").axes[0]
    for line in axes.lines:
        assert np.trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(1, abs=1e-3)
    for stairs in axes.patches:
        heights, edges, _ = stairs.get_data()
        assert np.dot(heights, np.diff(edges)) == pytest.approx(1)


def test_prediction_holds_every_change(log: CorrectionLog) -> None:
    figure = plot(log, "prediction")
    drawn = np.vstack([np.asarray(points.get_offsets()) for points in figure.axes[0].collections])
    expected = [pair for pairs in entropy_changes(log)[1].values() for pair in pairs]
    np.testing.assert_allclose(drawn, expected)
    assert f"{12 * len(SITES)} changes at updates, on the same samples, correlation 0.99" in texts(figure)


def test_ranking_is_in_order(log: CorrectionLog) -> None:
    axes = plot(log, "ranking", "eps").axes[0]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == [entry["site"] for entry in sorted(log.last(), key=lambda entry: -entry["eps"])]


def test_many_sites_are_thinned_and_said(many: CorrectionLog) -> None:
    assert "48 more sites, choose with --site" in texts(plot(many, "functions"))
    assert "the 20 in the middle left out" in texts(plot(many, "ranking"))
    assert len(plot(many, "ranking").axes[0].get_yticks()) == 40
    assert "v.e.l.59.i.intermediate_act_fn" in texts(plot(many, "ranking"))


@pytest.mark.parametrize("style", [LIGHT, DARK])
def test_every_colour_stands_out_from_the_ground(style: Style) -> None:
    ground = luminance(style.ground)
    for colour, least in [(style.ink, 7.0), *((line, 2.0) for line in style.lines)]:
        bright, dim = sorted((luminance(colour), ground), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= least, colour


def seen_with_deuteranopia(colour: str) -> np.ndarray:
    """Returns the colour as seen without green cones (Machado, Oliveira and Fernandes 2009, severity 1)."""
    matrix = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    return np.clip(np.array(matrix) @ np.array(to_rgb(colour)), 0, 1)


@pytest.mark.parametrize("style", [LIGHT, DARK])
def test_lines_are_told_apart_without_green_cones(style: Style) -> None:
    seen = [seen_with_deuteranopia(colour) for colour in style.lines]
    for number, left in enumerate(seen):
        for right in seen[:number]:
            assert np.linalg.norm(left - right) > 0.15


@pytest.mark.parametrize(
    ("what", "column", "parts"),
    [
        ("pie", "entropy", ["--what='pie'", "heatmap"]),
        ("heatmap", "policy", ["--column='policy'", "entropy"]),
        ("heatmap", "epsilon", ["--column='epsilon'", "eps"]),
    ],
)
def test_wrong_figure_or_column(log: CorrectionLog, what: str, column: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        plot(log, what, column)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("out", ["figure", "figure.gif", "no/such/folder/figure.png"])
def test_wrong_file(log: CorrectionLog, tmp_path: Path, out: str) -> None:
    with pytest.raises(ConfigError, match="--out="):
        save(plot(log, "ranking"), tmp_path / out)


@pytest.mark.parametrize(("what", "problem"), [("functions", "no snapshots"), ("densities", "no snapshots")])
def test_log_without_snapshots(tmp_path: Path, what: str, problem: str) -> None:
    LogWriter(tmp_path / "eafo", {}).write([{"step": 1, "site": "a", "entropy": 1.0}])
    log = CorrectionLog.load(tmp_path)
    with pytest.raises(LogError, match=problem):
        plot(log, what)
    with pytest.raises(LogError, match="no two updates"):
        plot(log, "prediction")


def test_snapshots_without_a_density(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "eafo", {})
    writer.write([{"step": 1, "site": "a", "entropy": 1.0}])
    writer.write_shapes(1, [{"site": "a", "z": [0, 1], "base": [0, 1], "function": [0, 1]}])
    log = CorrectionLog.load(tmp_path)
    assert len(plot(log, "functions").axes) == 3
    with pytest.raises(LogError, match="neither a density"):
        plot(log, "densities")


def test_column_of_nothing_but_missing_values(tmp_path: Path) -> None:
    LogWriter(tmp_path / "eafo", {}).write([{"step": 1, "site": "a", "entropy": None}])
    log = CorrectionLog.load(tmp_path)
    for what in ("heatmap", "trajectories", "ranking"):
        assert save(plot(log, what), tmp_path / f"{what}.png").stat().st_size > 0


def test_missing_matplotlib_is_said(log: CorrectionLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LogError, match=r"pip install 'eafo-dynamic\[plots\]'"):
        plot(log, "heatmap")


def test_plot_command(log: CorrectionLog, tmp_path: Path) -> None:
    code = (
        "import argparse, sys; from eafo_dynamic.cli import log; parser = argparse.ArgumentParser();"
        "log.register(parser.add_subparsers()); args = parser.parse_args(); sys.exit(args.run(args))"
    )
    out = tmp_path / "eps.svg"
    options = ["--what", "ranking", "--column", "eps", "--site", "blocks", "--steps", "100:", "--dark"]
    command = [sys.executable, "-c", code, "log", "plot", str(log.path), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    assert DARK.ground.lower() in out.read_text()
