"""``eafo-dynamic merge``: the model of a checkpoint, its corrections baked in, in a file for deployment."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from eafo_dynamic.errors import CompoundingError, ConfigError

if TYPE_CHECKING:
    from torch import nn

    from eafo_dynamic.apply.merge import MergePlan

__all__ = ["register"]

_CONFIG = "config.yaml"
_LEVELS = 4  # folders from a checkpoint up to its run's


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
        help="a checkpoint of eafo-dynamic fit, or of a Trainer with an EAFOCallback",
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="where to: .pt, .ckpt, .safetensors, .pt2, .onnx"
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
    _apply(model, checkpoint, args.checkpoint)
    model.eval()
    plan = plan_of(model)
    rows = _rows(model, plan)
    example = _example(args, model, data) if plan.calls or file.suffix in GRAPH_FORMATS else ()
    save_merged(merge(model, *example), file, *example)
    optional = ("shape", "sigma", "mu")
    emit(
        rows,
        fmt=args.format,
        optional=optional,
        title=f"{len(rows)} sites of {Path(args.checkpoint).name} merged into {file}",
    )
    return 0


def _checkpoint(path: str) -> Mapping[str, Any]:
    import torch

    from eafo_dynamic.apply.kept import CHECKPOINT_KEY

    try:
        saved = cast(object, torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({_line(error)})"
        raise ConfigError("checkpoint", path, reason, "Give a .ckpt file of a Trainer.") from None
    if not isinstance(saved, Mapping) or CHECKPOINT_KEY not in saved or "state_dict" not in saved:
        raise ConfigError("checkpoint", path, "holds no corrections", "Give one saved by a run with an EAFOCallback.")
    return cast("Mapping[str, Any]", saved)


def _line(error: Exception) -> str:
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
    folders = list(Path(args.checkpoint).resolve().parents)[:_LEVELS]
    found = next((folder / _CONFIG for folder in folders if (folder / _CONFIG).is_file()), None)
    if found is None:
        problem = f"has no {_CONFIG} in its folder or one of the {_LEVELS - 1} above"
        raise ConfigError("checkpoint", args.checkpoint, problem, "Name it with --config, or a factory with --model.")
    return found


def _configured(file: Path) -> tuple[nn.Module, Any]:
    import yaml

    from eafo_dynamic.experiments.configured import configured, quieten

    try:
        config: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("--config", str(file), f"cannot be read ({_line(error)})", "Give a YAML file.") from None
    if not isinstance(config, Mapping) or "model" not in config:
        raise ConfigError("--config", str(file), "has no model", "Give the config.yaml of a run of eafo-dynamic fit.")
    quieten()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    # nothing of the run's own trainer: its callbacks and loggers would act here
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "barebones": False}
    parts = {key: config[key] for key in ("model", "data") if config.get(key) is not None}
    # the parts are given in so many words; LightningCLI warns that the command line has others
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    made = configured({**parts, "trainer": quiet}, run=False, save_config_callback=None, seed_everything_default=False)
    return made.model, made.datamodule


def _apply(model: nn.Module, checkpoint: Mapping[str, Any], path: str) -> None:
    from eafo_dynamic.apply.manifest import apply_from_checkpoint

    try:
        apply_from_checkpoint(model, checkpoint)
    except CompoundingError:
        raise
    except RuntimeError as error:  # torch's own, and SiteError: the weights or the sites do not fit
        problem = f"is of another model than this {type(model).__name__} ({_line(error)})"
        mend = "Give the configuration or the factory that the checkpoint was trained with."
        raise ConfigError("checkpoint", path, problem, mend) from None


def _example(args: argparse.Namespace, model: nn.Module, data: Any) -> tuple[Any, ...]:
    import torch

    if args.shape is not None:
        return (torch.zeros(args.shape),)
    given = getattr(model, "example_input_array", None)
    if given is not None:
        return given if isinstance(given, tuple) else (given,)
    if data is None:
        problem = "needs an example input, and the model has no example_input_array"
        raise ConfigError("--output", args.output, problem, "Give its shape, for example --shape 2,3,32,32.")
    try:
        data.prepare_data()
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
    except Exception as error:
        problem = f"the configuration's data cannot be read for an example ({_line(error)})"
        raise ConfigError("--shape", None, problem, "Give one, for example --shape 2,3,32,32.") from None
    return ((batch[0] if isinstance(batch, (list, tuple)) else batch)[:2],)


def _rows(model: nn.Module, plan: MergePlan) -> list[dict[str, object]]:
    """One row a site: its correction, and what it becomes."""
    from eafo_dynamic.apply.surgery import hosted_sites, site_source
    from eafo_dynamic.correction.bases import as_base

    became: dict[str, str] = {}
    for baked in plan.baked:
        kind = "CorrectedCalls" if baked.orders else "CorrectedActivation"
        for site in baked.sites:
            became[site] = kind if baked.functions else "the plain activation"
    became |= dict.fromkeys(plan.calls, "in the graph")
    if plan.calls:
        became = {site: "in the graph" if text.startswith("Corrected") else text for site, text in became.items()}
    rows: list[dict[str, object]] = []
    for host, site in hosted_sites(model):
        eps, table, lift = (getattr(host, site.keys[k]) for k in (0, 2, 3))
        mu, sigma = getattr(host, site.keys[1]).tolist()
        row: dict[str, object] = {"site": site.name, "base": str(as_base(site_source(model, site)))}
        amplitudes = {"eps": eps, "lift": lift}
        row |= {name: float(each.detach().mean()) for name, each in amplitudes.items() if each is not None}
        row |= {"mu": mu, "sigma": sigma}
        row |= {
            "shape": "closed form" if table is None else "table",
            "becomes": became.get(site.name, "the plain activation"),
        }
        rows.append(row)
    return rows
