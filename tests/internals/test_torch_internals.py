"""The one door to private parts: nothing goes past it, and what holds where a version of torch lacks one of them.

A part is made to be missing by another name for it in the source of the door, so that torch itself is left whole.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib.util
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

PACKAGE = Path(__file__).parents[2] / "eafo_dynamic"
DOOR = PACKAGE / "internals" / "torch_internals.py"

PARTS_OF_FRAMES = {
    "f_back", "f_code", "f_lasti", "f_locals", "gi_frame", "tb_frame", "cell_contents", "co_freevars", "__closure__",
}  # fmt: skip
OF_OTHERS = {
    "_actions": "argparse",
    "_active_loop": "Lightning",
    "_asdict": "collections.namedtuple, documented",
    "_compiler_ctx": "Lightning",
    "_data_source": "Lightning",
    "_fabric": "Lightning",
    "_make": "collections.namedtuple, documented",
    "_NamedFuncPointer": "ctypes, in an annotation",
    "_parse_ckpt_path": "Lightning",
    "_plot": "torchmetrics",
    "_replace": "collections.namedtuple, documented",
    "_start_method": "Lightning",
    "_swa_lrs": "Lightning",
    "_trainer": "Lightning",
}

# ---- nothing goes past the door


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def private_words(text: str) -> set[str]:
    """Private names of torch in a path such as ``torch._C:_nn.gelu``, or a name alone."""
    if re.fullmatch(r"_[A-Za-z]\w*|(torch|sys)([.:]\w+)+", text) is None:
        return set()
    return {word for word in re.split(r"[.:]", text) if is_private(word)}


def private_parts(tree: ast.Module) -> set[str]:
    """Private names of others that a module reads as attributes, imports, or has as texts to look for."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (is_private(node.attr) or node.attr in PARTS_OF_FRAMES):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("eafo_dynamic"):
            words = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found |= {word for word in words if is_private(word)}
        elif isinstance(node, ast.Import):
            found |= {word for alias in node.names for word in alias.name.split(".") if is_private(word)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= private_words(node.value)
    return found


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


OTHERS = sorted(path for path in PACKAGE.rglob("*.py") if path != DOOR)


@functools.cache
def names_of_the_others() -> set[str]:
    return set().union(*(own_names(parsed(path)) for path in OTHERS))


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_names_a_private_part_but_the_door(path: Path) -> None:
    own = names_of_the_others()
    texts = {node.value for node in ast.walk(parsed(path)) if isinstance(node, ast.Constant)}
    behind_the_door = private_parts(parsed(DOOR)) - own_names(parsed(DOOR))
    found = private_parts(parsed(path)) - OF_OTHERS.keys()
    # a text may be anything, unless the door has it
    assert {part for part in found - own if part not in texts} == set()
    assert found & (behind_the_door - own) == set()


def test_the_test_above_sees_what_it_is_to_see() -> None:
    source = """
import torch._dynamo
from torch.overrides import _push_mode
torch._C._nn
frame.f_back
getattr(tensor, "_version")
import_module("torch._inductor.config")
"""
    expected = {"_dynamo", "_push_mode", "_C", "_nn", "f_back", "_version", "_inductor"}
    assert private_parts(ast.parse(source)) == expected


def test_the_door_knows_nothing_of_the_package_but_its_errors() -> None:
    imported = {node.module for node in ast.walk(parsed(DOOR)) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if (name or "").startswith("eafo_dynamic")} == {"eafo_dynamic.errors"}


def test_every_entry_says_which_versions_have_the_part() -> None:
    from eafo_dynamic.internals import torch_internals

    text = DOOR.read_text(encoding="utf-8")
    of_python = {"caller_of", "callers", "code_of", "current_frame", "instruction_of", "variable_of"}
    for name in set(torch_internals.__all__) - of_python - {"DispatchMode"}:
        function = re.search(rf'^def {name}\(.*?"""(.*?)"""', text, re.DOTALL | re.MULTILINE)
        constant = re.search(rf'^{name}\b[^\n]* = .*?"""(.*?)"""', text, re.DOTALL | re.MULTILINE)
        found = function or constant
        assert found is not None, name
        assert re.search(r"2\.\d+ to 2\.\d+|from torch 2\.\d+ on|\bsee ``|Up to torch", found[1]), name


# ---- where a part is missing

# parts, and besides training the features that need them
PARTS: dict[str, list[str]] = {
    # of torch
    "_are_functorch_transforms_active": ["transform", "differentiate_twice"],
    "is_functorch_wrapped_tensor": ["transform"],
    "is_legacy_batchedtensor": ["differentiate_twice"],
    "_is_zerotensor": ["transform", "differentiate_twice"],
    "_current_level": ["transform"],
    "_set_fwd_grad_enabled": ["transform"],
    "_len_torch_dispatch_stack": ["merge_into_graph"],
    "_current_graph_task_id": ["checkpoint_by_hooks", "checkpoint_reentrant"],
    "_top_saved_tensors_default_hooks": ["checkpoint_by_hooks", "checkpoint_reentrant"],
    "_checkpoint_hook": ["checkpoint_by_hooks", "checkpoint_reentrant"],
    "recompute_fn": ["checkpoint_by_hooks", "checkpoint_reentrant"],
    "run_function": ["checkpoint_by_hooks", "checkpoint_reentrant"],
    "_disable_dynamo": [],
    # of several processes, as tests/faults/test_ranks.py runs them
    "_execution_engine": [],
    "_forward_metadata_inference": [],
    "_fsdp_flattened": [],
    "_get_default_store": [],
    "_join_config": [],
    "_shape_inference": [],
    "_dynamo_marked_constant": [],
    "compile_subgraph_reason": [],
    "TorchFunctionModeVariable": [],
    "_compiled_call_impl": [],
    "_orig_mod": [],
    "_fsdp_wrapped_module": [],
    "_non_persistent_buffers_set": [],
    "_checkpoint_wrapped_module": [],
    "_push_mode": [],
    "_pop_mode": [],
    "TorchDispatchMode": [],
    "DisableTorchFunction": [],
    "_nn": [],
    "_backward": ["differentiate_twice"],
    "_version": [],
    "_is_view": ["differentiate_twice"],
    "_foreach_copy_": [],
    "_foreach_clamp_min_": [],
    "_foreach_clamp_max_": [],
    "_ragged_idx": ["nest"],
    "_nested_tensor_size": ["nest"],
    "_nested_tensor_strides": ["nest"],
    "_nested_tensor_storage_offsets": ["nest"],
    "_nested_view_from_buffer": ["nest"],
    "_parameters": ["merge_into_graph", "merge_in_place"],
    "_buffers": ["merge_into_graph", "merge_in_place"],
    "_modules": ["merge_into_graph", "merge_in_place"],
    "_forward_hooks": [],
    "_backward_hooks": [],
    "_backward_pre_hooks": [],
    "_forward_pre_hooks": ["merge_in_place", "save_weights"],
    "_hook": ["merge_in_place", "save_weights"],
    "_ddp_params_and_buffers_to_ignore": [],
    "_schedulers": ["schedule_inner"],
    "_last_lr": ["schedule_inner"],
    "_pytree": ["merge_into_graph"],
    # of Python
    "_getframe": ["checkpoint_by_hooks", "checkpoint_reentrant", "merge_in_place"],
}
NAMES_OF_TORCH_ALONE = {
    "_C", "_compile", "_autograd", "_functorch", "_dynamo", "_python_dispatch",  # modules, whose parts are in the list
    "_fields",  # of named tuples, documented
}  # fmt: skip


def test_every_private_part_of_the_door_is_in_the_list() -> None:
    words = private_parts(parsed(DOOR)) - PARTS_OF_FRAMES - own_names(parsed(DOOR)) - NAMES_OF_TORCH_ALONE
    assert words <= set(PARTS)
    for part in PARTS:
        assert re.search(rf"(\b|_){part}\b", DOOR.read_text(encoding="utf-8")), part


@contextmanager
def package_without(parts: list[str]) -> Iterator[None]:
    """The package anew, as in a version of torch that has none of some parts; the one that was there comes back."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "eafo_dynamic"}
    for name in before:
        del sys.modules[name]
    try:
        text = DOOR.read_text(encoding="utf-8")
        for part in parts:
            front = r"(?<=\})" if part == "_backward" else r"\b"
            text, count = re.subn(rf"{front}{part}\b", f"{part}_of_no_version", text)
            assert count, part
        importlib.import_module("eafo_dynamic.errors")
        name = "eafo_dynamic.internals.torch_internals"
        spec = importlib.util.spec_from_loader(name, loader=None, origin=str(DOOR))
        assert spec is not None
        door = importlib.util.module_from_spec(spec)
        sys.modules[name] = door
        exec(compile(text, str(DOOR), "exec"), vars(door))
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "eafo_dynamic"]:
            del sys.modules[name]
        sys.modules.update(before)


class Block(nn.Module):
    """Activations of every kind: modules, one of them shared, in place, functions, written out as a product."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.own, self.shared, self.in_place = nn.GELU(), nn.Tanh(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.one(x)) + self.own(x)
        x = F.silu(self.two(x)) * 2.0
        x = self.in_place(self.three(x)[:, :8])
        x = x * torch.sigmoid(1.702 * x)
        return self.shared(x) + F.relu(x)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.one, self.two, self.reentrant = nn.Linear(8, 8), nn.Linear(8, 8), reentrant

    def part(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.gelu(x)))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(checkpoint(self.part, F.relu(self.one(x)), use_reentrant=self.reentrant))  # type: ignore[arg-type]


