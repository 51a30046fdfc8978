"""Old module names: they import the very modules that took their place, and say so."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import eafo_dynamic
from eafo_dynamic.internals.renamed import RENAMED, Renamed

PACKAGE = Path(eafo_dynamic.__file__).parent
OF_0_1_0 = (Path(__file__).parents[1] / "data" / "v0.1.0" / "modules.txt").read_text(encoding="utf-8").split()
GONE = {"eafo_dynamic.records.cache"}  # modules of 0.1.0 that were deleted with nothing in their place

FILES = {
    "house/__init__.py": "",
    "house/attic.py": "where = 'attic'",  # is still there
    "house/rooms/__init__.py": "",
    "house/rooms/kitchen.py": "class Kettle: pass\ndef _boil(): return 'steam'",
    "house/rooms/attic.py": "where = 'rooms'",
    "house/rooms/hall.py": "__all__ = ['door']\ndoor, both, _hook = 'door', 'hall', 'hook'",
    "house/rooms/salon.py": "__all__ = ['piano', 'parts']\npiano, both, parts = 'piano', 'salon', 3",
    "house/rooms/coal.py": "where = 'rooms'",
    "house/rooms/tools.py": "where = 'rooms'",
    "house/cellar/__init__.py": "",
    "house/cellar/wine.py": "class Bottle: pass",
    "house/cellar/coal.py": "where = 'cellar'",
}
NAMES: dict[str, str | tuple[str, ...]] = {
    "house.kitchen": "house.rooms.kitchen",
    "house.attic": "house.rooms.attic",
    "house.parlour": ("house.rooms.hall", "house.rooms.salon"),
    "house.basement": "house.cellar",
    "house.basement.coal": "house.rooms.coal",
    "house.sheds": (),
    "house.sheds.tools": "house.rooms.tools",
    "house.garage": "house.rooms.garage",  # a mistake: there is no such module
}


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "house"]:
        del sys.modules[name]


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package whose modules have moved."""
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [Renamed(NAMES), *sys.meta_path])
    importlib.invalidate_caches()
    forget()
    yield tmp_path
    forget()


