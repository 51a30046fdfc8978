"""The rows with which a log ends: where the fit left the model, beside what the last update measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fabricate import SITES, fabricate_run
from small_logs import MANIFEST, assert_same_log, jsonl, oracle_rows, row, write_run

from eafo_dynamic.records import CorrectionLog, LogWriter
from eafo_dynamic.records.figures.logs import FIGURES, plot
from eafo_dynamic.records.report import render_report
from eafo_dynamic.records.summary import compare_runs, compare_sites, layer_rows, summarise

END = 620


def shape(step: int, site: str, eps: float) -> dict[str, Any]:
    curves = {"z": [0.0, 1.0], "base": [0.0, 1.0], "function": [0.0, 1.5], "u": [0.0, 1.0], "pdf": [0.4, 0.2]}
    return {"site": site, "eps": eps, "mu": 0.0, "sigma": 1.0, **curves}


def end_run(run: Path, how: str = "completed", eps: float = 0.3) -> CorrectionLog:
    """A fabricated run of 600 steps that goes on for 20 steps after its last update."""
    fabricate_run(run)
    writer = LogWriter(run / "eafo", {"sites": CorrectionLog.load(run).manifest["sites"]})
    writer.resume(600)
    rows = [row(END, name, epoch=12, eps=eps, delta_eps=0.1, mu=0.0, sigma=1.0, policy="entropy") for name, _ in SITES]
    writer.write_end(END, how, rows, [shape(END, name, eps) for name, _ in SITES])
    return CorrectionLog.load(run)


def test_the_end_is_marked_and_nothing_is_invented(tmp_path: Path) -> None:
    end_run(tmp_path, "interrupted")
    ends = [found for found in oracle_rows(tmp_path) if "fit_end" in found]
    assert [found["site"] for found in ends] == [name for name, _ in SITES]
    for found in ends:
        assert found["fit_end"] == "interrupted"
        assert (found["step"], found["eps"]) == (END, 0.3)
        assert not {"entropy", "entropy_after", "d_entropy_d_eps", "n", "event"} & found.keys()
    shapes = [json.loads(line) for line in (tmp_path / "eafo/shapes.jsonl").read_text().splitlines()]
    assert {found["step"] for found in shapes if "fit_end" in found} == {END}


def test_nothing_is_added_where_the_last_update_was_the_end(tmp_path: Path) -> None:
    writer = write_run(tmp_path)
    before = jsonl(tmp_path).read_bytes()
    writer.write_end(50, "completed", [row(50, "b.0.act", eps=1.0)], [shape(50, "b.0.act", 1.0)])
    assert jsonl(tmp_path).read_bytes() == before
    assert [found["step"] for found in CorrectionLog.load(tmp_path).shapes()] == [50]
    resumed = LogWriter(tmp_path / "eafo", MANIFEST)
    resumed.resume(50)
    resumed.write_end(50, "completed", [row(50, "b.0.act", eps=1.0)], [shape(50, "b.0.act", 1.0)])
    assert jsonl(tmp_path).read_bytes() == before, "a resumed writer knows the last step too"


def test_a_change_after_the_last_update_is_added_at_its_step(tmp_path: Path) -> None:
    """As weight averaging makes one when the fit ends."""
    writer = write_run(tmp_path, entropy=0.8)
    ends = [row(50, site, eps=0.7, delta_eps=0.2) for site in ("b.0.act", "b.1.act")]
    writer.write_end(50, "completed", ends, [shape(50, "b.0.act", 0.7)])
    log = CorrectionLog.load(tmp_path)
    assert [(found["eps"], found["entropy"], found["updates"]) for found in layer_rows(log)] == [(0.7, 0.8, 5)] * 2
    data = json.loads(render_report([log]).split('id="data">')[1].split("</script>")[0])["runs"][0]
    assert [line[-1] for line in data["series"]["eps"]] == [0.7, 0.7]
    assert [line[-1] for line in data["series"]["entropy"]] == [0.8, 0.8]


@pytest.mark.parametrize("step", [600, END, 10_000])
def test_a_resumed_run_drops_the_end(tmp_path: Path, step: int) -> None:
    end_run(tmp_path / "ended")
    whole = CorrectionLog.load(fabricate_run(tmp_path / "whole"))
    assert LogWriter(tmp_path / "ended/eafo", {"sites": whole.manifest["sites"]}).resume(step) == len(SITES)
    assert_same_log(tmp_path / "whole", tmp_path / "ended")


def test_a_site_named_like_the_mark_is_not_dropped(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "eafo", MANIFEST)
    writer.write([row(1, 'a"fit_end":"b', event='"fit_end":"completed"')])
    writer.resume(1)
    assert len(CorrectionLog.load(tmp_path)) == 1


def test_tables_have_the_amplitudes_of_the_end_and_the_last_measurements(tmp_path: Path) -> None:
    whole = CorrectionLog.load(fabricate_run(tmp_path / "whole"))
    log = end_run(tmp_path / "ended")
    for before, after, last in zip(layer_rows(whole), layer_rows(log), log.last(), strict=True):
        assert (after["step"], after["eps"], after["mu"]) == (END, 0.3, 0.0)
        for column in ("entropy", "d_entropy_d_eps", "atom_mass", "n", "updates", "event", "entropy_trend"):
            assert after[column] == before[column], column
        assert after["eps_trend"] == [*before["eps_trend"], 0.3]
        assert last["entropy"] == before["entropy"]
        assert last["event"] is None, "nothing was out of the ordinary at the end"
    facts = summarise(log)
    assert (facts["steps"], facts["updates"], facts["events"]) == ([50, END], 12, 2)
    assert facts["mean_eps"] == pytest.approx(0.3)
    assert log.events() == whole.events()


def test_a_run_that_went_on_differs_from_the_one_it_came_from(tmp_path: Path) -> None:
    logs = [CorrectionLog.load(fabricate_run(tmp_path / "whole")), end_run(tmp_path / "ended")]
    first, second = compare_runs(logs)
    assert (first["last_step"], second["last_step"]) == (600, END)
    assert first["mean_eps"] != second["mean_eps"]
    assert first["updates"] == second["updates"]
    assert all(found["spread"] > 0 for found in compare_sites(logs, "eps"))
    assert all(found["spread"] == 0 for found in compare_sites(logs, "entropy"))


def test_the_report_says_the_same_in_its_table_and_of_one_site(tmp_path: Path) -> None:
    log = end_run(tmp_path)
    page = render_report([log])
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])["runs"][0]
    for place, layer in enumerate(layer_rows(log)):
        film = data["snapshots"][str(place)]
        assert (film[-1]["step"], film[-1]["eps"]) == (END, layer["eps"])
        assert data["series"]["eps"][place][-1] == layer["eps"]
        assert data["series"]["entropy"][place][-1] is None
    assert (data["steps"][-1], data["updates"]) == (END, 12)
    layers = page.replace(page[page.index('id="changed"') : page.index("</section>", page.index('id="changed"'))], "")
    assert layers.count('data-value="0.3">0.3</td>') == len(SITES)


@pytest.mark.parametrize("what", FIGURES)
def test_figures_of_a_log_with_an_end(tmp_path: Path, what: str) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    log = end_run(tmp_path)
    for column in ("entropy", "eps"):
        assert plot(log, what, column) is not None


def test_a_heatmap_has_a_field_for_the_end_only_where_there_is_a_value(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    log = end_run(tmp_path)
    fields = {column: plot(log, "heatmap", column).axes[0].collections[0].get_array() for column in ("entropy", "eps")}
    assert fields["entropy"].shape == (len(SITES), 12)
    assert fields["eps"].shape == (len(SITES), 13)
