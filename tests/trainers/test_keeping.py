"""What was learned under transformers and PEFT gets to where it is used: train, save, load, equal to the bit."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from torch import Tensor, nn

from eafo_dynamic import (
    EAFOController,
    apply_from_checkpoint,
    find_sites,
    load_corrections,
    load_merged,
    merge,
    save_corrections,
    unwrap,
    wrap,
)
from eafo_dynamic.apply.sitelist import site_tensors
from eafo_dynamic.apply.surgery import is_wrapped

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from eafo_dynamic.trainers.huggingface import EAFOTrainerCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

IDS = torch.arange(24).reshape(3, 8) % 50


def config() -> Any:
    return transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )


def gpt() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config()).eval()


def corrected() -> Any:
    model = gpt()
    wrap(model, find_sites(model, IDS), 0.2)
    with torch.no_grad():
        for k, tensor in enumerate(site_tensors(model).values()):
            tensor.add_(0.02 * (k % 5 + 1))
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def trainer(folder: Path, model: Any, *callbacks: Any, **options: Any) -> Any:
    arguments: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 3,
    }
    args = transformers.TrainingArguments(output_dir=str(folder), **{**arguments, **options})
    data = [{"input_ids": IDS[k % 3], "labels": IDS[k % 3]} for k in range(32)]
    return transformers.Trainer(model, args, train_dataset=data, eval_dataset=data[:4], callbacks=list(callbacks))


def callback(**options: Any) -> EAFOTrainerCallback:
    return EAFOTrainerCallback(update_every_n_steps=2, eps_init=0.2, verbose=False, **options)


def in_a_fresh_process(code: str, expected: Tensor, folder: Path) -> None:
    torch.save(expected, folder / "expected.pt")
    whole = f"""
import torch, transformers
from eafo_dynamic import apply_from_checkpoint, load_corrections, load_merged
ids = torch.arange(24).reshape(3, 8) % 50
{code}
with torch.no_grad():
    assert torch.equal(model.eval()(ids).logits, torch.load({str(folder / "expected.pt")!r}))
