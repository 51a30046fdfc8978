"""The callback on a real Hugging Face Trainer: its own parameter group, its log, and a resumed run."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eafo_dynamic import unwrap
from eafo_dynamic.cli import main
from eafo_dynamic.errors import ConfigError, EAFOError, LogError, SiteError
from eafo_dynamic.records import CorrectionLog

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from eafo_dynamic.trainers.huggingface import EAFOTrainerCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.ids = torch.randint(0, 50, (64, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def make(folder: Path, steps: int, callback: EAFOTrainerCallback, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    arguments: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 4,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    args = transformers.TrainingArguments(output_dir=str(folder), **{**arguments, **options})
    model = transformers.GPT2LMHeadModel(config)
    return transformers.Trainer(model, args, train_dataset=Tokens(), eval_dataset=Tokens(), callbacks=[callback])


def test_eps_learns_in_a_group_of_its_own_and_is_logged(tmp_path: Path) -> None:
    callback = EAFOTrainerCallback(update_every_n_steps=4, lr_multiple=3.0)
    trainer = make(tmp_path, 12, callback)
    trainer.train()
    log = CorrectionLog.load(tmp_path)
    assert log.steps == [1, 2, 4, 8, 12]
    assert log.sites == ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]
    assert all(abs(row["eps"] - 0.01) > 1e-4 for row in log.last())
    groups = trainer.optimizer.param_groups
    eps = [group for group in groups if str(group.get("name", "")).startswith("eafo")]
    assert len(eps) == 1
    assert eps[0]["weight_decay"] == 0.0
    assert eps[0]["lr"] == pytest.approx(3 * groups[0]["lr"])


def test_a_second_training_starts_anew(tmp_path: Path) -> None:
    callback = EAFOTrainerCallback(update_every_n_steps=4)
    trainer = make(tmp_path, 10, callback)
    found: list[list[tuple[int, int]]] = []
    for _ in range(2):
        trainer.train()
        assert callback.controller is not None
        found.append([(row["step"], row["n"]) for row in callback.controller.records])
        callback.controller.records.clear()
    assert found[0] == found[1] and {step for step, _ in found[0]} == {1, 2, 4, 8}


def test_gradient_accumulation_counts_optimiser_steps(tmp_path: Path) -> None:
    callback = EAFOTrainerCallback(update_every_n_steps=2)
    make(tmp_path, 4, callback, gradient_accumulation_steps=2).train()
    assert CorrectionLog.load(tmp_path).steps == [1, 2, 4]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4}
    options = {"update_every_n_steps": 3, "collect_every_n_steps": 1}
    whole = make(tmp_path / "whole", 8, EAFOTrainerCallback(**options), **saving)
    whole.train()
    # the schedule depends on the number of steps, so the first part is stopped, not planned shorter
    stopped = make(tmp_path / "parts", 8, EAFOTrainerCallback(**options), **saving)
    stopped.add_callback(_StopAt(4))
    stopped.train()
    resumed = make(tmp_path / "parts", 8, EAFOTrainerCallback(**options), **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    for (key, one), two in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6, msg=key)
    rows = [CorrectionLog.load(tmp_path / name).rows for name in ("whole", "parts")]
    assert [(row["step"], row["site"]) for row in rows[0]] == [(row["step"], row["site"]) for row in rows[1]]


class _StopAt(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


def test_bad_options_and_a_late_callback_are_clear() -> None:
    with pytest.raises(ConfigError, match="policy='x'"):
        EAFOTrainerCallback(policy="x")
    with pytest.raises(ConfigError, match=r"log_sites='epsilon'.*log_figures"):
        EAFOTrainerCallback(log_sites=["epsilon"], log_figures=2)
    with pytest.raises(ConfigError, match="figures are drawn from the log"):
        EAFOTrainerCallback(log_figures=True, save_log=False)
    with pytest.raises(LogError, match="no correction log yet"):
        EAFOTrainerCallback().plot()
    with pytest.raises(EAFOError, match="pass it in callbacks"):
        EAFOTrainerCallback().on_step_end(None, None, None)


# ------------------------------------------------------------------ as in Lightning


class Spoil(transformers.TrainerCallback):
    """Makes the loss jump after a step, whatever the corrections do."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                kwargs["model"].transformer.ln_f.weight.mul_(50.0)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_round_after_which_the_loss_jumps_is_undone(tmp_path: Path, accumulated: int) -> None:
    callback = EAFOTrainerCallback(update_every_n_steps=4, rollback_factor=1.5)
    trainer = make(tmp_path, 8, callback, gradient_accumulation_steps=accumulated)
    trainer.add_callback(Spoil(5))
    trainer.train()
    rows = CorrectionLog.load(tmp_path).rows
    undone = {row["step"] for row in rows if "rolled back" in (row["event"] or "")}
    assert undone == {8}
    assert not trainer.model._forward_hooks


