"""Merged models on disk: weights beside what says where the corrected functions go, or a graph for other runtimes."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from eafo_dynamic.apply.kept import Keeper, keep
from eafo_dynamic.apply.merge.baking import Baked, MergePlan, State, apply_plan
from eafo_dynamic.apply.merge.calls import CallCounter, CorrectedCalls, Order
from eafo_dynamic.apply.merge.graph import MergedGraph, export
from eafo_dynamic.apply.merge.signature import Call, call_of
from eafo_dynamic.apply.standalone import CorrectedActivation
from eafo_dynamic.errors import CompoundingError, ConfigError, SiteError, legible
from eafo_dynamic.internals.torch_internals import forward_pre_hooks

__all__ = [
    "FORMATS",
    "FUNCTIONS_NAME",
    "GRAPH_FORMATS",
    "check_output",
    "keep_functions",
    "load_merged",
    "save_merged",
]

GRAPH_FORMATS = (".pt2", ".onnx")
FORMATS = (".pt", ".ckpt", ".safetensors", *GRAPH_FORMATS)

FUNCTIONS_NAME = "eafo_merged.safetensors"
"""What ``save_pretrained`` of a merged model writes beside its weights."""

_KEY = "merged"


def check_output(path: str | Path) -> Path:
    """Whether a merged model can be written to a file of that name here.

    Args:
        path: the file.

    Returns:
        The path.

    Raises:
        ConfigError: for another ending, a folder that is not there, or a format whose package is not installed.
    """
    file = Path(path)
    if file.suffix not in FORMATS:
        raise ConfigError("output", str(path), "is no format for models", f"End it in {', '.join(FORMATS)}.")
    if not file.parent.is_dir():
        raise ConfigError("output", str(path), "lies in a folder that does not exist", f"Make {file.parent} first.")
    if file.suffix == ".onnx" and importlib.util.find_spec("onnxscript") is None:
        raise ConfigError("output", str(path), "needs the package onnxscript", "Run pip install onnxscript.")
    return file


def save_merged(model: nn.Module, path: str | Path, *example_args: Any, **example_kwargs: Any) -> Path:
    """Writes a merged model; the ending of the name chooses the format.

    ``.pt``, ``.ckpt``, ``.safetensors``: the weights, for ``load_merged``; a file of the first two loads with
    ``weights_only=True`` and has the keys ``state_dict`` and ``merged``. ``.pt2``: a program of torch.export, for
    ``torch.export.load`` or ``load_merged``. ``.onnx``: for ONNX runtimes. In the last two the batch, the first
    dimension of every tensor, may have any size, and every other dimension that the model does not fix.

    Args:
        model: from ``merge``.
        path: the file.
        *example_args: example input, for ``.pt2`` and ``.onnx``; a ``MergedGraph`` needs none.
        **example_kwargs: example input.

    Returns:
        The path.

    Raises:
        ConfigError: if the model and the format do not go together, or there is no example.
        SiteError: if torch cannot export the model.
    """
    file = check_output(path)
    if file.suffix in GRAPH_FORMATS:
        if not isinstance(model, MergedGraph) and not example_args and not example_kwargs:
            problem = "is a graph, which needs an example input"
            raise ConfigError("output", str(path), problem, "Give one, or write to .pt or .safetensors.")
        program = export(model, example_args, example_kwargs)
        if file.suffix == ".pt2":
            torch.export.save(program, file, extra_files={_KEY: _call(model, example_args, example_kwargs)})
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the exporter, about its own code
                exported: Any = torch.onnx.export(program, dynamo=True, verbose=False)
                _fix_known_sizes(exported.model.graph)
                exported.save(file, external_data=False)
        return file
    if isinstance(model, MergedGraph):
        problem = "holds weights for modules, and this model calls activations as functions"
        raise ConfigError("output", str(path), problem, "Write the graph: end the name in .pt2 or .onnx.")
    state = {key: value.detach() for key, value in model.state_dict().items()}
    if file.suffix == ".safetensors":
        _save_tensors(state, _places(model), file)
    else:
        torch.save({"state_dict": state, _KEY: _places(model)}, file)
    return file


def _fix_known_sizes(graph: Any) -> None:
    """Makes numbers of sizes that torch has fixed and still writes as the names of free ones, such as "3"."""
    for value in (*graph.inputs, *graph.outputs):
        for dim, size in enumerate(value.shape or ()):
            name = getattr(size, "value", None)
            if isinstance(name, str) and name.isdecimal():
                value.shape[dim] = int(name)


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What a program does not say of itself: the mode it is for, and the signature of the forward."""
    call = model.call if isinstance(model, MergedGraph) else call_of(model, args, kwargs)
    return json.dumps({"training": model.training, "call": None if call is None else asdict(call)})


