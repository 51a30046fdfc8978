"""Python source files cut into what a language model may read: the whole, the code, or the docstrings."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from eafo_dynamic.errors import ConfigError

__all__ = ["Content", "read_source"]

Content = Literal["all", "code", "docstrings"]


def read_source(path: Path, content: Content) -> bytes:
    """One source file, or a part of it.

    "code" and "docstrings" share no byte: what the second gives is what the first leaves out.

    Args:
        path: a .py file.
        content: "all" is the file as it is; "code" the file without the lines of its docstrings, comments
            included; "docstrings" the docstrings alone, without quotes and common indentation, blank lines between.

    Returns:
        The bytes, UTF-8 unless the whole file is asked for.

    Raises:
        ConfigError: for a file that this Python cannot parse.
    """
    raw = path.read_bytes()
    if content == "all":
        return raw
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's escape sequences
            docstrings = sorted(_docstrings(ast.parse(raw)), key=lambda node: node.lineno)
    except (SyntaxError, ValueError) as error:
        raise ConfigError("content", content, f"{path} cannot be parsed ({error})", "Use content: all.") from error
    if content == "docstrings":
        return "".join(f"{inspect.cleandoc(str(node.value))}\n\n" for node in docstrings).encode(errors="replace")
    hidden = {line for node in docstrings for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    # bytes.splitlines, as Python's own lines end: str.splitlines also cuts at form feeds
    lines = raw.splitlines(keepends=True)
    return b"".join(line for number, line in enumerate(lines, start=1) if number not in hidden)


def _docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        # statements only: expressions are most of a tree and hold no definition with a docstring
        waiting.extend(
            child for child in ast.iter_child_nodes(node) if isinstance(child, (ast.stmt, ast.excepthandler))
        )
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or not node.body:
            continue
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            yield first.value
