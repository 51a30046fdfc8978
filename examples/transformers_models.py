"""transformers models, made from a configuration: GPT-2 and ViT.

Their activations are modules of the library's own (NewGELUActivation, GELUActivation), and are found by their classes.
Both train in a plain loop here; with the library's own Trainer see huggingface_trainer.py.

Needs: pip install transformers
Run: python examples/transformers_models.py
"""

from __future__ import annotations

import inspect
import json
from typing import Any

import torch
from sklearn.datasets import load_digits
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, ViTConfig, ViTForImageClassification

from eafo_dynamic import EAFOController, own_group


def gpt2() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A GPT-2 of three layers, and bytes of a module of Python's standard library."""
    config = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    text = torch.tensor(list(inspect.getsource(json.decoder).encode()))
    blocks = text[: len(text) // 64 * 64].view(-1, 64)
    return GPT2LMHeadModel(config), {"input_ids": blocks, "labels": blocks}


def vit() -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A ViT of three layers, and scikit-learn's handwritten digits."""
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, num_labels=10,
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    )  # fmt: skip
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return ViTForImageClassification(config), {"pixel_values": pixels, "labels": torch.tensor(labels)}


def train(model: PreTrainedModel, data: dict[str, torch.Tensor], steps: int) -> EAFOController:
    """A plain loop over random batches."""
    controller = EAFOController.attach(model, update_every_n_steps=20)  # before the optimiser is made
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    own_group([optimizer], controller.amplitudes, model)  # eps without weight decay
    model.train()
    for step in range(1, steps + 1):
        rows = torch.randint(len(data["labels"]), (32,))
        optimizer.zero_grad()
        model(**{name: values[rows] for name, values in data.items()}).loss.backward()
        optimizer.step()
        controller.step(step)
    return controller


def main(steps: int = 200) -> dict[str, Any]:
    """Trains both; returns their controllers by name."""
    torch.manual_seed(0)
    controllers = {}
    for make in (gpt2, vit):
        controller = controllers[make.__name__] = train(*make(), steps)
        print(f"{make.__name__}: {len(controller.report.wrapped)} sites")
        for row in list(controller.records)[-len(controller.report.wrapped) :]:
            print(f"  {row['site']}  eps {row['eps']:+.4f}  entropy {row['entropy']:.4f} nats")
    return controllers


if __name__ == "__main__":
    main()
