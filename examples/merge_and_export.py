"""From training to deployment: bake the corrections in, write ONNX, run it without torch.

The merged model computes what the trained one did, and needs nothing of this package where it becomes a graph.

Needs: pip install onnxscript onnxruntime
Run: python examples/merge_and_export.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from eafo_dynamic import EAFOController, merge, own_group, save_merged


def trained(x: torch.Tensor, y: torch.Tensor, steps: int) -> nn.Module:
    """A small classifier with learned corrections."""
    model = nn.Sequential(nn.Linear(30, 32), nn.GELU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    controller = EAFOController.attach(model, x[:2], update_every_n_steps=25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    own_group([optimizer], controller.amplitudes, model)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        controller.step(step)
    return model.eval()


def main(folder: str | Path, steps: int = 150) -> dict[str, Any]:
    """Trains, merges, exports, compares; returns the merged model and the differences."""
    torch.manual_seed(0)
    features, labels = load_breast_cancer(return_X_y=True)
    x, y = torch.tensor(features, dtype=torch.float32), torch.tensor(labels)
    x = (x - x.mean(0)) / x.std(0)
    model = trained(x, y, steps)
    with torch.no_grad():
        wanted = model(x)
        merged = merge(model)  # in place: an nn.GELU becomes a CorrectedActivation whose eps no longer trains
        print(merged)
        of_merged = float((merged(x) - wanted).abs().max())
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = save_merged(merged, Path(folder) / "classifier.onnx", x[:2])

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    of_onnx = float((torch.from_numpy(logits) - wanted).abs().max())
    print(f"largest difference to the trained model: merged {of_merged:.1e}, ONNX {of_onnx:.1e}")
    return {
        "model": merged,
        "merged": of_merged,
        "onnx": of_onnx,
        "accuracy": float((wanted.argmax(1) == y).float().mean()),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
