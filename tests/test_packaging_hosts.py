"""Lightning under both of its names: `lightning.pytorch` and `pytorch_lightning` share no classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from eafo_dynamic import CorrectionLog, EAFOCallback, apply_from_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:.*bottleneck"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You are trying to `self.log"),
]


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def host(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


def network(host: Any) -> Any:
    class Network(host.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
            self.configured = 0

        def configure_model(self) -> None:
            if not self.configured:  # as the hook's contract demands, since it may be called again
                self.head = nn.Sequential(nn.GELU(), nn.Linear(8, 2))
            self.configured += 1

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            loss = nn.functional.cross_entropy(self.head(self.net(batch[0])), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    torch.manual_seed(0)
    return Network()


class Stream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    def __iter__(self) -> Any:
        yield from zip(*pairs().tensors, strict=True)


def pairs() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 4, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long())


def trainer(host: Any, folder: Path, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    options = {"enable_checkpointing": False, **options}
    callback = EAFOCallback(update_every_n_steps=4, verbose=False)
    return host.Trainer(callbacks=[callback], default_root_dir=folder, **quiet, **options)


def test_fits_and_resumes_under_either_name(host: Any, tmp_path: Path) -> None:
    first = trainer(host, tmp_path, max_epochs=2)
    first.fit(network(host), DataLoader(pairs(), 16))
    first.save_checkpoint(tmp_path / "half.ckpt")
    second, model = trainer(host, tmp_path, max_epochs=4), network(host)
    second.fit(model, DataLoader(pairs(), 16), ckpt_path=tmp_path / "half.ckpt")
    callback = second.callbacks[0]
    assert [site.name for site in callback.controller.bank.sites] == ["net.1", "head.0"], "configure_model came first"
    assert callback.controller.rounds == 6, "steps 1, 2, 4, 8 before the checkpoint, 12 and 16 after it"

    straight, whole = trainer(host, tmp_path / "straight", max_epochs=4), network(host)
    straight.fit(whole, DataLoader(pairs(), 16))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), f"{name}: resuming is bitwise the same run"
    assert CorrectionLog.load(tmp_path / "straight").steps == [1, 2, 4, 8, 12, 16]

    straight.save_checkpoint(tmp_path / "end.ckpt")  # after the fit, as scripts do
    plain = network(host)
    plain.configure_model()
    apply_from_checkpoint(plain, tmp_path / "end.ckpt")
    x = torch.randn(8, 4)
    assert torch.equal(plain.head(plain.net(x)), whole.head(whole.net(x)))


def test_a_stream_waits_for_its_first_batch_under_either_name(host: Any, tmp_path: Path) -> None:
    run = trainer(host, tmp_path, max_steps=8)
    run.fit(network(host), DataLoader(Stream(), 16))  # a warning that only modules are searched would be an error
    assert CorrectionLog.load(tmp_path).steps == [1, 2, 4, 8]
