"""The recipes of the guide, run as they stand, each where its packages are installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "examples/guide/recipes.md").read_text(encoding="utf-8")
RECIPES = {
    section.partition("\n")[0]: block
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
}
NEEDS = {
    "LoRA with PEFT": ("peft", "transformers", "accelerate"),
    "Supervised fine-tuning with TRL": ("trl", "transformers", "accelerate"),
    "Preferences with TRL (DPO)": ("trl", "transformers", "accelerate"),
    "A loop with accelerate": ("accelerate",),
    "Sweeps with Optuna": ("optuna",),
    "Sweeps with Hydra": ("hydra",),
    "Quantisation with torchao": ("torchao",),
    "Serving with ONNX Runtime": ("onnxruntime", "onnxscript"),
    "Fine-tuning a model of timm": ("torchvision", "timm"),
}

pytestmark = [
    # of the tools, about themselves
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore:.*TracerWarning"),
]


def need(recipe: str) -> None:
    """Skips a recipe, naming the package that is missing."""
    missing = [name for name in NEEDS.get(recipe, ()) if find_spec(name) is None]
    if "torchvision" in missing:
        pytest.skip(f"{recipe} needs torchvision, of the same build as torch; see the recipe")
    if missing:
        pytest.skip(f"{recipe} needs {', '.join(missing)}: pip install 'eafo-dynamic[recipes]'")


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 2))


WORDS = ["<pad>", "<eos>", "<unk>", "a", "b", "c", "d", "good", "bad", "yes", "no"]


def make_base() -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config)


def make_tokenizer() -> Any:
    import tokenizers
    import transformers

    words = tokenizers.models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def arguments(kind: Any, **more: Any) -> Any:
    few = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    return kind(output_dir="run", **few, **quiet, **more)


X = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[3, 4, 5, 6], [4, 3, 6, 5]])


def run(recipe: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **names: Any) -> dict[str, Any]:
    """Runs a snippet in a folder of its own and returns its variables."""
    need(recipe)
    monkeypatch.chdir(folder)
    given: dict[str, Any] = {
        "torch": torch, "make_net": make_net, "make_base": make_base, "x": X, "y": torch.arange(8) % 2, "ids": IDS,
        **names,
    }  # fmt: skip
    exec(compile(RECIPES[recipe], "recipes.md", "exec"), given)
    return given


def assert_equal_logits(one: Any, two: Any) -> None:
    with torch.no_grad():
        assert torch.equal(one.eval()(IDS).logits, two.eval()(IDS).logits)


def assert_corrected(model: nn.Module) -> None:
    """Corrections act: without them the model would compute something else."""
    from eafo_dynamic import disabled

    with torch.no_grad():
        act = model.eval()(IDS).logits
        with disabled(model):
            assert not torch.equal(model(IDS).logits, act)


def test_every_recipe_is_one_of_these() -> None:
    tested = {name.removeprefix("test_").replace("_", " ") for name in globals() if name.startswith("test_")} - {
        "every recipe is one of these"
    }
    assert {re.sub(r"[^\w ]", "", recipe).replace(".", "").lower() for recipe in RECIPES} == tested


def test_corrections_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run("Corrections in a file of their own", tmp_path, monkeypatch)
    assert torch.equal(made["served"](X), made["net"](X))


def test_lora_with_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("LoRA with PEFT")
    import transformers

    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 16
    args = arguments(transformers.TrainingArguments)
    made = run("LoRA with PEFT", tmp_path, monkeypatch, args=args, data=data)
    assert_equal_logits(made["served"], made["model"])
    assert_corrected(made["served"])


def test_supervised_finetuning_with_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = "Supervised fine-tuning with TRL"
    need(recipe)
    import datasets
    import trl

    names = {"sft_args": arguments(trl.SFTConfig, bf16=False), "tokenizer": make_tokenizer()}
    texts = datasets.Dataset.from_list([{"text": "a b c good"}] * 16)
    made = run(recipe, tmp_path, monkeypatch, texts=texts, **names)
    assert_equal_logits(made["served"], made["model"])
    assert_corrected(made["served"])


def test_preferences_with_trl_dpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = "Preferences with TRL (DPO)"
    need(recipe)
    import datasets
    import trl

    names = {"dpo_args": arguments(trl.DPOConfig, bf16=False), "tokenizer": make_tokenizer()}
    pairs = datasets.Dataset.from_list([{"prompt": "a b", "chosen": " good yes", "rejected": " bad no"}] * 16)
    made = run(recipe, tmp_path, monkeypatch, pairs=pairs, **names)
    assert_equal_logits(made["served"], made["model"])
    assert_corrected(made["served"])


def test_a_loop_with_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run("A loop with accelerate", tmp_path, monkeypatch)
    assert torch.equal(made["served"](X), made["net"](X))


def test_sweeps_with_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run("Sweeps with Optuna", tmp_path, monkeypatch)
    assert len(made["study"].trials) == 3
    assert {"eps_init", "policy"} == set(made["study"].best_params)


@pytest.mark.slow
def test_sweeps_with_hydra(tmp_path: Path) -> None:
    recipe = "Sweeps with Hydra"
    need(recipe)
    (tmp_path / "sweep.py").write_text(RECIPES[recipe])
    command = [sys.executable, "-W", "ignore", "sweep.py", "--multirun", "eafo.eps_init=0.0,0.1"]
    done = subprocess.run(
        [*command, "eafo.policy=learned,hybrid"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("eafo_dynamic.safetensors"))) == 4


def test_quantisation_with_torchao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run("Quantisation with torchao", tmp_path, monkeypatch)
    assert "torchao" in type(made["served"][0].weight).__module__
    from eafo_dynamic import EAFOController

    exact = make_net()
    EAFOController.attach(exact, X, eps_init=0.1)
    torch.testing.assert_close(made["served"](X), exact.eval()(X), rtol=0.02, atol=0.02)


def test_serving_with_onnx_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run("Serving with ONNX Runtime", tmp_path, monkeypatch)
    expected: Tensor = made["net"](X)
    torch.testing.assert_close(torch.from_numpy(made["served"]), expected.detach(), rtol=1e-5, atol=1e-5)


def test_serving_a_program_of_torchexport(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run("Serving a program of torch.export", tmp_path, monkeypatch)
    for batch in (X, X[:3]):
        torch.testing.assert_close(made["served"](input=batch), made["net"](batch), rtol=1e-5, atol=1e-6)


def test_finetuning_a_model_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run("Fine-tuning a model of timm", tmp_path, monkeypatch)
    images = made["images"]
    assert torch.equal(made["served"].eval()(images), made["net"].eval()(images))
