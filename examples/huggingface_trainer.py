"""The Hugging Face Trainer: one callback, the model's code untouched.

A small GPT-2 from its configuration, with random weights, learns the bytes of Python's own standard library.
Needs: pip install transformers accelerate
Run: python examples/huggingface_trainer.py
"""

from __future__ import annotations

import inspect
import json
import tempfile
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from eafo_dynamic import EAFOTrainerCallback
from eafo_dynamic.records import CorrectionLog


class Bytes(Dataset[dict[str, torch.Tensor]]):
    """Blocks of bytes of one module's source."""

    def __init__(self, block: int = 64) -> None:
        text = torch.tensor(list(inspect.getsource(json.decoder).encode()))
        self.blocks = text[: len(text) // block * block].view(-1, block)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def main(output_dir: str | Path, steps: int = 60) -> CorrectionLog:
    """Trains and returns the correction log."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    args = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    callback = EAFOTrainerCallback(update_every_n_steps=20)
    Trainer(GPT2LMHeadModel(config), args, train_dataset=Bytes(), callbacks=[callback]).train()
    return CorrectionLog.load(output_dir)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for row in main(folder).rows:
            print(f"step {row['step']:3d}  {row['site']}  eps {row['eps']:+.4f}  entropy {row['entropy']:.4f} nats")
