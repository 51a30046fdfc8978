"""Every call is known for what it is: each case is compared with the same model written out by hand."""

from __future__ import annotations

import copy
import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eafo_dynamic.apply.surgery import hosted_sites, unwrap, wrap
from eafo_dynamic.find.sites import find_sites
from eafo_dynamic.policy.controller import EAFOController
from eafo_dynamic.policy.options import Options

X = torch.linspace(-2, 2, 24).view(4, 6)


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.4 warns of itself
        yield


def corrected(model: nn.Module, example: Callable[[nn.Module], object] | None = None) -> nn.Module:
    """The model wrapped by an example, with amplitudes 0.1, 0.2, ... in the order of the calls."""
    wrap(model, find_sites(model, run=example or (lambda copied: copied(X))))
    for number, (host, site) in enumerate(hosted_in_order(model)):
        nn.init.constant_(getattr(host, site.keys[0]), 0.1 * (number + 1))
    return model


def hosted_in_order(model: nn.Module) -> list[Any]:
    return hosted_sites(model)


def relu(number: int | None, z: Tensor) -> Tensor:
    """What the call with this number computes; None: what is left plain."""
    plain = (z + z.abs()) / 2  # not relu, which would be a call that the model is to tell
    if number is None:
        return plain
    return plain + 0.1 * (number + 1) * z * torch.exp(-z * z / 2)


def layers(number: int) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(6, 6) for _ in range(number))


def left_plain(words: str) -> Any:
    return pytest.warns(UserWarning, match=words)


def assert_same(one: object, two: object) -> None:
    torch.testing.assert_close(one, two)


