"""What the corrections cost on this machine, beside what one would use otherwise.

Every number is a ratio of two things measured in alternation in one run, as the median over pairs, so that whatever
else the machine does meets both alike.
"""

from eafo_dynamic.experiments.benchmark.cases import GROUPS, run_benchmark
from eafo_dynamic.experiments.benchmark.timing import TimeRatio, time_in_pairs

__all__ = ["GROUPS", "TimeRatio", "run_benchmark", "time_in_pairs"]