def with_gradients(model: nn.Module, out: Tensor) -> list[Tensor]:
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def wrapped(model: nn.Module, x: Tensor, eps: float = 0.3) -> nn.Module:
    from eafo_dynamic.apply.surgery import wrap
    from eafo_dynamic.find.sites import find_sites

    wrap(model, find_sites(model, x), eps)
    return model


def train(folder: Path) -> list[Tensor]:
    from eafo_dynamic.policy.controller import EAFOController
    from eafo_dynamic.trainers.optim import own_group

    model, x = Block(), torch.randn(16, 8)
    controller = EAFOController.attach(model, x, update_every_n_steps=2, max_eps=0.02)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    own_group([optimizer], controller.amplitudes, model)
    for step in range(1, 5):
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()
        controller.step(step)
    assert any(eps.abs() > 1e-3 for eps in controller.amplitudes.values())
    return [model.eval()(x).detach(), *(p.detach() for p in model.parameters())]


def schedule_inner(folder: Path) -> list[Tensor]:
    from eafo_dynamic.apply.surgery import hosted_sites
    from eafo_dynamic.trainers.optim import own_group

    model = wrapped(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(4, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kinds = torch.optim.lr_scheduler
    inner: list[Any] = [kinds.LambdaLR(optimizer, lambda step: 1.0 / (1 + step)), kinds.StepLR(optimizer, 1)]
    scheduler = kinds.SequentialLR(optimizer, inner, milestones=[1])
    amplitudes = {f"1.{site.keys[0]}": getattr(host, site.keys[0]) for host, site in hosted_sites(model)}
    own_group([optimizer], amplitudes, model, schedulers=[scheduler])
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    scheduler.step()
    return [torch.tensor([group["lr"] for group in optimizer.param_groups])]


def checkpoint_by_hooks(folder: Path) -> list[Tensor]:
    x = torch.randn(4, 8, requires_grad=True)
    model = wrapped(Checkpointed(reentrant=False), x)
    return with_gradients(model, model(x))


def checkpoint_reentrant(folder: Path) -> list[Tensor]:
    x = torch.randn(4, 8, requires_grad=True)
    model = wrapped(Checkpointed(reentrant=True), x)
    return with_gradients(model, model(x))


def transform(folder: Path) -> list[Tensor]:
    x, along = torch.randn(3, 8), torch.randn(3, 8)
    model = wrapped(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(inplace=True)), x)

    def once(z: Tensor) -> Tensor:
        return torch.func.jvp(model, (z,), (along,))[1]

    rows = torch.func.vmap(lambda row: model(row[None])[0])(x)
    twice = torch.func.jvp(once, (x,), (along,))[1]
    slopes = torch.func.vmap(torch.func.grad(lambda row: model(row[None]).sum()))(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.unpack_dual(model(torch.autograd.forward_ad.make_dual(x, along)))
    assert dual.tangent is not None
    return [each.detach() for each in (rows, twice, slopes, dual.primal, dual.tangent)]


def differentiate_twice(folder: Path) -> list[Tensor]:
    x = torch.randn(3, 8, requires_grad=True)
    model = wrapped(nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 2), nn.GELU()), x)
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    batch = torch.autograd.grad(out, x, torch.eye(6).view(6, 3, 2), is_grads_batched=True, retain_graph=True)[0]
    return [batch, slope.detach(), *torch.autograd.grad(slope.square().sum(), x)]