def compiled(model: nn.Module) -> Callable[..., Any]:
    torch.compiler.reset()
    function = torch.compile(model, backend="aot_eager")

    def run(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("default", module=r"torch\..*")
            return function(*args, **kwargs)

    return run


def as_it_is(model: nn.Module) -> Callable[..., Any]:
    return model


WAYS = [pytest.param(as_it_is, id="eager"), pytest.param(compiled, id="compiled")]


class Auxiliary(nn.Module):
    """A head that runs in training only, in the middle of the forward."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.enc, self.h2, self.aux, self.mid, self.out = layers(5)
        self.act = nn.ReLU() if shared else F.relu

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        h = self.act(self.enc(x))
        a = self.aux(self.act(self.h2(h))) if self.training else None
        return self.out(self.act(self.mid(h))), a

    def by_hand(self, x: Tensor, training: bool, numbers: tuple[int | None, ...] = (0, 1, 2)) -> Any:
        h = relu(numbers[0], self.enc(x))
        a = self.aux(relu(numbers[1], self.h2(h))) if training else None
        return self.out(relu(numbers[2], self.mid(h))), a


class TestAuxiliaryHead:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("shared", [False, True])
    def test_in_training_only(self, shared: bool, way: Any) -> None:
        model: Any = corrected(Auxiliary(shared).train())
        run = way(model)
        assert_same(run(X), model.by_hand(X, True))
        model.eval()
        assert_same(run(X), model.by_hand(X, False))

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("shared", [False, True])
    def test_that_the_example_has_not_shown_is_left_plain(self, shared: bool, way: Any) -> None:
        model: Any = corrected(Auxiliary(shared).eval())
        run = way(model)
        assert_same(run(X), model.by_hand(X, False, (0, None, 1)))
        model.train()
        with left_plain(r"EAFO: .*h2"):
            assert_same(run(X), model.by_hand(X, True, (0, None, 1)))
        assert_same(run(X), model.by_hand(X, True, (0, None, 1)))  # named once
        model.eval()
        assert_same(run(X), model.by_hand(X, False, (0, None, 1)))

    def test_a_child_that_is_called_in_training_only_takes_no_correction_away(self) -> None:
        class Dropped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.two = layers(2)
                self.noise = nn.Dropout(0.0)

            def forward(self, x: Tensor) -> Tensor:
                h = self.one(x)
                if self.training:
                    h = self.noise(h)
                return F.relu(self.two(F.relu(h)))

        for training in (True, False):
            model: Any = corrected(Dropped().train(training))
            expected = relu(1, model.two(relu(0, model.one(X))))
            assert_same(model(X), expected)
            assert_same(model.train(not training)(X), expected)


class Depth(nn.Module):
    """Stochastic depth: the layers of a loop that are in ``dropped`` do not run."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = layers(4)
        self.norm, self.act = nn.LayerNorm(6), nn.ReLU()
        self.kind = kind
        self.dropped: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if self.kind == "late":
                h = layer(x)
                if number in self.dropped:
                    continue
                x = x + F.relu(h)
                continue
            if number in self.dropped:
                continue
            if self.kind == "function":
                x = x + F.relu(layer(x))
            elif self.kind == "module":
                x = x + self.act(layer(x))
            else:
                x = x + F.relu(self.norm(layer(x)))
        return x

    def by_hand(self, x: Tensor, plain: tuple[int, ...] = (), numbers: tuple[int, ...] = (0, 1, 2, 3)) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number not in self.dropped:
                z = self.norm(layer(x)) if self.kind == "norm" else layer(x)
                x = x + relu(None if number in plain else numbers[number], z)
        return x


KINDS = ["function", "module", "norm", "late"]


class TestStochasticDepth:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_each_layer_keeps_its_own(self, kind: str, way: Any) -> None:
        model: Any = corrected(Depth(kind))
        run = way(model)
        for dropped in ((), (0,), (1,), (0, 2), (3,), (0, 1, 2)):
            model.dropped = dropped
            assert_same(run(X), model.by_hand(X))

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_layer_that_the_example_dropped_is_left_plain(self, kind: str) -> None:
        for missing in range(4):
            model: Any = Depth(kind)
            model.dropped = (missing,)
            corrected(model)
            numbers = tuple(number - (number > missing) for number in range(4))
            assert_same(model(X), model.by_hand(X, numbers=numbers))
            model.dropped = ()
            with left_plain(rf"layers\.{missing}"):
                assert_same(model(X), model.by_hand(X, (missing,), numbers))

    def test_an_example_that_runs_several_times_shows_all(self) -> None:
        def example(model: Any) -> None:
            for dropped in ((0, 1), (2, 3)):
                model.dropped = dropped
                model(X)

        model: Any = corrected(Depth("function"), example)
        model.dropped = ()
        assert_same(model(X), model.by_hand(X, numbers=(2, 3, 0, 1)))

    def test_turns_that_no_child_tells_apart_go_by_their_number(self) -> None:
        class Weights(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weights = nn.ParameterList(torch.randn(6, 6) / 3 for _ in range(3))
                self.dropped: tuple[int, ...] = ()

            def forward(self, x: Tensor) -> Tensor:
                for number, weight in enumerate(self.weights):
                    if number not in self.dropped:
                        x = F.relu(x @ weight)
                return x

        torch.manual_seed(0)
        model: Any = corrected(Weights())
        expected = X
        for number, weight in enumerate(model.weights):
            expected = relu(number, expected @ weight)
        assert_same(model(X), expected)
        model.dropped = (0,)  # nothing but its number tells a turn from the others
        with pytest.warns(UserWarning, match="ran 2 of the 3 turns of its example, and no layer tells which"):
            out = model(X)
        assert_same(out, relu(1, relu(0, X @ model.weights[1]) @ model.weights[2]))
        model(X)  # says it once


class Tasks(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b = layers(2)
        self.heads = nn.ModuleDict({"a": self.a, "b": self.b})
        self.kind, self.act = kind, nn.ReLU()

    def forward(self, x: Tensor, task: str = "a") -> Tensor:
        if self.kind == "lines":
            return F.relu(self.a(x)) if task == "a" else F.relu(self.b(x))
        if self.kind == "module":
            return self.act(self.a(x)) if task == "a" else self.act(self.b(x))
        return F.relu(self.heads[task](x))


class TestBranches:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("kind", ["lines", "module", "item"])
    def test_by_task(self, kind: str, way: Any) -> None:
        model: Any = corrected(Tasks(kind))
        run = way(model)
        assert_same(run(X), relu(0, model.a(X)))
        with left_plain("EAFO: .*relu|EAFO: .*act"):
            assert_same(run(X, task="b"), relu(None, model.b(X)))
        assert_same(run(X, task="b"), relu(None, model.b(X)))

    @pytest.mark.parametrize("kind", ["lines", "module", "item"])
    def test_an_example_of_both_tasks_gives_both_their_own(self, kind: str) -> None:
        model: Any = corrected(Tasks(kind), lambda copied: (copied(X, "a"), copied(X, "b")))
        assert_same(model(X, "b"), relu(1, model.b(X)))
        assert_same(model(X, "a"), relu(0, model.a(X)))


class Coder(nn.Module):
    """Encoder and decoder; trained as a whole, validated by the decoder alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.one, self.two, self.three = layers(3)
        self.act = nn.ReLU() if kind == "module" else F.relu

    def encode(self, x: Tensor) -> Tensor:
        return self.act(self.one(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.act(self.three(self.act(self.two(z))))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def training_step(self, x: Tensor) -> Tensor:
        return self(x).sum()

    def validation_step(self, z: Tensor) -> Tensor:
        return self.decode(z)

    def by_hand(self, z: Tensor) -> Tensor:
        return relu(2, self.three(relu(1, self.two(z))))


class Trained(nn.Module):
    """A step that calls methods of a net, whose forward nobody calls."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = Coder(kind)

    def training_step(self, x: Tensor) -> Tensor:
        h = self.net.encode(x)
        return self.net.decode(h)

    def validation_step(self, z: Tensor) -> Tensor:
        return self.net.decode(z)


class TestPartsAlone:
    @pytest.mark.parametrize("kind", ["function", "module"])
    def test_of_the_model_itself(self, kind: str) -> None:
        model: Any = corrected(Coder(kind))
        assert_same(model(X), model.by_hand(relu(0, model.one(X))))
        assert_same(model.validation_step(X), model.by_hand(X))

    @pytest.mark.parametrize("kind", ["function", "module"])
    def test_of_a_net_in_a_step(self, kind: str) -> None:
        model: Any = corrected(Trained(kind), lambda copied: copied.training_step(X))  # type: ignore[operator]
        assert_same(model.training_step(X), model.net.by_hand(relu(0, model.net.one(X))))
        assert_same(model.validation_step(X), model.net.by_hand(X))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.relu(self.layer(x)))


@pytest.mark.parametrize("kind", ["line", "loop"])
def test_a_child_that_is_replaced_takes_nothing(kind: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers(3)

        def forward(self, x: Tensor) -> Tensor:
            if kind == "loop":
                for layer in self.layers:
                    x = F.relu(layer(x))
                return x
            return F.relu(self.layers[2](F.relu(self.layers[1](F.relu(self.layers[0](x))))))

    model: Any = corrected(Net())
    torch.manual_seed(1)
    model.layers[1] = Inner()
    one, two, three = model.layers
    plain = two.layer(relu(None, two.layer(relu(0, one(X)))))
    with left_plain(r"EAFO"):
        found = model(X)
    candidates = [relu(2, three(relu(number, plain))) for number in (1, None)]
    assert any(torch.allclose(found, each) for each in candidates)
    assert_same(model(X), found)


class Takes(nn.Module):
    """Every model of this class has the same activation object."""

    def __init__(self, act: nn.Module = nn.ReLU(), times: int = 1) -> None:  # noqa: B008
        super().__init__()
        self.one, self.two = layers(2)
        self.act, self.times = act, times

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.one(x))
        return self.act(self.two(x)) if self.times == 2 else x


class TestOneActivationInTwoModels:
    @pytest.mark.parametrize("times", [1, 2])
    def test_wrapping_one_leaves_the_other_as_it_is(self, times: int) -> None:
        policy, reference = Takes(times=times), Takes(times=times)
        keys, before = set(reference.state_dict()), reference(X)
        act, kind = policy.act, type(reference.act)
        corrected(policy)
        assert not torch.equal(policy(X), before)
        assert torch.equal(reference(X), before)
        assert set(reference.state_dict()) == keys == set(Takes(times=times).state_dict())
        assert type(reference.act) is kind
        copied = copy.deepcopy(policy)
        assert_same(copied(X), policy(X))
        unwrap(copied)
        assert torch.equal(copied(X), before)
        unwrap(policy)
        assert policy.act is act is reference.act
        assert torch.equal(policy(X), before)

    def test_both_are_wrapped_each_for_itself(self) -> None:
        act = nn.ReLU()
        one, two = Takes(act), Takes(act)
        corrected(one)
        before = one(X)
        corrected(two)
        for host, site in hosted_sites(two):
            nn.init.constant_(getattr(host, site.keys[0]), 0.7)
        assert torch.equal(one(X), before)
        unwrap(one)
        z = two.one(X)
        assert_same(two(X), z.relu() + 0.7 * z * torch.exp(-z * z / 2))
        later = Takes(act)
        assert torch.equal(later(X), later.one(X).relu())

    def test_one_that_a_partial_gives_to_later_models(self) -> None:
        factory = functools.partial(Takes, nn.GELU())
        wrap(factory(), eps_init=0.3)
        later = factory()
        assert not hosted_sites(later)
        assert not list(later.act.parameters())

    def test_where_nobody_else_holds_one_no_objects_are_walked_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gc, "get_referrers", None)
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU())
        assert len(wrap(net)) == 2


