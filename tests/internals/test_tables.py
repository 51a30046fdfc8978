"""Tables for notebooks and terminals."""

from __future__ import annotations

import pytest
from torch import nn

from eafo_dynamic import EAFOController, find_sites
from eafo_dynamic.errors import LogError
from eafo_dynamic.internals.tables import as_html, as_table, as_text, clipped
from eafo_dynamic.records.notebook import History


def test_cells_are_escaped_and_short() -> None:
    html = as_html([{"site": "<b>", "eps": 0.123456}, {"site": None, "eps": 1.0}], "a & b")
    assert "<td>&lt;b&gt;</td><td>0.1235</td>" in html and "a &amp; b" in html and "<td></td>" in html


def test_long_names_are_cut_from_the_left_unless_they_would_be_alike() -> None:
    assert clipped(["encoder.layer.11.act", "act"], 10) == ["…er.11.act", "act"]
    assert clipped(["a.encoder.act", "b.encoder.act"], 8) == ["a.encoder.act", "b.encoder.act"]


def test_a_table_is_text_at_the_prompt() -> None:
    assert "0.5" in as_text(as_table([{"eps": 0.5}], "one row"))


def test_what_a_notebook_shows() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    report = find_sites(net)
    assert "<td>relu</td>" in report._repr_html_() and repr(report) == str(report)
    controller = EAFOController.attach(net)
    assert repr(controller) == "EAFOController of Sequential: 1 sites, learned, 0 rounds"
    assert "sigma=1.000" in controller._repr_html_() and "sigma=1.000" in repr(controller.sites)
    for empty in (controller, History()):
        with pytest.raises(LogError, match="no rows yet"):
            empty.plot()
