"""Files that are torn, foreign, newer or malicious, and disks that refuse: one line, exit code 2, nothing executed."""

from __future__ import annotations

import copy
import pickle
import random
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import CONFIG, Done, Payload, command
from torch import nn
from torch.nn import functional as F

from eafo_dynamic import apply_from_checkpoint, find_sites, wrap
from eafo_dynamic.apply.kept import CHECKPOINT_KEY
from eafo_dynamic.apply.manifest import manifest
from eafo_dynamic.apply.surgery import is_wrapped
from eafo_dynamic.errors import SiteError
from eafo_dynamic.records import CorrectionLog

QUICK = [
    f"--config={CONFIG}",
    "--trainer.max_steps=3",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.callbacks.init_args.update_every_n_steps=1",
]
TEST = ["test", f"--config={CONFIG}", "--trainer.enable_progress_bar=false"]
Tally = Callable[..., None]


# --- checkpoints


class Net(nn.Module):
    """A module, a function and a written-out activation."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.two = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.act(self.one(x)), 0.1)
        return self.two(x * torch.sigmoid(1.5 * x))


def checkpoint() -> dict[str, Any]:
    torch.manual_seed(0)
    net = Net()
    report = find_sites(net, torch.randn(2, 4))
    wrap(net, report, 0.2, tabulated=True)
    return {CHECKPOINT_KEY: manifest(report, tabulated=True), "state_dict": net.state_dict()}


def refused(saved: Any) -> str:
    """The message with which a checkpoint is refused; the model is as it was."""
    net = Net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(SiteError) as caught:
        apply_from_checkpoint(net, saved)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert not is_wrapped(net)
    assert net.state_dict().keys() == before.keys()
    return message


def sites_of(saved: dict[str, Any]) -> list[dict[str, Any]]:
    return saved[CHECKPOINT_KEY]["sites"]


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no corrections": (lambda c: c.pop("eafo"), "holds no corrections"),
    "no weights": (lambda c: c.pop("state_dict"), "holds no weights"),
    "weights that are none": (lambda c: c.update(state_dict=[1]), "holds no weights"),
    "sites missing": (lambda c: c["eafo"].pop("sites"), "holds no list of sites"),
    "sites empty": (lambda c: c["eafo"].update(sites=[]), "holds no list of sites"),
    "newer": (lambda c: c["eafo"].update(manifest_version=4), "manifest_version=4.* Upgrade eafo-dynamic"),
    "version that is none": (lambda c: c["eafo"].update(manifest_version="x"), "manifest_version='x'"),
    "a form as text": (lambda c: c["eafo"].update(tabulated="yes"), "tabulated='yes' is neither true nor false"),
    "a form missing": (lambda c: c["eafo"].pop("terms"), "free=None is neither"),
    "a form of 0.1.0 as text": (lambda c: c["eafo"].update(compounding="yes"), "compounding='yes' is neither"),
    "a site that is none": (lambda c: sites_of(c).append(3), "site 3 is 3"),
    "a site in part": (lambda c: sites_of(c)[0].pop("owner"), "site 'act' lacks 'owner'"),
    "an entry of the future": (lambda c: sites_of(c)[0].update(colour=1), "site 'act' has an unknown entry 'colour'"),
    "a huge call": (lambda c: sites_of(c)[0].update(call=10**12), "site 'act' has call=1000000000000"),
    "a negative call": (lambda c: sites_of(c)[0].update(call=-1), "call=-1"),
    "another model's": (lambda c: sites_of(c)[0].update(module="body.7"), "the model has no module 'body.7'"),
    "another class": (lambda c: sites_of(c)[0].update(class_name="GELU"), "act: ReLU in the model, GELU in the check"),
    "a function that is no activation": (
        lambda c: sites_of(c)[1].update(class_name="save", parameters={"f": "owned"}),
        r"save\(f\) is no activation",
    ),
    "an endless expression": (
        lambda c: sites_of(c)[2]["parameters"].update(expression=nested_expression(10_000)),
        "is no expression",
    ),
    "an unknown expression": (
        lambda c: sites_of(c)[2]["parameters"].update(expression=["eval", "x"]),
        "is no expression",
    ),
    "eps of another size": (
        lambda c: resize(c, "eps", torch.ones(5)),
        r"eps: \[5\] in the checkpoint, \[\] in the model",
    ),
    "mu, sigma of another size": (lambda c: resize(c, "shape", torch.ones(3)), r"shape: \[3\] in the checkpoint"),
    "a table of another size": (lambda c: resize(c, "table", torch.ones(4, 7)), r"table: \[4, 7\] in the checkpoint"),
    "a table that is none": (lambda c: resize(c, "table", "text"), "table: str in the checkpoint"),
    "NaN in a table": (lambda c: resize(c, "table", torch.full((4, 256), torch.nan)), "table: "),
    "sigma of 0": (lambda c: resize(c, "shape", torch.zeros(2)), "holds numbers that no correction can have"),
    "a weight of another size": (lambda c: c["state_dict"].update({"two.bias": torch.ones(9)}), "two.bias"),
    "a weight missing": (lambda c: c["state_dict"].pop("two.bias"), "two.bias"),
    "half a correction": (lambda c: c["state_dict"].pop(key_of(c, "eps")), "eps"),
}


def nested_expression(depth: int) -> Any:
    node: Any = "x"
    for _ in range(depth):
        node = ["square", node]
    return node


def key_of(saved: dict[str, Any], kind: str) -> str:
    return next(key for key in saved["state_dict"] if key.endswith(f"_{kind}"))


def resize(saved: dict[str, Any], kind: str, value: Any) -> None:
    saved["state_dict"][key_of(saved, kind)] = value


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    monkeypatch.chdir(tmp_path)
    damage, words = DAMAGES[name]
    saved = checkpoint()
    assert is_wrapped(apply_from_checkpoint(Net(), copy.deepcopy(saved)))
    damage(saved)
    message = refused(saved)
    assert re.search(words, message), message
    assert not list(tmp_path.iterdir()), "nothing was run"
    tally("hostile files tried")


JUNK: list[Any] = [None, True, -1, 10**30, 0.5, "", "x" * 10_000, [], [None], {}, {"a": 1}, torch.ones(2), b"\0"]


@pytest.mark.filterwarnings("ignore:EAFO. .*of version 0.1.0", "ignore:EAFO. .* left plain")
def test_any_entry_may_be_anything(tally: Tally) -> None:
    """Every entry of a manifest, replaced by each of many things: loaded, or refused in one line."""
    whole, tried, loaded = checkpoint(), 0, 0
    entries = [(None, key) for key in whole[CHECKPOINT_KEY]]
    entries += [(number, key) for number, site in enumerate(sites_of(whole)) for key in site]
    for number, key in entries:
        for junk in JUNK:
            saved = copy.deepcopy(whole)
            part = saved[CHECKPOINT_KEY] if number is None else sites_of(saved)[number]
            part[key] = junk
            try:
                apply_from_checkpoint(Net(), saved)(torch.randn(2, 4))
                loaded += 1
            except SiteError as error:
                assert "\n" not in str(error)
            tried += 1
    assert loaded < tried / 2, "most of it is no manifest"
    tally("hostile files tried", tried)


def test_torn_and_flipped_bytes_are_refused_or_load(tmp_path: Path, tally: Tally) -> None:
    path, tried = tmp_path / "net.ckpt", 0
    torch.save(checkpoint(), path)
    whole, choose = path.read_bytes(), random.Random(0)
    torn = [whole[: len(whole) * part // 16] for part in range(16)]
    flipped = []
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(choose.choice([1, 1, 8])):
            data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        flipped.append(bytes(data))
    foreign = [
        b"",
        b"\0" * 512,
        b"hello\n" * 99,
        pickle.dumps({"a": 1}),
        b"PK\x03\x04" + b"\0" * 99,
        CONFIG.read_bytes(),
    ]
    for data in [*torn, *flipped, *foreign]:
        path.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch, of archives with odd contents
                apply_from_checkpoint(Net(), path)
        except SiteError as error:
            assert "\n" not in str(error)
        tried += 1
    tally("hostile files tried", tried)


@pytest.mark.parametrize("form", ["pickle", "torch", "inside"])
def test_no_pickle_in_a_checkpoint_is_run(form: str, tmp_path: Path) -> None:
    path, owned = tmp_path / "evil.ckpt", tmp_path / "owned"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Payload(owned)))
    else:
        torch.save(Payload(owned) if form == "torch" else {**checkpoint(), "extra": Payload(owned)}, path)
    message = refused(path)
    assert "evil.ckpt: cannot be read as a checkpoint" in message
    assert not owned.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert owned.exists(), "it would have been"


def test_a_missing_file_is_named() -> None:
    assert "nowhere.ckpt" in refused("nowhere.ckpt")


# --- the command line, in processes of its own


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a short run."""
    folder = tmp_path_factory.mktemp("trained run")
    done = command(folder, "fit", *QUICK)
    assert done.code == 0, done.err
    (path,) = folder.rglob("*.ckpt")
    return path


