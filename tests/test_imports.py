"""The import graph against the table in CONTRIBUTING.md, and what importing the package costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "eafo_dynamic"


def allowed_imports() -> dict[str, set[str]]:
    table: dict[str, set[str]] = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        row = re.fullmatch(r"\| `(\w+)` \| .* \| ([\w, ]+) \|", line)
        if row:
            table[row[1]] = set() if row[2] == "nothing" else set(row[2].split(", "))
    return table


def actual_imports() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts == ("__init__",):
            continue
        used = found.setdefault(parts[0], set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eafo_dynamic."):
                used.add((node.module or "").split(".")[1])
            elif isinstance(node, ast.Import):
                used.update(a.name.split(".")[1] for a in node.names if a.name.startswith("eafo_dynamic."))
        used.discard(parts[0])
    return found


def test_table_names_every_module_and_no_other() -> None:
    assert set(allowed_imports()) == set(actual_imports())


@pytest.mark.parametrize("module", sorted(actual_imports()))
def test_module_imports_only_what_the_table_allows(module: str) -> None:
    allowed = allowed_imports()[module]
    if allowed != {"everything"}:
        assert actual_imports()[module] <= allowed


def test_only_the_shell_knows_lightning() -> None:
    def roots(node: ast.AST) -> set[str]:
        if isinstance(node, ast.ImportFrom):
            return {(node.module or "").split(".")[0]}
        return {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()

    knowing = {
        path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if "lightning" in roots(node)
    } - {"__init__"}  # for type checkers only
    allowed = {"callback", "configured", "compare", "example", "experiments", "benchmark"}
    assert {"callback", "configured"} <= knowing <= allowed


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import eafo_dynamic", ["torch", "lightning", "matplotlib", "jsonargparse", "rich"]),
        ("import eafo_dynamic.controller", ["lightning", "matplotlib", "jsonargparse", "pandas", "sklearn"]),
        ("import eafo_dynamic.callback", ["matplotlib", "jsonargparse.core", "sklearn"]),
        ("from eafo_dynamic.records import CorrectionLog", ["torch", "lightning", "matplotlib", "pandas"]),
    ],
)
def test_imports_stay_cheap(statement: str, absent: list[str]) -> None:
    code = f"import sys; {statement}; print([m for m in {absent!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(result.stdout.strip().splitlines()[-1])
    if statement == "import eafo_dynamic.callback":
        pytest.importorskip("lightning")
        loaded = [name for name in loaded if name != "matplotlib"]  # torchmetrics imports it where it is installed
    assert loaded == []


def test_public_names_resolve() -> None:
    import eafo_dynamic

    for name in eafo_dynamic.__all__:
        assert getattr(eafo_dynamic, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = eafo_dynamic.no_such_name
