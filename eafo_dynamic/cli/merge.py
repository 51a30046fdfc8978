"""``eafo-dynamic merge``: writes the model of a checkpoint, its corrections merged in, for deployment."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from eafo_dynamic.errors import CompoundingError, ConfigError, SiteError
from eafo_dynamic.internals.files import see_working_directory

if TYPE_CHECKING:
    from torch import nn

    from eafo_dynamic.apply.checkpoints import Checkpoint
    from eafo_dynamic.apply.merge import MergePlan

__all__ = ["register"]

_PLAIN = "the plain activation"
_IN_GRAPH = "in the graph"
_CONFIG = "config.yaml"
_LEVELS = 4  # how many folders above a checkpoint are searched for it


def register(commands: Any) -> None:
    """Adds the command.

    Args:
        commands: the subparsers of the main parser.
    """
    from eafo_dynamic.cli.helptext import examples
    from eafo_dynamic.cli.output import add_format_option
    from eafo_dynamic.cli.sites import shape

    parser: argparse.ArgumentParser = commands.add_parser(
        "merge",
        help="bake a checkpoint's corrections into plain modules and write the model for deployment",
        description="Rebuild a checkpoint's model, bake its corrections in and write it; show what became of each "
        "site. The ending of the output says what is written. .pt, .ckpt, .safetensors: weights for "
        "eafo_dynamic.load_merged; .pt2: a program of torch.export; .onnx: a graph for any ONNX runtime.",
        **examples(
            "merge runs/digits_vit/version_0/checkpoints/last.ckpt --output digits.onnx",
            "merge last.ckpt --model my_project.net:make --shape 2,3,32,32 --output net.safetensors",
        ),
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a checkpoint of eafo-dynamic fit, of a Trainer of Lightning or Hugging Face (its folder), of Fabric, of "
        "torch.distributed.checkpoint, a file of weights, or one of save_corrections",
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="file to write: .pt, .ckpt, .safetensors, .pt2, .onnx"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config", metavar="FILE", help="the run's configuration; default: config.yaml in its folder")
    source.add_argument(
        "--model", metavar="MODEL", help="package.module:callable that returns the model, instead of a configuration"
    )
    parser.add_argument(
        "--shape",
        type=shape,
        metavar="N,N,...",
        help="shape of an example input of zeros, for .pt2, .onnx and functional calls; "
        "default: the model's example_input_array, or the configuration's data",
    )
    add_format_option(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from eafo_dynamic.apply.merge import merge, plan_of, save_merged
    from eafo_dynamic.apply.merge.files import GRAPH_FORMATS, check_output
    from eafo_dynamic.cli.output import emit

    file = check_output(args.output)
    checkpoint = _checkpoint(args.checkpoint)
    model, data = _model(args)
    taken = _apply(model, checkpoint, args)
    model.eval()
    plan = plan_of(model)
    rows = _rows(model, plan)
    example: tuple[Any, ...] = ()
    if plan.calls or file.suffix in GRAPH_FORMATS:
        example = _example(args, model, data)
    save_merged(merge(model, *example), file, *example)
    title = f"{len(rows)} sites of {Path(args.checkpoint).name} merged into {file}; {taken}"
    emit(rows, fmt=args.format, optional=("shape", "sigma", "mu"), title=title)
    return 0


def _checkpoint(path: str) -> Checkpoint:
    from eafo_dynamic.apply.checkpoints import read_checkpoint

    mend = "Give a checkpoint of a Trainer: a file, or a folder."
    if not Path(path).exists():
        raise ConfigError("checkpoint", path, "does not exist", mend)
    try:
        return read_checkpoint(path)
    except SiteError as error:
        problem = f"cannot be read ({_message(error)})"
        if error.__cause__ is None:  # it could, and is not what is needed
            problem = _message(error)
        if "holds no corrections" in problem:
            problem = "holds no corrections"
            mend = "Give one saved by a run with a callback of eafo-dynamic, or a file of save_corrections."
        raise ConfigError("checkpoint", path, problem.removesuffix("."), mend) from None


def _message(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _model(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The plain model, and the data module of its configuration if there is one."""
    from eafo_dynamic.cli.sites import make

    if args.model is not None:
        model = make(args.model)
        return cast("nn.Module", model), None
    return _configured(_config(args))