def damaged(good: Path, name: str, folder: Path) -> Path:
    """A damaged copy of a real checkpoint."""
    path = folder / f"{name}.ckpt"
    if name in ("torn", "empty", "text"):
        path.write_bytes({"torn": good.read_bytes()[:5000], "empty": b"", "text": b"hello\n"}[name])
        return path
    saved = torch.load(good, weights_only=True)
    if name == "malicious":
        saved["extra"] = Payload(folder / "owned")
    elif name == "newer":
        saved["eafo"]["manifest_version"] = 7
    elif name == "foreign":
        saved = {"model": torch.ones(3)}
    elif name == "other sizes":
        saved["state_dict"]["model.1.weight"] = torch.ones(3)
    elif name == "half a state":
        del saved["callbacks"]["EAFOCallback"]["rounds"]
    torch.save(saved, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torn", "cannot be read"),
        ("empty", "cannot be read"),
        ("text", "cannot be read"),
        ("malicious", "cannot be read"),
        ("newer", "manifest_version=7"),
        ("foreign", "pytorch-lightning_version"),
        ("other sizes", "size mismatch for model.1.weight"),
        ("half a state", "state of the corrections is damaged"),
    ],
)
def test_a_bad_checkpoint_costs_one_line(name: str, words: str, trained: Path, tmp_path: Path, tally: Tally) -> None:
    path = damaged(trained, name, tmp_path)
    verbs = [["fit", *QUICK]] if name == "half a state" else [["fit", *QUICK], TEST]
    for verb in verbs:
        command(tmp_path, *verb, f"--ckpt_path={path}").assert_one_line(words)
        assert not (tmp_path / "owned").exists()
        tally("hostile files tried")


