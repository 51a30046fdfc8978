"""Fine-tuning: what a file gives, what starts afresh, and every way in which a file does not fit."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from small_experiments import CONFIGS, gpt, vit
from torch import nn

from eafo_dynamic import EAFOCallback
from eafo_dynamic.cli import main
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments import MLP, Classifier, DigitsData, LanguageModel, load_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*val_dataloader.*bottleneck"),
]


def trained(folder: Path, *callbacks: Callback) -> tuple[Classifier, Path]:
    """A network after a few steps on the digits 0 to 4, and its checkpoint."""
    torch.manual_seed(0)
    task = Classifier(vit(num_classes=5), 5)
    trainer = Trainer(
        max_steps=3,
        logger=False,
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(task, DigitsData(classes=range(5)))
    trainer.save_checkpoint(folder / "run.ckpt")
    return task, folder / "run.ckpt"


def test_a_checkpoint_gives_everything_but_what_starts_afresh(tmp_path: Path) -> None:
    source, path = trained(tmp_path)
    torch.manual_seed(1)
    network = vit(num_classes=7)
    head = {name: value.clone() for name, value in network.head.state_dict().items()}
    loaded = load_weights(network, path, ["head.*"])
    given = source.model.state_dict()
    assert loaded == [name for name in given if not name.startswith("head.")]
    for name, value in network.state_dict().items():
        expected = head[name.removeprefix("head.")] if name.startswith("head.") else given[name]
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_bare_state_dict_serves_too(tmp_path: Path, prefix: str) -> None:
    source, target = MLP(4, 2), MLP(4, 2)
    torch.save({prefix + name: value for name, value in source.state_dict().items()}, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    x = torch.randn(3, 4)
    assert torch.equal(source(x), target(x))


def test_a_network_with_a_child_called_model_keeps_its_names(tmp_path: Path) -> None:
    source, target = nn.ModuleDict({"model": nn.Linear(2, 2)}), nn.ModuleDict({"model": nn.Linear(2, 2)})
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    assert torch.equal(target["model"].weight, source["model"].weight)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    source, target = gpt(), gpt()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    task = LanguageModel(target, weights=str(tmp_path / "w.pt"))
    assert task.model.head.weight is task.model.token_embedding.weight
    assert torch.equal(target.head.weight, source.head.weight)


def broken(name: str, folder: Path) -> Path:
    path = folder / name
    if name == "text.ckpt":
        path.write_text("not a checkpoint")
    elif name == "empty.ckpt":
        path.write_bytes(b"")
    elif name == "nothing.ckpt":
        torch.save({"state_dict": {}}, path)
    elif name == "other.ckpt":
        torch.save({"encoder.weight": torch.zeros(2, 2)}, path)
    elif name == "code.ckpt":
        torch.save({"state_dict": {"0.weight": Path("executed")}}, path)
    return path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.ckpt", "no such file. Run the pretraining first"),
        ("text.ckpt", "not a file of weights"),
        ("empty.ckpt", "not a file of weights"),
        ("nothing.ckpt", "the file holds no weights of a network"),
        ("other.ckpt", "the file holds no weights of a network"),
        ("code.ckpt", "not a file of weights"),
    ],
)
def test_files_that_are_no_weights(name: str, words: str, tmp_path: Path) -> None:
    path = broken(name, tmp_path)
    with pytest.raises(ConfigError, match=re.escape(f"weights={str(path)!r}: {words}")) as caught:
        load_weights(MLP(4, 2), path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("network", "fresh", "words"),
    [
        (lambda: MLP(4, 3, [8]), [], r"the file has 3.weight of shape (2, 8), the network (3, 8)"),
        (lambda: MLP(4, 2, [8, 8]), [], "the file lacks 5.weight"),
        (lambda: MLP(4, 2, []), [], "has 3.weight, which the network has not"),
        (lambda: MLP(4, 2, [8]), ["hed.*"], "fresh='hed.*': matches nothing in the network"),
        (lambda: MLP(4, 2, [8]), ["(3"], "fresh='(3': not a regular expression"),
    ],
)
def test_weights_that_do_not_fit(network: Any, fresh: list[str], words: str, tmp_path: Path) -> None:
    torch.save(MLP(4, 2, [8]).state_dict(), tmp_path / "w.pt")
    target = network()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_weights(target, tmp_path / "w.pt", fresh)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_fresh_without_weights_is_said() -> None:
    with pytest.raises(ConfigError, match=r"fresh=.*no weights to start from"):
        Classifier(vit(), 10, fresh=["head.*"])


def test_weights_of_a_corrected_run_are_refused_with_the_reason(tmp_path: Path) -> None:
    _, path = trained(tmp_path, EAFOCallback(verbose=False, save_log=False))
    with pytest.raises(ConfigError, match="EAFOCallback attached: pretrain without it"):
        load_weights(vit(num_classes=5), path)


def test_a_finetuned_checkpoint_loads_without_the_pretrained_file(tmp_path: Path) -> None:
    _, path = trained(tmp_path)
    task = Classifier(vit(num_classes=5), 5, weights=str(path))
    assert not {"weights", "fresh"} & set(task.hparams)


class AtStart(Callback):
    """Keeps the state of the network as it is when training begins, after every setup."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.state = {name: value.clone() for name, value in pl_module.model.state_dict().items()}


def test_the_callback_corrects_a_network_that_starts_from_weights(tmp_path: Path) -> None:
    source, path = trained(tmp_path)
    task = Classifier(vit(num_classes=5), 5, weights=str(path), fresh=["head.*"])
    start = AtStart()
    (tmp_path / "tuned").mkdir()
    trainer = Trainer(
        max_steps=2,
        logger=False,
        accelerator="cpu",
        callbacks=[EAFOCallback(verbose=False, save_log=False), start],
        default_root_dir=tmp_path / "tuned",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(task, DigitsData(classes=range(5, 10)))
    corrections = [name for name in start.state if "eafo_" in name]
    assert corrections
    for name, value in source.model.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(start.state[name], value), name


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["eafo-dynamic", *arguments])
    return main()


SHORT = ["--trainer.max_steps=2", "--trainer.max_epochs=1", "--trainer.limit_val_batches=1"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]


@pytest.mark.parametrize("task", ["digits_vit", "stdlib_gpt"])
def test_pretraining_then_finetuning_from_yaml(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune = ["fit", f"--config={CONFIGS / f'{task}_finetune.yaml'}", *SHORT, *QUIET]
    assert run(monkeypatch, tmp_path, *finetune) == 2, "the pretraining has not been run"
    assert f"weights='runs/{task}_pretrain/pretrained.ckpt': no such file" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists(), "said before anything runs"

    assert run(monkeypatch, tmp_path, "fit", f"--config={CONFIGS / f'{task}_pretrain.yaml'}", *SHORT, *QUIET) == 0
    given = torch.load(tmp_path / f"runs/{task}_pretrain/pretrained.ckpt", weights_only=True)["state_dict"]
    assert run(monkeypatch, tmp_path, *finetune, "--model.init_args.lr=1e-9") == 0
    assert "activation sites wrapped" in capsys.readouterr().out
    (path,) = (tmp_path / f"runs/{task}_finetune").rglob("*.ckpt")
    tuned = torch.load(path, weights_only=True)["state_dict"]
    compared = [name for name in given if name.startswith("model.") and not name.startswith("model.head")]
    assert len(compared) > 20
    for name in compared:  # two steps with next to no learning rate
        torch.testing.assert_close(tuned[name], given[name], atol=1e-6, rtol=0)
