"""Draws the figures of the gallery: every example's run, one picture each.

Needs: pip install 'eafo-dynamic[plots,examples]' transformers accelerate onnxscript onnxruntime
Run: python examples/gallery.py [FOLDER] [EXAMPLE ...]     (about three minutes for all of them)
"""

from __future__ import annotations

import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch

from eafo_dynamic import CorrectionLog, EAFOController
from eafo_dynamic.records import LogWriter
from eafo_dynamic.records.figures.logs import plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent


def _log_of(controller: EAFOController, folder: Path) -> CorrectionLog:
    """A log of what a controller keeps in memory; the callbacks write theirs themselves."""
    writer = LogWriter(folder, controller.about())
    writer.write(list(controller.records))
    writer.write_shapes(int(str(controller.records[-1]["step"])), controller.snapshot())
    writer.close()
    return CorrectionLog.load(folder)


def _example(name: str) -> Callable[..., Any]:
    return runpy.run_path(str(HERE / f"{name}.py"))["main"]


def lightning_trainer(folder: Path) -> Figure:
    return plot(_example("lightning_trainer")(folder), "functions")


def plain_pytorch(folder: Path) -> Figure:
    return plot(_log_of(_example("plain_pytorch")(), folder), "trajectories", "entropy")


def huggingface_trainer(folder: Path) -> Figure:
    return plot(_example("huggingface_trainer")(folder), "trajectories", "eps")


def transformers_models(folder: Path) -> Figure:
    return plot(_log_of(_example("transformers_models")()["vit"], folder), "heatmap", "entropy")


def shared_relu_cnn(folder: Path) -> Figure:
    return plot(_log_of(_example("shared_relu_cnn")(), folder), "ranking", "entropy")


def custom_activation_policy(folder: Path) -> Figure:
    return plot(_log_of(_example("custom_activation_policy")(), folder), "trajectories", "eps")


def read_a_log(folder: Path) -> Figure:
    """The figure of one's own, the last that the script draws."""
    arguments, sys.argv = sys.argv, ["read_a_log.py"]
    try:
        return runpy.run_path(str(HERE / "read_a_log.py"))["figure"]
    finally:
        sys.argv = arguments


def merge_and_export(folder: Path) -> Figure:
    """What the merged modules compute, beside what they were made from."""
    merged = _example("merge_and_export")(folder)["model"]
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    for one, name in zip(axes, ("1", "3"), strict=True):
        module = merged[int(name)]
        z = torch.linspace(-4, 4, 400)
        with torch.no_grad():
            one.plot(z, module.base(z), color="0.6", label=f"{type(module.base).__name__}, before")
            one.plot(z, module(z), color="C0", label="merged")
            one.plot(z, module(z) - module.base(z), color="C1", linewidth=1, label="correction")
        one.set(xlabel="pre-activation z", title=f"layer {name}")
        one.legend(frameon=False)
    return figure


def ddp_launch(folder: Path) -> Figure:
    """Here on one rank; the log of several looks the same, from pooled samples."""
    _example("ddp_launch")(folder, devices=1)
    return plot(CorrectionLog.load(folder), "trajectories", "eps")


def fabric_loop(folder: Path) -> Figure:
    """Here on one rank too."""
    return plot(_log_of(_example("fabric_loop")(folder, devices=1), folder), "trajectories", "entropy")


FIGURES: dict[str, Callable[[Path], Figure]] = {
    made.__name__: made
    for made in (
        lightning_trainer, plain_pytorch, huggingface_trainer, transformers_models, shared_relu_cnn,
        custom_activation_policy, read_a_log, merge_and_export, ddp_launch, fabric_loop,
    )
}  # fmt: skip


def main(folder: str | Path = HERE / "figures", *names: str) -> list[Path]:
    """Draws the figures of these examples, or of all."""
    mpl.use("Agg")
    target = Path(folder)
    target.mkdir(exist_ok=True, parents=True)
    files = []
    for name in names or tuple(FIGURES):
        with tempfile.TemporaryDirectory() as run:
            figure = FIGURES[name](Path(run) / name)  # figures are headed by the name of the run's folder
            files.append(target / f"{name}.png")
            figure.savefig(files[-1], dpi=100, metadata={"Software": None})
            plt.close(figure)
    return files


if __name__ == "__main__":
    for file in main(*sys.argv[1:]):
        print(file)
