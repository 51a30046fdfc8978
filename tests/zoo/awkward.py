"""Hand-made models, one for each construct that makes finding or correcting an activation hard."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Run = Callable[[nn.Module], Any]
MODELS: dict[str, type[nn.Module]] = {}


def awkward(cls: type[nn.Module]) -> type[nn.Module]:
    """Registers a model that takes a batch of shape [4, 8]; a class attribute ``shape`` says otherwise."""
    MODELS[cls.__name__] = cls
    return cls


def make_awkward(name: str) -> tuple[nn.Module, Run]:
    """One of the models with random weights, and a function that runs it on a fixed input."""
    torch.manual_seed(0)
    model = MODELS[name]()
    shape = getattr(model, "shape", (4, 8))
    example = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return model, lambda m: m(example.clone())


class Layers(nn.Module):
    """Three linear layers to put activations between."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)


@awkward
class InPlace(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.relu, self.leaky = nn.ReLU(inplace=True), nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        self.relu(h)  # the result is dropped: only the overwritten input counts
        return self.three(self.leaky(self.two(h)))


@awkward
class InPlaceOnView(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        self.relu(h[:, :4])
        left, right = (h * 1.5).chunk(2, dim=-1)
        return self.three(torch.cat([F.silu(left), right.t().contiguous().t().tanh()], dim=-1))


@awkward
class FunctionalInPlace(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.one(x), inplace=True)
        h = F.leaky_relu_(self.two(h), 0.3)
        h = torch.relu_(self.three(h))
        return F.elu(h - 1, 0.7, True) + (h + 1).tanh_()


@awkward
class EveryFunction(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.2]))

    def forward(self, x: Tensor) -> Tensor:
        for f in (F.relu, torch.relu, F.relu6, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish, F.hardtanh):
            x = x + self.one(f(x))
        for f in (F.softsign, F.logsigmoid, F.tanhshrink, F.softshrink, F.hardshrink, F.tanh, torch.tanh, torch.selu):
            x = 0.5 * x + self.two(f(x))
        x = x + self.one(F.gelu(x, approximate="tanh"))
        x = self.one(F.threshold(x, 0.1, -0.2)) + x + F.prelu(x, self.slope)
        return self.three(x.relu()) + x.tanh() + F.leaky_relu(input=self.two(x), negative_slope=0.1)


@awkward
class OneReluForAll(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.three(self.relu(self.two(self.relu(self.one(x))))))


@awkward
class SeveralOwners(nn.Module):
    class Part(Layers):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.act = act

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.two(self.act(self.one(x))))

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.GELU()
        self.parts = nn.ModuleList([self.Part(self.act), self.Part(self.act)])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return self.act(x)


@awkward
class TiedBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = SeveralOwners.Part(nn.SiLU())
        self.depth = 3

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.depth):
            x = self.block(x) + F.relu(x)
        return x


@awkward
class TiedFunctionalBlocks(nn.Module):
    class Part(Layers):
        def forward(self, x: Tensor) -> Tensor:
            return self.two(F.relu(self.one(x)))

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Part()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.block(x)))


@awkward
class Recursive(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        h = F.silu(self.act(self.one(x)))
        return h if depth == 0 else self(h, depth - 1)


@awkward
class MixedCalls(Layers):
    """Functions, shared modules and children with functions of their own, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.sequence = nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sigmoid())
        self.inner = TiedFunctionalBlocks()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.one(x))
        h = self.act(self.two(h)) * self.sequence(h)
        h = self.act(self.inner(h)).relu()
        return self.two(torch.tanh(self.three(h)))


@awkward
class WrittenOut(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x = x * torch.sigmoid(1.702 * x)
        x = self.two(x)
        x = 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
        x = self.three(x)
        x = x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))
        x = self.one(x)
        x = x * F.softplus(x).tanh()
        x = self.two(x)
        return torch.sigmoid(self.beta * x) * x


@awkward
class HelperFunctions(Layers):
    def forward(self, x: Tensor) -> Tensor:
        def swish(t: Tensor) -> Tensor:
            return t * t.sigmoid()

        return swish(self.one(self._inner(swish(x))))

    def _inner(self, x: Tensor) -> Tensor:
        return F.gelu(self.two(x))


@awkward
class Gates(Layers):
    """Squeeze-excitation, GLU, a GRU cell written out, a soft cap and a transformed parameter: all left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.relu, self.hard = nn.Parameter(torch.randn(8)), nn.ReLU(), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.one(x))
        h = h * torch.sigmoid(self.two(h)) * self.hard(self.three(h))
        h = h * F.softplus(self.scale) + torch.tanh(self.scale)
        h = F.glu(torch.cat([h, x], dim=-1))
        z = torch.sigmoid(self.one(h))
        h = torch.tanh(self.two(h)) * z
        return torch.tanh(h / 5.0) * 5.0


