"""Bakes the corrections of a model into plain modules, or into a graph, for deployment.

- ``baking``: the plan, and what modules become in their place.
- ``calls``: a module with a function of its own for each call.
- ``graph``: a model whose own code calls activations as functions, as the graph that torch.export makes of it.
- ``merging``: ``merge``, which chooses.
- ``files``: merged models on disk.
"""

from eafo_dynamic.apply.merge.baking import Baked, MergePlan, plan_of
from eafo_dynamic.apply.merge.calls import CallCounter, CorrectedCalls
from eafo_dynamic.apply.merge.files import load_merged, save_merged
from eafo_dynamic.apply.merge.graph import MergedGraph
from eafo_dynamic.apply.merge.merging import merge

__all__ = [
    "Baked",
    "CallCounter",
    "CorrectedCalls",
    "MergePlan",
    "MergedGraph",
    "load_merged",
    "merge",
    "plan_of",
    "save_merged",
]
