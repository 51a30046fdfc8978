"""Models and what a Trainer can do with them, for test_trainer.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import callbacks as those
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from training_process import Stateful


class Net(LightningModule):
    """An in-place ReLU that is called twice, batch norm and dropout; validation and a schedule."""

    def __init__(self, batch_size: int = 8, lr: float = 0.05) -> None:
        super().__init__()
        self.lr, self.batch_size = lr, batch_size
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 16))
        self.relu, self.drop, self.head = nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.relu(self.backbone(self.relu(x * 1.0))))
        return self.head(hidden)

    def loss(self, batch: Any) -> Tensor:
        while isinstance(batch, (dict, list, tuple)) and not isinstance(
            batch[1 if 1 in range(len(batch)) else 0], Tensor
        ):
            batch = batch[0]
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batches = list(batch.values()) if isinstance(batch, dict) else [batch]
        loss = torch.stack([self.loss(each) for each in batches if each is not None]).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch), on_epoch=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]

    def train_dataloader(self) -> Any:
        return DataLoader(data(), self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(data(), 16)


class Manual(Net):
    """Manual optimisation, every second batch with a step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.example_input_array = torch.zeros(2, 8)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


class Late(Net):
    """Makes its layers in configure_model."""

    def __init__(self) -> None:
        super().__init__()
        self.tail: nn.Module | None = None

    def configure_model(self) -> None:
        if self.tail is None:
            self.tail = nn.Sequential(nn.Linear(3, 3), nn.SiLU(), nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        assert self.tail is not None
        return self.tail(super().forward(x))


class Pair(Net):
    """Reads from two loaders at once."""

    mode = "max_size"

    def train_dataloader(self) -> Any:
        return CombinedLoader({"a": super().train_dataloader(), "b": DataLoader(data(24), 8)}, self.mode)


class Two(Net):
    """Validates on two loaders."""

    def val_dataloader(self) -> Any:
        return [super().val_dataloader(), DataLoader(data(24), 8)]


class MidEpoch(Net):
    """Reads from a loader that knows where it is."""

    def train_dataloader(self) -> Any:
        return Stateful(data(), self.batch_size)


def data(n: int = 64) -> TensorDataset:
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, :3].argmax(1))


@dataclass(frozen=True)
class Feature:
    """One thing that a Trainer can do.

    Args:
        options: of the Trainer.
        before: callbacks that come before the plugin.
        after: callbacks that come after it.
        net: makes the model.
    """

    options: dict[str, Any] = field(default_factory=dict)
    before: list[Callable[[], Callback]] = field(default_factory=list)
    after: list[Callable[[], Callback]] = field(default_factory=list)
    net: Callable[[], Net] = Net


def either(name: str, make: Callable[[], Callback], **options: Any) -> dict[str, Feature]:
    """A callback in either order."""
    return {
        f"{name}, before": Feature(options, before=[make]),
        f"{name}, after": Feature(options, after=[make]),
    }


def options(**given: Any) -> Feature:
    return Feature(given)


def keep(**given: Any) -> Feature:
    return Feature({"enable_checkpointing": True}, after=[partial(those.ModelCheckpoint, **given)])


AVERAGES = hasattr(those, "WeightAveraging")  # lightning has them since 2.6

FEATURES: dict[str, Feature] = {
    "nothing": Feature(),
    "accumulation": options(accumulate_grad_batches=3),
    "clipping": options(gradient_clip_val=0.1),
    "clipping by value": options(gradient_clip_val=0.1, gradient_clip_algorithm="value"),
    "fast_dev_run": options(fast_dev_run=3),
    "barebones": options(barebones=True, logger=None, enable_progress_bar=None, enable_model_summary=None),
    "sanity validation": options(num_sanity_val_steps=2),
    "overfit_batches": options(overfit_batches=2),
    "overfit_batches as a fraction": options(overfit_batches=0.5),
    "inference_mode off": options(inference_mode=False),
    "simple profiler": options(profiler="simple"),
    "advanced profiler": options(profiler="advanced"),
    "limit_train_batches": options(limit_train_batches=3),
    "limit_train_batches as a fraction": options(limit_train_batches=0.5),
    "no training batch": options(limit_train_batches=0),
    "no validation": options(limit_val_batches=0),
    "max_time": options(max_time=timedelta(minutes=10)),
    "max_steps": options(max_steps=5, max_epochs=-1),
    "min_steps": options(min_steps=20, max_epochs=2),
    "val_check_interval": options(val_check_interval=3),
    "val_check_interval across epochs": options(val_check_interval=5, check_val_every_n_epoch=None),
    "validation every second epoch": options(check_val_every_n_epoch=2),
    "anomaly detection": options(detect_anomaly=True),
    "deterministic": options(deterministic=True),
    "reloaded loaders": options(reload_dataloaders_every_n_epochs=1),
    "manual optimisation": Feature(net=Manual),
    "configure_model": Feature(net=Late),
    "several loaders": Feature(net=Pair),
    "several loaders for validation": Feature(net=Two),
    "a stateful loader": Feature(net=MidEpoch),
    "accumulation that grows": Feature(after=[partial(those.GradientAccumulationScheduler, {0: 2, 1: 3})]),
    "early stopping": Feature(after=[partial(those.EarlyStopping, "val_loss", patience=0, min_delta=9.0)]),
    "learning rate monitor": Feature({"logger": True}, after=[those.LearningRateMonitor]),
    "progress bar": Feature({"enable_progress_bar": True}, after=[those.TQDMProgressBar]),
    "rich progress bar": Feature({"enable_progress_bar": True}, after=[those.RichProgressBar]),
    "model summary": Feature({"enable_model_summary": True}, after=[partial(those.ModelSummary, max_depth=3)]),
    "timer": Feature(after=[partial(those.Timer, timedelta(minutes=10))]),
    "checkpoints every 3 steps": keep(every_n_train_steps=3, save_top_k=-1, save_last=True),
    "checkpoints, last a link": keep(every_n_train_steps=3, save_last="link"),
    "checkpoints by time": keep(train_time_interval=timedelta(microseconds=1)),
    "checkpoints, best two": keep(monitor="val_loss", save_top_k=2, mode="min"),
    "checkpoints, weights only": keep(save_weights_only=True, save_last=True),
    "checkpoints every epoch": keep(every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=-1),
    "checkpoints on exceptions": Feature(
        {"enable_checkpointing": True}, after=[partial(those.OnExceptionCheckpoint, "nowhere")]
    ),
    **either("SWA", partial(those.StochasticWeightAveraging, 0.01, swa_epoch_start=1), max_epochs=3),
    **either("SWA, a rate a group", partial(those.StochasticWeightAveraging, [0.01], swa_epoch_start=1), max_epochs=3),
    **(either("weight averaging", those.WeightAveraging) if AVERAGES else {}),
    **(either("EMA", partial(those.EMAWeightAveraging, decay=0.9)) if AVERAGES else {}),
    **either("learning rate finder", partial(those.LearningRateFinder, num_training_steps=8)),
    **either("batch size finder", partial(those.BatchSizeFinder, "power", 2, 4, 2)),
    **either("pruning", partial(those.ModelPruning, "l1_unstructured", amount=0.3)),
    **either("fine-tuning", partial(those.BackboneFinetuning, 1)),
}
