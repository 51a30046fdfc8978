"""Language modelling of bytes: the source code of Python's standard library, and a GPT for it."""

from eafo_dynamic.experiments.text.gpt import GPT
from eafo_dynamic.experiments.text.stdlib import StdlibText

__all__ = ["GPT", "StdlibText"]
