"""Two and four real processes: agreement, skipped sites, collectives counted, deaths of single ranks, sharding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks as of_ranks
import torch
from children import CONTEXT, KILLED, digests, free_port, run, succeed
from crash_points import Point
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from tally import Tally
from training_process import Net

from eafo_dynamic import EAFOController
from eafo_dynamic.errors import ConfigError
from eafo_dynamic.records import CorrectionLog
from eafo_dynamic.trainers.replicas import Replicas, average_gradients, check_strategy

pytestmark = pytest.mark.slow
ROUNDS: dict[str, Any] = {"update_every_n_steps": 2, "collect_every_n_steps": 1}
STATIC = {"static_graph": True}
UNUSED = {"find_unused_parameters": True}


def assert_ranks_agree(folder: Path, ranks: int, steps: int, least: int = 4) -> None:
    """Every correction is the same on all ranks after every step, and moves."""
    first = digests(folder, 0)
    assert len(first) == steps
    assert len({line.split()[1] for line in first}) >= least
    assert all(digests(folder, rank) == first for rank in range(1, ranks))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("policy", ["learned", "entropy", "hybrid"])
def test_ranks_hold_identical_corrections_after_every_step(
    tmp_path: Path, ranks: int, policy: str, tally: Tally
) -> None:
    options: dict[str, Any] = {"policy": policy, "density": "histogram", "update_every_n_steps": 3, "batch": 8}
    succeed(tmp_path, ranks, steps=9, **options)
    assert_ranks_agree(tmp_path, ranks, 9)
    log = CorrectionLog.load(tmp_path)
    assert [(row["step"], row["site"]) for row in log.rows] == [
        (step, site) for step in (1, 2, 3, 6, 9) for site in log.sites
    ], "one log, written by one rank"
    assert set(log.sites) == {"relu#0", "relu#1", "gelu"}
    tally("distributed runs tried")


@pytest.mark.parametrize("shares", [[32, 32], [7, 57], [13, 20, 1, 30]], ids=str)
@pytest.mark.parametrize("density", ["gaussian", "histogram"])
def test_statistics_are_those_of_one_process_that_saw_all_data(
    tmp_path: Path, shares: list[int], density: str, tally: Tally
) -> None:
    """Also where one rank has many times the data of another."""
    options: dict[str, Any] = {"steps": 1, "density": density, "policy": "entropy", "update_every_n_steps": 1}
    options |= {"samples_per_site": 8192, "collect_every_n_steps": 1}
    succeed(tmp_path / "one", shares=[64], **options)
    succeed(tmp_path / "many", len(shares), shares=shares, **options)
    one, many = (CorrectionLog.load(tmp_path / name).rows for name in ("one", "many"))
    for alone, shared in zip(one, many, strict=True):
        assert shared["n"] == alone["n"] == 64 * 16
        for column in ("mean", "std", "skew", "kurtosis", "entropy", "d_entropy_d_eps", "negentropy", "mu", "sigma"):
            assert shared[column] == pytest.approx(alone[column], rel=1e-4, abs=1e-5), column
        assert alone["entropy_after"] != alone["entropy"]
        assert shared["entropy_after"] == pytest.approx(alone["entropy_after"], rel=1e-4)
    tally("distributed runs tried")


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_unit_is_dead_that_fires_on_no_rank(tmp_path: Path, ranks: int, tally: Tally) -> None:
    succeed(tmp_path, ranks, steps=1, prepare=of_ranks.silence, last=ranks - 1, **ROUNDS)
    dead = {row["site"]: row["dead_fraction"] for row in CorrectionLog.load(tmp_path).rows}
    assert dead["relu#0"] == 0.0, "all of its units fire on the last rank, and none on the others"
    tally("distributed runs tried")


@pytest.mark.parametrize("strategy", [{}, UNUSED, STATIC], ids=["default", "unused parameters", "static graph"])
@pytest.mark.parametrize("skips", ["on one rank", "on every rank", "in turn"])
def test_a_site_that_a_step_skips_stops_nobody(tmp_path: Path, skips: str, strategy: Any, tally: Tally) -> None:
    """The plain model's parameters are all used in every step, and so it trains; then the wrapped one does."""
    succeed(tmp_path / "plain", ranks=2, steps=6, plain=True, skips=skips, strategy=strategy)
    succeed(tmp_path / "wrapped", ranks=2, steps=6, skips=skips, strategy=strategy, **ROUNDS)
    assert_ranks_agree(tmp_path / "wrapped", 2, 6)
    assert {row["site"] for row in CorrectionLog.load(tmp_path / "wrapped").rows} == {
        "relu#0",
        "relu#1",
        "extra",
        "gelu",
    }
    tally("distributed runs tried", 2)


