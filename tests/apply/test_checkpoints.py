"""Checkpoints of every kind by one road: written here, read in a process of their own, equal to the bit."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from eafo_dynamic import EAFOCallback, EAFOController, apply_from_checkpoint, find_sites, save_corrections, unwrap, wrap
from eafo_dynamic.apply.sitelist import site_keys, site_tensors
from eafo_dynamic.apply.surgery import is_wrapped
from eafo_dynamic.cli import main
from eafo_dynamic.errors import SiteError

X = torch.linspace(-2.0, 2.0, 32).reshape(8, 4)

pytestmark = pytest.mark.filterwarnings(
    "ignore:The number of training batches",
    "ignore:Checkpoint directory",
    "ignore:.*LeafSpec",
    "ignore:torch.distributed",
)


class Net(nn.Module):
    """Modules alone, so that weights without a list of sites say enough."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU())
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Calls(nn.Module):
    """Functional calls."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(F.gelu(self.one(x)))))


class Lit(LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Net()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trained(model: nn.Module) -> nn.Module:
    """A model that a loop of one's own has trained for a few steps."""
    torch.manual_seed(0)
    controller = EAFOController.attach(model, X, update_every_n_steps=2, eps_init=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    for step in range(1, 5):
        optimizer.zero_grad()
        F.cross_entropy(model(X), (X.sum(1) > 0).long()).backward()
        optimizer.step()
        controller.step(step)
    return model.eval()


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return trained(Net())


@pytest.fixture(scope="module")
def lit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lit, Path]:
    folder = tmp_path_factory.mktemp("lit")
    torch.manual_seed(0)
    module = Lit()
    data = DataLoader(TensorDataset(X, (X.sum(1) > 0).long()), 4)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    callback = EAFOCallback(update_every_n_steps=2, eps_init=0.2, dirpath=folder / "eafo", verbose=False)
    trainer = Trainer(default_root_dir=str(folder), max_epochs=2, callbacks=[callback], **quiet)
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "lit.ckpt")
    return module.eval(), folder / "lit.ckpt"


def by_fabric(model: nn.Module, folder: Path) -> Path:
    fabric = Fabric(accelerator="cpu", devices=1)
    optimizer = torch.optim.AdamW(model.parameters())
    wrapped, optimizer = fabric.setup(model, optimizer)
    fabric.save(str(folder / "fabric.ckpt"), {"network": wrapped, "optimizer": optimizer, "step": 4})
    return folder / "fabric.ckpt"


def by_dcp(model: nn.Module, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"app": {"model": model.state_dict(), "step": 3}}, checkpoint_id=str(folder / "dcp"))
    return folder / "dcp"


