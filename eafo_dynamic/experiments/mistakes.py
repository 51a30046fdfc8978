"""Which part of a refused configuration is wrong, and how to fix it, in one line.

jsonargparse reports a mistake as a tree of all readings of a value that failed. Here the mistake is looked for instead:
along the configuration, each value is held against the signature of the class that it is an argument of.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, cast

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from eafo_dynamic.errors import ConfigError

__all__ = ["find_mistake"]

_PARTS: dict[str, Any] = {
    "seed_everything": bool | int,
    "model": LightningModule | None,
    "data": LightningDataModule | None,
    "ckpt_path": str | Path | None,
}
"""Parts of a configuration beside the trainer, and their types."""
_COMPLETED: dict[str, tuple[type, str]] = {
    "optimizer": (Optimizer, "params"),
    "lr_scheduler": (LRScheduler, "optimizer"),
}
"""Parts of which LightningCLI gives one argument itself: base class and name of that argument."""
_SPEC_KEYS = ("class_path", "init_args", "dict_kwargs")
"""Keys of a mapping that stands for an object: its class and the arguments of that class."""


def find_mistake(arguments: Sequence[str] | Mapping[str, Any]) -> str | None:
    """The first mistake in a command line or a configuration that LightningCLI has refused.

    Args:
        arguments: words of the command line, or a configuration as nested mappings.

    Returns:
        What is wrong and how to fix it, on one line; None if nothing is found.
    """
    try:
        if isinstance(arguments, Mapping):
            return _in_configuration(arguments)
        return _in_configuration(_given(arguments))
    except ConfigError as error:
        return str(error)


def _in_configuration(config: Mapping[str, Any]) -> str | None:
    trainer = _part(config, "trainer")
    if isinstance(trainer, Mapping):
        mistake = _in_arguments("trainer", Trainer, cast("Mapping[str, Any]", trainer))
        if mistake is not None:
            return mistake
    for part, kind in _PARTS.items():
        value = _part(config, part)
        if value is not None and not _fits(value, kind):
            return _in_value(value, kind) or _does_not_fit(part, value, kind)
    for part, (base, given) in _COMPLETED.items():
        value = _part(config, part)
        if value is not None and not _fits_subclass(value, base, skip=[given]):
            return _in_value(value, base, skip=[given]) or _does_not_fit(part, value, base)
    if config.get("model") is None:
        return "no model is given. Name a configuration that has one: --config FILE."
    return None


def _part(config: Mapping[str, Any], name: str) -> Any:
    """A part of a configuration, which may be the path of a YAML file of its own."""
    value = config.get(name)
    if isinstance(value, str) and value.endswith((".yaml", ".yml")) and Path(value).is_file():
        return _read(value)
    return value


# What is given on the command line


def _given(arguments: Sequence[str]) -> dict[str, Any]:
    """The configuration files of a command line and its single values, where later ones replace earlier ones."""
    config: dict[str, Any] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            continue
        option, equals, text = word.lstrip("-").partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                continue  # a flag
            text = words.pop(0)
        if option.endswith(".help"):
            continue
        if option in ("config", "c"):
            _merge(config, _read(text))
        else:
            _put(config, option.removesuffix("+").split("."), _list_or_mapping(text))
    return config


def _list_or_mapping(text: str) -> Any:
    """A list or mapping in YAML's notation; any other text as it is, for jsonargparse reads it by its type."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, (list, dict)):
        return cast("Any", value)
    return text