def nest(folder: Path) -> list[Tensor]:
    model = wrapped(nn.Sequential(nn.GELU()), torch.randn(4, 8))
    found: list[Tensor] = []
    for layout in (torch.strided, torch.jagged):
        parts = [torch.randn(2, 8), torch.randn(3, 8)]
        nested = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nested tensors are a prototype
            out = model(nested)
        found += [part.detach() for part in out.unbind()]
    return found


def merge_into_graph(folder: Path) -> list[Tensor]:
    from eafo_dynamic.apply.merge import merge

    x = torch.randn(4, 8)
    merged = merge(wrapped(Block().eval(), x), x)
    return [merged(x).detach(), *(p.detach() for p in merged.parameters())]


def merge_in_place(folder: Path) -> list[Tensor]:
    from eafo_dynamic.apply.merge import merge

    x = torch.randn(4, 8)
    shared = nn.GELU()
    model = wrapped(nn.Sequential(nn.Linear(8, 8), shared, nn.Linear(8, 8), shared, nn.ReLU()), x)
    return [merge(model)(x).detach()]


def save_weights(folder: Path) -> list[Tensor]:
    from eafo_dynamic.apply.merge import load_merged, merge, save_merged

    x = torch.randn(4, 8)
    plain = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    merged = merge(wrapped(copy.deepcopy(plain), x))
    return [load_merged(plain, save_merged(merged, folder / "merged.pt"))(x).detach()]


