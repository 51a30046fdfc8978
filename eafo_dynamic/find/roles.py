"""What each activation call is for, decided from what becomes of its result.

====== =================================================================================================
hidden  its result goes into a layer with weights; or nothing is known that speaks against it
gate    it lies between 0 and 1 and multiplies something else
range   a root, a logarithm, a division or a distribution needs its values, or it is the model's output
loss    the loss is made of it, with no layer in between
unknown none of these can be told
====== =================================================================================================

Only hidden activations are corrected by default.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from eafo_dynamic.correction.bases import Base, as_base
from eafo_dynamic.find.functional import function_base
from eafo_dynamic.find.lineage import Affine, Lineage, Uses, learns
from eafo_dynamic.find.trace import Call, Trace
from eafo_dynamic.find.wrapped import plain_view

__all__ = ["assign_roles", "is_rectifier"]

_LOSS = "part of a loss: no layer comes after it"
_FAR = 1e4
_MOST_COLOURS = 4  # red, green, blue and opacity


def is_rectifier(base: Base) -> bool:
    """Whether a function passes what is positive and holds back what is negative, as ReLU, GELU, SiLU or ELU.

    Such a function hardly ever makes a scale, a probability or an output, so it can be taken for a hidden activation
    without seeing what becomes of its result. Softplus is none: it is 0.69 at 0.

    Args:
        base: any.

    Returns:
        Whether f(0) = 0, f(50) is at least 5, and f(-50) is at most half of that in size.
    """
    z = torch.tensor([-50.0, 0.0, 50.0], dtype=torch.float64, device="cpu")
    with torch.no_grad():
        below, middle, above = base(z).tolist()
    return abs(middle) < 1e-6 and above >= 5.0 and abs(below) <= 0.5 * above


def assign_roles(trace: Trace, lineage: Lineage, model: nn.Module) -> None:
    """Gives each hidden call of a run its role, with the reason.

    Args:
        trace: what the run wrote down; the roles in it change.
        lineage: what became of the results.
        model: what ran, or rather what the run had a copy of.
    """
    learn = {name for name, module in model.named_modules() if learns(module)}
    losses = lineage.losses()
    for call, name in lineage.replacements().items():
        lineage.of(call).replaces = name
    for call in trace.calls:
        if call.role != "hidden":
            continue
        stepped = any(frame.instance and not frame.is_forward for frame in call.path)
        within = call.in_method or any(frame.is_forward and frame.module in learn for frame in call.path)
        uses = lineage.of(call)
        if uses.needs:
            call.role = "range"
            call.reason = f"its result goes into {uses.needs}, which needs its range"
            continue
        summed = uses.summed and not uses.layer
        if call in losses and (summed or (stepped and not within)):
            call.role = "loss"
            call.reason = _LOSS
            continue
        image = _Image(_base_of(call, model))
        call.role, call.reason = _role(call, uses, image)
        if call.role != "hidden" or not call.guessed:
            continue
        if not uses.layer:
            call.role = "unknown"
            call.reason = "looks like an activation, but no layer is seen to take its result"
        elif uses.asks:
            call.role = "unknown"
            call.reason = f"looks like an activation, but its result goes into {uses.asks} too"


def _role(call: Call, uses: Uses, image: _Image) -> tuple[str, str]:
    if any(image.is_unit(each) for each in uses.affine):
        return "gate", "a gate, not a hidden activation: scaled to values from 0 to 1"
    if any(image.is_positive_and_bounded(each) for each in uses.factor):
        return "gate", "a gate, not a hidden activation: bounded, and multiplies something else"
    if any(image.is_lifted(each) for each in uses.affine):
        return "range", "shifted so that it is never negative"
    if uses.replaces and image.bounded:
        return "range", f"output of a model: {uses.replaces} takes it where it takes data too"
    if uses.layer:
        return "hidden", ""
    if uses.asks:
        return "range", f"its result goes into {uses.asks}, and into no layer"
    if uses.compared:
        return "range", "output of the model: a loss compares it with data"
    if uses.returned and image.limited and ((uses.alone and image.is_squashing) or _is_head(uses)):
        return "range", "output of the model: it limits what comes out of the last layer"
    return "hidden", ""


def _is_head(uses: Uses) -> bool:
    """Whether a result that the model returns is no feature: reshaped to an image, or of far fewer channels."""
    if uses.unflattened:
        return True
    if uses.width is None:
        return False
    before, after = uses.width
    return after < before and (after <= _MOST_COLOURS or 2 * after <= before)


def _base_of(call: Call, model: nn.Module) -> Base | None:
    if call.function is not None:
        return function_base(call.function, call.parameters)
    module = model.get_submodule(call.module)
    if isinstance(module, torch.jit.ScriptModule):
        return None
    return as_base(plain_view(module))


class _Image:
    """The values that a function takes.

    Args:
        base: the function; None where it cannot be asked, then nothing is known.
    """

    def __init__(self, base: Base | None) -> None:
        self.low = -math.inf
        self.high = math.inf
        self.starts_at_zero = False
        if base is not None:
            self._ask(base)

    @property
    def bounded(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def limited(self) -> bool:
        """Whether the values say what they are for: bounded, or positive as those of softplus; no rectifier."""
        return not self.starts_at_zero or self.bounded

    @property
    def is_squashing(self) -> bool:
        """Whether the values end on one side at least, and no rectifier makes them: tanh, softplus, log-sigmoid."""
        return not self.starts_at_zero and (math.isfinite(self.low) or math.isfinite(self.high))

    def is_unit(self, affine: Affine) -> bool:
        low, high = self._after(affine)
        return abs(low) < 1e-6 and abs(high - 1.0) < 1e-6

    def is_positive_and_bounded(self, affine: Affine) -> bool:
        low, high = self._after(affine)
        return abs(low) < 1e-6 and math.isfinite(high)

    def is_lifted(self, affine: Affine) -> bool:
        """Whether a function with negative values has none any more: elu + 1."""
        return affine.shift != 0.0 and self.low < 0.0 and abs(self._after(affine)[0]) < 1e-6

    def _after(self, affine: Affine) -> tuple[float, float]:
        ends = sorted(affine.scale * end + affine.shift for end in (self.low, self.high))
        return ends[0], ends[1]

    def _ask(self, base: Base) -> None:
        near = torch.linspace(-50.0, 50.0, 20001, dtype=torch.float64, device="cpu")
        far = torch.tensor([-_FAR, -1e3, 1e3, _FAR], dtype=torch.float64, device="cpu")
        with torch.no_grad():
            values = base(near)
            ends = base(far).tolist()
        self.starts_at_zero = is_rectifier(base)
        is_flat_on_the_left = abs(ends[0] - ends[1]) < 1e-2
        is_flat_on_the_right = abs(ends[2] - ends[3]) < 1e-2
        if is_flat_on_the_left or ends[0] > 0:
            self.low = float(values.min())
        if is_flat_on_the_right:
            self.high = float(values.max())
