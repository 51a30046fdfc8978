"""`rank` and `shape`: what they print is what the theory says; figures show it; bad input is one line."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import reference
import torch
from fabricate import fabricate_run
from figures import assert_inside
from matplotlib.figure import Figure
from scipy import stats

from eafo_dynamic.cli import rank, shape
from eafo_dynamic.cli.sources import DENSITIES, from_density, from_file, from_log
from eafo_dynamic.correction.bases import activation_names
from eafo_dynamic.errors import ConfigError, EAFOError
from eafo_dynamic.records.figures import theory
from eafo_dynamic.records.figures.style import LIGHT, drawing


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="eafo-dynamic")
    commands = parser.add_subparsers(required=True)
    rank.register(commands)
    shape.register(commands)
    parsed = parser.parse_args(arguments)
    code: int = parsed.run(parsed)
    return code


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert run(*arguments, "--format", "json") == 0
    return json.loads(capsys.readouterr().out)


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


# rank


@pytest.mark.parametrize(
    ("arguments", "column"),
    [([], 0), (["--resolution", "0.05"], 1), (["--mean", "-0.5", "--std", "2"], 2)],
)
def test_rank_prints_the_oracle_table(capsys: pytest.CaptureFixture[str], arguments: list[str], column: int) -> None:
    found = rows(capsys, "rank", *arguments)
    assert {row["activation"]: row["entropy"] for row in found} == pytest.approx(
        {name: values[column] for name, values in reference.ORACLE.items()}, abs=2e-3
    )
    assert [row["rank"] for row in found] == list(range(1, 13))
    entropies = [row["entropy"] for row in found]
    assert entropies == sorted(entropies)
    assert found[0]["activation"] == "relu"


def test_rank_tells_atoms_and_what_the_correction_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    found = {row["activation"]: row for row in rows(capsys, "rank")}
    assert found["relu"]["atom_mass"] == pytest.approx(0.5, abs=1e-3)
    assert found["relu"]["continuous_entropy"] == pytest.approx(0.7258, abs=3e-3)
    assert found["gelu"]["atom_mass"] == 0
    assert found["relu"]["d_entropy_d_eps"] > 0.3
    assert found["normal_cdf"]["d_entropy_d_eps"] == pytest.approx(0, abs=1e-3)  # the worst activation


def test_rank_of_chosen_and_of_all_activations(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "rank", "--activations", "gelu", "relu", "GELU")
    assert [row["activation"] for row in found] == ["relu", "gelu"]
    everything = rows(capsys, "rank", "--activations", "all")
    assert len(everything) == len(activation_names())


def test_rank_of_a_file_of_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = np.random.default_rng(0).gamma(2.0, size=(50, 40))
    np.save(tmp_path / "z.npy", samples.astype(np.float32))
    np.savetxt(tmp_path / "z.csv", samples, delimiter=",", header="a,b", comments="")
    np.savetxt(tmp_path / "z.txt", samples)
    tables = [rows(capsys, "rank", "--samples", str(tmp_path / name)) for name in ("z.npy", "z.csv", "z.txt")]
    for table in tables[1:]:
        for row, same in zip(table, tables[0], strict=True):
            assert row["entropy"] == pytest.approx(same["entropy"], abs=1e-3)
    relu = next(row for row in tables[0] if row["activation"] == "relu")
    identity = next(row for row in tables[0] if row["activation"] == "identity")
    assert relu["entropy"] == identity["entropy"]  # nothing is below 0
    assert relu["continuous_entropy"] == pytest.approx(float(stats.gamma(2.0).entropy()), abs=0.05)


def test_rank_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fabricate_run(tmp_path / "run")
    source = from_log(str(folder))
    assert len(source.names) == len(set(source.names)) > 1
    found = rows(capsys, "rank", "--log", str(folder))
    for row in found:
        assert row["lowest"] <= row["entropy"] <= row["highest"]
    site = source.names[0]
    alone = rows(capsys, "rank", "--log", str(folder), "--site", site)
    mean, std = float(source.density.mean[0]), float(source.density.std[0])
    normal = rows(capsys, "rank", "--mean", repr(mean), "--std", repr(std))
    for row, same in zip(alone, normal, strict=True):
        assert row["entropy"] == pytest.approx(same["entropy"], abs=1e-6)


@pytest.mark.parametrize("form", ["table", "csv", "md"])
def test_rank_prints_in_every_format(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rank", "--activations", "relu", "gelu", "--format", form) == 0
    printed = capsys.readouterr().out
    assert printed.index("relu") < printed.index("gelu")
    if form == "csv":
        assert [row["activation"] for row in csv.DictReader(io.StringIO(printed))] == ["relu", "gelu"]


# shape


def test_shape_of_relu_is_crrelu(capsys: pytest.CaptureFixture[str]) -> None:
    curve = rows(capsys, "shape", "relu", "--curve", "--eps", "0.2")
    assert len(curve) > 50
    for row in curve:
        z = row["z"]
        assert row["ghat"] == pytest.approx(z * math.exp(-z * z / 2), abs=1e-9)
        assert row["corrected"] == pytest.approx(max(z, 0) + 0.2 * z * math.exp(-z * z / 2), abs=1e-9)
        assert row["density"] == pytest.approx(float(stats.norm.pdf(z)), abs=1e-9)


@pytest.mark.parametrize("density", DENSITIES)
def test_summary_predicts_the_entropy_of_a_small_step(density: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("gelu", "tanh"):
        (row,) = rows(capsys, "shape", name, "--density", density, "--mean", "-0.3", "--std", "1.4", "--eps", "1e-3")
        change = row["entropy_at_eps"] - row["entropy"]
        assert change == pytest.approx(1e-3 * row["d_entropy_d_eps"], rel=0.02, abs=2e-6)
        assert row["route"] == ("score" if name == "gelu" else "analytic")


def test_route_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows(capsys, "shape", "tanh", "--route", "score")
    assert row["route"] == "score"


# sources


@pytest.mark.parametrize("density", DENSITIES)
def test_named_densities_have_their_moments_and_their_form(density: str) -> None:
    source = from_density(density, mean=2.0, std=0.5)
    z = source.points[0].numpy()
    assert z.mean() == pytest.approx(2.0)
    assert z.std() == pytest.approx(0.5)
    share = (np.arange(len(z)) + 0.5) / len(z)
    frozen = {
        "normal": stats.norm(),
        "student-t3": stats.t(3),
        "logistic": stats.logistic(),
    }
    if density in frozen:
        expected = frozen[density].ppf(share)
    else:
        halves = 0.5 * stats.norm(-1, 0.4).cdf(z0 := np.linspace(-4, 4, 40001)) + 0.5 * stats.norm(1, 0.4).cdf(z0)
        expected = np.interp(share, halves, z0)
    middle = (share > 0.001) & (share < 0.999)
    unit = (z - 2.0) / 0.5 * expected.std()
    np.testing.assert_allclose(unit[middle], (expected - expected.mean())[middle], atol=2e-4)


def test_density_of_samples_is_estimated_from_them(tmp_path: Path) -> None:
    samples = np.random.default_rng(1).exponential(size=5000)
    np.save(tmp_path / "z.npy", np.append(samples, [np.nan, np.inf]))
    source = from_file(str(tmp_path / "z.npy"))
    assert source.points.shape == (1, 5000)
    assert float(source.density.mean) == pytest.approx(samples.mean())
    u = torch.linspace(-0.5, 2, 11, dtype=torch.float64)
    expected = stats.expon.pdf(samples.mean() + samples.std() * u.numpy()) * samples.std()
    np.testing.assert_allclose(source.density.pdf(u)[0], expected, atol=0.1)


# bad input


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["rank", "--activations", "gleu"], "activation"),
        (["rank", "--std", "0"], "--std"),
        (["rank", "--std", "nan"], "--std"),
        (["rank", "--resolution", "0"], "resolution"),
        (["rank", "--samples", "missing.npy"], "--samples"),
        (["rank", "--samples", "words.txt"], "--samples"),
        (["rank", "--samples", "constant.txt"], "--samples"),
        (["rank", "--samples", "one.txt"], "--samples"),
        (["rank", "--samples", "empty.npy"], "--samples"),
        (["rank", "--samples", "numbers.txt", "--mean", "1"], "--mean"),
        (["rank", "--site", "*"], "--site"),
        (["rank", "--activations", "relu", "--out", "figure.bmp"], "--out"),
        (["rank", "--activations", "relu", "--out", "no/such/folder.png"], "--out"),
        (["shape", "gleu"], "activation"),
        (["shape", "relu", "--density", "cauchy"], "--density"),
        (["shape", "relu", "--density", "missing.npy"], "--samples"),
        (["shape", "relu", "--eps", "nan"], "--eps"),
        (["shape", "relu", "--resolution", "7"], "resolution"),
    ],
)
def test_bad_input_is_one_line_that_names_the_option(
    arguments: list[str], option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("words", "a b c\nd e f"), ("constant", "1 1 1"), ("one", "3"), ("numbers", "1 2 3")):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "empty.npy").write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        run(*arguments)
    assert str(caught.value).startswith(f"{option}=")
    assert "\n" not in str(caught.value)


def test_missing_run_is_an_error_of_the_log(tmp_path: Path) -> None:
    with pytest.raises(EAFOError):
        run("rank", "--log", str(tmp_path))


def test_missing_matplotlib_names_the_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EAFOError, match=r"pip install 'eafo-dynamic\[plots\]'"):
        run("rank", "--activations", "relu", "--out", str(tmp_path / "figure.png"))


def test_commands_do_not_import_matplotlib_or_torch_before_they_need_it() -> None:
    code = (
        "import sys, argparse; from eafo_dynamic.cli import rank, shape; "
        "c = argparse.ArgumentParser().add_subparsers(); rank.register(c); shape.register(c); "
        "print([m for m in ('torch', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# figures; the pictures themselves have been looked at


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_figures_are_written(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("rank", "--activations", "relu", "gelu"), ("shape", "gelu", "--density", "bimodal")):
        out = tmp_path / f"{arguments[0]}{suffix}"
        assert run(*arguments, "--out", str(out)) == 0
        assert out.stat().st_size > 2000
        assert capsys.readouterr().out


def test_ranking_shows_the_rows() -> None:
    source = from_density("normal")
    found = rank.ranking(source, ["relu", "gelu", "tanh", "identity"], 0.1)
    with drawing(LIGHT):
        figure = theory.ranking(found, source.label, 0.1)
        assert_inside(figure)
    axes = figure.axes[0]
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert ends == pytest.approx([row["entropy"] for row in found])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["relu", "gelu", "tanh", "identity"]
    assert "50% on atoms" in texts(figure)
    assert "1.424" in texts(figure)


def test_ranking_of_several_sites_has_whiskers(tmp_path: Path) -> None:
    found = rank.ranking(from_log(str(fabricate_run(tmp_path / "run"))), ["relu", "gelu"], 0.1)
    with drawing(LIGHT):
        figure = theory.ranking(found, "a run", 0.1)
        assert_inside(figure)
    ends = sorted(point[0] for lines in figure.axes[0].collections for line in lines.get_segments() for point in line)
    assert ends[0] == pytest.approx(min(row["lowest"] for row in found))
    assert ends[-1] == pytest.approx(max(row["highest"] for row in found))


def test_shape_figure_shows_the_study() -> None:
    study = shape.study("gelu", from_density("student-t3"), eps=0.4)
    with drawing(LIGHT):
        figure = theory.shape(study)
        assert_inside(figure)
    functions, correction, density, outputs = figure.axes
    np.testing.assert_allclose(functions.get_lines()[1].get_ydata(), study.corrected)
    np.testing.assert_allclose(correction.get_lines()[1].get_ydata(), study.ghat)
    np.testing.assert_allclose(density.get_lines()[0].get_ydata(), study.density)
    np.testing.assert_allclose(outputs.get_lines()[1].get_ydata(), study.outputs_after[1])
    for curve in (study.outputs_before, study.outputs_after):
        assert np.trapezoid(curve[1], curve[0]) == pytest.approx(1, abs=1e-3)
    assert f"{study.entropy_after:.3f}" in texts(figure)
    assert f"{study.slope:+.3f}" in texts(figure)
