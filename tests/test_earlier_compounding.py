"""What version 0.1.0 has written: read as before, or refused in one line where later versions cannot compute it."""

from __future__ import annotations

import json
import pickle
import sys
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from small_logs import oracle_rows, write_run
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from eafo_dynamic import (
    CorrectedActivation,
    EAFOCallback,
    EAFOController,
    apply_from_checkpoint,
    load_merged,
    merge,
    save_merged,
    unwrap,
)
from eafo_dynamic.apply.manifest import check_form, manifest
from eafo_dynamic.apply.surgery import hosted_sites, is_wrapped, wrap
from eafo_dynamic.cli import main
from eafo_dynamic.errors import CompoundingError
from eafo_dynamic.find.sites import find_sites
from eafo_dynamic.records import CorrectionLog

FORM = {"tabulated": True, "per_channel": False, "terms": ("tied",)}


def x() -> Tensor:
    return torch.linspace(-3, 3, 40).view(10, 4)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1))


def wrapped() -> nn.Sequential:
    model = network()
    wrap(model, find_sites(model), eps_init=0.3, tabulated=True)
    return model


def checkpoint_of_0_1_0(compounding: bool) -> dict[str, Any]:
    model = wrapped()
    saved = {**manifest(find_sites(network()), **FORM), "compounding": compounding, "free": False}
    del saved["terms"]
    state = dict(model.state_dict())
    if compounding:
        state |= {f"{name}.eafo_0_offset": torch.ones(4, 256) for name in ("1", "3")}
    return {"state_dict": state, "eafo": saved}


def assert_is_refused(action: Callable[[], object]) -> None:
    with pytest.raises(CompoundingError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert "was trained with compounding=True, which eafo-dynamic 0.2.0 no longer has. Use it with version" in message


# --- checkpoints


def test_a_checkpoint_that_does_not_compound_loads_as_before() -> None:
    assert "compounding" not in manifest(find_sites(network()), **FORM)
    model = apply_from_checkpoint(network(), checkpoint_of_0_1_0(compounding=False))
    assert torch.equal(model(x()), wrapped()(x()))
    check_form(checkpoint_of_0_1_0(compounding=False)["eafo"], FORM)


def test_a_checkpoint_that_compounds_is_refused() -> None:
    saved, model = checkpoint_of_0_1_0(compounding=True), network()
    assert_is_refused(lambda: apply_from_checkpoint(model, saved))
    assert not is_wrapped(model)
    assert_is_refused(lambda: check_form(saved["eafo"], FORM))


@pytest.mark.parametrize("strict", [True, False])
def test_weights_that_compound_are_refused(strict: bool) -> None:
    weights = checkpoint_of_0_1_0(compounding=True)["state_dict"]
    assert_is_refused(lambda: wrapped().load_state_dict(weights, strict=strict))


def test_the_state_of_a_controller_that_compounds_is_refused() -> None:
    controller = EAFOController.attach(network(), density="histogram", rollback_factor=1.5)
    state = {**controller.state_dict(), "undo": {"offsets": torch.ones(2, 4, 256)}}
    assert_is_refused(lambda: controller.load_state_dict(state))


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.example_input_array = x()

    def forward(self, z: Tensor) -> Tensor:
        return self.body(z)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder: Path, epochs: int, resume_from: Path | None = None) -> EAFOCallback:
    callback = EAFOCallback(density="histogram", update_every_n_steps=2, verbose=False, save_log=False)
    trainer = Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        callbacks=[callback],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(), DataLoader(TensorDataset(x()), batch_size=5), ckpt_path=resume_from)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return callback


@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:.*does not have many workers")
@pytest.mark.parametrize("compounding", [False, True])
def test_resuming_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compounding: bool) -> None:
    fit(tmp_path, 2)
    file = tmp_path / "2.ckpt"
    saved = torch.load(file, weights_only=True)
    saved["eafo"]["compounding"] = compounding
    torch.save(saved, file)
    if compounding:
        assert_is_refused(lambda: fit(tmp_path, 4, file))
        return
    attached: list[Any] = []
    attach = EAFOCallback._attach
    monkeypatch.setattr(EAFOCallback, "_attach", lambda *given: (attached.append(1), attach(*given)))
    callback = fit(tmp_path, 4, file)
    assert callback.controller is not None and callback.controller.rounds > saved["callbacks"]["EAFOCallback"]["rounds"]
    assert len(attached) == 1, "the sites are those of the checkpoint, and need not be wrapped anew"
    assert "compounding" not in torch.load(tmp_path / "4.ckpt", weights_only=True)["eafo"]