def _places(model: nn.Module) -> list[dict[str, Any]]:
    """Where the corrected functions of a merged model are: primitives only."""
    orders: dict[str, dict[str, Order]] = {}
    parents: list[str] = []
    for name, module in model.named_modules():
        for hook in forward_pre_hooks(module):
            counter = getattr(hook, "__self__", None)
            if isinstance(counter, CallCounter):
                parents = list(counter.parents)
                for called, order in counter.orders.items():
                    orders.setdefault(called, {})[name] = order
    found: list[dict[str, Any]] = []
    for name, module in model.named_modules():
        if isinstance(module, CorrectedCalls):
            found.append(_place(name, module, orders[module.name]) | {"parents": parents})
        elif isinstance(module, CorrectedActivation) and not any(
            name.startswith(f"{each['module']}.") for each in found
        ):
            found.append(_place(name, module, {}))
    return found


def _place(name: str, module: nn.Module, orders: Mapping[str, Order]) -> dict[str, Any]:
    functions = _functions(module)
    dims, bases = [each.channel_dim for each in functions], [each.other_base for each in functions]
    place = {"module": name, "functions": len(dims), "orders": orders, "channel_dims": dims}
    return place if not any(bases) else {**place, "bases": bases}


def _functions(module: nn.Module) -> list[CorrectedActivation]:
    found = module.functions if isinstance(module, CorrectedCalls) else [module]
    return [each for each in found if isinstance(each, CorrectedActivation)]


def load_merged(model: nn.Module | None, path: str | Path) -> nn.Module:
    """Puts the corrected functions and the weights of a file into a plain model of the same structure.

    A ``.pt2`` file is a whole model, and needs none.

    Args:
        model: as it was before it was wrapped and trained; for ``.pt2`` it is not looked at and may be None.
        path: written by ``save_merged``: ``.pt``, ``.ckpt``, ``.safetensors`` or ``.pt2``; or a folder to which
            ``save_pretrained`` of a merged model of transformers has written: the model is then the one that
            ``from_pretrained`` makes of the folder, and gets the corrected functions.

    Returns:
        The model, changed in place; of ``.pt2`` a ``MergedGraph``, which is called as the model was.

    Raises:
        SiteError: if the file is not one of these, or of another model; the model is not changed then.
        CompoundingError: if it is of a run of version 0.1.0 whose corrections compound; likewise.
    """
    file = Path(path)
    if file.suffix == ".pt2":
        return _graph_in(file)
    if file.suffix == ".onnx":
        raise SiteError(f"{file} is for ONNX runtimes: onnxruntime.InferenceSession({str(path)!r}).")
    if model is None:
        raise SiteError(f"{file} has weights for a model. Give the plain model: load_merged(model, {str(path)!r}).")
    functions_alone = file.is_dir()
    if functions_alone:
        file = file / FUNCTIONS_NAME
    state, places = _read(file)
    if any(f"{stem}offset" in state for place in places for stem in _stems(place)):
        raise CompoundingError(str(path))
    _check_structure(model, state, places, path, functions_alone)
    modules = dict(model.named_modules())
    baked = [_baked(place, state) for place in places if not isinstance(modules.get(place["module"]), _DONE)]
    apply_plan(model, MergePlan(tuple(baked), ()))
    try:
        model.load_state_dict(state, strict=not functions_alone)
    except RuntimeError as error:
        raise SiteError(f"{path} is of another model: {' '.join(str(error).split())}") from None
    for place in places:
        functions, dims = _functions(model.get_submodule(place["module"])), place.get("channel_dims", ())
        for function, dim in zip(functions, dims, strict=False):  # a file need not say it
            function.channel_dim = dim
    keep_functions(model)
    return model


def _check_structure(
    model: nn.Module, state: Mapping[str, Tensor], places: Sequence[Mapping[str, Any]], path: object, functions: bool
) -> None:
    """Checks that a model has the modules and weights of a file, but for the functions that the file brings."""
    modules = dict(model.named_modules())
    names = {name for place in places for name in (place["module"], *place["orders"])}
    held = {f"{name}.activation".lstrip(".") for name, each in modules.items() if "activation" in vars(each)}
    absent = sorted(names - set(modules) - held)
    if absent:
        raise SiteError(f"{path} is of another model: this one has no {', '.join(map(repr, absent))}.")
    own = tuple(f"{alias}." for place in places for alias in _aliases(model, place["module"]))
    mine = {key for key in model.state_dict() if not key.startswith(own)}
    theirs = {key for key in state if not key.startswith(own)}
    if functions:
        mine = set()
    if mine != theirs:
        differ = ", ".join(sorted(mine ^ theirs)[:6])
        raise SiteError(f"{path} is of another model: the names of the weights differ ({differ}).")
    shapes = {key: value.shape for key, value in model.state_dict().items() if key in theirs}
    differing = [key for key in sorted(shapes) if shapes[key] != state[key].shape]
    if differing:
        shown = ", ".join(f"{key}: {list(state[key].shape)}, here {list(shapes[key])}" for key in differing[:6])
        raise SiteError(f"{path} is of another model: sizes differ ({shown}).")


