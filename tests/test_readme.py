"""What the README and the guide show is run as they show it: snippets, commands, tables, links, messages."""

from __future__ import annotations

import ast
import functools
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eafo_dynamic import EAFOController, EAFOError
from eafo_dynamic.cli.helptext import EXIT_CODES
from eafo_dynamic.policy import Entropy, Hybrid, alerts
from eafo_dynamic.policy.diagnostics import describe_events
from eafo_dynamic.policy.options import Options
from eafo_dynamic.records import COLUMNS
from eafo_dynamic.trainers.lightning.callback import EAFOCallback

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "examples/README.md", *sorted((ROOT / "examples/guide").glob("*.md"))]
}
FIRST_PAGES = ("README.md", "examples/guide/start.md")
README = "\n".join(PAGES[page] for page in FIRST_PAGES)


def blocks(language: str) -> list[tuple[str, str]]:
    """All code blocks of a language with their page."""
    pattern = re.compile(rf"```{language}\n(.*?)```", re.DOTALL)
    return [(page, block) for page, text in PAGES.items() for block in pattern.findall(text)]


SNIPPETS = [block for page, block in blocks("python") if page in FIRST_PAGES]
COMMANDS = [block for page, block in blocks("bash") if page == "README.md"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:.*bottleneck"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:.*script_method", "ignore:bf16 is supported"),
]


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,))), 16)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's first command has run, shortened, pip apart."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("configs", "examples", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my_project").mkdir()
    net = "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n"
    (folder / "my_project/net.py").write_text(net)
    shown = COMMANDS[0].replace("--trainer.max_epochs 20", "--trainer.max_epochs 2")
    result = run_by_bash(shown.partition("&&")[2], folder)
    (folder / "first.out").write_text(result.stdout)
    return folder


