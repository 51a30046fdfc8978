"""The callback on a real Hugging Face Trainer: its own parameter group, its log, and a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eafo_dynamic.errors import ConfigError, EAFOError
from eafo_dynamic.records import CorrectionLog

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from eafo_dynamic.trainers.huggingface import EAFOTrainerCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.ids = torch.randint(0, 50, (64, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def make(folder: Path, steps: int, callback: EAFOTrainerCallback, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    arguments: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 4,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    args = transformers.TrainingArguments(output_dir=str(folder), **{**arguments, **options})
    model = transformers.GPT2LMHeadModel(config)
    return transformers.Trainer(model, args, train_dataset=Tokens(), callbacks=[callback])


def test_eps_learns_in_a_group_of_its_own_and_is_logged(tmp_path: Path) -> None:
    callback = EAFOTrainerCallback(update_every_n_steps=4, lr_multiple=3.0)
    trainer = make(tmp_path, 12, callback)
    trainer.train()
    log = CorrectionLog.load(tmp_path)
    assert log.steps == [1, 2, 4, 8, 12]
    assert log.sites == ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]
    assert all(abs(row["eps"] - 0.01) > 1e-4 for row in log.last())
    groups = trainer.optimizer.param_groups
    eps = [group for group in groups if str(group.get("name", "")).startswith("eafo")]
    assert len(eps) == 1
    assert eps[0]["weight_decay"] == 0.0
    assert eps[0]["lr"] == pytest.approx(3 * groups[0]["lr"])


def test_a_second_training_starts_anew(tmp_path: Path) -> None:
    callback = EAFOTrainerCallback(update_every_n_steps=4)
    trainer = make(tmp_path, 10, callback)
    found: list[list[tuple[int, int]]] = []
    for _ in range(2):
        trainer.train()
        assert callback.controller is not None
        found.append([(row["step"], row["n"]) for row in callback.controller.records])
        callback.controller.records.clear()
    assert found[0] == found[1] and {step for step, _ in found[0]} == {1, 2, 4, 8}


def test_gradient_accumulation_counts_optimiser_steps(tmp_path: Path) -> None:
    callback = EAFOTrainerCallback(update_every_n_steps=2)
    make(tmp_path, 4, callback, gradient_accumulation_steps=2).train()
    assert CorrectionLog.load(tmp_path).steps == [1, 2, 4]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4}
    options = {"update_every_n_steps": 3, "collect_every_n_steps": 1}
    whole = make(tmp_path / "whole", 8, EAFOTrainerCallback(**options), **saving)
    whole.train()
    # the schedule depends on the number of steps, so the first part is stopped, not planned shorter
    stopped = make(tmp_path / "parts", 8, EAFOTrainerCallback(**options), **saving)
    stopped.add_callback(_StopAt(4))
    stopped.train()
    resumed = make(tmp_path / "parts", 8, EAFOTrainerCallback(**options), **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    for (key, one), two in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6, msg=key)
    rows = [CorrectionLog.load(tmp_path / name).rows for name in ("whole", "parts")]
    assert [(row["step"], row["site"]) for row in rows[0]] == [(row["step"], row["site"]) for row in rows[1]]


class _StopAt(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


def test_bad_options_and_a_late_callback_are_clear() -> None:
    with pytest.raises(ConfigError, match="policy='x'"):
        EAFOTrainerCallback(policy="x")
    with pytest.raises(EAFOError, match="pass it in callbacks"):
        EAFOTrainerCallback().on_step_end(None, None, None)
