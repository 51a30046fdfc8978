"""The compiled library on disk: damaged, foreign, half built, built by many at once, shared by unlike machines.

Each start is a process of its own, as in life: a damaged library can end the process that loads it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fresh
import pytest

pytestmark = pytest.mark.skipif(
    os.name != "posix" or not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here"
)

ROOT = Path(__file__).parents[2]
START = """
import sys, warnings
from eafo_dynamic.correction.kernels import choice
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = [choice.resolve_backend("auto"), choice.resolve_backend("auto"), choice.round_kernel("auto") is not None]
print(*found, flush=True)
for each in caught:
    print(each.message)
"""
AS_ANOTHER_MACHINE = """
import pathlib
read_text = pathlib.Path.read_text
def read_of_another(path, *args, **options):
    text = read_text(path, *args, **options)
    return text + "flags : another\\n" if str(path) == "/proc/cpuinfo" else text
pathlib.Path.read_text = read_of_another
"""


def environment(home: Path, compiler: Path | None = None) -> dict[str, str]:
    named = {} if compiler is None else {"CC": str(compiler)}
    temporary = home / "tmp"
    temporary.mkdir(exist_ok=True)
    ours = {"XDG_CACHE_HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    return {**os.environ, **ours, **named}


def launch(home: Path, compiler: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(home, compiler),
        start_new_session=True,
    )


def outcome(code: int, out: str, errors: str) -> tuple[str, list[str]]:
    """Back ends that a start found, and its warnings."""
    assert code == 0, f"exit code {code}: {errors}"
    found, *messages = out.splitlines()
    return found, messages


def start(home: Path, compiler: Path | None = None, before: str = "") -> tuple[str, list[str]]:
    done = fresh.python(before + START, environment=environment(home, compiler), libraries=("torch",))
    return outcome(done.returncode, done.stdout, done.stderr)


COMPILED = ("native native True", [])


def kept(home: Path) -> list[Path]:
    return sorted((home / "eafo-dynamic").iterdir())


def library_in(home: Path) -> Path:
    (library,) = (home / "eafo-dynamic").glob("*.so")
    return library


def other_library(folder: Path, functions: str) -> bytes:
    source = folder / "other.c"
    source.write_text(functions)
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", folder / "other.so"], check=True)
    return (folder / "other.so").read_bytes()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a library in it; tests copy it."""
    home = tmp_path_factory.mktemp("built")
    assert start(home) == COMPILED
    return home