def test_the_loss_of_an_evaluation_is_none_of_the_training(tmp_path: Path) -> None:
    callback = EAFOTrainerCallback(update_every_n_steps=4, rollback_factor=1.5)
    trainer = make(tmp_path, 3, callback, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert callback.controller is not None
    assert callback.controller.own_state()["losses"]["count"] == 1  # of step 3: rounds were after steps 1 and 2


def smoothed_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), label_smoothing=0.1)


def test_a_loss_that_cannot_be_seen_is_said_in_one_line(tmp_path: Path) -> None:
    callback = EAFOTrainerCallback(update_every_n_steps=4, rollback_factor=1.5)
    trainer = make(tmp_path / "unseen", 2, callback)
    trainer.compute_loss_func = smoothed_loss
    with pytest.warns(UserWarning, match=r"rollback_factor=1\.5 has no effect.*observe_loss") as caught:
        trainer.train()
    assert sum("rollback_factor" in str(each.message) for each in caught) == 1

    callback = EAFOTrainerCallback(update_every_n_steps=4, rollback_factor=1.5)
    trainer = make(tmp_path / "told", 8, callback)

    def told(*args: Any, **options: Any) -> torch.Tensor:
        loss = smoothed_loss(*args, **options) * (3.0 if trainer.state.global_step > 4 else 1.0)
        assert callback.controller is not None
        callback.controller.observe_loss(loss)
        return loss

    trainer.compute_loss_func = told
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="EAFO: rollback_factor")
        trainer.train()
    assert "rolled back" in CorrectionLog.load(tmp_path / "told").last()[0]["event"]


def test_functions_are_kept_for_figures(tmp_path: Path) -> None:
    callback = EAFOTrainerCallback(update_every_n_steps=2)
    make(tmp_path, 12, callback).train()
    shapes = CorrectionLog.load(tmp_path).shapes("transformer.h.0.mlp.act")
    assert [shape["step"] for shape in shapes] == [1, 2, 6, 12]  # rounds 1, 2, 4 and the last one, 7
    pytest.importorskip("matplotlib")
    assert callback.plot("functions").axes
    picture = tmp_path / "functions.png"
    assert main(["log", "plot", str(tmp_path), "--what", "functions", "--out", str(picture)]) == 0
    assert picture.stat().st_size > 1000


