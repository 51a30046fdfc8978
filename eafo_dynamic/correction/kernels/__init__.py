"""Base plus correction: one equation (formula), a traceable form of it, and faster ways to compute it.

- ``directions`` are the terms: what each adds to the base, per unit of its amplitude.
- ``formula`` is the equation as operations that autograd, compilers, transforms and every device understand.
- ``terms`` are its operands, and the layouts of tensors that the back ends take; ``known`` has the bases.
- ``compiled`` builds the C code on the user's machine and loads it; ``keeping`` keeps what is built on disk.
- ``native`` computes activations on a CPU with it, in one pass forward and one backward.
- ``rounds`` computes with it what an update round needs to know of all samples.
- ``gpu`` computes activations on CUDA devices, with the Triton code of ``triton_code``; ``gpu_check`` compares that
  with the formula before it is used.
- ``eager`` computes activations with torch's operations, in place and part by part, where there is no compiler.
- ``choice`` knows the back ends by name, and which of them a device gets.
- ``fused`` joins base and correction in one autograd function that keeps only the input for its backward.
- ``node`` is the same function in C++ for small tensors, which it builds in the background for the next process.
- ``layouts`` says which tensors can be corrected at all, and finds the values inside nested ones.
"""

from eafo_dynamic.correction.kernels.choice import (
    BACKENDS,
    Backend,
    check_backend,
    prepare,
    resolve_backend,
    round_kernel,
)
from eafo_dynamic.correction.kernels.directions import (
    BASE_TERM,
    EPS,
    GAIN,
    LIFT,
    MAX_U,
    SLOPE,
    TERMS,
    Term,
    bell,
    finite,
    ghat_closed_form,
    in_order,
)
from eafo_dynamic.correction.kernels.formula import correction, correction_of, correction_value, ghat_table
from eafo_dynamic.correction.kernels.fused import corrected, corrected_
from eafo_dynamic.correction.kernels.known import Known, known_base, known_function, known_module, known_pointwise
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
    "BASE_TERM",
    "EPS",
    "GAIN",
    "LIFT",
    "MAX_U",
    "SLOPE",
    "TERMS",
    "Backend",
    "Known",
    "RoundKernel",
    "RoundOperands",
    "Smoothed",
    "Term",
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
    "finite",
    "ghat_closed_form",
    "ghat_table",
    "in_order",
    "is_correctable",
    "known_base",
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