@pytest.fixture
def home(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def intact(home: Path) -> bytes:
    return library_in(home).read_bytes()


def assert_built_anew(home: Path, intact: bytes) -> None:
    """A start finds the compiled code, without a warning, and leaves a private library such as the first one."""
    assert start(home) == COMPILED
    library = library_in(home)
    status = library.lstat()
    assert library.is_file() and not library.is_symlink()
    assert status.st_uid == os.geteuid() and not status.st_mode & 0o022
    assert library.read_bytes() == intact


class TestDamage:
    def test_a_truncated_library(self, home: Path, intact: bytes) -> None:
        library = library_in(home)
        library.write_bytes(intact[: len(intact) // 2])
        assert_built_anew(home, intact)

    def test_an_empty_library(self, home: Path, intact: bytes) -> None:
        library_in(home).write_bytes(b"")
        assert_built_anew(home, intact)

    def test_a_library_without_one_of_the_functions(self, home: Path, intact: bytes, tmp_path: Path) -> None:
        library_in(home).write_bytes(other_library(tmp_path, "void eafo_forward(void) {}"))
        assert_built_anew(home, intact)

    @pytest.mark.parametrize("contents", [b"", b"\xff" * 65, None], ids=["empty", "junk", "missing"])
    def test_a_damaged_checksum(self, home: Path, intact: bytes, contents: bytes | None) -> None:
        checksum = library_in(home).with_suffix(".sha256")
        assert checksum.read_text().strip() == hashlib.sha256(intact).hexdigest()
        if contents is None:
            checksum.unlink()
        else:
            checksum.write_bytes(contents)
        before = library_in(home).stat().st_ino
        assert_built_anew(home, intact)
        assert library_in(home).stat().st_ino != before
        assert checksum.read_text().strip() == hashlib.sha256(intact).hexdigest()

    def test_functions_that_are_missing_although_the_checksum_fits(self, home: Path, tmp_path: Path) -> None:
        library = library_in(home)
        wrong = other_library(tmp_path, "void eafo_forward(void) {}")
        library.write_bytes(wrong)
        library.with_suffix(".sha256").write_text(hashlib.sha256(wrong).hexdigest())
        found, messages = start(home)
        assert found == "eager eager False"
        for task, message in zip(("activations", "update rounds"), messages, strict=True):
            assert f"compute {task} on the CPU" in message and "has no function eafo_" in message
            assert f"Delete {library}" in message and "variable CC" in message

    def test_a_folder_in_the_place_of_the_library(self, home: Path) -> None:
        library = library_in(home)
        library.unlink()
        library.mkdir()
        found, (message,) = start(home)
        assert found == "eager eager False"
        assert "cannot be kept" in message and str(library) in message and "XDG_CACHE_HOME" in message


class TestPrivacy:
    @pytest.mark.parametrize("mode", [0o777, 0o770], ids=["everybody", "the group"])
    def test_a_library_that_others_can_write(self, home: Path, intact: bytes, mode: int) -> None:
        library_in(home).chmod(mode)
        assert_built_anew(home, intact)

    def test_a_checksum_that_others_can_write(self, home: Path, intact: bytes) -> None:
        checksum = library_in(home).with_suffix(".sha256")
        checksum.chmod(0o666)
        assert_built_anew(home, intact)
        assert not checksum.stat().st_mode & 0o022

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files away")
    def test_a_library_of_somebody_else(self, home: Path, intact: bytes) -> None:
        os.chown(library_in(home), 12345, 12345)
        assert_built_anew(home, intact)

    def test_a_link_to_a_library(self, home: Path, intact: bytes, tmp_path: Path) -> None:
        library = library_in(home)
        elsewhere = tmp_path / "elsewhere.so"
        library.rename(elsewhere)
        library.symlink_to(elsewhere)
        assert_built_anew(home, intact)


@pytest.fixture
def slow_compiler(tmp_path: Path) -> Iterator[Path]:
    """A compiler that waits before linking, and says so in a file."""
    real = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
    script = tmp_path / "slow-cc"
    script.write_text(
        f"""#!/bin/sh
case "$*" in *-shared*)
    touch "{tmp_path}/linking"
    while [ ! -e "{tmp_path}/go" ]; do sleep 0.05; done
esac
exec "{real}" "$@"
"""
    )
    script.chmod(0o755)
    yield script
    (tmp_path / "go").touch()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_build_that_is_killed(slow_compiler: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = launch(tmp_path, slow_compiler)
    deadline = time.monotonic() + 100
    while not (tmp_path / "linking").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)
    process.communicate()
    assert not list(tmp_path.rglob("*.so")), "killed before there was a library"
    (tmp_path / "go").touch()
    assert start(tmp_path, slow_compiler) == COMPILED
    left = [path.name for path in tmp_path.rglob("*") if path.suffix in (".o", ".s", ".tmp") or "build-" in path.name]
    assert not left
    assert [path.suffix for path in kept(tmp_path)] == [".sha256", ".so"]


@pytest.mark.slow
def test_many_processes_at_once(tmp_path: Path) -> None:
    processes = [launch(tmp_path) for _ in range(8)]
    texts = [process.communicate(timeout=200) for process in processes]
    found = [outcome(process.returncode, *each) for process, each in zip(processes, texts, strict=True)]
    assert found == [COMPILED] * 8
    assert [path.suffix for path in kept(tmp_path)] == [".sha256", ".so"]


@pytest.mark.slow
class TestOneHomeForUnlikeMachines:
    @pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the test describes a processor as Linux does")
    def test_other_processors(self, home: Path) -> None:
        mine = library_in(home)
        made = mine.stat().st_mtime_ns
        assert start(home, before=AS_ANOTHER_MACHINE) == COMPILED
        both = {path: path.stat().st_mtime_ns for path in kept(home) if path.suffix == ".so"}
        assert len(both) == 2 and both[mine] == made
        assert start(home) == COMPILED
        assert start(home, before=AS_ANOTHER_MACHINE) == COMPILED
        assert {path: path.stat().st_mtime_ns for path in kept(home) if path.suffix == ".so"} == both, "no third build"

    def test_other_compilers_at_the_same_place(self, tmp_path: Path) -> None:
        real = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
        compiler = tmp_path / "cc"
        libraries: list[set[str]] = []
        for version in ("1.0", "2.0", "1.0"):
            answers = f'[ "$1" = --version ] && echo "cc {version}" && exit'
            compiler.write_text(f'#!/bin/sh\n{answers}\nexec "{real}" "$@"\n')
            compiler.chmod(0o755)
            os.utime(compiler, (1e9, 1e9))  # as in two images of one distribution
            assert start(tmp_path, compiler) == COMPILED
            libraries.append({path.name for path in kept(tmp_path) if path.suffix == ".so"})
        assert [len(names) for names in libraries] == [1, 2, 2]

    def test_a_runtime_that_this_machine_lacks(self, home: Path, intact: bytes, tmp_path: Path) -> None:
        library = library_in(home)
        other_library(tmp_path, "int needed(void) { return 1; }")
        (tmp_path / "other.so").rename(tmp_path / "libneeded.so")
        source = tmp_path / "needs.c"
        source.write_text("int needed(void); int needs(void) { return needed(); }")
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
        command = [compiler, "-shared", "-fPIC", source, f"-L{tmp_path}", "-lneeded", "-o", library]
        subprocess.run(command, check=True)
        (tmp_path / "libneeded.so").unlink()
        library.chmod(0o700)
        library.with_suffix(".sha256").write_text(hashlib.sha256(library.read_bytes()).hexdigest())
        assert_built_anew(home, intact)


def test_without_a_compiler_one_warning_says_why_and_what_to_do(tmp_path: Path) -> None:
    nowhere = {**environment(tmp_path), "PATH": str(tmp_path), "CC": ""}
    result = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, env=nowhere, check=True)
    found, message = result.stdout.splitlines()
    assert found == "eager eager False"
    assert "no C compiler was found" in message and "Install cc, gcc or clang" in message and "'eager'" in message
