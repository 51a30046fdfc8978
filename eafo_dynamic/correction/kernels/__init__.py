"""Base plus correction: one equation (formula), a traceable form of it, and faster ways to compute it.

- ``formula`` is the equation as operations that autograd, compilers, transforms and every device understand.
- ``native`` computes it in one pass each way on a CPU, compiled from C on the user's machine.
- ``gpu`` computes it likewise on CUDA devices, by ``triton_code``; ``gpu_check`` holds that against the formula first.
- ``eager`` computes it by torch's operations, in place and by parts, where there is no compiler.
- ``layouts`` knows which tensors can be corrected at all, and the values inside nested ones.
- ``rounds`` has what an update round asks of all samples, compiled with it.
- ``choice`` knows the back ends by name, and which of them a device gets.
- ``fused`` joins the backward of base and correction, so that the input alone is kept.
"""

from eafo_dynamic.correction.kernels.choice import (
    BACKENDS,
    Backend,
    check_backend,
    prepare,
    resolve_backend,
    round_kernel,
)
from eafo_dynamic.correction.kernels.formula import (
    MAX_U,
    bell,
    correction,
    correction_of,
    correction_value,
    ghat_closed_form,
    ghat_table,
)
from eafo_dynamic.correction.kernels.fused import corrected, corrected_
from eafo_dynamic.correction.kernels.known import Known, known_function, known_module, known_pointwise
from eafo_dynamic.correction.kernels.layouts import (
    corrected_nested,
    describe,
    is_correctable,
    per_channel,
    size_of,
    values_of,
)
from eafo_dynamic.correction.kernels.rounds import RoundKernel, RoundOperands, Smoothed, Workspace
from eafo_dynamic.correction.kernels.terms import Terms

__all__ = [
    "BACKENDS",
    "MAX_U",
    "Backend",
    "Known",
    "RoundKernel",
    "RoundOperands",
    "Smoothed",
    "Terms",
    "Workspace",
    "bell",
    "check_backend",
    "corrected",
    "corrected_",
    "corrected_nested",
    "correction",
    "correction_of",
    "correction_value",
    "describe",
    "ghat_closed_form",
    "ghat_table",
    "is_correctable",
    "known_function",
    "known_module",
    "known_pointwise",
    "per_channel",
    "prepare",
    "resolve_backend",
    "round_kernel",
    "size_of",
    "values_of",
]
