"""What the corrections cost on this machine, compared with the alternatives.

A ratio is the median over pairs of measurements, taken in alternation in one run, so that whatever else the machine
does affects both of a pair in the same way.
"""

from eafo_dynamic.experiments.benchmark.cases import GROUPS, run_benchmark
from eafo_dynamic.experiments.benchmark.timing import TimeRatio, time_in_pairs

__all__ = ["GROUPS", "TimeRatio", "run_benchmark", "time_in_pairs"]