# --- pickles of whole models


def pickled_by_0_1_0(model: nn.Module, offset: Tensor | None) -> bytes:
    for host, site in hosted_sites(model):
        eps, shape, table, lift, *tails = site.keys
        key = eps.replace("_eps", "_offset")
        vars(site)["keys"] = (eps, shape, table, key, lift)
        vars(site).pop("_names")
        for tail in tails:
            vars(host).pop(tail)
        if offset is None:
            vars(host)[key] = None
        else:
            host.register_buffer(key, offset)
    return pickle.dumps(model)


def test_a_pickle_that_does_not_compound_is_the_model() -> None:
    model = pickle.loads(pickled_by_0_1_0(wrapped(), None))
    assert torch.equal(model(x()), wrapped()(x()))
    unwrap(model)
    assert not [name for module in model.modules() for name in vars(module) if name.startswith("eafo_")]


def test_a_pickle_that_compounds_is_refused() -> None:
    data = pickled_by_0_1_0(wrapped(), torch.ones(4, 256))
    assert_is_refused(lambda: pickle.loads(data))


def test_pickles_of_corrected_activations() -> None:
    activation = CorrectedActivation(nn.GELU(), 0.3)
    vars(activation)["offset"] = None
    again = pickle.loads(pickle.dumps(activation))
    assert torch.equal(again(x()), activation(x())) and "offset" not in vars(again)
    del activation.offset
    activation.register_buffer("offset", torch.ones(4, 256))
    data = pickle.dumps(activation)
    assert_is_refused(lambda: pickle.loads(data))


# --- merged models


@pytest.mark.parametrize("ending", [".pt", ".ckpt", ".safetensors"])
def test_a_merged_file_that_compounds_is_refused(tmp_path: Path, ending: str) -> None:
    merged = merge(wrapped())
    merged[1].register_buffer("offset", torch.ones(4, 256))
    file = save_merged(merged, tmp_path / f"model{ending}")
    model = network()
    assert_is_refused(lambda: load_merged(model, file))
    assert not any(isinstance(module, CorrectedActivation) for module in model.modules())


@pytest.mark.parametrize("strict", [True, False])
def test_merged_weights_that_compound_are_refused(strict: bool) -> None:
    merged = merge(wrapped())
    weights = {**merged.state_dict(), "1.offset": torch.ones(4, 256)}
    assert_is_refused(lambda: merged.load_state_dict(weights, strict=strict))


def test_the_command_refuses_a_checkpoint_that_compounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "last.ckpt"
    torch.save(checkpoint_of_0_1_0(compounding=True), file)
    factory = f"--model={__name__}:network"
    assert main(["merge", str(file), factory, f"--output={tmp_path / 'model.pt'}"]) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    assert "the checkpoint was trained with compounding=True" in message and "another model" not in message


# --- logs


def test_the_columnar_file_beside_a_long_log_is_ignored(tmp_path: Path) -> None:
    write_run(tmp_path)
    file = tmp_path / "eafo" / "corrections.jsonl"
    rows = file.read_bytes()
    # sound, as version 0.1.0 would read it, and without any row
    header = {
        "mark": "eafo-columns-1",
        "offset": len(rows),
        "line": rows.count(b"\n"),
        "tail": [zlib.crc32(rows[-4096:]), sys.byteorder, array("I").itemsize],
        "rows": 0,
        "columns": [{"name": "step", "values": None}, {"name": "site", "values": [None]}],
    }
    file.with_name(".corrections.cache").write_bytes(json.dumps(header).encode() + b"\n")
    log = CorrectionLog.load(tmp_path)
    assert len(log) > 0 and log.rows == oracle_rows(tmp_path)
    assert not log.notes