def run_by_bash(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-e", "-c", script], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{script}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result


# ---- snippets


def test_the_three_line_attachment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (snippet,) = [s for s in SNIPPETS if "trainer.fit(model, data)" in s]
    quick = "callbacks=[EAFOCallback()], max_epochs=1, enable_progress_bar=False, accelerator='cpu'"
    names: dict[str, Any] = {"model": Tiny(), "data": data()}
    exec(snippet.replace("callbacks=[EAFOCallback()]", quick), names)
    assert isinstance(names["trainer"], Trainer)
    assert names["trainer"].global_step == 4


def test_the_options_snippet_makes_a_callback() -> None:
    (snippet,) = [s for s in SNIPPETS if "Rule(" in s]
    names: dict[str, Any] = {}
    exec(snippet.replace("EAFOCallback(\n", "callback = EAFOCallback(\n"), names)
    assert isinstance(names["callback"], EAFOCallback)


def test_the_monitor_snippet() -> None:
    (snippet,) = [s for s in SNIPPETS if "ActivationMonitor" in s]
    names: dict[str, Any] = {"Trainer": functools.partial(Trainer, logger=False, accelerator="cpu")}
    exec(snippet, names)
    assert isinstance(names["trainer"].callbacks[0], EAFOCallback)


def test_the_plain_loop_snippet() -> None:
    (snippet,) = [s for s in SNIPPETS if "EAFOController.attach" in s]
    model = Tiny().net
    x, y = torch.randn(8, 4), torch.randint(0, 2, (8,))
    names: dict[str, Any] = {
        "torch": torch, "model": model, "example_input": x[:2], "batches": [(x, y)] * 3,
        "loss_fn": nn.functional.cross_entropy,
    }  # fmt: skip
    exec(snippet, names)
    assert names["controller"].rounds == 2, "after steps 1 and 2"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_hugging_face_snippet(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    (snippet,) = [s for s in SNIPPETS if "EAFOTrainerCallback" in s]
    config = transformers.GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    arguments = {"max_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    block = torch.arange(8)
    names: dict[str, Any] = {
        "Trainer": transformers.Trainer,
        "model": transformers.GPT2LMHeadModel(config),
        "args": transformers.TrainingArguments(output_dir=str(tmp_path), logging_strategy="no", **arguments),
        "data": [{"input_ids": block, "labels": block}] * 16,
    }
    exec(snippet, names)
    names["trainer"].train()
    assert (tmp_path / "eafo/corrections.jsonl").stat().st_size > 0


def test_the_readme_fits_on_two_screens() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 100


def test_every_snippet_of_the_readme_is_one_of_these() -> None:
    known = ("trainer.fit(model, data)", "ActivationMonitor", "Rule(", "EAFOController.attach", "EAFOTrainerCallback")
    assert all(sum(mark in snippet for mark in known) == 1 for snippet in SNIPPETS)
    assert len(SNIPPETS) == len(known)


# those of the recipes are run by tests/recipes
ELSEWHERE = (*FIRST_PAGES, "examples/guide/recipes.md")
GUIDE = [(page, block) for page, block in blocks("python") if page not in ELSEWHERE]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("number", range(len(GUIDE)), ids=[f"{page}-{n}" for n, (page, _) in enumerate(GUIDE)])
def test_snippets_of_the_guide(number: int, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, snippet = GUIDE[number]
    monkeypatch.chdir(workplace)
    if "torch.compile" in snippet and sys.platform == "win32":
        pytest.skip("no compiler")
    quiet = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    names: dict[str, Any] = {
        "torch": torch, "EAFOCallback": EAFOCallback, "EAFOController": EAFOController,
        "Trainer": functools.partial(Trainer, **quiet), "model": Tiny(), "make_model": Tiny, "data": data(),
        "net": Tiny().net, "make_net": lambda: Tiny().net, "x": torch.randn(8, 4), "y": torch.randint(0, 2, (8,)),
    }  # fmt: skip
    exec(compile(snippet, page, "exec"), names)
    made = [value for value in names.values() if isinstance(value, EAFOController)]
    assert all(controller.rounds == 3 for controller in made if controller.records), "updates at steps 1, 2 and 4"
    if "apply_from_checkpoint" in snippet:
        assert torch.equal(names["fresh"](names["x"]), names["model"].eval()(names["x"]))
    if "load_merged" in snippet:
        assert torch.equal(names["again"].eval()(names["x"]), names["merged"](names["x"]))
    if "disabled(net)" in snippet:
        assert torch.equal(names["plain"], names["net"](names["x"]))
    if "log.series" in snippet:
        assert len(names["eps"]) == len(names["log"].steps) and len(names["frame"]) == len(names["log"])


# ---- commands


def test_the_two_commands_name_what_exists() -> None:
    first, second = (shlex.split(command) for command in COMMANDS[:2])
    assert (ROOT / first[first.index("--config") + 1]).is_file()
    assert first[:5] == ["pip", "install", "-c", "constraints.txt", "-e"]
    assert second[5:] == [".[dev]", "&&", "pytest", "-n", "auto"]
    assert COMMANDS[1].strip() in (ROOT / ".ci/run").read_text(), "CI runs the README's own test command"
    config = yaml.safe_load((ROOT / first[first.index("--config") + 1]).read_text())
    logger = config["trainer"]["logger"]["init_args"]
    assert f"{logger['save_dir']}/{logger['name']}" == first[-1]


def test_the_first_command_shows_the_table_of_the_readme(workplace: Path) -> None:
    heading = next(line for line in README.splitlines() if line.startswith("site "))
    shown = (workplace / "first.out").read_text().splitlines()
    words = [set(line.split()) for line in shown if line.startswith("site ")]
    # its sites have longer names, which leave less room for the other columns
    assert any({"site", "eps", "lift", "H"} <= found <= set(heading.split()) for found in words)
    assert (workplace / "runs/digits_vit/version_0/config.yaml").is_file()


def test_the_first_command_ends_with_what_was_learned_and_where_to_look(workplace: Path) -> None:
    shown = (workplace / "first.out").read_text()
    assert re.search(r"EAFO: \d+ sites, \d+ updates; mean entropy .* nats; largest eps .* at ", shown)
    assert re.search(r"^ +corrected +plain\n +test_loss +\S+ +\S+$", shown, re.MULTILINE)
    commands = re.findall(r"^  (eafo-dynamic log .*)$", shown, re.MULTILINE)
    assert len(commands) == 2
    run_by_bash("\n".join(commands), workplace)


BASH = [(page, block) for page, block in blocks("bash") if page != "README.md"]


@pytest.mark.parametrize("number", range(len(BASH)), ids=[f"{page}-{n}" for n, (page, _) in enumerate(BASH)])
def test_commands_of_the_guide(number: int, workplace: Path) -> None:
    lines = BASH[number][1].splitlines()
    script = "\n".join(line for line in lines if not line.startswith(("pip install", "python examples/")))
    if ".onnx" in script:
        pytest.importorskip("onnxscript")
    run_by_bash(script, workplace)
    for line in lines:
        if line.startswith("python examples/"):  # run by tests/test_examples.py
            assert (ROOT / line.split()[1]).is_file()
    for name in re.findall(r"--out(?:put)? (\S+)", script):
        assert (workplace / name).stat().st_size > 1000


def test_installed_extras_exist() -> None:
    extras = metadata.metadata("eafo-dynamic").get_all("Provides-Extra") or []
    named = re.findall(r"(?:eafo-dynamic|\.)\[([\w,]+)\]", "".join(PAGES.values()))
    assert named
    assert {each for names in named for each in names.split(",")} <= set(extras)


def test_commands_in_the_text_of_the_readme(workplace: Path) -> None:
    inline = re.findall(r"`(eafo-dynamic [^`]*)`", README.replace("\n", " "))
    whole = [line for line in inline if not re.search(r"[A-Z]{3,}|\||\.\.\.|<", line)]
    runnable = [line for line in whole if line.split()[1] in ("sites", "rank", "shape") and len(line.split()) > 2]
    assert len(runnable) >= 2
    for line in runnable:
        run_by_bash(line, workplace)


# ---- tables


def table_rows(page: str, columns: int) -> list[list[str]]:
    rows = re.findall(r"^\| (.*) \|$", PAGES[page].replace("\\|", "¦"), re.MULTILINE)
    return [cells for row in rows if len(cells := [cell.strip() for cell in row.split(" | ")]) == columns]


def documented_options() -> dict[str, str]:
    rows = [re.match(r"\| `(\S+)` \| `(.*?)` \|", line) for line in PAGES["examples/guide/options.md"].splitlines()]
    return {row[1]: row[2] for row in rows if row}


def test_every_option_of_the_callback_is_in_the_guide_with_its_default() -> None:
    documented = documented_options()
    parameters = inspect.signature(EAFOCallback.__init__).parameters
    for name, parameter in parameters.items():
        if name != "self":
            assert documented.pop(name, "missing") == repr(parameter.default).replace("'", '"'), name
    assert documented.pop("Entropy(rate)") == str(Entropy().rate)
    assert documented.pop("Entropy(ascent)") == str(Entropy().ascent)
    assert documented.pop("Hybrid(weight)") == str(Hybrid().weight)
    assert documented == {"example": "None"}, "of the Hugging Face callback"


def test_every_option_of_the_hugging_face_callback_is_in_the_guide() -> None:
    huggingface = pytest.importorskip("eafo_dynamic.trainers.huggingface")
    names = set(inspect.signature(huggingface.EAFOTrainerCallback.__init__).parameters) - {"self"}
    assert names >= {"example", "lr", "eps_init"}
    assert names <= set(documented_options())


def test_the_tables_of_options_are_those_of_the_definitions() -> None:
    page = PAGES["examples/guide/options.md"]
    filled = runpy.run_path(str(ROOT / ".ci/options_page.py"))["filled"]
    assert page == filled(page), "run python .ci/options_page.py"
    assert filled(page.replace("distance between update rounds", "something else")) == page


def test_callback_and_options_agree_on_every_default() -> None:
    parameters = inspect.signature(EAFOCallback.__init__).parameters
    options = Options()
    for name in vars(options):
        assert parameters[name].default == getattr(options, name), name


def test_every_column_of_the_log_is_in_the_guide() -> None:
    rows = [row for row in table_rows("examples/guide/log.md", 3) if row[0].strip("`") in COLUMNS and row[0] != "event"]
    assert rows == [[f"`{each.name}`", each.unit, each.meaning] for each in COLUMNS.values()]


def test_every_event_is_in_the_guide() -> None:
    texts = re.findall(r"found\.append\(f?\"([^\"{]+)", inspect.getsource(describe_events))
    listed = [row[0].strip("`") for row in table_rows("examples/guide/log.md", 3)]
    assert len(texts) >= 8
    assert [text for text in texts if not any(each.startswith(text) for each in listed)] == []


def test_every_alert_is_in_the_guide() -> None:
    source = inspect.getsource(alerts)
    texts = re.findall(r"(?:found\[\"\w+\"\] = |found\.append\()f\"([^\"]+)\"", source)
    assert len(texts) == 6
    for text in texts:
        first, *rest = [part.strip(" ,") for part in re.split(r"\{[^}]*\}", text)]
        words = max([first, *rest], key=len)
        assert words.removesuffix(", entropy") in PAGES["examples/guide/log.md"], text


def test_exit_codes_are_in_the_guide() -> None:
    rows = {row[0]: row[1] for row in table_rows("examples/guide/options.md", 2) if row[0].isdigit()}
    assert rows == {str(code): meaning for code, meaning in EXIT_CODES.items()}


def written_texts() -> list[str]:
    """Every text in the package's code; parts that are filled in at run time are a blank."""
    texts: list[str] = []
    for path in (ROOT / "eafo_dynamic").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(p.value if isinstance(p, ast.Constant) else " " for p in node.values))  # type: ignore[misc]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_every_message_of_the_troubleshooting_page_is_written_somewhere() -> None:
    texts = written_texts()
    messages = [row[0].strip("`") for row in table_rows("examples/guide/troubleshooting.md", 2) if row[0][0] == "`"]
    assert len(messages) > 30
    unknown = []
    for message in messages:
        parts = [part.strip() for part in message.split("...") if part.strip()]
        words = [part.removesuffix(" relu_") for part in parts]
        if not any(all(word in text for word in words) for text in texts):
            unknown.append(message)
    assert unknown == []


def test_boring_model_is_what_the_troubleshooting_says() -> None:
    with pytest.raises(EAFOError, match="has no activation module to correct"):
        EAFOController.attach(BoringModel())


# ---- links


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_citation_says_what_the_package_says() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{cited["version"]}"' in project
    assert f'license = "{cited["license"]}"' in project
    assert set(cited) >= {"cff-version", "message", "title", "authors"}
    assert "2405.12954" in str(cited["references"])