def _config(args: argparse.Namespace) -> Path:
    if args.config is not None:
        return Path(args.config)
    for folder in list(Path(args.checkpoint).resolve().parents)[:_LEVELS]:
        file = folder / _CONFIG
        if file.is_file():
            return file
    problem = f"has no {_CONFIG} in its folder or one of the {_LEVELS - 1} above"
    raise ConfigError("checkpoint", args.checkpoint, problem, "Name it with --config, or a factory with --model.")


def _configured(file: Path) -> tuple[nn.Module, Any]:
    import yaml

    from eafo_dynamic.experiments.configured import configured, quieten

    try:
        config: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("--config", str(file), f"cannot be read ({_message(error)})", "Give a YAML file.") from None
    if not isinstance(config, Mapping) or "model" not in config:
        raise ConfigError("--config", str(file), "has no model", "Give the config.yaml of a run of eafo-dynamic fit.")
    quieten()
    see_working_directory()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    # not the run's own trainer, whose callbacks and loggers would act here
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "barebones": False}
    parts = {key: config[key] for key in ("model", "data") if config.get(key) is not None}
    # LightningCLI warns that the arguments of this process are not used, which is what is wanted
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    made = configured({**parts, "trainer": quiet}, run=False, save_config_callback=None, seed_everything_default=False)
    return made.model, made.datamodule


def _apply(model: nn.Module, checkpoint: Checkpoint, args: argparse.Namespace) -> str:
    """Gives the plain model what the checkpoint holds; says what that was."""
    from eafo_dynamic.apply.checkpoints import apply_checkpoint

    example: tuple[Any, ...] = ()
    if args.shape is not None and checkpoint.sites is None and checkpoint.corrections is None:
        example = _example(args, model, None)  # without a list of sites they have to be found
    try:
        return apply_checkpoint(model, checkpoint, *example)
    except CompoundingError:
        raise
    except RuntimeError as error:  # torch's, and SiteError: the weights or the sites do not fit
        problem = f"is of another model than this {type(model).__name__} ({_message(error)})"
        mend = "Give the configuration or the factory that the checkpoint was trained with."
        raise ConfigError("checkpoint", args.checkpoint, problem, mend) from None


def _example(args: argparse.Namespace, model: nn.Module, data: Any) -> tuple[Any, ...]:
    import torch

    if args.shape is not None:
        return (torch.zeros(args.shape),)
    given = getattr(model, "example_input_array", None)
    if given is not None:
        if isinstance(given, tuple):
            return cast("tuple[Any, ...]", given)
        return (given,)
    if data is None:
        problem = "needs an example input, and the model has no example_input_array"
        raise ConfigError("--output", args.output, problem, "Give its shape, for example --shape 2,3,32,32.")
    try:
        data.prepare_data()
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
    except Exception as error:
        problem = f"the configuration's data cannot be read for an example ({_message(error)})"
        raise ConfigError("--shape", None, problem, "Give one, for example --shape 2,3,32,32.") from None
    if isinstance(batch, (list, tuple)):
        batch = cast("list[Any]", batch)[0]
    return (batch[:2],)


def _rows(model: nn.Module, plan: MergePlan) -> list[dict[str, object]]:
    """One row per site: its correction, and what it becomes."""
    from eafo_dynamic.apply.surgery import hosted_sites, site_source
    from eafo_dynamic.correction.bases import as_base

    becomes = _becomes(plan)
    rows: list[dict[str, object]] = []
    for host, site in hosted_sites(model):
        table = getattr(host, site.key("table"))
        mu, sigma = getattr(host, site.key("shape")).tolist()
        row: dict[str, object] = {"site": site.name, "base": str(as_base(site_source(model, site)))}
        for name, amplitude in zip(site.names(host), site.amplitudes(host), strict=True):
            row[name] = float(amplitude.detach().mean())
        row["mu"] = mu
        row["sigma"] = sigma
        row["shape"] = "closed form" if table is None else "table"
        row["becomes"] = becomes.get(site.name, _PLAIN)
        rows.append(row)
    return rows


def _becomes(plan: MergePlan) -> dict[str, str]:
    """What each site becomes, by its name."""
    becomes: dict[str, str] = {}
    for baked in plan.baked:
        if not baked.functions:
            kind = _PLAIN
        elif plan.calls:  # an exported graph holds the corrected modules too
            kind = _IN_GRAPH
        elif baked.orders:
            kind = "CorrectedCalls"
        else:
            kind = "CorrectedActivation"
        becomes |= dict.fromkeys(baked.sites, kind)
    becomes |= dict.fromkeys(plan.calls, _IN_GRAPH)
    return becomes
