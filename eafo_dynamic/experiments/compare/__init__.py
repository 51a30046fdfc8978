"""Arms times seeds on one task: plans in YAML, cells that can be resumed, paired statistics."""

from eafo_dynamic.experiments.compare.plan import Arm, Plan, read_plan

__all__ = ["Arm", "Plan", "read_plan"]
