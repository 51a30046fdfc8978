"""Which activation, with which correction, should a model have? Candidates on a user's own task, by Optuna."""

from eafo_dynamic.experiments.search.answer import Answer, Row
from eafo_dynamic.experiments.search.candidates import Candidate, Space
from eafo_dynamic.experiments.search.searching import search

__all__ = ["Answer", "Candidate", "Row", "Space", "search"]
