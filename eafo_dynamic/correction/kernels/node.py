"""The autograd node in C++ of small tensors, for which a node in Python takes longer than the arithmetic.

It is built in the background, once for each version of torch and of Python, and used from the next process on: no run
waits for it, and the numbers of a run do not depend on when it was ready, since both nodes call the same compiled
functions on the same memory. Where it cannot be built, the node in Python goes on to serve.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eafo_dynamic.correction.kernels import keeping
from eafo_dynamic.correction.kernels.compiled import cache_folder
from eafo_dynamic.correction.kernels.directions import MAX_U, TERMS, code_of_terms
from eafo_dynamic.correction.kernels.known import INSIDE, Known, known_inside
from eafo_dynamic.correction.kernels.native import LARGEST_SINGLE, NativeKernel
from eafo_dynamic.correction.kernels.terms import Terms, is_dense

__all__ = ["SWITCH", "Node", "build_node", "kept_node", "node_of"]

SWITCH = "EAFO_DYNAMIC_NODE"
"""The environment variable that turns the node off with "0": it is then neither built nor used."""

_SOURCE = Path(__file__).with_name("node.cpp")
_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared")
_NO_TABLE = 1.0  # the end of a table that is not there
_FORGIVEN_AFTER = 24 * 3600.0  # [s]
_LOG = logging.getLogger("eafo_dynamic")

_Both = tuple["Tensor | None", "Tensor | None"]
Gradients = Callable[[Tensor, Terms, Known, NativeKernel, Tensor, tuple[bool, bool]], _Both]
"""The backward of the node in Python: from z, the terms, the base, the kernel, the gradient, and whether gradients by z
and by the amplitudes are needed."""


class Node:
    """The loaded node.

    Args:
        module: the extension.
        kernel: whose functions it calls.
        gradients: the backward for second derivatives, and for all that is no plain tensor in dense memory.
    """

    def __init__(self, module: Any, kernel: NativeKernel, gradients: Gradients) -> None:
        self._corrected: Callable[..., Tensor] = module.corrected
        self._kernel = kernel
        self._gradients = gradients
        self._user: int = module.attach(*kernel.addresses(), MAX_U, _NO_TABLE, self._in_python)

    @staticmethod
    def takes(z: Tensor, terms: Terms, known: Known) -> bool:
        """Whether it computes what the node in Python computes.

        Args:
            z: pre-activations for which the kernel was chosen.
            terms: likewise.
            known: the base.

        Returns:
            Whether z is float32, in memory without gaps and not large, there is one amplitude for a term and no table,
            not all amplitudes are 0, and the base is one that the kernel computes.
        """
        amplitudes, shape, table, _, _ = terms
        if known.code == 0 or table is not None or amplitudes.dim() > 1 or z.dtype != torch.float32:
            return False
        if z.numel() > LARGEST_SINGLE or not is_dense(z):
            return False
        fits = amplitudes.dtype == shape.dtype == torch.float32 and amplitudes.is_contiguous() and shape.is_contiguous()
        return fits and any(amplitudes.tolist())

    def __call__(self, z: Tensor, terms: Terms, known: Known) -> Tensor:
        """f(z), with a gradient.

        Args:
            z: pre-activations that it takes.
            terms: the other operands.
            known: the base.

        Returns:
            Of the shape and strides of z.
        """
        code = code_of_terms(terms.names)
        return self._corrected(z, terms.amplitudes, terms.shape, code, known.code, known.below, self._user)

    def _in_python(
        self,
        grad: Tensor,
        z: Tensor,
        amplitudes: Tensor,
        shape: Tensor,
        code: int,
        base: int,
        below: float,
        *needed: bool,
    ) -> _Both:
        by_z, by_amplitudes = needed
        terms = Terms(amplitudes, shape, None, _NO_TABLE, _names_of(code))
        return self._gradients(z, terms, known_inside(base, below), self._kernel, grad, (by_z, by_amplitudes))

    def is_sound(self) -> bool:
        """Whether the results are those of the node in Python; a compiler may be broken.

        Returns:
            Whether values and gradients are the same bit for bit, with every base.
        """
        z = torch.linspace(-9.0, 9.0, 301, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
        terms = Terms(z.new_tensor([0.3, -0.2, 0.15, -0.1]), z.new_tensor([0.2, 1.4]), None, _NO_TABLE, tuple(TERMS))
        return all(self._agrees(z, terms, known) for known in INSIDE)

    def _agrees(self, z: Tensor, terms: Terms, known: Known) -> bool:
        grad = torch.cos(z)
        with torch.enable_grad():
            inputs = [z.detach().requires_grad_(), terms.amplitudes.detach().requires_grad_()]
            out = self(inputs[0], terms._replace(amplitudes=inputs[1]), known)
            found = torch.autograd.grad(out, inputs, grad)
        expected = torch.empty_like(z)
        self._kernel.add(expected, z, terms, known)
        with torch.no_grad():
            gradients = self._gradients(z, terms, known, self._kernel, grad, (True, True))
        pairs = zip((out, *found), (expected, *gradients), strict=True)
        return all(other is not None and torch.equal(one, other) for one, other in pairs)


@functools.cache
def _names_of(code: int) -> tuple[str, ...]:
    return tuple(name for name, term in TERMS.items() if code & term.code)


@functools.cache
def node_of(kernel: NativeKernel, gradients: Gradients) -> Node | None:
    """The node of this process, if it was built before; else it is built in the background for later processes.

    Args:
        kernel: the compiled functions.
        gradients: see ``Node``.

    Returns:
        The node; None where it is not there.
    """
    path = _path()
    if path is None:
        return None
    node = kept_node(path, kernel, gradients)
    if node is None and not keeping.is_intact(path) and not _has_just_failed(path):
        _build_in_background(path)
    return node


def kept_node(path: Path, kernel: NativeKernel, gradients: Gradients) -> Node | None:
    """The node in a file.

    Args:
        path: of the extension.
        kernel: the compiled functions.
        gradients: see ``Node``.

    Returns:
        The node; None, where it is not there, not as it was built, cannot be loaded, or, with a warning, gives wrong
        results.
    """
    if not keeping.is_intact(path):
        return None
    loader = ExtensionFileLoader("eafo_dynamic_node", str(path))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    try:
        module = module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        _LOG.info("EAFO: the node in C++ cannot be loaded, the one in Python serves: %s", error)
        return None
    node = Node(module, kernel, gradients)
    is_sound = _in_a_thread(node.is_sound)
    if is_sound is None:
        return None
    if is_sound:
        return node
    warnings.warn(
        f"EAFO: the compiled node {path} gives wrong results; a slower one in Python serves. Delete it, or set "
        f"{SWITCH}=0.",
        stacklevel=2,
    )
    return None


def _in_a_thread(question: Callable[[], bool]) -> bool | None:
    """The answer to a question that is asked in a thread of its own: here hooks may count what autograd keeps.

    Returns:
        The answer; None where no thread can be started, as at the end of the process.
    """
    answers: list[bool] = []
    worker = threading.Thread(target=lambda: answers.append(question()), daemon=True)
    try:
        worker.start()
    except RuntimeError as error:
        _LOG.info("EAFO: the node in C++ cannot be checked, the one in Python serves: %s", error)
        return None
    worker.join()
    return bool(answers and answers[0])  # an exception has been shown, and is no good sign


def build_node() -> Path | None:
    """Builds the node now, for processes that start afterwards, unless it is there.

    Returns:
        Its path; None where it cannot be built.
    """
    path = _path()
    if path is None:
        return None
    keeping.main(path, _command())
    if keeping.is_intact(path):
        return path
    return None


def _path() -> Path | None:
    """Where the node is kept; None where there is none: only tried on Linux, where a C++ compiler is."""
    folder = None
    if sys.platform == "linux" and os.environ.get(SWITCH) != "0" and _compiler() is not None:
        folder = cache_folder()
    if folder is None:
        return None
    about = (_command(), torch.__version__, sys.version, platform.machine())
    key = hashlib.sha256(_SOURCE.read_bytes() + repr(about).encode()).hexdigest()
    return folder / f"node-{key[:24]}.so"


def _has_just_failed(path: Path) -> bool:
    """Whether the compiler failed within a day; later it is asked again, as the disk was full or a header missing."""
    said = path.with_suffix(".failed")
    try:
        age = time.time() - said.stat().st_mtime
    except OSError:
        return False
    if age > _FORGIVEN_AFTER:
        return False
    _LOG.info("EAFO: the node in C++ could not be built, the one in Python serves: see %s", said)
    return True


def _compiler() -> str | None:
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            return path
    return None


def _command() -> list[str]:
    """Compiles the node into {made}."""
    folder = Path(torch.__file__).parent
    include = folder / "include"
    of_python = sysconfig.get_path("include")
    included = [f"-I{each}" for each in (include, include / "torch" / "csrc" / "api" / "include", of_python)]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    libraries = [f"-L{folder / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10"]
    return [str(_compiler()), *_FLAGS, abi, *included, str(_SOURCE), "-o", "{made}", *libraries]


def _build_in_background(path: Path) -> None:
    """Starts a process of its own that outlives this one, and waits for nothing."""
    if not sys.executable or getattr(sys, "frozen", False):  # Python inside another program, which is not to be started
        return
    words = [sys.executable, "-I", "-S", keeping.__file__, str(path), *_command()]
    # the shell ends at once, so that nobody has to wait for what it has started
    starts = ["sh", "-c", '"$@" </dev/null >/dev/null 2>&1 &', "sh", *words]
    try:
        subprocess.run(starts, check=False, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:  # no shell, no memory: nothing is lost
        _LOG.info("EAFO: the node in C++ cannot be built, the one in Python serves: %s", error)
