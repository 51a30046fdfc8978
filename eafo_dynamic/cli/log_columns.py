"""The columns of the tables of `eafo-dynamic log`, and those that a narrow terminal leaves out."""

from __future__ import annotations

__all__ = [
    "COMPARE_OPTIONAL",
    "LABELS",
    "LAYERS",
    "LAYERS_OPTIONAL",
    "SHOW",
    "SHOW_OPTIONAL",
    "TABLE_ROWS",
    "TRENDS",
]

TABLE_ROWS = 40

LABELS = {
    "eps_trend": "",
    "entropy_trend": "",
    "entropy_first": "H first",
    "entropy": "H",
    "entropy_last": "H last",
    "entropy_change": "dH",
    "d_entropy_d_eps": "dH/deps",
    "atom_mass": "atoms",
    "dead_fraction": "dead",
    "delta_eps": "deps",
    "mean_eps": "mean eps",
    "mean_abs_eps": "mean |eps|",
    "last_step": "last step",
}
TRENDS = ("eps_trend", "entropy_trend")
# The columns of a table from left to right; *_OPTIONAL: those that a narrow one leaves out, the first one first.
LAYERS = [
    "site",
    "base",
    "eps",
    "eps_trend",
    "lift",
    "entropy_first",
    "entropy",
    "entropy_trend",
    "d_entropy_d_eps",
    "atom_mass",
    "dead_fraction",
    "mean",
    "std",
    "n",
    "updates",
    "policy",
    "event",
    "event_step",
]
LAYERS_OPTIONAL = [
    "event_step",
    "policy",
    "updates",
    "n",
    "std",
    "mean",
    "event",
    "dead_fraction",
    "atom_mass",
    "base",
    "d_entropy_d_eps",
    "entropy_first",
    "lift",
    "eps_trend",
    "entropy_trend",
]
SHOW = [
    "site",
    "step",
    "epoch",
    "eps",
    "delta_eps",
    "lift",
    "entropy",
    "d_entropy_d_eps",
    "atom_mass",
    "dead_fraction",
    "mean",
    "std",
    "skew",
    "kurtosis",
    "mu",
    "sigma",
    "n",
    "event",
    "fit_end",
]
SHOW_OPTIONAL = [
    "n",
    "sigma",
    "mu",
    "kurtosis",
    "skew",
    "epoch",
    "event",
    "atom_mass",
    "dead_fraction",
    "std",
    "mean",
    "lift",
]
COMPARE_OPTIONAL = ["updates", "mean_abs_eps", "last_step", "policy", "events", "sites", "entropy_first"]
