"""Python source files reduced to what a language model should read: the whole, the code, or the docstrings."""

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

    "code" and "docstrings" have no byte in common: "docstrings" gives what "code" leaves out.

    Args:
        path: a .py file.
        content: "all" is the file as it is; "code" is the file without the lines of its docstrings, but with its
            comments; "docstrings" are the docstrings alone, without quotes and common indentation, separated by
            blank lines.

    Returns:
        The bytes, in UTF-8 unless the whole file is asked for.

    Raises:
        ConfigError: for a file that this Python cannot parse.
    """
    raw = path.read_bytes()
    if content == "all":
        return raw
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escape sequences in the file
            tree = ast.parse(raw)
    except (SyntaxError, ValueError) as error:
        raise ConfigError("content", content, f"{path} cannot be parsed ({error})", "Use content: all.") from error
    docstrings = sorted(_docstrings(tree), key=lambda node: node.lineno)
    if content == "docstrings":
        texts = [f"{inspect.cleandoc(str(node.value))}\n\n" for node in docstrings]
        return "".join(texts).encode(errors="replace")
    left_out: set[int] = set()
    for node in docstrings:
        last = node.end_lineno or node.lineno
        left_out.update(range(node.lineno, last + 1))
    # bytes.splitlines ends lines where Python's parser does; str.splitlines would also cut at form feeds.
    lines = raw.splitlines(keepends=True)
    return b"".join(line for number, line in enumerate(lines, start=1) if number not in left_out)


def _docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Docstrings of the module and of all its classes and functions, in any order."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        # Expressions are most of a tree, but no definition with a docstring is inside one.
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.stmt, ast.excepthandler)):
                waiting.append(child)
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or not node.body:
            continue
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            yield first.value