def scripted_relu(x: Tensor) -> Tensor:
    return torch.relu(x)


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.act = nn.Linear(8, 8), nn.GELU()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.function = torch.jit.script(scripted_relu)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.function(self.one(x)))


FEATURES: dict[str, Callable[[Path], list[Tensor]]] = {
    feature.__name__: feature
    for feature in (
        train,
        schedule_inner,
        checkpoint_by_hooks,
        checkpoint_reentrant,
        transform,
        differentiate_twice,
        nest,
        merge_into_graph,
        merge_in_place,
        save_weights,
    )
}


def outcome(feature: Callable[[Path], list[Tensor]], folder: Path) -> list[Tensor] | str:
    torch.manual_seed(0)
    try:
        return feature(folder)
    except Exception as error:
        if type(error).__name__ != "UnsupportedTorchError":
            raise
        return str(error)


@functools.cache
def expected(name: str) -> list[Tensor]:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = outcome(FEATURES[name], Path(folder))
    assert not isinstance(found, str), found
    return found


def assert_same(found: list[Tensor], name: str) -> None:
    torch.testing.assert_close(found, expected(name), rtol=1e-5, atol=1e-6)


REFUSED = {
    "recompute_fn": {"checkpoint_by_hooks"},
    "run_function": {"checkpoint_reentrant"},
    "_parameters": {"merge_into_graph"},
    "_buffers": {"merge_into_graph"},
    "_modules": {"merge_into_graph"},
    "_forward_pre_hooks": {"save_weights"},
    "_hook": {"merge_in_place", "save_weights"},
    "_schedulers": {"schedule_inner"},
}
WARNED = {"TorchDispatchMode", "DisableTorchFunction"}


