"""Options: what cannot work is refused at once, by name and value; what can goes into the manifest as it is."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from eafo_dynamic.density import gaussian
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.internals.checks import flag, folder, not_negative
from eafo_dynamic.policy import Entropy, Rule
from eafo_dynamic.policy.options import Options
from eafo_dynamic.policy.schedule import Schedule
from eafo_dynamic.policy.trust_region import TrustRegion

BAD: list[tuple[str, Any]] = [
    ("policy", "greedy"),
    ("policy", []),
    ("density", "kde"),
    ("density", 3),
    ("eps_init", 1.1),
    ("eps_init", math.nan),
    ("max_eps", 0.0),
    ("max_delta", -1.0),
    ("update_every_n_steps", 0),
    ("update_starting_at_step", -5),
    ("freeze_at_step", -1),
    ("collect_every_n_steps", 500),
    ("samples_per_site", 15),
    ("samples_per_site", 100.5),
    ("momentum", 0.0),
    ("momentum", 1.1),
    ("momentum", math.nan),
    ("momentum", "half"),
    ("resolution", 0.0005),
    ("resolution", 1.5),
    ("rollback_factor", 1.0),
    ("rollback_factor", math.nan),
    ("target_modules", ["ReLU", 3]),
    ("filter_fn", "ReLU"),
    ("per_channel", "yes"),
    ("per_channel", None),
    ("per_channel", 1),
]


@pytest.mark.parametrize("option, value", BAD)
def test_a_bad_option_is_named_with_its_value_and_the_mend(option: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        Options(**{option: value})
    text = str(error.value)
    assert error.value.option == option
    assert text.startswith(f"{option}={value!r}: ") and text.endswith("."), text


@pytest.mark.parametrize("option", [f.name for f in fields(Options)])
def test_no_option_takes_an_object_silently(option: str) -> None:
    with pytest.raises(ConfigError) as error:
        Options(**{option: object.__new__(_Nothing)})
    assert error.value.option == option


class _Nothing:
    """Neither a number nor a text, and not callable."""


def test_a_comparison_of_numpy_is_true_or_false() -> None:
    options = Options(per_channel=numpy.float64(1) > 0)  # pyright: ignore[reportArgumentType]
    assert options.form["per_channel"] is True  # checkpoints load Python's alone
    assert options.primitives()["per_channel"] is True
    assert Options(per_channel=numpy.bool_(False)) == Options()  # pyright: ignore[reportArgumentType]
    assert flag("per_channel", numpy.bool_(False)) is False


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: Rule("x", "nope"), "policy='nope': no such policy. Choose one of static,"),
    (lambda: Rule("x", None), "policy=None: no such policy. Choose one of static,"),  # pyright: ignore
    (lambda: Rule(3, "learned"), "sites=3: not a pattern. Give text, such as 'ReLU'."),  # pyright: ignore
    (lambda: Rule(["ReLU"], Entropy()), "sites=['ReLU']: not a pattern."),  # pyright: ignore
    (lambda: Rule("(", "learned"), "sites='(': not a valid regular expression (missing ), unterminated subpattern"),
    (lambda: Entropy(ascent="no"), "ascent='no': neither True nor False. Give one of the two."),  # pyright: ignore
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_rules_and_policies_are_checked_when_they_are_made(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        make()


@pytest.mark.parametrize("value", ["a", None, -1.0, math.inf, math.nan])
def test_what_must_not_be_negative_is_a_finite_number(value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        not_negative("lr", value, "Leave it out.")
    assert str(error.value).startswith(f"lr={value!r}: ") and str(error.value).endswith("Leave it out.")
    assert not_negative("lr", 0) == 0.0 and not_negative("lr", 0.5) == 0.5


def test_a_folder_is_a_path_or_none() -> None:
    assert folder("dirpath", "runs") == folder("dirpath", Path("runs")) == Path("runs")
    assert folder("dirpath", None) is None
    with pytest.raises(ConfigError, match=r"^dirpath=3: not a path\. Give the path of a folder, or None\.$"):
        folder("dirpath", 3)


def test_parts_are_made_of_the_options() -> None:
    options = Options(update_every_n_steps=8, update_starting_at_step=3, freeze_at_step=90, collect_every_n_steps=2)
    assert options.schedule == Schedule(8, 3, 90, 2)
    assert replace(options, max_eps=0.3, max_delta=0.2).trust_region == TrustRegion(0.3, 0.2)
    with pytest.raises(ConfigError, match="max_eps"):
        replace(options, max_eps=-1.0)


def test_only_the_gaussian_density_goes_without_tables() -> None:
    assert not Options().tabulated
    assert Options(density="histogram").tabulated
    assert Options(density=gaussian).tabulated
    form = {"tabulated": False, "per_channel": True, "terms": ("eps", "lift"), "base": None}
    assert Options(per_channel=True, terms="free").form == form


@pytest.mark.parametrize("options", [{"density": "histogram"}, {"density": gaussian}], ids=["histogram", "own density"])
def test_local_terms_need_the_closed_form(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"terms='free': eps and lift need density='gaussian'"):
        Options(terms="free", **options)
    with pytest.raises(ConfigError, match=r"terms=\['lift', 'slope'\]: lift needs density='gaussian'"):
        Options(terms=["lift", "slope"], **options)
    assert Options(terms="tails", **options).resolved_terms == ("gain", "slope")
    assert Options(terms=["slope", "tied"], **options).resolved_terms == ("tied", "slope")


LOCAL, TIED = ("eps", "lift"), ("tied",)
AUTO: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, LOCAL),
    ({"policy": "entropy"}, LOCAL),
    ({"density": "histogram"}, TIED),
    ({"policy": "static"}, TIED),
    ({"policy": [Rule("a", "learned"), Rule(".*", "static")]}, TIED),
]


@pytest.mark.parametrize(("options", "terms"), AUTO, ids=str)
def test_terms_are_local_where_they_can_be(options: dict[str, Any], terms: tuple[str, ...]) -> None:
    assert Options(**options).form["terms"] == terms
    assert Options(**options, terms="tied").form["terms"] == TIED


def test_names_of_terms() -> None:
    every = ("eps", "lift", "gain", "slope")
    assert (
        Options(terms="full").resolved_terms == Options(terms=["slope", "eps", "gain", "lift"]).resolved_terms == every
    )
    assert Options(terms="local").resolved_terms == Options(terms="free").resolved_terms == LOCAL
    assert Options(terms=("lift",)).resolved_terms == ("lift",)


WRONG_TERMS: list[tuple[Any, str]] = [
    ("loose", "terms='loose': unknown. Choose one of auto, full, local, tails, tied, free, or a list of terms."),
    (["eps", "bend"], "terms='bend': unknown. Give a list of tied, eps, lift, gain, slope."),
    ([], "terms=[]: neither a name nor a list of terms. Give a list of tied, eps, lift, gain, slope."),
    (3, "terms=3: neither a name nor a list of terms. Give a list of tied, eps, lift, gain, slope."),
    (["eps", "eps"], "terms=['eps', 'eps']: a term stands there twice. Give a list of tied, eps, lift, gain, slope."),
    (
        ["tied", "lift"],
        "terms=['tied', 'lift']: tied is one amplitude for eps and lift together. Give tied, or eps and ",
    ),
]


@pytest.mark.parametrize(("terms", "message"), WRONG_TERMS, ids=str)
def test_terms_that_there_are_not_are_one_line(terms: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        Options(terms=terms)


def test_primitives_are_json_and_complete() -> None:
    options = Options(
        target_modules=["ReLU", "head.act"],
        filter_fn=lambda module, name: True,
        policy=[Rule("ReLU", Entropy(0.1)), Rule(".*", "static")],
        density=gaussian,
        max_delta=math.inf,
    )
    plain = options.primitives()
    assert list(plain) == [f.name for f in fields(Options)]
    back = json.loads(json.dumps(plain, allow_nan=False))
    assert back == plain
    assert back["target_modules"] == ["ReLU", "head.act"]
    assert "Entropy(rate=0.1" in back["policy"][0] and "'ReLU'" in back["policy"][0]
    assert back["max_delta"] == "inf" and back["freeze_at_step"] is None


def test_primitives_of_the_defaults_are_the_defaults() -> None:
    assert Options().primitives() == {f.name: f.default for f in fields(Options)}
