"""Which expressions of a run are activations by their behaviour: ``torch.where(x > 0, x, 0.1 * x)``, ``torch.sin(x)``.

The candidates are pointwise expressions of one tensor. Those inside a larger one are none, nor are those of data: a
clamp of coordinates, the sine of a position.
"""

from __future__ import annotations

from typing import Any

from eafo_dynamic.find.trace import Call, Trace
from eafo_dynamic.find.written import acts

__all__ = ["keep_expressions"]

_DATA = "its argument comes out of no layer"
_ALSO_INSIDE = "written out both alone and inside a larger expression, so its calls cannot be told apart"


def keep_expressions(trace: Trace) -> None:
    """Keeps the candidates of a trace that behave like activations; only hidden ones are corrected, see ``roles``.

    Args:
        trace: what the run wrote down, candidates with the roles ``open``, ``data`` and ``inner``.
    """
    inner = {_key(call) for call in trace.calls if call.role == "inner"}
    learned = {_key(call) for call in trace.calls if call.role == "open" and _acts(call)}
    kept: list[Call] = []
    for call in trace.calls:
        if call.role not in ("open", "data", "inner"):
            kept.append(call)
        elif call.role != "inner" and _key(call) in learned:
            call.guessed = True
            if call.role == "data":
                call.role = "unknown"
                call.reason = _DATA
            else:
                call.role = "hidden"
                call.reason = ""
            if _key(call) in inner:
                call.refusal = _ALSO_INSIDE
            kept.append(call)
    trace.calls[:] = kept


def _key(call: Call) -> tuple[str, object]:
    return call.module, call.parameters.get("expression")


def _acts(call: Call) -> bool:
    parameters: Any = call.parameters
    return acts(parameters["expression"], parameters["constants"])
