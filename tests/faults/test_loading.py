"""Every way in which weights come into a model: from a Trainer, from plain checkpoints and back, from other formats."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as those
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from eafo_dynamic import EAFOCallback, apply_from_checkpoint, find_sites, unwrap, wrap
from eafo_dynamic.apply.manifest import manifest, warn_of_changes
from eafo_dynamic.apply.surgery import disabled, hosted_sites, is_wrapped
from eafo_dynamic.errors import SiteError
from eafo_dynamic.records import CorrectionLog

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`",
    "ignore:The dirpath has changed",
    "ignore:The number of training batches",
    "ignore:Checkpoint directory",
)
Tally = Callable[..., None]


class Net(LightningModule):
    """A plain module that knows nothing of this package: one ReLU called twice, one function, one written out."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.one, self.two, self.three = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.two(self.relu(self.one(x))))
        x = F.gelu(x)
        return self.three(x * torch.sigmoid(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-2)


class Slope(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.layer, self.slope = nn.Linear(4, 4), slope

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.layer(x), self.slope)


def loader() -> DataLoader[Any]:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 16)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=str(folder), callbacks=list(callbacks), **{**quiet, "max_epochs": 2, **options})


def callback(folder: Path, **options: Any) -> EAFOCallback:
    return EAFOCallback(update_every_n_steps=2, eps_init=0.2, dirpath=folder / "eafo", verbose=False, **options)


FORMS = {
    "gaussian": {},
    "histogram": {"density": "histogram", "policy": "hybrid"},
    "per channel": {"per_channel": True},
}