def _read(path: str) -> Mapping[str, Any]:
    if not Path(path).is_file():
        raise ConfigError("config", path, "no such file", "Name a YAML file.")
    try:
        with Path(path).open(encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("config", path, f"cannot be parsed ({_one_line(error)})", "Correct the file.") from error
    if not isinstance(content, Mapping):
        raise ConfigError("config", path, "has no keys", "A configuration has the keys trainer, model and data.")
    return cast("Mapping[str, Any]", content)


def _merge(config: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        present = config.get(key)
        if isinstance(present, dict) and isinstance(value, Mapping):
            _merge(cast("dict[str, Any]", present), cast("Mapping[str, Any]", value))
        else:
            config[key] = value


def _put(node: Any, keys: list[str], value: Any) -> None:
    """Sets a value as jsonargparse does: `model.lr` means `model.init_args.lr`, and a list means its last element."""
    if isinstance(node, list) and node:
        node = node[-1]
    if not isinstance(node, dict):
        return
    node = cast("dict[str, Any]", node)
    key, *inner_keys = keys
    if "class_path" in node and key not in _SPEC_KEYS:
        node = node.setdefault("init_args", {})
    if not inner_keys:
        node[key] = value
        return
    if isinstance(node.get(key), str):
        node[key] = {"class_path": node[key]}
    _put(node.setdefault(key, {}), inner_keys, value)


# What is wrong with it


def _in_value(value: Any, kind: Any, skip: Collection[str] = ()) -> str | None:
    """The mistake inside a value that does not fit: in a class that it names, or in an argument of that class."""
    if isinstance(value, list):
        for element in cast("list[Any]", value):
            mistake = _in_value(element, kind)
            if mistake is not None:
                return mistake
        return None
    classes = list(_classes_in(kind))
    if isinstance(value, str) and "." in value and classes:
        value = {"class_path": value}
    if not isinstance(value, Mapping):
        return None
    spec = cast("Mapping[str, Any]", value)
    if "class_path" in spec:
        return _in_spec(spec, classes, skip)
    for cls in classes:
        if dataclasses.is_dataclass(cls):
            return _in_arguments(_path_of(cls), cls, spec)
    return None


def _in_spec(spec: Mapping[str, Any], bases: Sequence[type], skip: Collection[str]) -> str | None:
    """The mistake in a mapping with `class_path` and `init_args`."""
    path = str(spec["class_path"])
    module_name, _, name = path.rpartition(".")
    if module_name == "":
        cls = _subclass(bases, name)
    else:
        try:
            cls = _import(path)
        except (ImportError, AttributeError) as error:
            return f"{path}: {error}.{_did_you_mean(name, _public_names(module_name))}"
    if not callable(cls):
        return None
    if inspect.isclass(cls) and bases and set(bases).isdisjoint(cls.__mro__):
        return None  # a class of another kind: the whole value does not fit
    for key in spec:
        if key not in _SPEC_KEYS:
            return f"{path}: unknown key {key!r} beside class_path.{_did_you_mean(key, _SPEC_KEYS)}"
    init_args = spec.get("init_args", {})
    if not isinstance(init_args, Mapping):
        return _does_not_fit("init_args", init_args, dict, owner=path)
    return _in_arguments(path, cls, cast("Mapping[str, Any]", init_args), skip)


def _in_arguments(
    owner: str, function: Callable[..., Any], given: Mapping[str, Any], skip: Collection[str] = ()
) -> str | None:
    """The mistake among the arguments of a class or function: an unknown one, one that does not fit, a missing one."""
    parser, known = _parser_of(function, skip)
    for name in given:
        if name not in known:
            hint = _did_you_mean(name, known) or f" Options are: {', '.join(known)}."
            return f"{owner}: unknown option {name!r}.{hint}"
    kinds = _annotations(function)
    for name, value in given.items():
        alone, _ = _parser_of(function, {*skip, *known} - {name})
        if _refusal(alone, {name: value}) is not None:
            kind = kinds.get(name, Any)
            return _in_value(value, kind) or _does_not_fit(name, value, kind, owner)
    refusal = _refusal(parser, given)
    if refusal is not None:
        return f"{owner}: {_one_line(refusal)}"
    return None


def _does_not_fit(option: str, value: Any, kind: Any, owner: str | None = None) -> str:
    takes = "See --help for its type."
    if kind is not Any:
        takes = f"It takes {_words(kind)}."
    mistake = str(ConfigError(option, value, "does not fit", takes))
    if owner is None:
        return mistake
    return f"{owner}: {mistake}"


# What jsonargparse accepts


def _parser_of(function: Callable[..., Any], skip: Collection[str]) -> tuple[ArgumentParser, list[str]]:
    """A parser for the arguments of a class or function but those in `skip`, and their names."""
    parser = ArgumentParser(exit_on_error=False)
    if inspect.isclass(function):
        added = parser.add_class_arguments(function, fail_untyped=False, sub_configs=True, skip=set(skip))
    else:
        added = parser.add_function_arguments(function, fail_untyped=False, sub_configs=True, skip=set(skip))
    return parser, list(dict.fromkeys(name.partition(".")[0] for name in added))


def _refusal(parser: ArgumentParser, given: Mapping[str, Any]) -> argparse.ArgumentError | None:
    try:
        parser.parse_object(copy.deepcopy(dict(given)))  # older versions of jsonargparse write into the object
    except argparse.ArgumentError as error:
        return error
    return None


def _fits(value: Any, kind: Any) -> bool:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    return _refusal(parser, {"value": value}) is None


def _fits_subclass(value: Any, base: type, skip: Collection[str]) -> bool:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "value", fail_untyped=False, skip=set(skip))
    return _refusal(parser, {"value": value}) is None


# Types and names


def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    target = function
    if inspect.isclass(function):
        target = function.__init__
    try:
        return typing.get_type_hints(target)
    except NameError:  # a type that is imported for type checkers only
        return {}


def _classes_in(kind: Any) -> Iterator[type]:
    """Classes that a type consists of, at any depth, except those of Python itself."""
    for part in typing.get_args(kind):
        yield from _classes_in(part)
    if inspect.isclass(kind) and typing.get_origin(kind) is None and kind.__module__ != "builtins":
        yield kind


def _words(kind: Any) -> str:
    """A type as the writer of a YAML file would call it."""
    origin = typing.get_origin(kind) or kind
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(part) for part in typing.get_args(kind)))
    if origin is Literal:
        return ", ".join(repr(value) for value in typing.get_args(kind))
    if origin in (None, type(None)):
        return "null"
    if origin is Callable:
        return "function (package.module.function)"
    if not inspect.isclass(origin):
        return str(kind)
    if issubclass(origin, (str, Path)):
        return "str"
    if issubclass(origin, Mapping):
        return "mapping"
    if issubclass(origin, (list, tuple, set)) or origin.__module__ == "collections.abc":
        elements = [_words(part) for part in typing.get_args(kind)[:1]]
        return " of ".join(["list", *elements])
    if origin.__module__ == "builtins":
        return origin.__name__
    return f"{origin.__name__} (package.module.Class)"


def _import(path: str) -> Any:
    """The class or function at a path; also a method, whose path has the name of its class before its own."""
    module_name, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        try:
            return pkgutil.resolve_name(path)
        except (ImportError, AttributeError):
            raise error from None


def _path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _subclass(bases: Sequence[type], name: str) -> type | None:
    """The class of that name among the subclasses, which jsonargparse takes without a path too."""
    waiting = list(bases)
    while waiting:
        cls = waiting.pop(0)
        if cls.__name__ == name:
            return cls
        waiting.extend(cls.__subclasses__())
    return None


def _public_names(module_name: str) -> list[str]:
    try:
        return dir(importlib.import_module(module_name))
    except ImportError:
        return []


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if not near:
        return ""
    return f" Did you mean {near[0]!r}?"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
