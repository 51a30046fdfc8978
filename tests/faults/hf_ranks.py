"""The Hugging Face Trainer on real ranks; imported in the children."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

RESUMED: dict[str, Any] = {"update_every_n_steps": 5, "collect_every_n_steps": 1, "rollback_factor": 1.01}


class Points(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.x = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.x[index, :3].argmax()}


class Classifier(nn.Module):
    """Calls its second activation in every second step only: no parameter of the plain model goes unused."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.first, self.second = nn.GELU(), nn.Tanh()
        self.calls = 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.two(self.first(self.one(x)))
        self.calls += 1
        if self.calls % 2:
            hidden = self.second(hidden)
        logits = self.three(hidden)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def train(folder: Path, rank: int, options: dict[str, Any]) -> None:
    """Trains one rank, writes down what came of it, and leaves."""
    os.environ["RANK"] = str(rank)
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from eafo_dynamic.trainers.huggingface import EAFOTrainerCallback

    stops_at, resume = options.pop("stops_at", None), options.pop("resume", False)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == stops_at:
                control.should_training_stop = True

    torch.manual_seed(0)
    torch.set_num_threads(1)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=3,
        report_to="none",
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    callback = EAFOTrainerCallback(verbose=False, **RESUMED)
    model = Classifier()
    model.calls = 3 if resume else 0
    trainer = Trainer(model, args, train_dataset=Points(), callbacks=[callback, Stop()])
    trainer.train(resume_from_checkpoint=resume)
    torch.save(model.state_dict(), folder / f"final{rank}.pt")
    torch.save({"rows": list(callback.controller.records)}, folder / f"rows{rank}.pt")  # pyright: ignore
    with contextlib.suppress(Exception):
        torch.distributed.destroy_process_group()
    raise SystemExit(0)