def by_torch(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


def under_a_key(model: nn.Module, folder: Path) -> Path:
    torch.save({"model": model.state_dict(), "epoch": 3}, folder / "mine.pth")
    return folder / "mine.pth"


def by_safetensors(model: nn.Module, folder: Path) -> Path:
    save_file(model.state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def beside_corrections(model: nn.Module, folder: Path) -> Path:
    save_file(model.state_dict(), folder / "model.safetensors")
    save_corrections(model, folder)
    return folder


def plain_beside_corrections(model: nn.Module, folder: Path) -> Path:
    plain = {key: value for key, value in model.state_dict().items() if not site_keys([key])}
    save_file(plain, folder / "model.safetensors")
    save_corrections(model, folder)
    return folder


def sharded(model: nn.Module, folder: Path) -> Path:
    state = model.state_dict()
    places: dict[str, str] = {}
    for k in range(3):
        part = dict(list(state.items())[k::3])
        name = f"model-0000{k + 1}-of-00003.safetensors"
        save_file(part, folder / name)
        places |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def sharded_bins(model: nn.Module, folder: Path) -> Path:
    state = model.state_dict()
    places: dict[str, str] = {}
    for k in range(2):
        part = dict(list(state.items())[k::2])
        torch.save(part, folder / f"pytorch_model-{k}.bin")
        places |= dict.fromkeys(part, f"pytorch_model-{k}.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def of_a_compiled_model(model: nn.Module, folder: Path) -> Path:
    torch.save(torch.compile(model).state_dict(), folder / "compiled.pt")
    return folder / "compiled.pt"


WRITERS: list[Callable[[nn.Module, Path], Path]] = [
    by_fabric,
    by_dcp,
    by_torch,
    under_a_key,
    by_safetensors,
    beside_corrections,
    plain_beside_corrections,
    sharded,
    sharded_bins,
    of_a_compiled_model,
]


def in_a_fresh_process(make: str, source: Path, expected: Tensor, folder: Path) -> None:
    """Asserts that the model of a source computes in another process what it computed, to the bit."""
    torch.save(expected.detach(), folder / "expected.pt")
    code = f"""
import torch
from eafo_dynamic import EAFOCallback, apply_from_checkpoint, load_corrections
from tests.apply.test_checkpoints import Calls, Lit, Net, X
model = {make.format(source=str(source))}
assert torch.equal(model.eval()(X), torch.load({str(folder / "expected.pt")!r}))
"""
    done = fresh.python(code, path=[fresh.ROOT, fresh.ROOT / "tests"])  # this file imports fresh
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_kind(write: Callable[[nn.Module, Path], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = make_net()
    source = write(net, tmp_path)
    with caplog.at_level(logging.INFO, "eafo_dynamic"):
        fresh = apply_from_checkpoint(Net(), source)
    assert torch.equal(fresh.eval()(X), net(X))
    (said,) = [record.getMessage() for record in caplog.records if record.name == "eafo_dynamic"]
    assert said.startswith("took 2 corrections and 6 weights from ")
    assert str(source) in said
    for one, two in zip(site_tensors(fresh).values(), site_tensors(net).values(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_kind_in_a_fresh_process(write: Callable[[nn.Module, Path], Path], tmp_path: Path) -> None:
    net = make_net()
    in_a_fresh_process("apply_from_checkpoint(Net(), {source!r})", write(net, tmp_path), net(X), tmp_path)


class TestLightning:
    def test_the_module_and_its_network(
        self, lit: tuple[Lit, Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        module, path = lit
        whole = apply_from_checkpoint(Lit(), path)
        assert torch.equal(whole.eval()(X), module(X))
        with caplog.at_level(logging.INFO, "eafo_dynamic"):
            network = apply_from_checkpoint(Lit().net, path)
        assert torch.equal(network.eval()(X), module.net(X))
        assert "of 1 more that are outside of this Net none" in caplog.messages[-1]
        assert "without their prefix 'net'" in caplog.messages[-1]
        in_a_fresh_process("apply_from_checkpoint(Net(), {source!r})", path, module.net(X), tmp_path)

    def test_load_from_checkpoint(self, lit: tuple[Lit, Path], tmp_path: Path) -> None:
        module, path = lit
        loaded = EAFOCallback.load_from_checkpoint(Lit, path)
        assert type(unwrap(copy.deepcopy(loaded))) is Lit
        assert torch.equal(loaded.eval()(X), module(X))
        assert EAFOCallback.load_from_checkpoint(Lit, str(path), width=3, map_location="cpu").hparams["width"] == 3
        in_a_fresh_process("EAFOCallback.load_from_checkpoint(Lit, {source!r})", path, module(X), tmp_path)

    def test_what_it_loads_can_be_saved_and_trained(self, lit: tuple[Lit, Path], tmp_path: Path) -> None:
        module, path = lit
        loaded = EAFOCallback.load_from_checkpoint(Lit, path)
        trainer = Trainer(default_root_dir=str(tmp_path), logger=False, accelerator="cpu", barebones=False)
        trainer.strategy.connect(loaded)
        trainer.save_checkpoint(tmp_path / "again.ckpt", weights_only=True)
        assert torch.equal(apply_from_checkpoint(Lit(), tmp_path / "again.ckpt").eval()(X), module(X))

    def test_a_checkpoint_without_corrections_is_said_to_have_none(self, tmp_path: Path) -> None:
        torch.save({"state_dict": Lit().state_dict(), "pytorch-lightning_version": "2.6.0"}, tmp_path / "plain.ckpt")
        with pytest.raises(SiteError, match="holds no corrections"):
            EAFOCallback.load_from_checkpoint(Lit, tmp_path / "plain.ckpt")

    def test_the_command_line_takes_the_network_alone(
        self, lit: tuple[Lit, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from eafo_dynamic import load_merged

        module, path = lit
        output = tmp_path / "net.pt"
        model = "tests.apply.test_checkpoints:Net"
        assert main(["merge", str(path), "--model", model, "--output", str(output)]) == 0
        assert "took 2 corrections and 6 weights (of 1 more that are outside of this Net none) from" in " ".join(
            capsys.readouterr().out.split()
        )
        assert torch.equal(load_merged(Net().eval(), output)(X), module.net(X))


class TestWithoutAList:
    def test_functional_calls_need_an_example(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        net = trained(Calls())
        source = by_torch(net, tmp_path)
        fresh = Calls()
        with pytest.raises(SiteError, match=r"has no list of sites \(the model itself: 2 in the file, 0 found\)"):
            apply_from_checkpoint(fresh, source)
        assert not is_wrapped(fresh)
        assert torch.equal(apply_from_checkpoint(fresh, source, X).eval()(X), net(X))

    def test_the_names_in_the_state_of_version_0_1_0_are_used(self, tmp_path: Path) -> None:
        net = Net()
        report = find_sites(net)
        object.__setattr__(report.sites[0], "wrapped", False)
        wrap(net, report, 0.3)
        save_file(net.state_dict(), tmp_path / "model.safetensors")
        torch.save({"sites": ["body.3"]}, tmp_path / "eafo_state.pt")
        assert torch.equal(apply_from_checkpoint(Net(), tmp_path)(X), net(X))

    def test_corrections_of_modules_that_are_not_there(self, tmp_path: Path) -> None:
        source = by_torch(make_net(), tmp_path)
        with pytest.raises(SiteError, match=r"corrections of 'body\.1', 'body\.3', which this Calls does not have"):
            apply_from_checkpoint(Calls(), source, X)


class TestRefusals:
    def unchanged(self, model: nn.Module, source: Any, words: str) -> None:
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(SiteError, match=words) as caught:
            apply_from_checkpoint(model, source)
        assert "\n" not in str(caught.value)
        assert not is_wrapped(model)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)

    def test_weights_that_do_not_fit_change_nothing(self, lit: tuple[Lit, Path]) -> None:
        saved = torch.load(lit[1], weights_only=True)
        for change, words in (
            (lambda state: state.pop("net.head.bias"), "net.head.bias is missing"),
            (lambda state: state.update({"net.more": torch.ones(2)}), "net.more is not known"),
            (
                lambda state: state.update({"net.head.bias": torch.ones(5)}),
                r"net.head.bias: \[5\] in the checkpoint, \[2\]",
            ),
        ):
            damaged = copy.deepcopy(saved)
            change(damaged["state_dict"])
            self.unchanged(Lit(), damaged, words)
            self.unchanged(Net(), damaged, words.removeprefix("net."))

    def test_two_sets_of_weights(self, tmp_path: Path) -> None:
        state = make_net().state_dict()
        torch.save({"model": state, "average": state}, tmp_path / "two.pt")
        self.unchanged(
            Net(), tmp_path / "two.pt", r"has corrections under 'model', 'average'. Give the one that is meant"
        )

    def test_folders(self, tmp_path: Path) -> None:
        self.unchanged(Net(), tmp_path, "holds no weights that are known")
        for k in (4, 8):
            (tmp_path / f"checkpoint-{k}").mkdir()
            save_corrections(make_net(), tmp_path / f"checkpoint-{k}")
        self.unchanged(Net(), tmp_path, r"has checkpoints in it \(checkpoint-4, checkpoint-8\). Give one of them")
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "latest").write_text("global_step4")
        self.unchanged(Net(), tmp_path / "deep", "is of DeepSpeed. Run the zero_to_fp32.py")

    def test_shards_that_are_gone(self, tmp_path: Path) -> None:
        source = sharded(make_net(), tmp_path)
        (tmp_path / "model-00002-of-00003.safetensors").unlink()
        self.unchanged(Net(), source, "model-00002-of-00003.safetensors: cannot be read as a shard")

    def test_plain_weights(self, tmp_path: Path) -> None:
        save_file(Net().state_dict(), tmp_path / "model.safetensors")
        self.unchanged(Net(), tmp_path, "holds no corrections, and there is no eafo_dynamic.safetensors beside it")

    def test_no_pickle_in_a_distributed_checkpoint_is_run(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "ran"),)

        source = by_dcp(make_net(), tmp_path)
        (source / ".metadata").write_bytes(pickle.dumps(Evil()))
        self.unchanged(
            Net(), source, r"cannot be read as a checkpoint of torch.distributed.checkpoint \(UnpicklingError"
        )
        assert not (tmp_path / "ran").exists()


def test_a_part_of_a_model_leaves_the_rest_with_a_warning(tmp_path: Path) -> None:
    net = make_net()
    source = by_torch(net, tmp_path)
    module = Lit()
    with pytest.warns(UserWarning, match=r"1 weights of this Lit are not in .* first of them scale"):
        apply_from_checkpoint(module, source)
    assert torch.equal(module.net.eval()(X), net(X))


def test_weights_that_a_file_leaves_out_since_they_are_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.act, self.two = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.act(self.one(x)))

    net = Tied()
    wrap(net, eps_init=0.3)
    save_file(
        {key: value for key, value in net.state_dict().items() if key != "two.weight"}, tmp_path / "t.safetensors"
    )
    assert torch.equal(apply_from_checkpoint(Tied(), tmp_path / "t.safetensors")(X), net(X))


def test_corrections_alone_leave_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = make_net()
    fresh = unwrap(copy.deepcopy(net))
    with caplog.at_level(logging.INFO, "eafo_dynamic"):
        apply_from_checkpoint(fresh, save_corrections(net, tmp_path))
    assert torch.equal(fresh(X), net(X))
    assert "took 2 corrections and no other weights" in caplog.messages[-1]


SHARDS = """
import sys, torch
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
rank, store, source, folder = int(sys.argv[1]), *sys.argv[2:]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
state = torch.load(source)
shards = {key: distribute_tensor(value, mesh, [Shard(0)]) if value.dim() else value for key, value in state.items()}
dcp.save({"model": shards}, checkpoint_id=folder)
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_shards_of_two_ranks(tmp_path: Path) -> None:
    net = make_net()
    words = [str(tmp_path / "store"), str(by_torch(net, tmp_path)), str(tmp_path / "shards")]
    ranks = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", SHARDS, str(k), *words]) for k in range(2)]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    assert len(list((tmp_path / "shards").glob("*.distcp"))) == 2
    assert torch.equal(apply_from_checkpoint(Net(), tmp_path / "shards").eval()(X), net(X))
