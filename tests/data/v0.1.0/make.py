"""Writes what version 0.1.0 saved, files.zip, and the numbers that it computed, expected.json, beside this script.

It was run once and is kept to show how they were made. Run it with version 0.1.0 installed::

    OMP_NUM_THREADS=1 python tests/data/v0.1.0/make.py

In the archive:

- ``default.ckpt``, ``per_channel.ckpt``: Lightning checkpoints after 5 of 10 steps, of EAFOCallback with its default
  options and with ``PER_CHANNEL``.
- ``default/eafo``, ``per_channel/eafo``: the correction logs of these runs, up to step 10. The first lacks its
  ``shapes.jsonl``, which is long; the second shows the format.
- ``layers.csv``: what ``eafo-dynamic log layers default --format csv`` printed.
- ``net.pt``: a pickle of the LightningModule of the first run; ``body.pt``: a pickle of a plain module that was trained
  with EAFOController.
- ``merged.pt``, ``merged.safetensors``: merged models by ``save_merged``, the second with tables and one amplitude per
  channel; ``tower.pt``: a pickle of the first.
- ``huggingface/``: weights, optimiser and ``eafo_state.pt`` of a checkpoint of the Hugging Face Trainer after 4 of 8
  steps, and the correction log up to step 8.

``expected.json`` has the outputs of each model for ``inputs()``, and the weights at the end of each training. Numbers
of 32 bits survive JSON exactly. Everything is computed with ``backend="eager"``, which needs no compiler.

``modules.txt`` lists the modules of the package.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from eafo_dynamic.huggingface import EAFOTrainerCallback
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

import eafo_dynamic
from eafo_dynamic import EAFOCallback, EAFOController, disabled, merge, save_merged
from eafo_dynamic.cli import main as command_line

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from earlier_networks import Body, Classifier, Examples, Net, Tower, inputs, labels, loader  # noqa: E402

PER_CHANNEL: dict[str, Any] = {
    "density": "histogram",
    "per_channel": True,
    "policy": "hybrid",
    "target_modules": ["quick_gelu"],  # the file has a table for each site
    "update_every_n_steps": 3,
    "collect_every_n_steps": 1,  # the checkpoint then holds samples of a round that is to come
    "rollback_factor": 1.01,  # undoes a round after the checkpoint
}


class SaveAfterFirstEpoch(Callback):
    """What ModelCheckpoint does, whose own state in the file would be a path of this machine."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def spread(model: Any) -> Any:
    """Larger weights than torch's, with which rows of ``inputs()`` hardly differ at the end of a deep network."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3.0)
    return model


def outputs(model: nn.Module) -> dict[str, Any]:
    """With the corrections and, as ``plain``, without."""
    model.eval()
    with torch.no_grad():
        corrected = model(inputs())
        with disabled(model):
            plain = model(inputs())
    return {"outputs": corrected.tolist(), "plain": plain.tolist()}


def weights(model: nn.Module) -> dict[str, Any]:
    """Parameters and buffers by name, without the long tables."""
    return {name: value.tolist() for name, value in model.state_dict().items() if not name.endswith("_table")}


def fit(name: str, **options: Any) -> tuple[Net, dict[str, Any]]:
    torch.manual_seed(1)
    net = spread(Net())
    callback = EAFOCallback(backend="eager", dirpath=f"{name}/eafo", verbose=False, **options)
    trainer = Trainer(
        default_root_dir=".",
        callbacks=[callback, SaveAfterFirstEpoch(f"{name}.ckpt")],
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, loader())
    at_checkpoint = eafo_dynamic.apply_from_checkpoint(Net(), f"{name}.ckpt")
    for module in at_checkpoint.modules():
        for site in getattr(module, "eafo_sites", ()):
            site.switch.backend = "eager"
    return net, {**outputs(at_checkpoint), "weights_at_the_end": weights(net)}


def train_with_controller(model: nn.Module, **options: Any) -> None:
    controller = EAFOController.attach(model, inputs(), backend="eager", **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(1, 6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs(40)), labels(40)).backward()
        controller.before_optimizer_step(step - 1)
        optimizer.step()
        controller.step(step)


def merged(name: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(1)
    tower = spread(Tower())
    train_with_controller(tower, **options)
    found = outputs(tower)
    merge(tower)
    save_merged(tower, name)
    return tower, found


def huggingface(folder: str) -> dict[str, Any]:
    torch.manual_seed(2)
    args = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=8,
        save_strategy="steps",
        save_steps=4,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to="none",
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    model = spread(Classifier())
    callback = EAFOTrainerCallback(
        {"x": inputs(), "labels": labels()}, backend="eager", update_every_n_steps=3, collect_every_n_steps=1
    )
    transformers.Trainer(model, args, train_dataset=Examples(), callbacks=[callback]).train()
    for name in ("model.safetensors", "optimizer.pt", "eafo_state.pt"):
        Path(folder, "checkpoint-4", name).rename(Path(folder, name))
    return {"weights_at_the_end": weights(model)}


def modules() -> str:
    """Names of all modules of the package but ``__main__``, one per line."""
    package = Path(eafo_dynamic.__file__).parent
    names: list[str] = []
    for file in package.rglob("*.py"):
        parts = file.relative_to(package.parent).with_suffix("").parts
        if parts[-1] != "__main__":
            names.append(".".join(parts).removesuffix(".__init__"))
    return "".join(f"{name}\n" for name in sorted(names))


def make() -> dict[str, Any]:
    """Writes the files to the working directory and returns the expected numbers."""
    expected: dict[str, Any] = {}
    net, expected["default.ckpt"] = fit("default")
    Path("default/eafo/shapes.jsonl").unlink()
    _, expected["per_channel.ckpt"] = fit("per_channel", **PER_CHANNEL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        command_line(["log", "layers", "default", "--format", "csv"])
    Path("layers.csv").write_text(printed.getvalue(), encoding="utf-8")

    expected["net.pt"] = outputs(net)
    torch.save(net, "net.pt")
    torch.manual_seed(3)
    body = spread(Body())
    train_with_controller(body)
    expected["body.pt"] = outputs(body)
    torch.save(body, "body.pt")

    tower, expected["merged.pt"] = merged("merged.pt")
    torch.save(tower, "tower.pt")
    _, expected["merged.safetensors"] = merged(
        "merged.safetensors", density="histogram", per_channel=True, target_modules=["ReLU"]
    )
    expected["huggingface"] = huggingface("huggingface")
    return expected


FILES = [
    "default.ckpt",
    "default/eafo/manifest.json",
    "default/eafo/corrections.jsonl",
    "per_channel.ckpt",
    "per_channel/eafo/manifest.json",
    "per_channel/eafo/corrections.jsonl",
    "per_channel/eafo/shapes.jsonl",
    "layers.csv",
    "net.pt",
    "body.pt",
    "merged.pt",
    "merged.safetensors",
    "tower.pt",
    "huggingface/model.safetensors",
    "huggingface/optimizer.pt",
    "huggingface/eafo_state.pt",
    "huggingface/eafo/manifest.json",
    "huggingface/eafo/corrections.jsonl",
]


def lines(expected: dict[str, Any]) -> str:
    """JSON with one line per model and quantity."""
    models: list[str] = []
    for name, numbers in expected.items():
        quantities = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in numbers.items())
        models.append(f"{json.dumps(name)}: {{\n{quantities}\n}}")
    return "{\n" + ",\n".join(models) + "\n}\n"


if __name__ == "__main__":
    assert eafo_dynamic.__version__ == "0.1.0", eafo_dynamic.__version__
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        expected = make()
        (HERE / "modules.txt").write_text(modules(), encoding="utf-8")
        (HERE / "expected.json").write_text(lines(expected), encoding="utf-8")
        with zipfile.ZipFile(HERE / "files.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name in FILES:
                data = Path(name).read_bytes()
                for path in (work, str(HERE), str(Path.home())):
                    assert path.encode() not in data, f"{name} names {path}"
                entry = zipfile.ZipInfo(name)  # of the year 1980: no time of day in the archive
                archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
        os.chdir(HERE)