class Checkpointed(nn.Module):
    def __init__(self, inner: bool | None) -> None:
        super().__init__()
        self.one, self.two, self.three = layers(3)
        self.inner = inner

    def part(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.one(x))))

    def at(self, number: int, z: Tensor) -> Tensor:
        return F.relu(z)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.part, x, use_reentrant=self.inner) if self.inner is not None else self.part(x)
        return F.relu(self.three(F.relu(x + 0.1)))


class CheckpointedByHand(Checkpointed):
    def part(self, x: Tensor) -> Tensor:
        return relu(1, self.two(relu(0, self.one(x))))

    def forward(self, x: Tensor) -> Tensor:
        return relu(3, self.three(relu(2, self.part(x) + 0.1)))


@pytest.mark.parametrize("outer", [None, True, False])
@pytest.mark.parametrize("inner", [None, True, False])
def test_checkpoints_inside_checkpoints(outer: bool | None, inner: bool | None) -> None:
    results: list[Any] = []
    for model in (corrected(Checkpointed(inner)), CheckpointedByHand(None)):
        x = X.clone().requires_grad_()
        out = model(x) if outer is None else checkpoint(model, x, use_reentrant=outer)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(getattr(model, name).weight.grad for name in ("one", "two", "three"))])
    for one, two in zip(*results, strict=True):
        assert_same(one, two)


def test_a_call_that_is_left_plain_is_an_event_of_the_log() -> None:
    model: Any = Tasks("lines")
    controller = EAFOController(model, Options(update_every_n_steps=1), find_sites(model, X))
    with left_plain("EAFO: a call of relu at test_identity.py"):
        model(X, "b")
    model(X, "a")
    row = controller.update(1)[0]
    assert "left alone: a call of relu at test_identity.py" in str(row["event"])
    assert "after b" in str(row["event"])
    model(X, "b")
    model(X, "a")
    assert "left alone" not in str(controller.update(2)[0]["event"])