@pytest.mark.parametrize("example", [True, False], ids=["example", "module tree"])
def test_a_module_that_is_never_reached_stops_nobody_under_torchs_own_ddp(example: bool, tally: Tally) -> None:
    port = free_port()
    children = [CONTEXT.Process(target=of_ranks.train_spare, args=(rank, port, example)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        child.kill()
    assert [child.exitcode for child in children] == [0, 0]
    tally("distributed runs tried")


@pytest.mark.parametrize("strategy", [{}, STATIC], ids=["default", "static graph"])
def test_a_module_that_is_never_reached_stops_nobody(tmp_path: Path, strategy: Any, tally: Tally) -> None:
    succeed(tmp_path / "plain", ranks=2, steps=3, plain=True, prepare=of_ranks.spare, strategy=strategy)
    succeed(tmp_path / "wrapped", ranks=2, steps=3, prepare=of_ranks.spare, strategy=strategy, **ROUNDS)
    assert_ranks_agree(tmp_path / "wrapped", 2, 3, least=2)
    assert set(CorrectionLog.load(tmp_path / "wrapped").sites) == {"relu#0", "relu#1", "gelu"}
    tally("distributed runs tried", 2)


@pytest.mark.parametrize("strategy", [{}, STATIC], ids=["default", "static graph"])
def test_four_ranks_skip_a_site_in_turn(tmp_path: Path, strategy: Any, tally: Tally) -> None:
    succeed(tmp_path, ranks=4, steps=6, batch=8, skips="in turn", strategy=strategy, **ROUNDS)
    assert_ranks_agree(tmp_path, 4, 6)
    tally("distributed runs tried")


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_ranks_with_unequal_batches_and_no_sample_at_all_agree(tmp_path: Path, precision: str, tally: Tally) -> None:
    """Rank 0 skips a site from the second step on: it has no sample of it, nor knows what dtype it would have."""
    options = {"n": 23, "batch": 6, "stateful": True, "skips": "on one rank", "trainer": {"precision": precision}}
    succeed(tmp_path, ranks=2, steps=6, **options, **ROUNDS)
    assert_ranks_agree(tmp_path, 2, 6)
    tally("distributed runs tried")


@pytest.mark.parametrize("options", [{}, {"rollback_factor": 1.2, "policy": "hybrid"}], ids=["default", "rollback"])
def test_one_collective_a_round_and_none_between(tmp_path: Path, options: Any, tally: Tally) -> None:
    """Buffers, gradients and losses included: what DistributedDataParallel does itself is counted too."""
    for name, more in {"plain": {"plain": True}, "wrapped": {**ROUNDS, **options}}.items():
        succeed(tmp_path / name, ranks=2, steps=7, prepare=of_ranks.count, **more)
    for rank in range(2):
        plain, wrapped = (of_ranks.collectives(tmp_path / name, rank) for name in ("plain", "wrapped"))
        assert plain[4] == ["allreduce_"], "the model has no buffers of its own, and one bucket"
        for step in range(1, 8):
            extra = ["allgather_"] if step in (1, 2, 4, 6) else []
            if step == 1:
                extra.append("allgather_")  # what each rank has attached, once
            assert wrapped[step] == sorted(plain[step] + extra), step
    tally("distributed runs tried", 2)


def test_what_one_rank_sees_is_in_the_log_of_rank_0(tmp_path: Path, tally: Tally) -> None:
    succeed(tmp_path, ranks=2, steps=3, prepare=of_ranks.poison, **ROUNDS)
    rows = [row for row in CorrectionLog.load(tmp_path).rows if row.get("fit_end") is None]
    assert {row["step"] for row in rows} == {1, 2}
    assert all(row["n_nonfinite"] > 0 for row in rows if row["step"] == 1)
    assert all(row["n_nonfinite"] == 0 for row in rows if row["step"] > 1)
    assert digests(tmp_path, 0) == digests(tmp_path, 1)
    tally("distributed runs tried")


@pytest.mark.parametrize(("ranks", "kinds"), [(2, "int64 tensor"), (4, "int64 tensor, complex64 tensor")])
def test_what_other_ranks_left_alone_is_in_the_log_of_rank_0(
    tmp_path: Path, ranks: int, kinds: str, tally: Tally
) -> None:
    succeed(tmp_path, ranks, steps=4, prepare=of_ranks.mistake, batch=8, **ROUNDS)
    said = {(row["step"], row["site"]): row["event"].split("; ")[0] for row in CorrectionLog.load(tmp_path).events()}
    assert said.pop((2, "gelu")) == f"left alone: {kinds}"
    assert not any("left alone" in text for text in said.values())
    assert_ranks_agree(tmp_path, ranks, 4)
    tally("distributed runs tried")


RESUMED: dict[str, Any] = {
    "ranks": 2,
    "steps": 12,
    "n": 30,
    "batch": 4,
    "stateful": True,
    "policy": "hybrid",
    "update_every_n_steps": 5,
    "collect_every_n_steps": 1,
    "rollback_factor": 1.01,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    succeed(folder, save_every=2, **RESUMED)
    assert CorrectionLog.load(folder).steps == [1, 2, 4, 5, 10, 12]
    return folder


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("step", [5, 8], ids=lambda step: f"killed in step {step}")
def test_ranks_resume_between_two_rounds_as_if_none_had_died(
    tmp_path: Path, whole: Path, victim: int, step: int, tally: Tally
) -> None:
    """Each rank goes on with the sample and the losses that it had itself."""
    point = Point("step", "training_process:Watch.on_train_batch_end", "before", step)
    codes = run(tmp_path, save_every=2, prepare=of_ranks.kill_one, victim=victim, point=point, **RESUMED)
    assert codes[victim] == KILLED
    assert not (tmp_path / "final.pt").exists()
    succeed(tmp_path, save_every=2, resume=True, **RESUMED)
    one, two = (torch.load(folder / "final.pt", weights_only=True) for folder in (whole, tmp_path))
    for key, value in one.items():
        assert torch.equal(value, two[key]), key
    assert CorrectionLog.load(whole).rows == CorrectionLog.load(tmp_path).rows
    tally("crash points tried")
    tally("runs resumed equal")
    tally("distributed runs tried", 2)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2)])
