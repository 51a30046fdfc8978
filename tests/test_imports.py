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


def rooms() -> list[str]:
    """The rooms of the table in CONTRIBUTING.md, from the ground up."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `(\w+)` \|", text.split("## The house")[1].split("\n## ")[0], flags=re.MULTILINE)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}


def room_of(module: str) -> str:
    return module.split(".")[0]


def imported_modules(module: str) -> set[str]:
    """Modules of this package that a module imports anywhere: at its top, in a function, or for types only."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eafo_dynamic."):
            home = (node.module or "").removeprefix("eafo_dynamic.")
            names = {f"{home}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) or {home}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names if alias.name.startswith("eafo_dynamic.")}
            found |= {name.removeprefix("eafo_dynamic.") for name in names}
    return found - {module}


IMPORTS = {module: imported_modules(module) for module in MODULES}


def circle_through(module: str) -> list[str]:
    """A way of imports from a module back to itself; empty without one."""
    came_from: dict[str, str] = {}
    waiting = [module]
    while waiting:
        here = waiting.pop()
        for target in IMPORTS.get(here, set()):
            if target == module:
                way = [here]
                while way[-1] != module:
                    way.append(came_from[way[-1]])
                return [*reversed(way), module]
            if target not in came_from:
                came_from[target] = here
                waiting.append(target)
    return []


def test_table_names_every_room_and_no_other() -> None:
    assert sorted(rooms()) == sorted({room_of(module) for module in MODULES} - {"__main__"})


def test_top_of_the_package_stays_small() -> None:
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"} - {"py.typed"}
    assert len(entries) <= 14, sorted(entries)


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"__main__"}))
def test_imports_go_down_only(module: str) -> None:
    order = rooms()
    above = [name for name in IMPORTS[module] if order.index(room_of(name)) > order.index(room_of(module))]
    assert above == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_circle_of_imports(module: str) -> None:
    assert circle_through(module) == []


def test_only_the_shell_knows_lightning() -> None:
    def roots(node: ast.AST) -> set[str]:
        if isinstance(node, ast.ImportFrom):
            return {(node.module or "").split(".")[0]}
        return {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()

    knowing = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if "lightning" in roots(node)
    }
    outside = {module for module in knowing if not module.startswith(("trainers.lightning", "experiments"))}
    assert "trainers.lightning.callback" in knowing
    assert outside == set()


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import eafo_dynamic", ["torch", "lightning", "matplotlib", "jsonargparse", "rich"]),
        ("import eafo_dynamic.policy.controller", ["lightning", "matplotlib", "jsonargparse", "pandas", "sklearn"]),
        ("import eafo_dynamic.trainers.lightning.callback", ["matplotlib", "jsonargparse.core", "sklearn"]),
        ("from eafo_dynamic.records import CorrectionLog", ["torch", "lightning", "matplotlib", "pandas"]),
    ],
)
def test_imports_stay_cheap(statement: str, absent: list[str]) -> None:
    code = f"import sys; {statement}; print([m for m in {absent!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(result.stdout.strip().splitlines()[-1])
    if statement == "import eafo_dynamic.trainers.lightning.callback":
        pytest.importorskip("lightning")
        loaded = [name for name in loaded if name != "matplotlib"]  # torchmetrics imports it where it is installed
    assert loaded == []


def test_public_names_resolve() -> None:
    import eafo_dynamic

    for name in eafo_dynamic.__all__:
        assert getattr(eafo_dynamic, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = eafo_dynamic.no_such_name
