"""Base plus correction: one equation (formula), a traceable form of it, and faster ways to compute it on a CPU.

- ``formula`` is the equation as operations that autograd, compilers, transforms and every device understand.
- ``native`` computes it in one pass each way, compiled from C on the user's machine.
- ``eager`` computes it by torch's operations, in place and by parts, where there is no compiler.
- ``layouts`` knows which tensors can be corrected at all, and the values inside nested ones.
- ``rounds`` has what an update round asks of all samples, compiled with it.
- ``fused`` chooses, and joins the backward of base and correction, so that the input alone is kept.
"""

from eafo_dynamic.kernels.formula import (
    MAX_U,
    bell,
    correction,
    correction_of,
    correction_value,
    ghat_closed_form,
    ghat_table,
)
from eafo_dynamic.kernels.fused import (
    BACKENDS,
    Backend,
    check_backend,
    corrected,
    corrected_,
    resolve_backend,
    round_kernel,
)
from eafo_dynamic.kernels.known import Known, known_function, known_module
from eafo_dynamic.kernels.layouts import corrected_nested, describe, is_correctable, per_channel, size_of, values_of
from eafo_dynamic.kernels.rounds import RoundKernel, Smoothed
from eafo_dynamic.kernels.terms import Terms

__all__ = [
    "BACKENDS",
    "MAX_U",
    "Backend",
    "Known",
    "RoundKernel",
    "Smoothed",
    "Terms",
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
    "per_channel",
    "resolve_backend",
    "round_kernel",
    "size_of",
    "values_of",
]