def load(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(name)


@pytest.mark.usefixtures("house")
class TestOldNames:
    @pytest.mark.parametrize(
        "statement",
        [
            "import house.kitchen; found = house.kitchen",
            "import house.kitchen as found",
            "from house import kitchen as found",
            "import importlib; found = importlib.import_module('house.kitchen')",
            "import importlib; found = importlib.import_module('.kitchen', 'house')",
            "__import__('house.kitchen'); import sys; found = sys.modules['house.kitchen']",
        ],
    )
    def test_every_import_gives_the_very_module(self, statement: str) -> None:
        scope: dict[str, object] = {}
        with pytest.warns(DeprecationWarning, match=r"house\.kitchen"):
            exec(statement, scope)
        assert scope["found"] is importlib.import_module("house.rooms.kitchen")

    def test_new_module_keeps_its_name_and_spec(self) -> None:
        module = load("house.kitchen")
        assert module.__name__ == "house.rooms.kitchen"
        assert module.__spec__ is not None and module.__spec__.name == "house.rooms.kitchen"
        assert importlib.reload(module) is module

    def test_names_of_the_module_are_the_same_objects(self) -> None:
        with pytest.warns(DeprecationWarning):
            from house.kitchen import Kettle  # pyright: ignore
        from house.rooms.kitchen import Kettle as Moved  # pyright: ignore

        assert Kettle is Moved

    def test_pickles_find_private_names(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            assert pickle.loads(b"chouse.kitchen\n_boil\n(tR.") == "steam"
            kettle = pickle.loads(b"\x80\x02chouse.kitchen\nKettle\n)\x81.")
        assert type(kettle) is importlib.import_module("house.rooms.kitchen").Kettle

    def test_one_warning_that_says_what_to_write_and_where(self, house: Path) -> None:
        (house / "user.py").write_text("import os\n\nfrom house.kitchen import Kettle\nimport house.kitchen\n")
        with pytest.warns(DeprecationWarning) as found:
            importlib.import_module("user")
            importlib.import_module("house.kitchen")
        del sys.modules["user"]
        (warning,) = found
        assert str(warning.message) == (
            "house.kitchen is now house.rooms.kitchen. Import from there: the old name will be removed in version 0.3."
        )
        assert (Path(warning.filename).name, warning.lineno) == ("user.py", 3)

    def test_warnings_as_errors_leave_nothing_half_imported(self) -> None:
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with pytest.raises(DeprecationWarning, match=r"house\.rooms\.kitchen"):
                    importlib.import_module("house.kitchen")
        assert "house.kitchen" not in sys.modules

    def test_looking_for_a_module_neither_loads_it_nor_warns(self) -> None:
        assert importlib.util.find_spec("house.kitchen") is not None
        assert "house.kitchen" not in sys.modules and "house.rooms.kitchen" not in sys.modules

    def test_new_names_and_modules_that_exist_do_not_warn(self) -> None:
        assert importlib.import_module("house.rooms.kitchen")._boil() == "steam"
        assert importlib.import_module("house.attic").where == "attic"

    @pytest.mark.parametrize("name", ["house.nothing", "house.basement.nothing", "house.sheds.nothing", "no_house"])
    def test_what_never_existed_does_not_exist(self, name: str) -> None:
        with pytest.raises(ModuleNotFoundError, match=f"'{re.escape(name)}'"):
            load(name)
        assert name not in sys.modules

    def test_an_entry_that_leads_nowhere_names_the_new_module(self) -> None:
        with pytest.raises(ModuleNotFoundError, match=r"house\.rooms\.garage"):
            load("house.garage")


@pytest.mark.usefixtures("house")
class TestPackages:
    @pytest.mark.parametrize("first", ["house.basement.wine", "house.cellar.wine"])
    def test_modules_inside_are_no_second_copies(self, first: str) -> None:
        load(first)
        old, new = load("house.basement.wine"), importlib.import_module("house.cellar.wine")
        assert old is new and old.Bottle is new.Bottle
        assert load("house.basement") is importlib.import_module("house.cellar")

    def test_a_module_that_left_its_package(self) -> None:
        assert load("house.basement.coal").where == "rooms"
        assert importlib.import_module("house.cellar.coal").where == "cellar"

    def test_a_folder_of_which_nothing_is_left(self) -> None:
        with pytest.warns(DeprecationWarning) as found:
            module = importlib.import_module("house.sheds.tools")
        assert module is importlib.import_module("house.rooms.tools")
        assert ["house.sheds.tools" in str(each.message) for each in found] == [True]


@pytest.mark.usefixtures("house")
class TestDividedModules:
    def test_names_are_looked_up_in_the_parts_in_order(self) -> None:
        with pytest.warns(DeprecationWarning, match=r"now house\.rooms\.hall and house\.rooms\.salon"):
            parlour = importlib.import_module("house.parlour")
        assert (parlour.door, parlour.both, parlour._hook, parlour.piano) == ("door", "hall", "hook", "piano")
        assert parlour.parts == 3

    def test_a_later_part_is_imported_when_it_is_needed(self) -> None:
        assert load("house.parlour").door == "door"
        assert "house.rooms.salon" not in sys.modules

    def test_names_follow_the_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        parlour = load("house.parlour")
        monkeypatch.setattr("house.rooms.salon.piano", "organ")
        assert parlour.piano == "organ"

    def test_import_of_everything(self) -> None:
        scope: dict[str, object] = {}
        load("house.parlour")
        exec("from house.parlour import *", scope)
        assert {name: scope[name] for name in scope if name != "__builtins__"} == {
            "door": "door",
            "piano": "piano",
            "parts": 3,
        }

    def test_what_no_part_has(self) -> None:
        with pytest.raises(AttributeError, match=r"'house\.parlour' has no attribute 'sofa'"):
            _ = load("house.parlour").sofa
        assert not hasattr(load("house.parlour"), "__file__")


def exists(name: str) -> bool:
    return (PACKAGE.parent / name.replace(".", "/")).with_suffix(".py").exists() or (
        PACKAGE.parent / name.replace(".", "/") / "__init__.py"
    ).exists()


class TestThisPackage:
    def test_old_names_are_no_modules_and_new_names_are(self) -> None:
        for old, new in RENAMED.items():
            assert not exists(old), old
            for name in (new,) if isinstance(new, str) else new:
                assert exists(name), name

    @pytest.mark.filterwarnings("ignore:eafo_dynamic:DeprecationWarning")
    def test_every_module_of_0_1_0_can_be_imported_by_its_name(self) -> None:
        assert len(OF_0_1_0) > 100
        missing = {name for name in OF_0_1_0 if importlib.util.find_spec(name) is None}
        assert missing == GONE

    def test_the_package_itself_uses_no_old_name(self) -> None:
        for file in PACKAGE.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                used = [node.module] if isinstance(node, ast.ImportFrom) else []
                used += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not set(used) & set(RENAMED), file

    def test_old_names_are_known_as_soon_as_the_package_is_imported(self) -> None:
        code = "import sys, eafo_dynamic; print(sum(type(each).__name__ == 'Renamed' for each in sys.meta_path))"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert int(result.stdout) == bool(RENAMED)
