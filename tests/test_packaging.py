"""What is installed: files of the wheel, imports, the oldest Python, optional packages that are not there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "eafo_dynamic").rglob("*.py"), *(ROOT / "examples").glob("*.py")])

# Makes packages absent in a process: they can neither be imported nor found.
_HIDE = """
import importlib.metadata, sys
hidden = {hidden!r}
class Hider:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Hider(finder) for finder in sys.meta_path]
found = importlib.metadata.Distribution.from_name.__func__
def from_name(cls, name):
    if name.lower().replace("-", "_") in hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(cls, name)
importlib.metadata.Distribution.from_name = classmethod(from_name)
"""
_MERGED = """
import torch
from eafo_dynamic import EAFOController, merge, save_merged
net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
EAFOController.attach(net, eps_init=0.1)
save_merged(merge(net.eval()), {file!r}, torch.zeros(2, 2))
"""


def run_without(hidden: str, code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = _HIDE.format(hidden=hidden.split()) + code
    return subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=folder, capture_output=True, text=True)


def command(line: str) -> str:
    return f"from eafo_dynamic.cli import main\nraise SystemExit(main({line.split()!r}))"


@pytest.mark.parametrize(
    ("hidden", "code", "message"),
    [
        ("matplotlib", command("shape gelu --out a.png"), "pip install 'eafo-dynamic[plots]'"),
        ("matplotlib", command("rank --out a.png"), "pip install 'eafo-dynamic[plots]'"),
        ("matplotlib", command("log plot run --out a.png"), "pip install 'eafo-dynamic[plots]'"),
        (
            "pandas",
            "from eafo_dynamic import CorrectionLog\nCorrectionLog.load('run').to_pandas()",
            "pip install pandas",
        ),
        (
            "pyarrow",
            "from eafo_dynamic import CorrectionLog\nCorrectionLog.load('run').to_arrow()",
            "pip install pyarrow",
        ),
        ("sklearn", command(f"fit --config {ROOT}/configs/wine_mlp.yaml"), "pip install 'eafo-dynamic[examples]'"),
        ("transformers", "import eafo_dynamic.trainers.huggingface", "pip install transformers"),
        ("onnxscript", _MERGED.format(file="a.onnx"), "pip install onnxscript"),
        ("shtab", command("completion bash"), "pip install 'eafo-dynamic[completion]'"),
    ],
    ids=lambda value: value if " " not in value else "",
)
def test_what_is_absent_is_named_where_it_is_needed(hidden: str, code: str, message: str, run_folder: Path) -> None:
    result = run_without(hidden, code, run_folder)
    assert result.returncode != 0
    assert message in result.stderr.splitlines()[-1], result.stderr
    if "main(" in code:
        assert result.returncode == 2
        assert "Traceback" not in result.stderr


OPTIONAL = "matplotlib pandas pyarrow sklearn scipy transformers accelerate onnx onnxscript shtab tensorboard"


def test_everything_else_works_without_any_of_them(run_folder: Path) -> None:
    code = """
import torch
import eafo_dynamic
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import RandomDataset
for name in set(eafo_dynamic.__all__):
    getattr(eafo_dynamic, name)
net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.GELU(), torch.nn.Linear(4, 2))
controller = eafo_dynamic.EAFOController.attach(net, torch.zeros(2, 2))
net(torch.randn(8, 2)).sum().backward()
assert len(controller.step(1)) == 1
from eafo_dynamic.cli import main
for line in ("log summary run", "log layers run", "log report run --out run.html", "rank", "shape gelu"):
    assert main(line.split()) == 0, line
print("fine")
"""
    result = run_without(OPTIONAL, code, run_folder)
    assert result.stdout.endswith("fine\n"), result.stderr
    assert (run_folder / "run.html").stat().st_size > 10_000


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the log of a small run in it."""
    from eafo_dynamic import EAFOController
    from eafo_dynamic.records import LogWriter

    folder = tmp_path_factory.mktemp("absent")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    controller = EAFOController.attach(net, torch.zeros(2, 2), update_every_n_steps=2, eps_init=0.1)
    writer = LogWriter(folder / "run" / "eafo", controller.about())
    for step in range(1, 5):
        net(torch.randn(64, 2)).sum().backward()
        if rows := controller.step(step):
            writer.write(rows)
            writer.write_shapes(step, controller.snapshot())
    writer.close()
    return folder


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_syntax_is_that_of_the_oldest_python(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


def test_importing_the_controller_leaves_the_compiler_alone() -> None:
    code = "import sys, torch\nbefore = 'torch._dynamo' in sys.modules\nimport eafo_dynamic.policy.controller\n"
    code += "print(before, 'torch._dynamo' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = result.stdout.split()
    assert before == after


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package(tmp_path: Path) -> None:
    pytest.importorskip("build")
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    files = [path for path in (ROOT / "eafo_dynamic").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    for path in files:
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    build = [sys.executable, "-W", "ignore", "-m", "build", "--wheel", "--outdir", str(tmp_path), str(copy)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert held == {path.relative_to(ROOT).as_posix() for path in files}


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflows_run_scripts_that_exist(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    scripts = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    named = {word for script in scripts for word in script.split() if word.startswith(".ci/")}
    assert named
    assert all((ROOT / name).is_file() for name in named)


def test_only_a_tag_publishes_and_what_is_published_was_checked() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))["jobs"]
    publish = jobs["publish"]
    assert publish["needs"] == "package" and "ref_type == 'tag'" in publish["if"]
    assert not any("run" in step for step in publish["steps"]), "the files of the job package, and no others"
    with_token = [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})]
    assert with_token == ["site", "publish"]
    assert all("ref_type == 'tag'" in jobs[name]["if"] for name in with_token)


def test_the_conda_recipe_has_the_dependencies_of_the_package() -> None:
    recipe = yaml.safe_load((ROOT / ".ci/conda/recipe.yaml").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = project.partition("dependencies = [\n")[2].partition("\n]")[0]
    wanted = {"python": ">=3.10"}
    for name, versions in re.findall(r'^ +"([\w-]+)(?:\[\w+\])?([^"]*)"', listed, re.MULTILINE):
        wanted[name.replace("-", "_")] = versions
    wanted["pytorch"] = wanted.pop("torch")
    wanted |= {"docstring_parser": "", "typeshed_client": ""}  # conda has no jsonargparse[signatures]
    run = (line.partition(" ") for line in recipe["requirements"]["run"])
    assert {name: versions for name, _, versions in run} == wanted
    assert f'version = "{recipe["context"]["version"]}"' in project


def test_workflows_are_ci_and_release() -> None:
    assert sorted(path.name for path in (ROOT / ".github/workflows").glob("*.yml")) == ["ci.yml", "release.yml"]
