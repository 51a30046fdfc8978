"""Copies, compilers and transforms: what torch can do to a plain model, it can do to a corrected one."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eafo_dynamic.apply.surgery import disabled, hosted_sites, unwrap
from eafo_dynamic.policy.controller import EAFOController

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of torch itself
Tally = Callable[..., None]
KINDS = ["modules", "in place", "shared", "functions", "written out"]


class Net(nn.Module):
    """Two layers, and one kind of activation call."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.one, self.two, self.three = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        if kind in ("modules", "in place", "shared"):
            self.gelu = nn.GELU()
        if kind in ("modules", "in place", "written out"):
            self.relu = nn.ReLU(inplace=kind == "in place")

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "shared":
            return self.three(self.gelu(self.two(self.gelu(self.one(x)))))
        if self.kind == "functions":
            return self.three(F.silu(self.two(self.one(x).relu())))
        if self.kind == "written out":
            x = self.one(x)
            return self.three(self.relu(self.two(x * torch.sigmoid(1.7 * x))))
        return self.three(self.relu(self.two(self.gelu(self.one(x)))))


def batch(n: int = 6) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(n))


def corrected(kind: str, eps: float = 0.2, **options: Any) -> tuple[Net, EAFOController]:
    torch.manual_seed(0)
    net = Net(kind)
    controller = EAFOController.attach(net, batch(), eps_init=eps, update_every_n_steps=2, **options)
    assert len(controller.sites) == 2
    controller.collecting = False
    return net, controller


