"""The HTML report: self-contained, safe against hostile names, and seen in a browser where there is one."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import AVAILABLE, Browser, browser
from fabricate import SITES, fabricate_run

from eafo_dynamic.errors import ConfigError
from eafo_dynamic.records import COLUMNS, CorrectionLog, LogWriter
from eafo_dynamic.records.report import render_report, write_report
from eafo_dynamic.records.report.data import payload
from eafo_dynamic.records.summary import changed_most

RIGHT, DOWN, HOME, END = "\ue014", "\ue015", "\ue011", "\ue010"
HOSTILE = '</script><img src=x onerror=alert(1)> @@DATA@@ & "quoted" \''


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> list[CorrectionLog]:
    folder = tmp_path_factory.mktemp("runs")
    first = fabricate_run(folder / "run a", updates=40)
    second = fabricate_run(folder / "run b", updates=30, policy="learned", seed=1)
    return [CorrectionLog.load(first), CorrectionLog.load(second)]


class Page(HTMLParser):
    """Collects the page's elements, and complains about tags that do not match."""

    VOID = ("meta", "link", "input", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def assert_loads_nothing(text: str) -> None:
    page = Page(text)
    for _, attributes in page.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), value
    assert "@import" not in text
    assert "url(" not in text
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg"}


def embedded(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    return json.loads(found[1])


def test_page_is_whole_and_loads_nothing(logs: list[CorrectionLog]) -> None:
    text = render_report(logs)
    page = Page(text)
    assert page.open == []
    assert "@@" not in text
    assert_loads_nothing(text)
    policy = next(entry["content"] for entry in page.all("meta") if entry.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert all(entry.get("lang") == "en" for entry in page.all("html"))


def test_page_is_small(logs: list[CorrectionLog], tmp_path: Path) -> None:
    assert len(render_report(logs)) < 500_000
    sites = [(f"model.layers.{k}.mlp.act_fn", "silu") for k in range(400)]
    large = CorrectionLog.load(fabricate_run(tmp_path, updates=40, sites=sites))
    assert len(render_report([large])) < 4_000_000


def test_tables_are_there_without_scripts(logs: list[CorrectionLog]) -> None:
    text = render_report(logs)
    page = Page(text)
    assert len(page.all("table")) == 3 + 4 * 2, (
        "runs, their settings and sites compared; changes, layers, events and settings of each run"
    )
    assert "options: update_every_n_steps" in page.text["th"]
    for site, _ in SITES:
        assert site in page.text["button"]
    assert "eps held at max_eps" in page.text["td"]
    for column in COLUMNS.values():
        assert column.meaning in page.text["dd"]


def test_values_are_those_of_the_log(logs: list[CorrectionLog]) -> None:
    found = embedded(render_report(logs))
    for run, log in zip(found["runs"], logs, strict=True):
        assert run["sites"] == log.sites
        assert run["steps"] == log.steps
        for name, lines in run["series"].items():
            for site, line in zip(log.sites, lines, strict=True):
                assert line == pytest.approx(log.series(site, name), rel=1e-4), name
        for place, film in run["snapshots"].items():
            shapes = log.shapes(log.sites[int(place)])
            assert [shot["step"] for shot in film] == [shape["step"] for shape in shapes]
            assert film[-1]["function"] == pytest.approx(shapes[-1]["function"], rel=1e-4)


def test_long_logs_are_thinned_with_first_and_last(tmp_path: Path) -> None:
    sites = [(f"layers.{k}.act", "gelu") for k in range(200)]
    log = CorrectionLog.load(fabricate_run(tmp_path, updates=150, sites=sites))
    found = payload([log])["runs"][0]
    assert (found["steps"][0], found["steps"][-1]) == (log.steps[0], log.steps[-1])
    assert found["updates"] == 150 > len(found["steps"])
    assert set(found["steps"]) <= set(log.steps)
    assert found["series"]["eps"][7][-1] == pytest.approx(log.series("layers.7.act", "eps")[-1], rel=1e-4)
    assert len(json.dumps(found)) < 4_000_000


def test_what_changed_most_names_site_and_values(logs: list[CorrectionLog]) -> None:
    rows = {row["quantity"]: row for row in changed_most(logs[0])}
    assert list(rows) == ["entropy", "eps", "mean", "std", "kurtosis", "atom_mass", "dead_fraction"]
    for quantity, row in rows.items():
        courses = {site: logs[0].series(site, quantity) for site in logs[0].sites}
        changes = {site: values[-1] - values[0] for site, values in courses.items()}
        assert abs(row["change"]) == max(map(abs, changes.values()))
        assert (row["first"], row["last"]) == (courses[row["site"]][0], courses[row["site"]][-1])
    assert changed_most(logs[0].select(steps=(50, 50))) == []


def test_settings_are_words_and_differences_are_shown(tmp_path: Path) -> None:
    options = {"per_channel": False, "filter_fn": None, "target_modules": ["a", "b"], "policy": {"x*": "frozen"}}
    for name, density in (("a", "gaussian"), ("b", "histogram")):
        manifest = {
            "model": "Classifier",
            "run": {"name": "digits", "data": "DigitsData"},
            "options": {**options, "density": density},
        }
        LogWriter(tmp_path / name / "eafo", manifest).write([{"step": 1, "site": "s", "entropy": 1.0}])
    runs = [CorrectionLog.load(tmp_path / name) for name in "ab"]
    text = render_report(runs[:1])
    for name, value in [
        ("options: per_channel", "no"),
        ("options: filter_fn", "-"),
        ("options: target_modules", "a, b"),
        ("options: policy", "x*: frozen"),
    ]:
        assert f'<th scope="row">{name}</th><td>{value}</td>' in text
    for fact in ("<dt>Task</dt><dd>Classifier</dd>", "<dt>Data</dt><dd>DigitsData</dd>", "<dt>Begun</dt>"):
        assert fact in text
    compared = render_report(runs)
    compared = compared[compared.index("Settings in which the runs differ") :]
    compared = compared[: compared.index("</table>")]
    assert "<td>options: density</td><td>gaussian</td><td>histogram</td>" in compared
    assert "options: per_channel" not in compared


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "eafo", {"sites": [{"name": HOSTILE, "base": HOSTILE}], "note": HOSTILE})
    writer.write([{"step": 1, "site": HOSTILE, "entropy": 1.0, "policy": HOSTILE, "event": HOSTILE}])
    text = render_report([CorrectionLog.load(tmp_path)])
    page = Page(text)
    assert page.all("img") == []
    assert len(page.all("script")) == 2
    assert embedded(text)["runs"][0]["sites"] == [HOSTILE]
    assert HOSTILE in page.text["button"]


def test_file_that_cannot_be_written(logs: list[CorrectionLog], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--out="):
        write_report(logs, tmp_path / "no" / "folder" / "report.html")


def test_report_command(logs: list[CorrectionLog], tmp_path: Path) -> None:
    code = (
        "import argparse, sys; from eafo_dynamic.cli import log; parser = argparse.ArgumentParser();"
        "log.register(parser.add_subparsers()); args = parser.parse_args(); sys.exit(args.run(args))"
    )
    out = tmp_path / "ein Bericht.html"
    runs = [str(log.path.parent) for log in logs]
    command = [sys.executable, "-c", code, "log", "report", *runs, "--site", "blocks", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    assert embedded(out.read_text(encoding="utf-8"))["runs"][1]["sites"] == [name for name, _ in SITES[:4]]


# --- in a browser

needs_browser = pytest.mark.skipif(not AVAILABLE, reason="needs chromium and chromedriver")


@pytest.fixture(scope="module", params=[1280, 390])
def window(
    request: pytest.FixtureRequest, logs: list[CorrectionLog], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Browser]:
    page = write_report(logs, tmp_path_factory.mktemp("page") / "report.html")
    with browser(request.param) as opened:
        opened.open(page)
        yield opened


@pytest.fixture
def fresh(window: Browser) -> Iterator[Browser]:
    """Gives the page as it is when opened, and checks that nothing complained in the end."""
    window.call("/refresh", {})
    window.errors()
    yield window
    assert window.errors() == []


def text_of(window: Browser, selector: str) -> str:
    return window.run(f"return document.querySelector({selector!r}).textContent")


def column_of(window: Browser, number: int) -> list[str]:
    rows = "[...document.querySelectorAll(\"#layers ~ .of-run[data-run='0'] tbody tr\")]"
    return window.run(f"return {rows}.filter(row => !row.hidden).map(row => row.cells[{number}].textContent)")


@needs_browser
def test_page_fits_its_width_and_asks_for_nothing(fresh: Browser) -> None:
    assert fresh.run("return document.documentElement.scrollWidth <= innerWidth")
    requests = "performance.getEntriesByType('resource').map(entry => entry.name)"
    assert fresh.run(f"return {requests}.filter(name => !name.startsWith('data:'))") == []


@needs_browser
def test_every_chart_is_drawn_and_named(fresh: Browser) -> None:
    charts = fresh.run(
        "return [...document.querySelectorAll('.chart')]"
        ".map(box => [box.id, box.querySelectorAll('svg *').length,"
        " box.querySelector('svg[role=img]')?.getAttribute('aria-label') || ''])"
    )
    assert len(charts) == 11 + len(SITES)
    for name, marks, label in charts:
        assert marks > 10, name
        assert label, name


@needs_browser
def test_no_text_of_a_chart_is_cut_off(fresh: Browser) -> None:
    script = """
        const cut = [];
        for (const svg of document.querySelectorAll('.chart svg')) {
          const box = svg.getBoundingClientRect();
          for (const text of svg.querySelectorAll('text')) {
            const own = text.getBoundingClientRect();
            if (own.left < box.left - 1 || own.right > box.right + 1) cut.push(text.textContent);
          }
        }
        return cut"""
    assert fresh.run(script) == []


@needs_browser
def test_controls_have_names_and_tables_captions(fresh: Browser) -> None:
    nameless = """return [...document.querySelectorAll('input, select, button')].filter(node =>
        !node.textContent.trim() && !node.labels?.length && !node.ariaLabel).map(node => node.outerHTML)"""
    assert fresh.run(nameless) == []
    assert fresh.run("return [...document.querySelectorAll('table')].every(table => table.caption.textContent)")
    levels = fresh.run("return [...document.querySelectorAll('h1,h2,h3')].map(heading => heading.tagName)")
    assert levels[0] == "H1"
    assert set(levels[1:]) == {"H2"}


@needs_browser
def test_heading_sorts_both_ways(fresh: Browser) -> None:
    names = column_of(fresh, 0)
    head = "document.querySelector(\"#layers ~ .of-run[data-run='0'] thead th:nth-child(3) button\")"
    for order in ("descending", "ascending"):
        fresh.run(f"{head}.click()")
        assert fresh.run("return document.querySelector('th[aria-sort]').ariaSort") == order
        numbers = [float(text.replace("\u2212", "-")) for text in column_of(fresh, 2)]
        assert numbers == sorted(numbers, reverse=order == "descending")
    assert sorted(column_of(fresh, 0)) == sorted(names)


def put(window: Browser, control: str, value: object, event: str) -> None:
    """Sets a control as a user does."""
    window.run(
        f"const node = document.getElementById({control!r}); node.focus(); node.value = {value!r};"
        f"node.dispatchEvent(new Event({event!r}))"
    )


@needs_browser
def test_filter_leaves_the_sites_that_match(fresh: Browser) -> None:
    put(fresh, "filter", "HEAD", "input")
    assert column_of(fresh, 0) == ["head.act"]
    assert text_of(fresh, "#found") == "1 of 5 sites"


@needs_browser
def test_site_in_the_table_opens_its_film(fresh: Browser) -> None:
    fresh.run("[...document.querySelectorAll('button.site')].find(node => node.textContent === 'head.act').click()")
    assert text_of(fresh, "#readout").startswith("head.act, ")
    label = "document.querySelector('#function svg').getAttribute('aria-label')"
    assert fresh.run(f"return {label}") == "Function of head.act at step 2000"
    assert fresh.run("return document.activeElement.id") == "site"


@needs_browser
def test_slider_plays_the_film(fresh: Browser) -> None:
    curve = "document.querySelector('#correction path[stroke=\"var(--line-0)\"]').getAttribute('d')"
    last = fresh.run(f"return {curve}")
    put(fresh, "snapshot", 0, "input")
    assert text_of(fresh, "#snapshot-step") == "50 (1 of 7)"
    assert fresh.run(f"return {curve}") != last
    fresh.press(RIGHT)
    assert text_of(fresh, "#snapshot-step") == "100 (2 of 7)"
    spoken = "document.getElementById('snapshot').getAttribute('aria-valuetext')"
    assert fresh.run(f"return {spoken}") == "step 100"
    fresh.run("document.getElementById('play').click()")
    assert text_of(fresh, "#play") == "Pause"
    moved = "document.getElementById('snapshot').value > 1"
    assert fresh.run(f"return new Promise(done => setTimeout(() => done({moved}), 900))")


CELL = "document.querySelector('#multiples [aria-label=\"Open head.act\"]')"
ITS_LABEL = f"return {CELL}.querySelector('svg').getAttribute('aria-label')"


@needs_browser
def test_one_slider_moves_the_functions_of_all_sites(fresh: Browser) -> None:
    assert fresh.run("return document.querySelectorAll('#multiples .cell').length") == len(SITES)
    curves = "return [...document.querySelectorAll('#multiples path')].map(path => path.getAttribute('d'))"
    last = fresh.run(curves)
    put(fresh, "frame", 0, "input")
    assert text_of(fresh, "#frame-step") == "50 (1 of 8)", "steps of both runs"
    assert text_of(fresh, "#snapshot-step") == "50 (1 of 7)"
    assert fresh.run(ITS_LABEL) == "Function of head.act at step 50"
    assert fresh.run(curves) != last
    fresh.press(RIGHT)
    assert fresh.run(ITS_LABEL) == "Function of head.act at step 100"
    put(fresh, "shown", "correction", "change")
    assert fresh.run(ITS_LABEL) == "Correction of head.act at step 100"
    put(fresh, "shown", "density", "change")
    assert fresh.run(f"return {CELL}.querySelectorAll('rect').length") == 16, "bars of the chosen run"
    fresh.run(f"{CELL}.click()")
    assert fresh.run("return document.getElementById('site').selectedOptions[0].text") == "head.act"


@needs_browser
def test_functions_of_all_runs_are_drawn_in_their_colours(fresh: Browser) -> None:
    colours = f"return [...{CELL}.querySelectorAll('path')].map(path => path.getAttribute('stroke'))"
    assert fresh.run(colours) == ["var(--line-1)", "var(--line-0)", "var(--ink)"]
    assert text_of(fresh, "#multiples-key") == "● run a● run b"


@needs_browser
def test_readers_who_want_no_motion_get_single_steps(fresh: Browser) -> None:
    put(fresh, "frame", 0, "input")
    fresh.want_no_motion(True)
    assert text_of(fresh, "#play") == "Next"
    fresh.run("document.getElementById('play').click()")
    assert text_of(fresh, "#frame-step") == "100 (2 of 8)"
    moved = "document.getElementById('frame').value > 1"
    assert not fresh.run(f"return new Promise(done => setTimeout(() => done({moved}), 900))")
    fresh.want_no_motion(False)
    assert text_of(fresh, "#play") == "Play"


@needs_browser
@pytest.mark.parametrize("chart", ["heatmap", "lines"])
def test_keyboard_moves_over_sites_and_steps(fresh: Browser, logs: list[CorrectionLog], chart: str) -> None:
    fresh.run(f"document.getElementById('{chart}').focus()")
    assert text_of(fresh, "#readout").startswith("blocks.0.mlp.act, step 2000: entropy 0.8")
    fresh.press(HOME, DOWN, DOWN, RIGHT)
    value = logs[0].series("blocks.2.mlp.act", "entropy")[1]
    assert text_of(fresh, "#readout") == f"blocks.2.mlp.act, step 100: entropy {value:.4g} nats"
    assert fresh.run("return document.getElementById('site').selectedOptions[0].text") == "blocks.2.mlp.act"
    assert text_of(fresh, "#snapshot-step") == "100 (2 of 7)"
    fresh.press(END)
    assert "step 2000" in text_of(fresh, "#readout")


@needs_browser
def test_pointer_shows_the_value_under_it(fresh: Browser, logs: list[CorrectionLog]) -> None:
    move = """
        const svg = document.querySelector('#heatmap svg');
        const image = svg.querySelector('image').getBoundingClientRect();
        const at = {clientX: image.left + 2, clientY: image.bottom - 2};
        svg.dispatchEvent(new PointerEvent('pointermove', at));
        return document.getElementById('tip').textContent"""
    value = logs[0].series("head.act", "entropy")[0]
    assert fresh.run(move) == f"head.act, step 50: entropy {value:.4g} nats"


@needs_browser
def test_column_and_run_are_chosen(fresh: Browser, logs: list[CorrectionLog]) -> None:
    put(fresh, "column", "eps", "change")
    assert ": eps " in text_of(fresh, "#readout")
    put(fresh, "run", 1, "change")
    value = f"{logs[1].series('blocks.0.mlp.act', 'eps')[-1]:.4g}".replace("-", "\u2212")
    assert text_of(fresh, "#readout") == f"blocks.0.mlp.act, step 1500: eps {value}"
    parts = "[...document.querySelectorAll('.of-run')].filter(part => !part.hidden)"
    assert set(fresh.run(f"return {parts}.map(part => part.dataset.run)")) == {"1"}


@needs_browser
def test_screenshot_shows_the_charts(fresh: Browser, tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    picture = pil.open(io.BytesIO(fresh.screenshot(tmp_path / "page.png"))).convert("RGB")
    seen = np.array([colour for _, colour in picture.getcolors(1 << 24)])
    scale = fresh.run("return [0, 0.5, 1].map(place => shade(place, false))")
    lines = [bytes.fromhex(colour) for colour in ("0072b2", "d55e00", "009e73", "cc79a7", "e69f00")]
    for colour in [*scale, *map(list, lines)]:
        # Thin lines are mixed with the ground.
        assert np.abs(seen - colour).sum(1).min() < 60, colour


CONTRAST = """
    const part = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const light = text => {
      const [red, green, blue] = text.match(/[\\d.]+/g).map(value => part(value / 255));
      return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const ground = light(getComputedStyle(document.body).backgroundColor);
    const nodes = document.querySelectorAll('h1, p, dt, dd, td, th button, a, figcaption, text');
    return Math.min(...[...nodes].map(node => {
      const style = getComputedStyle(node), ink = light(node.tagName === 'text' ? style.fill : style.color);
      return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
    }))"""


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable(logs: list[CorrectionLog], tmp_path: Path, dark: bool) -> None:
    page = write_report(logs, tmp_path / "report.html")
    with browser(1280, dark=dark) as window:
        window.open(page)
        assert window.run("return isDark()") == dark
        assert window.run(CONTRAST) >= 4.5
        assert window.errors() == []


@needs_browser
def test_strange_logs_in_a_browser(tmp_path: Path) -> None:
    hostile = LogWriter(tmp_path / "a" / "eafo", {"sites": [{"name": HOSTILE, "base": HOSTILE}]})
    for step in (1, 2):
        hostile.write([{"step": step, "site": HOSTILE, "entropy": step, "eps": 0.1, "event": HOSTILE}])
    plain = LogWriter(tmp_path / "b" / "eafo", {})
    plain.write([{"step": 1, "site": "s", "eps": math.nan}])
    bare = {"site": "s", "z": [0.0, 1.0], "base": [0.0, 1.0], "function": [0.0, math.nan]}
    plain.write_shapes(1, [bare])
    plain.write_shapes(2, [{**bare, "edges": [1.0, 1.0], "counts": [3]}])
    logs = [CorrectionLog.load(tmp_path / name) for name in "ab"]
    page = write_report(logs, tmp_path / "report.html")
    with browser(1280) as window:
        window.open(page)
        assert text_of(window, "#readout") == f"{HOSTILE}, step 2: entropy 2 nats"
        put(window, "run", 1, "change")
        assert text_of(window, "#readout") == "s, step 1: entropy \u2013 nats"
        put(window, "shown", "density", "change")
        put(window, "frame", 0, "input")
        assert window.run("return document.querySelector('.cell').hidden"), "no density, no bar of any width"
        assert window.run("return document.images.length") == 0
        assert window.errors() == []
