"""ActivationMonitor in Lightning runs."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from trainers.test_callback import Net, loader, trainer

from eafo_dynamic import ActivationMonitor, CorrectionLog, EAFOCallback
from eafo_dynamic.errors import SiteError

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed",  # ModelCheckpoint, of a resumed run
    "ignore:Be aware that when using `ckpt_path`",  # of a callback that is there no more
)


def test_a_monitored_run_is_the_plain_run(tmp_path: Path) -> None:
    nets = []
    for name, callbacks in {"plain": [], "watched": [ActivationMonitor(update_every_n_steps=3, verbose=False)]}.items():
        torch.manual_seed(0)
        net = Net()
        host = trainer(tmp_path / name, *callbacks)
        host.fit(net, loader())
        host.save_checkpoint(tmp_path / f"{name}.ckpt")
        nets.append(net)
    plain, watched = (net.state_dict() for net in nets)
    assert list(watched) == list(plain)
    assert all(torch.equal(watched[key], plain[key]) for key in plain)
    assert [len(optimizer.param_groups) for optimizer in host.optimizers] == [1]
    rows = CorrectionLog.load(tmp_path / "watched").rows
    assert len(rows) > 9 and all(row["policy"] == "observe" for row in rows)
    header = (tmp_path / "watched/run/version_0/metrics.csv").read_text().splitlines()[0]
    assert "eafo/alerts" in header and "eafo/mean_dead_fraction" in header and "eps" not in header


def test_a_plain_run_is_resumed_with_a_monitor_and_without(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = trainer(tmp_path, max_epochs=1)
    first.fit(Net(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    monitor = ActivationMonitor(update_every_n_steps=2, verbose=False)
    second = trainer(tmp_path, monitor, max_epochs=2)
    second.fit(Net(), loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert second.global_step == 12 and monitor.history
    second.save_checkpoint(tmp_path / "watched.ckpt")
    third = trainer(tmp_path, max_epochs=3)
    third.fit(Net(), loader(), ckpt_path=tmp_path / "watched.ckpt", weights_only=False)
    assert third.global_step == 18


def test_the_checkpoint_of_a_corrected_run_is_refused(tmp_path: Path) -> None:
    first = trainer(tmp_path, EAFOCallback(verbose=False), max_epochs=1)
    first.fit(Net(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = trainer(tmp_path, ActivationMonitor(verbose=False))
    with pytest.raises(SiteError, match="the checkpoint has corrections"):
        second.fit(Net(), loader(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)


def test_its_options_are_those_of_the_callback() -> None:
    own, all_ = (inspect.signature(kind.__init__).parameters for kind in (ActivationMonitor, EAFOCallback))
    assert all(own[name].default == all_[name].default for name in own if name != "self")
    assert not {"policy", "lr", "eps_init", "max_eps"} & set(own)