def train_step(run: Any, controller: EAFOController, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One optimiser step of a model, compiled or not, with everything that the controller does around it."""
    controller.collecting = controller.schedule.collects(step - 1)
    optimizer.zero_grad()
    run(batch()).square().mean().backward()
    controller.before_optimizer_step(step - 1)
    optimizer.step()
    controller.step(step)


class Graphs:
    """A compiler that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@pytest.fixture
def graphs() -> Generator[Graphs]:
    torch._dynamo.reset()
    counters.clear()
    yield Graphs()
    torch._dynamo.reset()


class TestCompile:
    @pytest.mark.parametrize("kind", KINDS)
    def test_before_wrapping(self, kind: str, graphs: Graphs, tally: Tally) -> None:
        """A model that is compiled already gets its corrections, and loses them again."""
        torch.manual_seed(0)
        net = Net(kind)
        run = torch.compile(net, backend=graphs, fullgraph=True)
        plain = run(batch())
        assert torch.equal(plain, net(batch()))
        EAFOController.attach(net, batch(), eps_init=0.3).collecting = False
        torch.testing.assert_close(run(batch()), net(batch()))
        assert (run(batch()) - plain).abs().max() > 1e-3
        with disabled(net):
            torch.testing.assert_close(run(batch()), plain)
        unwrap(net)
        torch.testing.assert_close(run(batch()), plain)
        assert graphs.count <= 4
        tally("compilations tried", graphs.count)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dynamic", [None, True, False])
    def test_as_many_graphs_as_the_plain_model(self, kind: str, dynamic: bool | None, tally: Tally) -> None:
        """Over batches of many sizes, in training and evaluation, with and without gradients."""
        counts = []
        for model in (Net(kind), corrected(kind)[0]):
            torch._dynamo.reset()
            graphs = Graphs()
            run = torch.compile(model, backend=graphs, fullgraph=True, dynamic=dynamic)
            for n in (6, 5, 7, 9, 6):
                torch.testing.assert_close(run(batch(n)), model(batch(n)))
            with torch.no_grad():
                torch.testing.assert_close(run(batch()), model(batch()))
            model.eval()
            torch.testing.assert_close(run(batch()), model(batch()))
            counts.append(graphs.count)
        assert counts[1] <= counts[0] + 1, "one more where collecting and evaluation differ"
        tally("compilations tried", sum(counts))

    @pytest.mark.parametrize("kind", KINDS)
    def test_training_compiles_a_bounded_number_of_times(self, kind: str, graphs: Graphs, tally: Tally) -> None:
        """Rounds come and go, samples are taken or not, every number changes: nothing of it compiles anew."""
        net, controller = corrected(kind, policy="hybrid", collect_every_n_steps=1)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        run = torch.compile(net, backend=graphs, fullgraph=True)
        after = []
        for step in range(1, 41):
            train_step(run, controller, optimizer, step)
            after.append(graphs.count)
        assert after[-1] == after[5], after
        assert after[-1] <= 3
        assert controller.rounds > 15
        assert all(row["n"] > 0 for row in controller.records), "samples are taken inside the graph"
        tally("compilations tried", graphs.count)

    def test_a_compiled_step_takes_the_same_samples_and_gradients(self, graphs: Graphs) -> None:
        rows, grads = [], []
        for compiled in (False, True):
            net, controller = corrected("modules")
            controller.collecting = True
            run = torch.compile(net, backend=graphs, fullgraph=True) if compiled else net
            run(batch()).square().mean().backward()
            grads.append([p.grad for p in net.parameters()])
            rows.append(controller.update(1))
        for one, two in zip(*grads, strict=True):
            torch.testing.assert_close(one, two)
        for one, two in zip(*rows, strict=True):
            assert one["n"] == two["n"]
            assert one["mean"] == pytest.approx(two["mean"], abs=1e-6)

    @pytest.mark.slow
    @pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler")
    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch, when inductor is imported
    @pytest.mark.parametrize("kind", ["in place", "functions"])
    def test_torchs_own_compiler_trains_as_without(self, kind: str, graphs: Graphs) -> None:
        """Code that inductor writes: the same log, update for update, and the same amplitudes."""
        rows, amplitudes = [], []
        for compiled in (False, True):
            net, controller = corrected(kind, policy="hybrid", density="histogram", collect_every_n_steps=1)
            optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
            run = torch.compile(net, fullgraph=True) if compiled else net
            for step in range(1, 7):
                train_step(run, controller, optimizer, step)
            rows.append([(row["step"], row["site"], row["n"]) for row in controller.records])
            amplitudes.append([eps.detach().clone() for eps in controller.amplitudes.values()])
        assert rows[0] == rows[1]
        assert len(rows[0]) == 2 * 4
        for one, two in zip(*amplitudes, strict=True):
            assert (one - 0.2).abs() > 1e-4
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", ["nan", "empty", "half"])
    def test_bad_batches(self, name: str, graphs: Graphs) -> None:
        net, _ = corrected("modules")
        run = torch.compile(net, backend=graphs, fullgraph=True)
        x = {"nan": torch.full((3, 4), torch.nan), "empty": torch.empty(0, 4), "half": batch().bfloat16()}[name]
        if name == "half":
            net.bfloat16()
        bounds = {"rtol": 0.05, "atol": 1e-3} if name == "half" else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(run(x), net(x), equal_nan=True, **bounds)


class TestTransforms:
    """torch.func and forward mode, against finite differences and each other."""

    @pytest.fixture(params=KINDS)
    def net(self, request: pytest.FixtureRequest) -> Net:
        return corrected(request.param)[0].double()

    @pytest.mark.parametrize("density", ["gaussian", "histogram"])
    def test_forward_mode_is_the_finite_difference(self, density: str, tally: Tally) -> None:
        for kind in KINDS:
            net, _ = corrected(kind, density=density)
            net.double()
            x, along = batch().double(), batch(6).flip(0).double()
            step = 1e-6
            difference = (net(x + step * along) - net(x - step * along)).detach() / (2 * step)
            with forward_ad.dual_level():
                dual = forward_ad.unpack_dual(net(forward_ad.make_dual(x, along)))[1]
            with torch.no_grad(), forward_ad.dual_level():
                bare = forward_ad.unpack_dual(net(forward_ad.make_dual(x, along)))[1]
            found = {
                "jvp": torch.func.jvp(net, (x,), (along,))[1],
                "dual": dual,
                "dual without gradients": bare,
                "vmap of jvp": torch.vmap(lambda a, b, f=net: torch.func.jvp(f, (a,), (b,))[1])(x, along),
                "jacfwd": torch.einsum("ijkl,kl->ij", torch.func.jacfwd(net)(x), along),
                "jacrev": torch.einsum("ijkl,kl->ij", torch.func.jacrev(net)(x), along),
            }
            for name, value in found.items():
                torch.testing.assert_close(value, difference, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
            tally("transforms tried", len(found))

    def test_forward_mode_in_eps(self, net: Net) -> None:
        x, step = batch().double(), 1e-6
        host, site = hosted_sites(net)[0]
        (key,) = [name for name, p in net.named_parameters() if p is getattr(host, site.keys[0])]
        values = {name: p.detach() for name, p in net.named_parameters()}

        def at(eps: Tensor) -> Tensor:
            return torch.func.functional_call(net, {**values, key: eps}, (x,))

        eps = values[key]
        difference = (at(eps + step) - at(eps - step)) / (2 * step)
        assert difference.abs().max() > 1e-3
        torch.testing.assert_close(
            torch.func.jvp(at, (eps,), (torch.ones_like(eps),))[1], difference, rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(torch.func.jacrev(at)(eps), difference, rtol=1e-4, atol=1e-6)

    def test_hessians_of_both_modes_agree(self, net: Net) -> None:
        x = batch(2).double()

        def loss(z: Tensor) -> Tensor:
            return net(z).square().sum()

        forward = torch.func.hessian(loss)(x)
        torch.testing.assert_close(forward, torch.autograd.functional.hessian(loss, x))
        torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(loss))(x), forward)

    def test_an_ensemble_by_stacked_states(self, net: Net, tally: Tally) -> None:
        members = [copy.deepcopy(net) for _ in range(3)]
        for number, member in enumerate(members):
            for host, site in hosted_sites(member):
                nn.init.constant_(getattr(host, site.keys[0]), 0.1 * number)
        parameters, buffers = torch.func.stack_module_state(members)  # pyright: ignore[reportArgumentType]

        def call(p: Any, b: Any, x: Tensor) -> Tensor:
            return torch.func.functional_call(net, (p, b), (x,))

        outs = torch.vmap(call, in_dims=(0, 0, None))(parameters, buffers, batch().double())
        for out, member in zip(outs, members, strict=True):
            torch.testing.assert_close(out, member(batch().double()))
        assert (outs[0] - outs[2]).abs().max() > 1e-3
        tally("transforms tried")

    def test_gradients_a_sample_while_samples_are_taken(self, net: Net) -> None:
        for _, site in hosted_sites(net):
            site.switch.collecting = True
        values, x = {name: p.detach() for name, p in net.named_parameters()}, batch().double()

        def loss(p: dict[str, Tensor], row: Tensor) -> Tensor:
            return torch.func.functional_call(net, p, (row[None],)).square().sum()

        each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
        for number in range(len(x)):
            net.zero_grad()
            net(x[number : number + 1]).square().sum().backward()
            for name, p in net.named_parameters():
                torch.testing.assert_close(each[name][number], p.grad if p.grad is not None else torch.zeros_like(p))

    def test_checkpointing(self, net: Net) -> None:
        grads = []
        for how in ("none", "reentrant", "not reentrant"):
            x = batch().double().requires_grad_()
            net.zero_grad()
            out = net(x) if how == "none" else checkpoint(net, x, use_reentrant=how == "reentrant")
            assert isinstance(out, Tensor)
            out.square().sum().backward()
            grads.append([x.grad, *[p.grad.clone() for p in net.parameters() if p.grad is not None]])
        for other in grads[1:]:
            for one, two in zip(grads[0], other, strict=True):
                torch.testing.assert_close(one, two)


class TestCopies:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_copy_goes_on_alone(self, kind: str) -> None:
        """Deep copies and pickles compute the same, train apart, and are unwrapped apart."""
        net, controller = corrected(kind)
        for make in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
            twin: Any = make(net)
            assert torch.equal(twin(batch()), net(batch()))
            taken = EAFOController.attach(twin, batch(), update_every_n_steps=1)
            assert torch.equal(twin(batch()), net(batch())), "a controller of its own keeps what was learned"
            twin(batch(64))
            taken.step(1)
            assert controller.rounds == 0
            assert not torch.equal(twin(batch()), net(batch()))
            unwrap(twin)
            assert len(hosted_sites(net)) == 2

    def test_a_copied_controller_leaves_the_original_alone(self) -> None:
        _, controller = corrected("modules")
        twin = copy.deepcopy(controller)
        twin.collecting = True
        twin.model(batch(64))
        (row, *_) = twin.update(1)
        assert row["n"] == 64 * 8
        assert (controller.rounds, twin.rounds) == (0, 1)
        assert not controller.collecting
        assert {id(p) for p in twin.amplitudes.values()}.isdisjoint({id(p) for p in controller.amplitudes.values()})
        again = pickle.loads(pickle.dumps(controller))
        again.collecting = True
        again.model(batch(64))
        (row, *_) = again.update(1)
        assert row["n"] == 64 * 8