@pytest.mark.slow
def test_a_good_checkpoint_beside_them_is_taken(trained: Path, tmp_path: Path) -> None:
    for verb in (["fit", *QUICK], TEST):
        assert command(tmp_path, *verb, f"--ckpt_path={trained}").code == 0


def fit_into(folder: Path, log: Path, *more: str) -> Done:
    return command(folder, "fit", *QUICK, f"--trainer.callbacks.init_args.dirpath={log}", *more)


def assert_trained_with_one_warning(done: Done, folder: Path) -> None:
    assert done.code == 0, done.err[-2000:]
    assert "`max_steps=3` reached" in done.err
    said = [
        line for line in done.err.splitlines() if "UserWarning" in line and "correction log cannot be written" in line
    ]
    assert len(said) == 1, done.err
    (path,) = folder.rglob("*.ckpt")
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert any("eafo_0_eps" in key and value.item() != 0.01 for key, value in weights.items()), "corrections learned"


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A disk of 64 kB."""
    place = tmp_path / "small disk"
    place.mkdir()
    size = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(size, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_while_training(tmp_path: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"\0" * 56 * 1024)
    done = fit_into(tmp_path, small_disk / "eafo")
    assert_trained_with_one_warning(done, tmp_path)
    assert "No space left" in done.err
    log = CorrectionLog.load(small_disk / "eafo")
    assert len(log) % len(log.manifest["sites"]) == 0, "whole updates only"


@pytest.mark.slow
def test_a_read_only_run_folder(tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = fit_into(tmp_path, small_disk / "eafo")
    assert_trained_with_one_warning(done, tmp_path)
    assert "Read-only file system" in done.err


@pytest.mark.slow
def test_a_full_device_and_a_file_in_the_way(tmp_path: Path) -> None:
    for name in ("full", "way"):
        (tmp_path / name).mkdir()
    if Path("/dev/full").exists():
        (tmp_path / "full" / "eafo").mkdir()
        (tmp_path / "full" / "eafo" / "corrections.jsonl").symlink_to("/dev/full")
        assert_trained_with_one_warning(fit_into(tmp_path / "full", tmp_path / "full" / "eafo"), tmp_path / "full")
    (tmp_path / "way" / "eafo").write_text("a file")
    assert_trained_with_one_warning(fit_into(tmp_path / "way", tmp_path / "way" / "eafo"), tmp_path / "way")


@pytest.mark.slow
def test_blanks_and_unicode_in_paths(tmp_path: Path) -> None:
    folder = tmp_path / "läufe mit Leerzeichen" / "模型 🙂 'x' \"y\""
    folder.mkdir(parents=True)
    config = folder / "mein plan é.yaml"
    config.write_bytes(CONFIG.read_bytes())
    log = folder / "протокол 1"
    done = fit_into(folder, log, f"--config={config}")
    assert done.code == 0, done.err
    (path,) = folder.rglob("*.ckpt")
    assert command(folder, *TEST, f"--ckpt_path={path}").code == 0
    for view in (["summary"], ["layers"], ["show", "model.2"]):
        done = command(folder, "log", view[0], str(log), *view[1:])
        assert done.code == 0, done.err
        assert "model.2" in done.out
    assert command(folder, "log", "report", str(log), "--out", "bericht ü.html").code == 0
    assert (folder / "bericht ü.html").stat().st_size > 10_000
    command(folder, "log", "summary", str(folder / "nicht da")).assert_one_line("nicht da")