@pytest.fixture(scope="module", params=FORMS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Net]:
    """A checkpoint, and the very model that was saved."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    net = Net()
    saver = ModelCheckpoint(folder, filename="last", save_top_k=1)
    trainer(folder, callback(folder, **FORMS[request.param]), saver).fit(net, loader())
    assert any(eps.detach().ne(0.2).all() for eps in amplitudes(net))
    return folder / "last.ckpt", net.eval()


def amplitudes(net: nn.Module) -> list[Tensor]:
    return [getattr(host, site.keys[0]) for host, site in hosted_sites(net)]


def x() -> Tensor:
    return torch.linspace(-2.0, 2.0, 32).view(8, 4)


class TestTrainer:
    def test_predict_validate_and_test_use_the_corrections(
        self, trained: tuple[Path, Net], tmp_path: Path, tally: Tally
    ) -> None:
        path, net = trained
        with torch.no_grad():
            expected = torch.cat([net(batch[0]) for batch in loader()])
        loss = trainer(tmp_path).validate(net, loader(), verbose=False)[0]["loss"]
        with disabled(net), torch.no_grad():
            assert not torch.allclose(torch.cat([net(batch[0]) for batch in loader()]), expected, atol=1e-3)
        fresh = Net()
        found: Any = trainer(tmp_path, callback(tmp_path)).predict(fresh, loader(), ckpt_path=str(path))
        assert torch.equal(torch.cat(found), expected)
        for stage in ("validate", "test"):
            run = getattr(trainer(tmp_path, callback(tmp_path)), stage)
            assert run(Net(), loader(), ckpt_path=str(path), verbose=False)[0]["loss"] == loss
        tally("ways of loading tried", 3)

    def test_a_model_that_is_used_again_for_each(self, trained: tuple[Path, Net], tmp_path: Path) -> None:
        path, net = trained
        one, again = Net(), trainer(tmp_path, callback(tmp_path))
        for stage in ("test", "validate", "test"):
            getattr(again, stage)(one, loader(), ckpt_path=str(path), verbose=False)
        with torch.no_grad():
            assert torch.equal(one.eval()(x()), net(x()))
        assert len(hosted_sites(one)) == len(hosted_sites(net)) == 4

    def test_weights_only(self, trained: tuple[Path, Net], tmp_path: Path) -> None:
        path, net = trained
        host = trainer(tmp_path, callback(tmp_path))
        found: Any = host.predict(Net(), loader(), ckpt_path=str(path), weights_only=True)
        with torch.no_grad():
            assert torch.equal(torch.cat(found), torch.cat([net(batch[0]) for batch in loader()]))

    def test_without_the_callback_nothing_is_lost_in_silence(self, trained: tuple[Path, Net], tmp_path: Path) -> None:
        path, _ = trained
        with pytest.raises(RuntimeError, match="eafo_0_eps"):
            trainer(tmp_path).test(Net(), loader(), ckpt_path=str(path), verbose=False)


class TestWeightsOnly:
    """Checkpoints for which a Trainer asks no callback anything."""

    @pytest.mark.parametrize("moment", ["during", "after", "another trainer", "copied", "pickled", "tested"])
    def test_they_list_the_sites(self, moment: str, tmp_path: Path) -> None:
        net, path = Net(), tmp_path / "weights.ckpt"
        saver = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True, enable_version_counter=False)
        host = trainer(tmp_path, callback(tmp_path), *([saver] if moment in ("during", "tested") else []))
        host.fit(net, loader())
        if moment in ("copied", "pickled"):
            net = copy.deepcopy(net) if moment == "copied" else pickle.loads(pickle.dumps(net))
        if moment in ("another trainer", "copied", "pickled"):
            host = trainer(tmp_path)
            host.validate(net, loader(), verbose=False)
        elif moment == "tested":
            net, host = Net(), trainer(tmp_path, callback(tmp_path))
            host.test(net, loader(), ckpt_path=str(path), verbose=False, weights_only=True)
            path = tmp_path / "again.ckpt"
        if moment != "during":
            host.save_checkpoint(path, weights_only=True)
        saved = torch.load(path, weights_only=True)
        assert "optimizer_states" not in saved
        with torch.no_grad():
            expected = net.eval()(x())
            assert torch.equal(apply_from_checkpoint(Net(), path).eval()(x()), expected)
        fresh = Net()
        trainer(tmp_path, callback(tmp_path)).test(fresh, loader(), ckpt_path=str(path), verbose=False)
        with torch.no_grad():
            assert torch.equal(fresh.eval()(x()), expected)

    def test_the_hooks_of_the_module_run_and_those_of_a_plain_model_are_its_own(self, tmp_path: Path) -> None:
        class Hooked(Net):
            def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["class"] = len(checkpoint.get("eafo", {}).get("sites", []))

        net, host = Hooked(), trainer(tmp_path, callback(tmp_path))
        host.fit(net, loader())
        host.save_checkpoint(tmp_path / "class.ckpt", weights_only=True)
        assert torch.load(tmp_path / "class.ckpt", weights_only=True)["class"] == 4
        unwrap(net)
        host.save_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
        saved = torch.load(tmp_path / "plain.ckpt", weights_only=True)
        assert "eafo" not in saved
        assert saved["class"] == 0

        own = Net()
        own.on_save_checkpoint = lambda checkpoint: checkpoint.update(instance=True)
        kept = own.on_save_checkpoint
        host = trainer(tmp_path, callback(tmp_path))
        host.fit(own, loader())
        host.save_checkpoint(tmp_path / "own.ckpt", weights_only=True)
        saved = torch.load(tmp_path / "own.ckpt", weights_only=True)
        assert saved["instance"]
        assert saved["eafo"]
        unwrap(own)
        assert own.on_save_checkpoint is kept


class TestPlainModels:
    def test_apply_from_checkpoint(self, trained: tuple[Path, Net], tally: Tally) -> None:
        path, net = trained
        for source in (path, str(path), torch.load(path, weights_only=True)):
            model = apply_from_checkpoint(Net(), source)
            with torch.no_grad():
                assert torch.equal(model.eval()(x()), net(x()))
            assert [site.name for _, site in hosted_sites(model)] == [site.name for _, site in hosted_sites(net)]
        tally("ways of loading tried", 3)

    def test_load_from_checkpoint_of_lightning_is_the_plain_model(self, trained: tuple[Path, Net]) -> None:
        path, net = trained
        with pytest.raises(RuntimeError, match="eafo_0_eps"):
            Net.load_from_checkpoint(path)
        with pytest.warns(UserWarning, match="not in the model state dict but in the checkpoint"):
            plain = Net.load_from_checkpoint(path, strict=False, weights_only=True)
        assert not is_wrapped(plain)
        with disabled(net), torch.no_grad():
            assert torch.equal(plain.eval()(x()), net(x()))
        model = apply_from_checkpoint(plain, path)
        with torch.no_grad():
            assert torch.equal(model(x()), net(x()))

    def test_a_pretrained_plain_checkpoint_starts_a_corrected_run(self, tmp_path: Path, tally: Tally) -> None:
        torch.manual_seed(1)
        plain = Net()
        trainer(tmp_path, ModelCheckpoint(tmp_path, filename="plain"), max_epochs=1).fit(plain, loader())
        net = Net()
        net.load_state_dict(torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"])
        wrap(net, find_sites(net, x()), 0.0)
        assert torch.equal(net(x()), plain(x()))
        net.load_state_dict(plain.state_dict(), strict=True)
        # a run that goes on from it, as from any checkpoint that lacks the callback
        resumed = Net()
        trainer(tmp_path, callback(tmp_path)).test(resumed, loader(), ckpt_path=tmp_path / "plain.ckpt", verbose=False)
        assert torch.equal(resumed.eval()(x()), plain.eval()(x()))
        tally("ways of loading tried", 3)

    def test_a_run_without_corrections_goes_on_with_them(self, tmp_path: Path, tally: Tally) -> None:
        """Optimiser included: at eps = 0 it goes on to the bit as it would have without."""

        def run(epochs: int, ckpt: str | None, *callbacks: Callback) -> dict[str, Tensor]:
            torch.manual_seed(1)
            net = Net()
            saver = ModelCheckpoint(tmp_path / f"until-{epochs}", filename="plain")
            trainer(tmp_path, saver, *callbacks, max_epochs=epochs).fit(net, loader(), ckpt_path=ckpt)
            return net.state_dict()

        whole, _ = run(4, None), run(2, None)
        path = str(tmp_path / "until-2/plain.ckpt")
        still = EAFOCallback(policy="frozen", eps_init=0.0, save_log=False, verbose=False)
        found = run(4, path, still)
        assert all(torch.equal(value, found[key]) for key, value in whole.items())
        moved = run(4, path, callback(tmp_path))
        assert CorrectionLog.load(tmp_path).steps == [10, 12, 14, 16], "the plain run took 8 steps"
        values = [value for key, value in moved.items() if key.endswith("_eps")]
        assert len(values) == 4
        assert all(value.item() != pytest.approx(0.2, abs=1e-4) for value in values)
        tally("ways of loading tried", 2)

    def test_where_eps_cannot_join_later_a_run_without_corrections_is_refused(self, tmp_path: Path) -> None:
        if not hasattr(those, "EMAWeightAveraging"):
            pytest.skip("lightning has it since 2.6")
        trainer(tmp_path, ModelCheckpoint(tmp_path, filename="plain"), max_epochs=1).fit(Net(), loader())
        host = trainer(tmp_path, callback(tmp_path), those.EMAWeightAveraging())
        with pytest.raises(
            SiteError, match=r"cannot be resumed with them: EMAWeightAveraging copies.*without ckpt_path"
        ):
            host.fit(Net(), loader(), ckpt_path=str(tmp_path / "plain.ckpt"))

    def test_the_reverse_and_other_formats(self, trained: tuple[Path, Net], tmp_path: Path, tally: Tally) -> None:
        path, net = trained
        kept = {key: value for key, value in net.state_dict().items() if "eafo_" not in key}
        plain = Net().eval()
        plain.load_state_dict(kept, strict=True)
        with disabled(net), torch.no_grad():
            assert torch.equal(plain(x()), net(x()))
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file({key: value.contiguous() for key, value in net.state_dict().items()}, tmp_path / "net.st")
        saved = torch.load(path, weights_only=True)
        loaded = apply_from_checkpoint(Net(), {**saved, "state_dict": safetensors.load_file(tmp_path / "net.st")})
        safetensors.save_model(net, str(tmp_path / "model.st"))
        twin = apply_from_checkpoint(Net(), path)
        nn.init.zeros_(twin.one.weight)
        safetensors.load_model(twin, str(tmp_path / "model.st"))
        stream = io.BytesIO()
        torch.save(net.state_dict(), stream)
        stream.seek(0)
        third = apply_from_checkpoint(Net(), path)
        third.load_state_dict(torch.load(stream, weights_only=True, mmap=False), assign=True)
        for model in (loaded, twin, third):
            with torch.no_grad():
                assert torch.equal(model.eval()(x()), net(x()))
        tally("ways of loading tried", 4)

    def test_meta_device_and_assign(self, trained: tuple[Path, Net]) -> None:
        path, net = trained
        saved = torch.load(path, weights_only=True)
        model = apply_from_checkpoint(Net(), path).to("meta")
        model.load_state_dict(saved["state_dict"], assign=True)
        with torch.no_grad():
            assert torch.equal(model.eval()(x()), net(x()))


class TestChangedModels:
    """What has changed since the checkpoint is named, site by site."""

    @pytest.mark.parametrize("stage", ["fit", "test", "apply"])
    def test_the_difference_is_readable(self, stage: str, trained: tuple[Path, Net], tmp_path: Path) -> None:
        path, _ = trained

        class Renamed(Net):
            def __init__(self) -> None:
                super().__init__()
                self.act = self.relu
                del self.relu

            def forward(self, x: Tensor) -> Tensor:
                return self.three(F.gelu(self.act(self.two(self.act(self.one(x))))))

        with pytest.raises(SiteError) as caught:
            if stage == "apply":
                apply_from_checkpoint(Renamed(), path)
            else:
                run = getattr(trainer(tmp_path, callback(tmp_path, **self.form(path))), stage)
                run(Renamed(), loader(), ckpt_path=str(path))
        message = str(caught.value)
        assert "relu#0: the model has no module 'relu'" in message
        assert "relu#1: the model has no module 'relu'" in message
        assert "\n" not in message

    @pytest.mark.filterwarnings("ignore:EAFO. a call of relu .* left plain")
    def test_functions_that_a_forward_calls_no_more(self, trained: tuple[Path, Net], tmp_path: Path) -> None:
        """No weight and no module shows it; the dry run does."""
        path, _ = trained

        class Other(Net):
            def forward(self, x: Tensor) -> Tensor:
                x = F.elu(self.two(self.relu(self.one(x))))
                return self.three(x * torch.sigmoid(x))

        run = trainer(tmp_path, callback(tmp_path, **self.form(path)), max_epochs=3)
        said = r"only in the checkpoint: relu#0, relu#1, :gelu; only in the model: relu, :elu\. The checkpoint's"
        with pytest.warns(UserWarning, match=said):
            run.fit(Other(), loader(), ckpt_path=str(path))

    @pytest.mark.parametrize("stage", ["test", "validate", "apply", "apply with an example", "by its array"])
    def test_an_evaluation_says_it_too(self, stage: str, trained: tuple[Path, Net], tmp_path: Path) -> None:
        path, _ = trained

        class Other(Net):
            def forward(self, x: Tensor) -> Tensor:
                x = self.relu(self.two(self.relu(self.one(x))))
                return self.three(F.elu(x) * torch.sigmoid(x))

        for kind, changed in ((Net, False), (Other, True)):
            model = kind()
            if stage == "by its array":
                model.example_input_array = x()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if stage in ("test", "validate"):
                    run = getattr(trainer(tmp_path, callback(tmp_path)), stage)
                    run(model, [loader()], ckpt_path=str(path), verbose=False)
                else:
                    apply_from_checkpoint(model, path, *([x()] if stage == "apply with an example" else []))
            said = [str(each.message) for each in caught if "the model has changed" in str(each.message)]
            if not changed or stage == "apply":
                assert said == [], "the same model, or nothing to see it by"
            else:
                (message,) = said
                assert "only in the checkpoint: :gelu, :silu; only in the model: :elu. Its corrections" in message
            assert len(hosted_sites(model)) == 4

    @pytest.mark.parametrize("stage", ["predict", "apply"])
    def test_an_evaluation_says_nothing_that_it_cannot_know(self, stage: str, tmp_path: Path) -> None:
        """A batch without labels does not run through training_step, where one of the sites is called."""

        class Loss(Net):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                return F.cross_entropy(F.silu(self(batch[0])), batch[1])

        saver = ModelCheckpoint(tmp_path, filename="last")
        trainer(tmp_path, callback(tmp_path), saver).fit(Loss(), loader())
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "EAFO")
            if stage == "predict":
                images = DataLoader(TensorDataset(x()), 4)
                trainer(tmp_path, callback(tmp_path)).predict(Loss(), images, ckpt_path=str(tmp_path / "last.ckpt"))
            else:
                apply_from_checkpoint(Loss(), tmp_path / "last.ckpt")

    def test_a_slope_that_is_another(self, tmp_path: Path) -> None:
        net = nn.Sequential(Slope(0.1), nn.Linear(4, 4))
        saved = manifest(find_sites(net, x()))
        net[0] = Slope(0.3)
        with pytest.warns(
            UserWarning, match=r"leaky_relu\(.*0\.3.*\) in the model, leaky_relu\(.*0\.1.*\) in the check"
        ):
            warn_of_changes(saved, find_sites(net, x()))

    def test_other_sites_are_selected(self, trained: tuple[Path, Net], tmp_path: Path) -> None:
        path, net = trained
        run = trainer(tmp_path, callback(tmp_path, target_modules="relu", **self.form(path)), max_epochs=3)
        again = Net()
        with pytest.warns(UserWarning, match=r"only in the checkpoint: :gelu, :silu\."):
            run.fit(again, loader(), ckpt_path=str(path))
        assert len(hosted_sites(again)) == len(hosted_sites(net)) == 4

    @staticmethod
    def form(path: Path) -> dict[str, Any]:
        saved = torch.load(path, weights_only=True)["eafo"]
        options = {"per_channel": saved["per_channel"]}
        return {**options, "density": "histogram"} if saved["tabulated"] else options

    def test_another_width(self, trained: tuple[Path, Net], tmp_path: Path) -> None:
        path, _ = trained
        net = Net(width=12)
        with pytest.raises(SiteError, match=r"(one\.weight|eafo_0_eps)") as caught:
            apply_from_checkpoint(net, path)
        assert "\n" not in str(caught.value)
        assert not is_wrapped(net)

    def test_other_options(self, trained: tuple[Path, Net], tmp_path: Path) -> None:
        path, _ = trained
        form = self.form(path)
        form["per_channel"] = not form["per_channel"]
        with pytest.raises(SiteError, match=r"per_channel=.* \(now .*\)"):
            trainer(tmp_path, callback(tmp_path, **form)).fit(Net(), loader(), ckpt_path=str(path))

    def test_unwrapping_after_loading_leaves_the_plain_model(self, trained: tuple[Path, Net]) -> None:
        path, _ = trained
        model, plain = apply_from_checkpoint(Net(), path), Net()
        unwrap(model)
        assert list(model.state_dict()) == list(plain.state_dict())
        assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
