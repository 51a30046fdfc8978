"""Preference fine-tuning with transformers: the loss by hand, the file as users write it, a tiny GPT-2 from YAML."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_experiments import CONFIGS

from eafo_dynamic.cli import main
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.experiments import PreferenceData, PreferenceTask, causal_lm
from eafo_dynamic.experiments.preferences.dpo import dpo_loss, sequence_log_prob
from eafo_dynamic.records import CorrectionLog

pytest.importorskip("transformers")
TINY = {
    "vocab_size": 256,
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def write_pairs(path: Path, n: int = 40) -> Path:
    lines = [{"prompt": f"Question {k}? ", "chosen": "yes" * (1 + k % 3), "rejected": "é no"} for k in range(n)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def ready(path: Path, **options: Any) -> PreferenceData:
    data = PreferenceData(str(path), tokenizer="bytes", **{"max_length": 32, "batch_size": 4, **options})
    data.setup("fit")
    return data


def test_log_probability_of_an_answer_token_by_token() -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(1, 5, 7), torch.tensor([[3, 1, 4, 6, 0]])
    answer = torch.tensor([[False, False, True, True, False]])
    p = logits[0].softmax(-1)
    expected = math.log(p[1, 4]) + math.log(p[2, 6])
    assert sequence_log_prob(logits, tokens, answer).item() == pytest.approx(expected, rel=1e-5)


def test_dpo_loss() -> None:
    margin = torch.tensor([0.0, 2.0])
    assert dpo_loss(margin).item() == pytest.approx((math.log(2) + math.log(1 + math.exp(-2))) / 2)


def test_pairs_hold_prompt_and_answer(tmp_path: Path) -> None:
    data = ready(write_pairs(tmp_path / "p.jsonl"))
    assert [len(part) for part in (data.train_data, data.val_data, data.test_data)] == [32, 4, 4]
    seen = set()
    for part in (data.train_data, data.val_data, data.test_data):
        for pair in part:
            tokens, answer = pair["rejected"]["tokens"], pair["rejected"]["answer"]
            assert bytes(tokens[answer].tolist()).decode() == "é no"
            seen.add(bytes(tokens[: int(answer.nonzero()[0])].tolist()).decode())
    assert seen == {f"Question {k}? " for k in range(40)}


def test_long_prompts_lose_their_beginning_and_long_answers_their_end(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "abcdef", "chosen": "12", "rejected": "123456789"}) + "\n")
    data = PreferenceData(str(path), tokenizer="bytes", max_length=5)
    with pytest.raises(ConfigError, match="too few for three parts"):
        data.setup("fit")
    path.write_text(path.read_text() * 10)
    pair = ready(path, max_length=5).train_data[0]
    assert bytes(pair["chosen"]["tokens"].tolist()) == b"def12"
    assert bytes(pair["rejected"]["tokens"].tolist()) == b"f1234"
    assert pair["rejected"]["answer"].tolist() == [False, True, True, True, True]


def test_the_reference_is_the_model_before_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = PreferenceTask(causal_lm(config=TINY)).eval()
    logged: dict[str, Any] = {}
    task.log_dict = lambda values, **options: logged.update(values)
    batch = next(iter(ready(write_pairs(tmp_path / "p.jsonl")).train_dataloader()))
    assert task.evaluate(batch, "val").item() == pytest.approx(math.log(2))
    assert logged["val_margin"].item() == 0.0
    assert not [name for name in task.state_dict() if "reference" in name]
    with torch.no_grad():
        task.model.lm_head.weight.mul_(1.5)
    assert task.evaluate(batch, "val").item() != pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"),
        ("{", "line 1 is not JSON"),
        ('{"prompt": "a", "chosen": "b"}', "line 1 lacks a text prompt, chosen or rejected"),
        ('{"prompt": "a", "chosen": "b", "rejected": ""}', "line 1 lacks"),
        ("[1]", "line 1 lacks"),
    ],
)
def test_files_that_are_no_preferences(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        PreferenceData(str(path))


def test_options_that_cannot_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="not exactly one of them"):
        causal_lm()
    with pytest.raises(ConfigError, match="transformers cannot load it"):
        causal_lm(str(tmp_path))
    with pytest.raises(ConfigError, match=r"beta=0\.0"):
        PreferenceTask(torch.nn.Linear(1, 1), beta=0.0)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install transformers"):
        causal_lm("gpt2")


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["eafo-dynamic", *arguments])
    return main()


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning", "ignore:The number of training batches")
def test_gpt2_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((CONFIGS / "gpt2_finetune.yaml").read_text())
    config["model"]["init_args"]["model"]["init_args"] = {"config": TINY}  # the only change: no download
    config["trainer"] |= {"max_steps": 2, "enable_progress_bar": False, "accelerator": "cpu"}
    config["data"]["init_args"] |= {"tokenizer": "bytes", "max_length": 32}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    assert run(monkeypatch, tmp_path, "fit", "--config=tiny.yaml") == 2
    assert "error: path='data/preferences.jsonl': no such file" in capsys.readouterr().err
    write_pairs(tmp_path / "data/preferences.jsonl")
    assert run(monkeypatch, tmp_path, "fit", "--config=tiny.yaml") == 0
    sites = CorrectionLog.load(tmp_path / "runs/gpt2_finetune").sites
    assert sorted(sites) == [f"model.transformer.h.{layer}.mlp.act" for layer in (0, 1)], (
        "not the reference, not the loss"
    )