def test_another_number_of_ranks_takes_over_the_whole_sample(
    tmp_path: Path, before: int, after: int, tally: Tally
) -> None:
    options = {**RESUMED, "samples_per_site": 100_000}
    succeed(tmp_path, save_every=3, **{**options, "ranks": before, "steps": 3})  # between the rounds 2 and 4
    succeed(tmp_path, resume=True, save_every=3, **{**options, "ranks": after, "steps": 4})
    per_rank = 4 * 16  # pre-activations of a step: 4 items, 16 units
    row = next(row for row in CorrectionLog.load(tmp_path).rows if row["step"] == 4 and row["site"] == "gelu")
    assert row["n"] == per_rank * (before + after), "step 3 of all ranks before, step 4 of all after"
    tally("distributed runs tried", 2)


def test_fully_shard_leaves_the_amplitudes_to_their_own_average(tmp_path: Path, tally: Tally) -> None:
    """FSDP2 on real ranks equals one process that sees the whole batch."""
    assert run(tmp_path, ranks=2, prepare=of_ranks.shard, whole=False) == [0, 0]
    torch.manual_seed(0)
    model = of_ranks.Plain()
    controller = EAFOController.attach(model, torch.zeros(2, 8), update_every_n_steps=2)
    of_ranks.train(model, controller, tmp_path / "alone.pt", 0, 1)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("alone", "sharded0", "sharded1"))
    assert torch.equal(first["eps"], second["eps"])
    assert first["rows"] == second["rows"]
    torch.testing.assert_close(first["eps"], alone["eps"], rtol=1e-4, atol=1e-6)
    for one, two in zip(first["weights"], alone["weights"], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    tally("distributed runs tried")


def test_sharding_an_amplitude_is_refused_by_its_name(tmp_path: Path) -> None:
    assert run(tmp_path, ranks=2, prepare=of_ranks.shard, whole=True) == [0, 0]
    refused = (tmp_path / "refused0.txt").read_text()
    assert "scalar" in refused
    assert "eafo_0_eps" in refused


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_shard_are_refused_in_one_line(kind: type) -> None:
    strategy = kind.__new__(kind)  # its backend is not asked
    with pytest.raises(ConfigError, match=f"strategy='?{kind.__name__}'?.*one number.*DDPStrategy") as caught:
        check_strategy(strategy)
    assert "\n" not in str(caught.value)


def test_replicas_leave_no_trace() -> None:
    net = Net()
    net._ddp_params_and_buffers_to_ignore = ["one.bias"]
    EAFOController.attach(net, torch.zeros(2, 8))
    before = set(vars(net))
    replicas = Replicas(net, list)
    names = list(net._ddp_params_and_buffers_to_ignore)
    assert names[0] == "one.bias"
    assert sorted(names[1:]) == sorted(key for key, _ in net.named_buffers())
    replicas.release()
    assert set(vars(net)) == before
    assert net._ddp_params_and_buffers_to_ignore == ["one.bias"]
    assert not net._forward_hooks
    assert not net._forward_pre_hooks


def test_one_process_needs_no_average() -> None:
    eps = torch.nn.Parameter(torch.tensor(0.1))
    average_gradients([eps])
    assert eps.grad is None