"""
    done = fresh.python(whole)
    assert done.returncode == 0, done.stderr


class TestPretrained:
    def test_a_whole_model(self, tmp_path: Path) -> None:
        model = corrected()
        model.save_pretrained(tmp_path)
        assert (tmp_path / "eafo_dynamic.md").is_file()
        loaded = load_corrections(transformers.GPT2LMHeadModel.from_pretrained(tmp_path), tmp_path)
        assert torch.equal(logits(loaded), logits(model))
        assert "save_pretrained" not in vars(unwrap(copy.deepcopy(model)))

    @pytest.mark.slow
    @pytest.mark.parametrize("shard", ["1KB", "5GB"])
    def test_a_fresh_process(self, shard: str, tmp_path: Path) -> None:
        model = corrected()
        model.save_pretrained(tmp_path, max_shard_size=shard)
        assert (tmp_path / "model.safetensors").exists() == (shard == "5GB")
        source = repr(str(tmp_path))
        for code in (
            f"model = load_corrections(transformers.AutoModelForCausalLM.from_pretrained({source}), {source})",
            f"config = transformers.AutoConfig.from_pretrained({source})\n"
            f"model = apply_from_checkpoint(transformers.GPT2LMHeadModel(config), {source})",
        ):
            in_a_fresh_process(code, logits(model), tmp_path)

    def test_the_report_of_a_plain_load_says_what_to_do(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        corrected().save_pretrained(tmp_path)
        logger = logging.getLogger("transformers.modeling_utils")
        logger.addHandler(caplog.handler)
        try:
            transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
        finally:
            logger.removeHandler(caplog.handler)
        assert "eafo_dynamic.load_corrections(model, folder)" in caplog.text

    def test_a_merged_model(self, tmp_path: Path) -> None:
        merged = merge(corrected())
        merged.save_pretrained(tmp_path)
        loaded = load_merged(transformers.GPT2LMHeadModel.from_pretrained(tmp_path), tmp_path)
        assert torch.equal(logits(loaded), logits(merged))
        loaded.save_pretrained(tmp_path / "again")
        again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again")
        assert torch.equal(logits(load_merged(again, tmp_path / "again")), logits(merged))
        source = repr(str(tmp_path))
        code = f"model = load_merged(transformers.GPT2LMHeadModel.from_pretrained({source}), {source})"
        in_a_fresh_process(code, logits(merged), tmp_path)

    def test_a_model_inside_of_another(self, tmp_path: Path) -> None:
        holder = nn.ModuleDict({"body": gpt()})
        wrap(holder, find_sites(holder["body"], IDS) and find_sites(holder), 0.3)
        holder["body"].save_pretrained(tmp_path)
        loaded = load_corrections(transformers.GPT2LMHeadModel.from_pretrained(tmp_path), tmp_path)
        assert torch.equal(logits(loaded), logits(holder["body"]))


class TestTrainer:
    def test_a_checkpoint_goes_to_inference(self, tmp_path: Path) -> None:
        model = gpt()
        trainer(tmp_path, model, callback()).train()
        folder = tmp_path / "checkpoint-4"
        for source in (folder, folder / "model.safetensors"):
            assert torch.equal(logits(apply_from_checkpoint(gpt(), source)), logits(model))
        plain = transformers.GPT2LMHeadModel.from_pretrained(folder)
        assert not torch.equal(logits(plain), logits(model))
        assert torch.equal(logits(load_corrections(plain, folder)), logits(model))

    def test_a_checkpoint_of_version_0_1_0(self, tmp_path: Path) -> None:
        """Without the file of corrections; the state has the names of the sites."""
        model = gpt()
        trainer(tmp_path, model, callback()).train()
        folder = tmp_path / "checkpoint-4"
        (folder / "eafo_dynamic.safetensors").unlink()
        assert torch.equal(logits(apply_from_checkpoint(gpt(), folder)), logits(model))

    def test_a_module_that_is_none_of_transformers(self, tmp_path: Path) -> None:
        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 50))

            def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
                out = self.net(input_ids)
                loss = nn.functional.cross_entropy(out.flatten(0, 1), input_ids.flatten())
                return {"loss": loss, "logits": out}

        model = Plain()
        trainer(tmp_path, model, callback()).train()
        fresh = apply_from_checkpoint(Plain(), tmp_path / "checkpoint-4")
        assert torch.equal(fresh(IDS)["logits"], model(IDS)["logits"])


class TestAdapters:
    """LoRA adapters of PEFT."""

    @pytest.fixture(autouse=True)
    def peft(self) -> Any:
        return pytest.importorskip("peft")

    def adapted(self, peft: Any, model: Any) -> Any:
        torch.manual_seed(1)
        adapter = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", init_lora_weights=False)
        return peft.get_peft_model(model, adapter).eval()

    def test_an_adapter_of_a_corrected_model_is_saved_with_its_corrections(self, peft: Any, tmp_path: Path) -> None:
        model = self.adapted(peft, corrected())
        assert "save_pretrained" not in vars(model)
        model.save_pretrained(tmp_path)
        assert (tmp_path / "adapter_model.safetensors").is_file()
        loaded = peft.PeftModel.from_pretrained(gpt(), tmp_path)
        load_corrections(loaded, tmp_path)
        assert torch.equal(logits(loaded), logits(model))
        base = load_corrections(gpt(), tmp_path)
        assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path)), logits(model))

    def test_a_corrected_adapter_too(self, peft: Any, tmp_path: Path) -> None:
        model = self.adapted(peft, gpt())
        wrap(model, find_sites(model, IDS), 0.2)
        model.save_pretrained(tmp_path)
        loaded = load_corrections(peft.PeftModel.from_pretrained(gpt(), tmp_path), tmp_path)
        assert torch.equal(logits(loaded), logits(model))
        merged = load_corrections(peft.PeftModel.from_pretrained(gpt(), tmp_path).merge_and_unload(), tmp_path)
        torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)

    def test_an_unwrapped_model_leaves_no_file(self, peft: Any, tmp_path: Path) -> None:
        self.adapted(peft, unwrap(corrected())).save_pretrained(tmp_path)
        assert not (tmp_path / "eafo_dynamic.safetensors").exists()

    @pytest.mark.parametrize("first", ["attach", "adapt"])
    def test_amplitudes_train_whichever_comes_first(self, first: str, peft: Any) -> None:
        model = gpt()
        if first == "attach":
            controller = EAFOController.attach(model, IDS, eps_init=0.2)
            model = self.adapted(peft, model)
        else:
            model = self.adapted(peft, model)
            controller = EAFOController.attach(model, IDS, eps_init=0.2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = {name: value.detach().clone() for name, value in controller.amplitudes.items()}
        for step in (1, 2):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            controller.step(step)
        assert before
        for name, value in controller.amplitudes.items():
            assert value.requires_grad
            assert not torch.equal(value, before[name])

    def test_what_a_user_has_frozen_stays_frozen(self, peft: Any) -> None:
        controller = EAFOController.attach(gpt(), IDS)
        for amplitude in controller.amplitudes.values():
            amplitude.requires_grad_(False)
        controller.step(1)
        assert not any(amplitude.requires_grad for amplitude in controller.amplitudes.values())

    @pytest.mark.parametrize("resumed", [False, True])
    def test_a_trainer_with_an_adapter(self, resumed: bool, peft: Any, tmp_path: Path) -> None:
        model = self.adapted(peft, gpt())
        trainer(tmp_path, model, callback()).train()
        if resumed:
            whole, model = model, self.adapted(peft, gpt())
            trainer(tmp_path, model, callback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
            torch.testing.assert_close(logits(model), logits(whole), rtol=1e-5, atol=1e-5)
        folder = tmp_path / "checkpoint-4"
        fresh = load_corrections(peft.PeftModel.from_pretrained(gpt(), folder), folder)
        assert torch.equal(logits(fresh), logits(model))
        only = apply_from_checkpoint(peft.PeftModel.from_pretrained(gpt(), folder), folder)
        assert torch.equal(logits(only), logits(model))

    def test_the_best_model_has_its_corrections(self, peft: Any, tmp_path: Path) -> None:
        model = self.adapted(peft, gpt())
        options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 1.0}
        run = trainer(tmp_path, model, callback(), **options)
        run.train()
        folder = Path(run.state.best_model_checkpoint)
        fresh = load_corrections(peft.PeftModel.from_pretrained(gpt(), folder), folder)
        assert torch.equal(logits(fresh), logits(model))


def test_corrections_of_a_part_are_saved_from_the_whole(tmp_path: Path) -> None:
    model = corrected()
    save_corrections(model.transformer, tmp_path)
    fresh = gpt()
    load_corrections(fresh, tmp_path)
    assert is_wrapped(fresh)
    assert torch.equal(logits(fresh), logits(model))