def scalars(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (events,) = folder.rglob("events.out.tfevents*")
    found = accumulator.EventAccumulator(str(events))
    found.Reload()
    return found


def test_metrics_reach_tensorboard_at_update_rounds(tmp_path: Path) -> None:
    callback = EAFOTrainerCallback(update_every_n_steps=4, log_sites=["eps"], log_figures=True)
    options = {"report_to": "tensorboard", "logging_strategy": "steps", "logging_steps": 2}
    make(tmp_path, 8, callback, **options).train()
    found = scalars(tmp_path)
    rows = CorrectionLog.load(tmp_path).rows
    for site in ("transformer.h.0.mlp.act", "transformer.h.1.mlp.act"):
        sent = [(event.step, event.value) for event in found.Scalars(f"train/eafo/eps/{site}")]
        assert sent == [(row["step"], pytest.approx(row["eps"])) for row in rows if row["site"] == site]
    means = found.Scalars("train/eafo/mean_entropy")
    assert [event.step for event in means] == [1, 2, 4, 8]
    assert means[-1].value == pytest.approx(sum(row["entropy"] for row in rows[-2:]) / 2)
    assert [event.step for event in found.Scalars("train/loss")] == [2, 4, 6, 8], "the Trainer's own log is whole"
    assert {event.step for event in found.Images("eafo/functions")} == {1, 2, 8}
    (options_seen,) = found.Tensors("eafo/text_summary")
    assert '"update_every_n_steps": 4' in options_seen.tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("best", [False, True])
def test_the_log_and_the_figures_end_with_the_model(tmp_path: Path, best: bool) -> None:
    callback = EAFOTrainerCallback(update_every_n_steps=4, log_figures=True)
    options: dict[str, Any] = {"report_to": "tensorboard", "logging_strategy": "steps", "logging_steps": 2}
    if best:
        options |= {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
        options |= {"eval_steps": 3, "save_steps": 3}
    trainer = make(tmp_path, 10, callback, **options)
    trainer.train()
    log = CorrectionLog.load(tmp_path)
    assert (log.update_steps, log.steps) == ([1, 2, 4, 8], [1, 2, 4, 8, 10])
    assert callback.controller is not None
    for row, eps in zip(log.last(), callback.controller.bank.eps, strict=True):
        assert row["eps"] == pytest.approx(eps.item())
    assert log.shapes("transformer.h.0.mlp.act")[-1]["step"] == 10
    if not best:
        assert max(event.step for event in scalars(tmp_path).Images("eafo/functions")) == 10


def test_aggregates_go_out_as_often_as_asked(tmp_path: Path) -> None:
    callback = EAFOTrainerCallback(update_every_n_steps=4, log_every_n_steps=3)
    trainer = make(tmp_path, 8, callback, logging_strategy="epoch")
    trainer.train()
    sent = [entry["step"] for entry in trainer.state.log_history if "eafo/mean_eps" in entry]
    assert sent == [3, 6]


def test_without_logging_there_are_no_metrics(tmp_path: Path) -> None:
    trainer = make(tmp_path, 2, EAFOTrainerCallback(), logging_strategy="no")
    trainer.train()
    assert not any("eafo/mean_eps" in entry for entry in trainer.state.log_history)


class Images:
    """Stands in for the packages of Weights & Biases and MLflow."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def Image(self, figure: Any) -> Any:
        return "image", figure

    def log(self, values: Any) -> None:
        self.seen.append(values)

    def log_figure(self, figure: Any, file: str) -> None:
        self.seen.append((figure, file))


def test_options_go_to_the_callbacks_that_take_them() -> None:
    from types import SimpleNamespace

    from eafo_dynamic.trainers.reports import log_options

    config: dict[str, Any] = {"learning_rate": 0.1}
    params: dict[str, str] = {}
    options = {"policy": "learned", "target_modules": ["m" * 1000], "per_channel": False}
    wandb = SimpleNamespace(
        run=object(), config=SimpleNamespace(update=lambda more, allow_val_change: config.update(more))
    )
    assert log_options(SimpleNamespace(_wandb=wandb), options)
    assert config == {"learning_rate": 0.1, "eafo": options}
    assert log_options(SimpleNamespace(_ml_flow=SimpleNamespace(log_params=params.update)), options)
    assert (params["eafo/policy"], params["eafo/per_channel"]) == ("learned", "False")
    assert len(params["eafo/target_modules"]) == 250
    assert not log_options(SimpleNamespace(tb_writer=None), options)
    assert not log_options(SimpleNamespace(_wandb=SimpleNamespace(run=None)), options)


def test_figures_go_to_the_callbacks_that_take_them() -> None:
    from eafo_dynamic.trainers.reports import log_figure

    wandb, mlflow, figure = Images(), Images(), object()
    assert log_figure(SimpleNamespace(_wandb=wandb), "eafo/functions", figure, 7)
    assert wandb.seen == [{"eafo/functions": ("image", figure), "train/global_step": 7}]
    assert log_figure(SimpleNamespace(_ml_flow=mlflow), "eafo/functions", figure, 7)
    assert mlflow.seen == [(figure, "eafo/functions-7.png")]
    assert not log_figure(SimpleNamespace(tb_writer=None), "eafo/functions", figure, 7)


@pytest.mark.parametrize("verbose", [True, False])
def test_the_table_of_sites_and_the_place_of_the_log_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verbose: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    make(tmp_path, 1, EAFOTrainerCallback(verbose=verbose)).train()
    out = capsys.readouterr().out
    assert out.count("activation sites wrapped") == verbose
    assert ("transformer.h.1.mlp.act" in out) == verbose
    assert out.count(str(tmp_path / "eafo")) == 2 * verbose


def test_the_log_lies_where_it_is_wanted(tmp_path: Path) -> None:
    make(tmp_path / "run", 2, EAFOTrainerCallback(dirpath=tmp_path / "log")).train()
    assert CorrectionLog.load(tmp_path / "log").steps == [1, 2]
    make(tmp_path / "run", 2, EAFOTrainerCallback(save_log=False)).train()
    assert not (tmp_path / "run" / "eafo").exists()


# ------------------------------------------------------------------ interrupted, damaged, another model

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_grad_norm": 0.0}
BETWEEN: dict[str, Any] = {"update_every_n_steps": 5, "collect_every_n_steps": 1, "rollback_factor": 1.01}


def stopped(folder: Path) -> Path:
    """A run that was stopped between two rounds.

    Returns:
        Its checkpoint.
    """
    trainer = make(folder, 8, EAFOTrainerCallback(**BETWEEN), **SAVING)
    trainer.add_callback(_StopAt(3))
    trainer.train()
    return folder / "checkpoint-3"


def test_a_run_that_is_resumed_elsewhere_goes_on_with_its_state_and_its_log(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", 8, EAFOTrainerCallback(**BETWEEN), **SAVING)
    whole.train()
    checkpoint = stopped(tmp_path / "first")
    resumed = make(tmp_path / "second", 8, EAFOTrainerCallback(**BETWEEN), **SAVING)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="EAFO")
        resumed.train(resume_from_checkpoint=str(checkpoint))
    for (key, one), two in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, two), key
    logs = [CorrectionLog.load(tmp_path / name) for name in ("whole", "second")]
    assert logs[0].rows == logs[1].rows


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, path)


def incomplete(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    del state["losses"]  # which is restored last
    torch.save(state, path)


@pytest.mark.parametrize("damage", [cut, empty, foreign, incomplete])
def test_a_damaged_state_is_one_line_and_nothing_of_it_is_applied(tmp_path: Path, damage: Any) -> None:
    state = stopped(tmp_path) / "eafo_state.pt"
    log = CorrectionLog.load(tmp_path).rows
    damage(state)
    callback = EAFOTrainerCallback(**BETWEEN)
    trainer = make(tmp_path, 8, callback, **SAVING)
    assert callback.controller is not None
    with pytest.raises(SiteError) as caught:
        trainer.train(resume_from_checkpoint=True)
    text = str(caught.value)
    assert str(state) in text and "\n" not in text
    assert "Resume from an earlier checkpoint, or delete this file" in text
    assert callback.controller.pace.last < 0
    assert callback.controller.rounds == 0
    assert CorrectionLog.load(tmp_path).rows == log

    state.unlink()
    trainer = make(tmp_path, 8, EAFOTrainerCallback(**BETWEEN), **SAVING)
    with pytest.warns(UserWarning, match="eafo_state.pt is missing; density estimates start anew"):
        trainer.train(resume_from_checkpoint=True)
    assert CorrectionLog.load(tmp_path).update_steps == [1, 2, 4, 5]


def test_the_state_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = stopped(tmp_path) / "eafo_state.pt"
    before = state.read_bytes()
    callback = EAFOTrainerCallback(**BETWEEN)
    trainer = make(tmp_path, 3, callback, **SAVING)

    def full(saved: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    trainer.state.global_step = 3
    with pytest.raises(OSError, match="no space"):
        callback.on_save(trainer.args, trainer.state, trainer.control)
    assert state.read_bytes() == before
    assert [path.name for path in state.parent.iterdir() if "tmp" in path.name] == []


def test_another_model_than_the_one_that_was_wrapped_is_refused(tmp_path: Path) -> None:
    callback = EAFOTrainerCallback()
    trainer = make(tmp_path, 2, callback)
    other = transformers.GPT2LMHeadModel(trainer.model.config)
    trainer = transformers.Trainer(
        model_init=lambda: transformers.GPT2LMHeadModel(other.config),
        args=trainer.args,
        train_dataset=Tokens(),
        callbacks=[EAFOTrainerCallback()],
    )
    with pytest.raises(EAFOError, match=r"model=\.\.\. in place of model_init"):
        trainer.train()


def test_corrections_that_were_taken_out_are_refused(tmp_path: Path) -> None:
    callback = EAFOTrainerCallback()
    trainer = make(tmp_path, 2, callback)
    unwrap(trainer.model)
    with pytest.raises(EAFOError, match="taken out of the model after the Trainer was made"):
        trainer.train()


class Frames(torch.utils.data.Dataset[dict[str, Any]]):
    """Sounds with their text, or text alone; a column that no model asks for; says what was read."""

    def __init__(self, sounds: bool) -> None:
        self.sounds = sounds
        self.read: list[int] = []

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        ids = torch.randint(3, 40, (6,))
        if self.sounds:
            return {"input_features": torch.randn(8, 60), "labels": ids, "name": "x"}
        return {"input_ids": ids, "labels": ids, "name": "x"}


def mamba() -> Any:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)
    )


def whisper() -> Any:
    sizes = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes |= dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 16)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(
        vocab_size=50, num_mel_bins=8, max_source_positions=30, max_target_positions=16, **sizes, **tokens
    )
    return transformers.WhisperForConditionalGeneration(config)


@pytest.mark.parametrize(("make_model", "calls"), [(mamba, 4), (whisper, 6)])
def test_the_first_items_show_functional_calls_and_leave_no_trace(tmp_path: Path, make_model: Any, calls: int) -> None:
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    torch.manual_seed(0)
    model, data, callback = make_model(), Frames(make_model is whisper), EAFOTrainerCallback()
    seen: list[str] = []
    model.register_forward_hook(lambda module, args, out: seen.append("forward"))
    torch.manual_seed(5)
    transformers.Trainer(model, args, train_dataset=data)
    plain = torch.get_rng_state()
    torch.manual_seed(5)
    data.read.clear()
    transformers.Trainer(model, args, train_dataset=data, callbacks=[callback])
    assert torch.equal(torch.get_rng_state(), plain)
    assert data.read == [0, 1]
    assert callback.controller is not None and callback.controller.report.dynamic
    assert len(callback.controller.report.wrapped) == calls
    assert all(p.grad is None for p in model.parameters())
    assert seen == []


@pytest.mark.filterwarnings("default::UserWarning")
def test_without_data_the_tree_alone_is_searched_and_a_warning_says_so(tmp_path: Path) -> None:
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.warns(UserWarning, match=r"module tree only.*example="):
        transformers.Trainer(make_gpt2(), args, callbacks=[EAFOTrainerCallback()])


def make_gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))


class _FailAt(transformers.TrainerCallback):
    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise self.error


@pytest.mark.parametrize(
    ("error", "how"), [(RuntimeError("no memory left"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_the_log_of_a_run_that_an_exception_ends_ends_with_the_model(
    tmp_path: Path, error: BaseException, how: str
) -> None:
    callback = EAFOTrainerCallback(update_every_n_steps=4)
    trainer = make(tmp_path, 10, callback)
    trainer.add_callback(_FailAt(6, error))
    with pytest.raises(type(error)):
        trainer.train()
    log = CorrectionLog.load(tmp_path)
    assert (log.update_steps, log.steps) == ([1, 2, 4], [1, 2, 4, 6])
    assert {row["fit_end"] for row in log.last()} == {how}
    assert callback.controller is not None
    for row, eps in zip(log.last(), callback.controller.bank.eps, strict=True):
        assert row["eps"] == pytest.approx(eps.item())


def test_a_run_that_fails_before_it_trains_has_no_log(tmp_path: Path) -> None:
    trainer = make(tmp_path, 4, EAFOTrainerCallback())
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="train_dataset"):
        trainer.train()
    with pytest.raises(LogError):
        CorrectionLog.load(tmp_path)


@pytest.mark.parametrize(("option", "name"), [("fsdp", "FSDP"), ("deepspeed", "DeepSpeed")])
def test_shards_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, name: str
) -> None:
    made = transformers.Trainer.create_accelerator_and_postprocess

    def sharded(self: Any) -> None:
        made(self)
        setattr(self, f"is_{option}_enabled", True)  # as a configuration of accelerate sets it
        monkeypatch.setattr(type(self.accelerator.state), "fsdp_plugin", SimpleNamespace(fsdp_version=1), raising=False)

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ConfigError, match=f"^{option}=.*{name} cuts parameters into shards.*DistributedData") as raised:
        make(tmp_path, 4, EAFOTrainerCallback())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("loads", "options", "line"),
    [
        (True, {}, "^cpu_ram_efficient_loading=True: .*one number.*False in fsdp_config"),
        (False, {"per_channel": True}, "^max_grad_norm=1.0: .*max_grad_norm=0.0"),
    ],
)
def test_settings_of_fsdp2_that_cannot_work_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: bool, options: dict[str, Any], line: str
) -> None:
    made = transformers.Trainer.create_accelerator_and_postprocess
    plugin = SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=loads, ignored_modules=None)

    def sharded(self: Any) -> None:
        made(self)
        self.is_fsdp_enabled = True
        monkeypatch.setattr(type(self.accelerator.state), "fsdp_plugin", plugin, raising=False)

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ConfigError, match=line) as raised:
        make(tmp_path, 4, EAFOTrainerCallback(**options))
    assert "\n" not in str(raised.value)
