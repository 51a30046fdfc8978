"""``merge``: a wrapped model without the plugin, and with the functions that it has learned."""

from __future__ import annotations

from typing import Any

from torch import nn

from eafo_dynamic.apply.merge.baking import apply_plan, plan_of
from eafo_dynamic.apply.merge.files import keep_functions
from eafo_dynamic.apply.merge.graph import graph_of
from eafo_dynamic.apply.surgery import is_wrapped, unwrap
from eafo_dynamic.errors import SiteError

__all__ = ["merge"]


def merge(model: nn.Module, *example_args: Any, **example_kwargs: Any) -> nn.Module:
    """Bakes the corrections into a model: it computes what it computed, and nothing of the plugin is left to train.

    What takes a corrected activation's place depends on how it is called:

    - *A module* whose calls all have the same correction: a ``CorrectedActivation`` in its place, eps a buffer.
    - *A module that one forward calls several times*, with different corrections: a ``CorrectedCalls`` in its place,
      with a function for each call. Forward hooks of the module around the calls count them, so call that module, not
      its ``forward``.
    - *The function that a transformer layer of torch holds* as its ``activation``: the same, as a module.
    - *A function called in somebody's own code*, ``F.relu(x)``, ``x.relu()`` or a written-out product: no module in
      place can express it. With an example the whole model becomes a ``MergedGraph``, by ``torch.export``, for the mode
      that the model is in; sizes are free where the model allows. Without an example it is an error.

    A site with eps = 0 leaves the plain activation behind. Unless a graph is needed the model is changed in place:
    classes, names and keys of everything else stay, training and evaluation both work, and the result can be copied,
    pickled, compiled, traced, exported and, but for a ``CorrectedCalls``, scripted. A graph shares the weights of the
    model, which stays wrapped; it can be traced, not scripted.

    Args:
        model: a wrapped model; one that is not stays as it is.
        *example_args: example input, needed for functional calls only.
        **example_kwargs: example input.

    Returns:
        The merged model: the very object, or a ``MergedGraph``. Corrections on the CPU agree to the last bit where the
        same kernel computes them; a graph has torch's operations instead of the compiled ones, and differs by rounding.

    Raises:
        SiteError: for functional calls without an example, or if torch cannot export the model, which is then as it
            was.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> _ = wrap(net, eps_init=0.3)
        >>> x = torch.ones(3, 2)
        >>> learned = net(x)
        >>> torch.equal(merge(net)(x), learned)
        True
        >>> net[1]
        CorrectedActivation(...
    """
    if not is_wrapped(model):
        return model
    plan = plan_of(model)
    if not plan.calls:
        unwrap(model)
        apply_plan(model, plan)
        keep_functions(model)
        return model
    if not example_args and not example_kwargs:
        shown = ", ".join(plan.calls[:6]) + (f" and {len(plan.calls) - 6} more" if len(plan.calls) > 6 else "")
        raise SiteError(
            f"{shown}: a function that the code of a forward calls cannot be replaced in place. Give merge an example "
            "input, merge(model, x), to get the model as a graph, or call a module there (self.act = nn.ReLU())."
        )
    return graph_of(model, example_args, example_kwargs)
