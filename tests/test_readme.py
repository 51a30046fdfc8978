"""What README and the examples show is run as they show it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eafo_dynamic.callback import EAFOCallback
from eafo_dynamic.options import Options

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:.*bottleneck")


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,))), 16)


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


def test_the_plain_loop_snippet() -> None:
    (snippet,) = [s for s in SNIPPETS if "EAFOController.attach" in s]
    model = Tiny().net
    x, y = torch.randn(8, 4), torch.randint(0, 2, (8,))
    names: dict[str, Any] = {
        "torch": torch, "model": model, "example_input": x[:2], "batches": [(x, y)] * 3,
        "loss_fn": nn.functional.cross_entropy,
    }  # fmt: skip
    exec(snippet, names)
    assert len(names["controller"].records) == 2


def test_every_option_of_the_callback_is_in_the_table_with_its_default() -> None:
    import inspect

    rows = re.findall(r"^\| (`.*?`) \| (.*?) \| .* \|$", README, re.MULTILINE)
    documented = {name.strip("` "): default for names, default in rows for name in names.split(",")}
    parameters = inspect.signature(EAFOCallback.__init__).parameters
    missing = [name for name in parameters if name != "self" and name not in documented and f"`{name}`" not in README]
    assert missing == []
    for name in ("eps_init", "max_eps", "max_delta", "update_every_n_steps", "samples_per_site", "momentum"):
        assert documented[name].strip('`"') == str(parameters[name].default)
        assert getattr(Options(), name) == parameters[name].default


def test_callback_and_options_agree_on_every_default() -> None:
    import inspect

    parameters = inspect.signature(EAFOCallback.__init__).parameters
    options = Options()
    for name in vars(options):
        assert parameters[name].default == getattr(options, name), name


def test_the_two_commands_name_what_exists() -> None:
    first, second = (shlex.split(command) for command in COMMANDS[:2])
    assert (ROOT / first[first.index("--config") + 1]).is_file()
    assert first[:5] == ["pip", "install", "-c", "constraints.txt", "-e"]
    assert second[-1] == "pytest"
    assert COMMANDS[1].strip() in (ROOT / ".ci/run").read_text(), "CI runs the README's own test command"
    config = yaml.safe_load((ROOT / first[first.index("--config") + 1]).read_text())
    logger = config["trainer"]["logger"]["init_args"]
    assert f"{logger['save_dir']}/{logger['name']}" == first[-1]


def test_boring_model_is_what_the_troubleshooting_says() -> None:
    from eafo_dynamic import EAFOController, EAFOError

    with pytest.raises(EAFOError, match="has no activation"):
        EAFOController.attach(BoringModel())