@awkward
class CallableAttributes(Layers):
    class Plain:
        """No module."""

        def __call__(self, x: Tensor) -> Tensor:
            return F.silu(x)

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = F.gelu, functools.partial(F.leaky_relu, negative_slope=0.3)
        self.plain, self.hidden = self.Plain(), [nn.ELU()]
        self.table = {"relu": torch.relu}

    def forward(self, x: Tensor) -> Tensor:
        h = self.g(self.one(self.f(x)))
        return self.table["relu"](self.two(self.hidden[0](self.three(self.plain(h)))))


@awkward
class OwnClasses(Layers):
    class Swish(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value * torch.sigmoid(value)

    class OfParts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gate(x)

    class Square(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).square()

    def __init__(self) -> None:
        super().__init__()
        self.swish, self.of_parts, self.square, self.prelu = self.Swish(), self.OfParts(), self.Square(), nn.PReLU(8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.of_parts(self.one(self.swish(value=x)))
        return self.prelu(self.two(self.square(self.three(h))))


@awkward
class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        relu = nn.ReLU()
        self.sequence = nn.Sequential(nn.Linear(8, 8), relu, nn.Linear(8, 8), relu, nn.Tanh())
        self.table = nn.ModuleDict({"act": nn.Mish(), "lin": nn.Linear(8, 8)})
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(8, 8) / 3) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.sequence[:2](x)
        x = self.sequence(x)
        for weight in self.weights:
            x = F.relu(x @ weight)
        return self.table["act"](self.table["lin"](x))


@awkward
class Checkpointed(Layers):
    """A part of the forward is recomputed, and whole blocks too, in both modes."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.block, self.tied = SeveralOwners.Part(nn.SiLU()), TiedBlocks()

    def _some(self, x: Tensor) -> Tensor:
        return F.gelu(self.two(self.relu(self.one(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.relu(self.three(x)))
        for reentrant in (True, False):
            x = checkpoint(self._some, x, use_reentrant=reentrant)
            x = checkpoint(self.block, x, use_reentrant=reentrant)
            x = checkpoint(self.tied, x, use_reentrant=reentrant)
        return self.relu(F.gelu(x))


@awkward
class TransformerLayers(nn.Module):
    shape = (2, 5, 8)

    def __init__(self) -> None:
        super().__init__()
        self.by_name = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.by_function = nn.TransformerEncoderLayer(8, 2, 16, activation=F.gelu, batch_first=True)
        self.by_module = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, activation=nn.ReLU(), batch_first=True), 2
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.by_module(self.by_function(self.by_name(x)))


@awkward
class GradientsWithGaps(Layers):
    """What is concatenated, sliced, transposed or summed gets a gradient that is not dense in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.elu, self.mish, self.selu = nn.ELU(), nn.Mish(), nn.SELU()
        self.soft, self.gelu, self.inplace = nn.Softplus(), nn.GELU("tanh"), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        parts = [self.elu(x), F.silu(x), self.mish(x).mT.mT, self.selu(x), self.soft(x)[:, ::2], torch.tanh(x).mT]
        wide = torch.cat([parts[0], parts[1], parts[2], parts[3], parts[4], parts[5].mT], dim=-1)
        rest = self.two(self.gelu(x).expand(3, 4, 8)[1]) + self.inplace(self.three(x)).mT.reshape(8, 4).mT
        return torch.cat(
            [wide * 1.5, rest, x * torch.sigmoid(1.7 * x), F.gelu(x).sum(0, keepdim=True).expand(4, 8)], -1
        )


@awkward
class ConvBlocks(nn.Module):
    shape = (2, 3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(x + self.dropout(self.bn2(self.conv2(x))))
        return self.head(F.relu(F.adaptive_avg_pool2d(x, 1)).flatten(1))


@awkward
class ParametersTransformed(Layers):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrize.register_parametrization(self.one, "weight", nn.Softplus())
        nn.utils.parametrizations.weight_norm(self.two)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(self.one(x))) * torch.sigmoid(x)


@awkward
class Experts(nn.Module):
    """How often the shared activation runs depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.router = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)]), nn.Linear(8, 4)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        choice, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            mine = choice == k
            if mine.any():
                out[mine] = self.act(expert(x[mine]))
        return out


@awkward
class Nested(nn.Module):
    """A model inside another's forward, held where named_modules does not look."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.held = {"model": OneReluForAll()}

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            guide = self.held["model"](x)
        return F.relu(self.lin(x)) + guide