def _graph_in(file: Path) -> MergedGraph:
    said = {_KEY: ""}
    if not file.is_file():
        raise SiteError(f"{file} does not exist. Write one with save_merged, or eafo-dynamic merge.")
    with legible(f"{file} is damaged, or no program of torch.export. Write it anew with save_merged"):
        program = torch.export.load(file, extra_files=said)
        known = json.loads(said[_KEY] or "{}")
        call = known.get("call")
        if call is not None:
            call = Call.of_lists(call)
        return MergedGraph(program, bool(known.get("training", False)), call)


class _Functions(Keeper):
    """Stands before ``save_pretrained`` of a merged model: its plain class does not know the corrected functions."""

    hook = "save_pretrained"

    def __call__(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        result = self.run_own(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            places = _places(self.module)
            stems = tuple(stem for place in places for stem in _stems(place))
            state = {key: value for key, value in self.module.state_dict().items() if key.startswith(stems)}
            _save_tensors(state, places, Path(save_directory) / FUNCTIONS_NAME)
        return result


def keep_functions(model: nn.Module) -> None:
    """Lets ``save_pretrained`` of a merged model of transformers write its corrected functions too.

    Args:
        model: merged in place.
    """
    for module in model.modules():
        if hasattr(type(module), _Functions.hook) and any(isinstance(each, _DONE) for each in module.modules()):
            keep(_Functions(module))


def _save_tensors(state: Mapping[str, Tensor], places: Sequence[Mapping[str, Any]], file: Path) -> None:
    from safetensors.torch import save_file

    alone = {key: value.detach().clone().contiguous() for key, value in state.items()}
    save_file(alone, file, metadata={"format": "pt", _KEY: json.dumps(places)})


def _aliases(model: nn.Module, name: str) -> list[str]:
    """All names of a module or attribute: what is shared is in a state_dict once a name."""
    holder, _, attribute = name.rpartition(".")
    held = attribute in vars(model.get_submodule(holder))  # a function, no module yet
    wanted, rest = (model.get_submodule(holder), f".{attribute}") if held else (model.get_submodule(name), "")
    every = model.named_modules(remove_duplicate=False)
    return [f"{each}{rest}".lstrip(".") for each, module in every if module is wanted]


_DONE = (CorrectedActivation, CorrectedCalls)


def _read(file: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    problem = "is not a merged model"
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with cast("Callable[..., Any]", safe_open)(file, framework="pt") as opened:
                places = json.loads((opened.metadata() or {})[_KEY])
                return {key: opened.get_tensor(key) for key in list(opened.keys())}, places
        saved = cast("Mapping[str, Any]", torch.load(file, map_location="cpu", weights_only=True))
        return dict(saved["state_dict"]), list(saved[_KEY])
    except FileNotFoundError:
        problem = "does not exist"
    except (KeyError, TypeError):
        problem = "holds no merged model"
    except Exception as error:
        problem = f"cannot be read ({' '.join(str(error).split())[:200]})"
    raise SiteError(f"{file} {problem}. Write one with save_merged, or eafo-dynamic merge.")


def _stems(place: Mapping[str, Any]) -> list[str]:
    """What the names of the tensors of every corrected function begin with."""
    name, count = place["module"], place["functions"]
    return [f"{name}.functions.{k}." for k in range(count)] if place["orders"] else [f"{name}."]


def _baked(place: Mapping[str, Any], state: Mapping[str, Tensor]) -> Baked:
    stems = _stems(place)
    functions = tuple(
        State(
            state.get(f"{stem}eps"),
            state[f"{stem}shape"],
            state.get(f"{stem}table"),
            state.get(f"{stem}lift"),
            state.get(f"{stem}gain"),
            state.get(f"{stem}slope"),
            base=base,
        )
        for stem, base in zip(stems, place.get("bases") or [None] * len(stems), strict=True)
    )
    return Baked(place["module"], (), functions, place["orders"], tuple(place.get("parents", ())))