@pytest.mark.parametrize("part", PARTS)
def test_without_one_part_all_is_the_same_or_one_feature_says_so(part: str, tmp_path: Path) -> None:
    names = ["train", *PARTS[part]]
    for name in names:
        expected(name)  # before the package goes
    refused: set[str] = set()
    with package_without([part]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if part not in WARNED | {"_hook"}:  # without hooks found, a warning says that they fire in the dry run
            warnings.filterwarnings("error", message="EAFO")
        for name in names:
            found = outcome(FEATURES[name], tmp_path)
            if isinstance(found, str):
                assert f", which torch {torch.__version__} does not have. " in found
                refused.add(name)
            else:
                assert_same(found, name)
    assert refused == REFUSED.get(part, set())


def test_without_all_parts_a_model_trains(tmp_path: Path) -> None:
    expected("train")
    with package_without(list(PARTS)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = outcome(train, tmp_path)
        assert not isinstance(found, str), found
        assert_same(found, "train")


@pytest.mark.parametrize("part", sorted(WARNED))
def test_what_cannot_be_heard_is_said(part: str) -> None:
    with package_without([part]):
        from eafo_dynamic.find.sites import find_sites

        with pytest.warns(UserWarning, match=r"torch 2.* does not let its kernels be heard"):
            found = find_sites(Scripted(), torch.randn(4, 8))
    assert [(site.name, site.wrapped) for site in found.sites] == [("act", True)]


COMPILED = """
import sys, warnings
import torch
from tests.internals.test_torch_internals import Block, package_without, with_gradients, wrapped

warnings.simplefilter("ignore")
warnings.filterwarnings("default", message="EAFO")
with package_without([sys.argv[1]]):
    torch.manual_seed(0)
    x = torch.randn(4, 8, requires_grad=True)
    model = wrapped(Block(), x)
    expected = with_gradients(model, model(x))
    model.zero_grad()
    found = with_gradients(model, torch.compile(model, backend="eager")(x))
    torch.testing.assert_close(found, expected)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        "_disable_dynamo",
        "_dynamo_marked_constant",
        "TorchFunctionModeVariable",
        "_push_mode",
        "_pop_mode",
        "_parameters",
        "_buffers",
    ],
)
def test_without_one_part_compiled_functions_are_the_same(part: str) -> None:
    result = fresh.python(COMPILED, part, path=[fresh.ROOT, fresh.ROOT / "tests"])  # this file imports fresh
    assert result.returncode == 0, result.stderr
    assert ("cannot tell the calls of its activations apart" in result.stderr) == (part == "TorchFunctionModeVariable")


class Asking(TorchFunctionMode):
    def __init__(self, ask: Callable[[], bool]) -> None:
        super().__init__()
        self.ask = ask
        self.answers: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.relu:
            self.answers.append(self.ask())
        return func(*args, **(kwargs or {}))


def test_graphs_of_the_compiler_are_told_from_others_or_refused() -> None:
    importlib.import_module("torch._dynamo")
    from eafo_dynamic.internals.torch_internals import in_compiled_graph

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x)

    graph = torch.fx.symbolic_trace(Net())
    mode = Asking(in_compiled_graph)
    with mode:
        graph(torch.ones(2))
        graph.compile_subgraph_reason = None
        graph(torch.ones(2))
    assert mode.answers == [False, True]
    with package_without(["compile_subgraph_reason"]):
        from eafo_dynamic.internals.torch_internals import in_compiled_graph

        with (
            pytest.raises(Exception, match=r"beside a graph of torch\.fx or torch\.compile needs"),
            Asking(in_compiled_graph),
        ):
            graph(torch.ones(2))


def test_modules_of_which_it_cannot_be_known_may_be_compiled() -> None:
    from eafo_dynamic.internals.torch_internals import may_be_compiled

    plain, called, compiled = nn.Linear(2, 2), nn.Linear(2, 2), torch.compile(nn.Linear(2, 2))
    called.compile()
    assert [may_be_compiled(each) for each in (plain, called, compiled)] == [False, True, True]  # type: ignore[arg-type]
    for part in ("_compiled_call_impl", "_orig_mod"):
        with package_without([part]):
            from eafo_dynamic.internals.torch_internals import may_be_compiled

            assert may_be_compiled(plain)


def test_the_mark_of_a_constant_is_the_one_that_torch_sets() -> None:
    from eafo_dynamic.apply.recompute import check_compiled_part
    from eafo_dynamic.correction import table_half_width

    marked = vars(torch.compiler.assume_constant_result(lambda: 0))
    assert marked == vars(table_half_width) == vars(check_compiled_part)


def test_a_checkpointed_part_that_cannot_be_told_is_an_error_in_the_backward() -> None:
    class Shared(Checkpointed):
        def __init__(self) -> None:
            super().__init__(reentrant=False)
            self.act = nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            # no method of the module, which could tell its calls when it runs alone
            part = lambda z: self.act(self.two(self.act(z)))  # noqa: E731
            return self.act(checkpoint(part, self.one(x), use_reentrant=False))  # type: ignore[arg-type]

    with package_without(["_top_saved_tensors_default_hooks", "new_frame"]):
        from eafo_dynamic.errors import SiteError

        x = torch.randn(4, 8)
        out = wrapped(Shared(), x)(x).sum()
        with pytest.raises(SiteError, match="is called in a backward pass"):
            out.backward()
