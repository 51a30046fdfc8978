"""What becomes of the result of each activation call in a dry run, until a layer with weights takes it.

Every torch function of the run is followed. A tensor *carries* the calls that it comes from with no layer in between,
each with what is certain about its sign (``ranges``). What happens to a tensor is noted in the ``Uses`` of the calls
that it carries; ``roles`` decides from these.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from eafo_dynamic.find.channels import CONVOLUTIONS
from eafo_dynamic.find.ranges import Sign, asks_for_values, inside_distribution, name_of, needing, sign_after
from eafo_dynamic.find.trace import Call
from eafo_dynamic.internals.torch_internals import caller_of, code_of, variable_of

__all__ = ["Affine", "Lineage", "Uses", "in_method", "is_product", "learns"]

_PRODUCTS = CONVOLUTIONS | {
    "linear", "bilinear", "matmul", "rmatmul", "mm", "bmm", "mv", "addmm", "addbmm", "addmv", "baddbmm", "inner",
    "tensordot", "einsum", "cdist", "scaled_dot_product_attention", "multi_head_attention_forward",
}  # fmt: skip
_COMPARED = {
    "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "poisson_nll_loss", "kl_div", "gaussian_nll_loss",
}  # fmt: skip


def is_product(func: Any) -> bool:
    """Whether a torch function sums over products, as the layers of a network do: ``linear``, ``matmul``, ``conv2d``.

    Args:
        func: the function.

    Returns:
        Whether it does.
    """
    return name_of(func) in _PRODUCTS


class Affine(NamedTuple):
    """scale * f(z) + shift, for the result f(z) of a call."""

    scale: float = 1.0
    shift: float = 0.0


@dataclass
class Uses:
    """What becomes of the result of one activation call.

    Args:
        layer: whether a layer with weights takes it, or a product with another result.
        needs: the function that gives NaN outside the result's range; empty if there is none.
        asks: what looks at its values as such: a comparison, a rounding, a distribution; empty if nothing does.
        affine: the scales and shifts by numbers that it is given.
        factor: its scales and shifts where it multiplies another tensor.
        compared: whether a loss compares it with data.
        replaces: the module that takes it in one call and data in another, as a discriminator does.
        returned: whether the outermost forward returns it.
        alone: whether that forward returns it as it is, or scaled and shifted by numbers.
        unflattened: whether it is returned with more dimensions, as an image made by a linear layer.
        summed: whether a forward that makes it returns a single number made of it.
        width: channels before and after the layer that made its pre-activation.
    """

    layer: bool = False
    needs: str = ""
    asks: str = ""
    affine: set[Affine] = field(default_factory=set)
    factor: set[Affine] = field(default_factory=set)
    compared: bool = False
    replaces: str = ""
    returned: bool = False
    alone: bool = False
    unflattened: bool = False
    summed: bool = False
    width: tuple[int, int] | None = None


class _Carried(NamedTuple):
    """How a tensor carries a call.

    Args:
        sign: what is certain of the tensor's sign.
        direct: whether no product lies between the call and the tensor, not even one without weights.
    """

    sign: Sign
    direct: bool


class _Known(NamedTuple):
    """What is known of a tensor.

    Args:
        tensor: the tensor.
        calls: the calls that it comes from with no layer in between.
        weight: whether it is made of weights alone.
        learned: whether a layer with weights came before it, so that it is no data.
        affine: if it is nothing but the scaled and shifted result of a call: that call, its scale and shift.
        width: channels before and after the last layer.
    """

    tensor: weakref.ref[Tensor]
    calls: Mapping[Call, _Carried]
    weight: bool = False
    learned: bool = False
    affine: tuple[Call, Affine] | None = None
    width: tuple[int, int] | None = None


class Lineage:
    """Follows the results of activation calls.

    A layer is a function that takes a parameter of several numbers, or a tensor made of parameters and buffers alone;
    or a function that sums over products and gives several numbers.

    Args:
        model: what runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.uses: dict[Call, Uses] = {}
        self.stepped = False
        self._buffers = {id(buffer) for buffer in model.buffers()}
        self._of: dict[int, _Known] = {}
        self._counted: set[Call] = set()
        self._returned: set[Call] | None = None
        self._entries: dict[str, list[tuple[tuple[int, ...], frozenset[Call], bool]]] = {}

    def of(self, call: Call) -> Uses:
        """What has become of a call's result so far.

        Args:
            call: an activation call.

        Returns:
            Its uses.
        """
        return self.uses.setdefault(call, Uses())

    def step(self, func: Any, args: Any, kwargs: Any, out: Any, call: Call | None = None) -> None:
        """Follows a function that runs.

        Args:
            func: the torch function; None for an activation module.
            args: positional arguments.
            kwargs: keyword arguments.
            out: its result.
            call: the activation call that the function is, if it is one.
        """
        given = list(_tensors((args, kwargs)))
        made = list(_tensors(out))
        if out is None:  # as of x[0] = y, which changes its first argument
            made = given[:1]
        carried = self._carried(given)
        if carried and func is not None:
            self._note_needs(func, args, kwargs, out)
        weights = [tensor for tensor in given if self._is_weight(tensor)]
        has_weights = any(tensor.numel() > 1 for tensor in weights)
        gives_several = any(tensor.numel() > 1 for tensor in made)
        learned = any(self.is_learned(tensor) for tensor in given)
        width = self._width(given)
        if has_weights or (gives_several and is_product(func)):
            for earlier, how in carried.items():
                self.of(earlier).layer |= how.direct
            if has_weights:
                carried = {}
                learned = learned or is_product(func)
            else:
                carried = {earlier: how._replace(direct=False) for earlier, how in carried.items()}
            width = _layer_width(func, args, made) or width
        elif func is not None:
            for earlier, how in carried.items():
                carried[earlier] = how._replace(sign=sign_after(func, args, kwargs, how.sign))
        if isinstance(out, Tensor) and not (out.is_floating_point() or out.is_complex()):
            carried = {}  # a mask or an index is no longer the result of an activation
        affine = self._affine(func, args, kwargs)
        if call is not None:
            # the range of what comes after an activation is that activation's, whatever came before
            for earlier, how in carried.items():
                carried[earlier] = how._replace(sign=max(how.sign, Sign.CLAMPED))
            carried[call] = _Carried(Sign.ANY, direct=True)
            affine = call, Affine()
            self.of(call).width = width
        if affine is not None:
            scaled, scale_and_shift = affine
            self.of(scaled).affine.add(scale_and_shift)
        only_weights = bool(weights) and all(self._is_weight(each) or id(each) in self._buffers for each in given)
        if not (carried or only_weights or learned):
            return
        for tensor in made:
            self._of[id(tensor)] = _Known(weakref.ref(tensor), carried, only_weights, learned, affine, width)
            if tensor.numel() == 1:
                self._counted |= {earlier for earlier, how in carried.items() if how.direct}

    def made(self, out: Tensor, call: Call) -> None:
        """Notes that a written-out activation is complete.

        Args:
            out: its result; ``step`` has followed the function that made it.
            call: the activation.
        """
        known = self._known(out)
        if known is None:
            known = _Known(weakref.ref(out), {})
        calls = dict(known.calls)
        calls[call] = _Carried(Sign.ANY, direct=True)
        self.of(call).width = known.width
        self._of[id(out)] = known._replace(calls=calls, weight=False, affine=(call, Affine()))

    def is_learned(self, tensor: Tensor) -> bool:
        """Whether a tensor comes out of a layer with weights, so that it is no data.

        Args:
            tensor: any.

        Returns:
            Whether it does.
        """
        known = self._known(tensor)
        return known is not None and known.learned

    def entered(self, name: str, values: Any) -> None:
        """Notes that a module's forward begins.

        Args:
            name: FQN of the module.
            values: its arguments.
        """
        tensor = next(_tensors(values), None)
        if tensor is not None and tensor.is_floating_point():
            entry = (tuple(tensor.shape[1:]), self._calls(tensor), not self.is_learned(tensor))
            self._entries.setdefault(name, []).append(entry)

    def left(self, out: Any, name: str, outermost: bool) -> None:
        """Notes that a module's forward has ended.

        Args:
            out: what it returns.
            name: FQN of the module.
            outermost: whether no other forward is around it.
        """
        for tensor in _tensors(out):
            known = self._known(tensor)
            if outermost and known is not None and known.affine is not None:
                self.of(known.affine[0]).alone = True
            for call in self._calls(tensor):
                uses = self.of(call)
                if tensor.dim() == 0 and any(frame.module == name for frame in call.path):
                    uses.summed = True
                if outermost:
                    uses.returned = True
                    uses.unflattened |= tensor.dim() > max(2, len(call.shape))

    def returned(self, out: Any) -> None:
        """Notes what a step returns: the loss, alone or as an entry ``loss``.

        Args:
            out: anything.
        """
        loss = out
        if isinstance(out, dict) and "loss" in out:
            loss = cast("Mapping[str, Any]", out)["loss"]
        for tensor in _tensors(loss):
            if tensor.numel() == 1:
                self._returned = (self._returned or set()) | self._calls(tensor)

    def losses(self) -> set[Call]:
        """The calls that the loss is made of; where no step returns a loss, those that any single number is made of."""
        ends = self._counted if self._returned is None else self._returned
        return {call for call in ends if not self.of(call).layer}

    def replacements(self) -> dict[Call, str]:
        """Calls whose results a module takes in place of data, with the module's name."""
        found: dict[Call, str] = {}
        for name, entries in self._entries.items():
            shapes_of_data = {shape for shape, calls, is_data in entries if is_data and not calls}
            for shape, calls, _ in entries:
                if shape not in shapes_of_data:
                    continue
                for call in calls:
                    is_inside = any(frame.module == name for frame in call.path)
                    if not is_inside:
                        found[call] = name
        return found

    def _note_needs(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Notes which calls' results a function looks at, and in what range it needs them."""
        for tensor in _tensors(needing(func, args, kwargs)):
            for call, how in self._carried_by(tensor).items():
                if how.sign is Sign.ANY:
                    self.of(call).needs = self.of(call).needs or name_of(func)
        asks = asks_for_values(func, args, out)
        distribution = inside_distribution()
        tensors = list(_tensors((args, kwargs)))
        calls = [call for tensor in tensors for call in self._calls(tensor)]
        for call in calls:
            uses = self.of(call)
            if distribution:
                uses.needs = uses.needs or "a distribution"
            elif asks:
                uses.asks = uses.asks or asks
        with_data = not all(self.is_learned(tensor) for tensor in tensors)
        if with_data and name_of(func) in _COMPARED:
            for call in calls:
                self.of(call).compared = True

    def _affine(self, func: Any, args: Any, kwargs: Any) -> tuple[Call, Affine] | None:
        """The call whose result a function scales or shifts by a number, with what it has been scaled and shifted by.

        Of a product with another tensor, this notes both factors.

        Returns:
            The call, its scale and shift; None if the function does something else.
        """
        name = name_of(func)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        numbers = [float(arg) for arg in args if isinstance(arg, (int, float))]
        if name in ("mul", "multiply", "imul", "rmul") and len(tensors) == 2:
            self._note_product(tensors)
            return None
        if len(tensors) != 1 or len(numbers) != 1 or len(args) != 2 or kwargs:
            return None
        known = self._known(tensors[0])
        if known is None or known.affine is None:
            return None
        call, (scale, shift) = known.affine
        number = numbers[0]
        if name in ("add", "radd", "iadd"):
            return call, Affine(scale, shift + number)
        if name in ("sub", "subtract", "isub") and isinstance(args[0], Tensor):
            return call, Affine(scale, shift - number)
        if name in ("rsub", "sub"):
            return call, Affine(-scale, number - shift)
        if name in ("mul", "multiply", "rmul", "imul"):
            return call, Affine(scale * number, shift * number)
        if name in ("div", "divide", "true_divide", "truediv", "itruediv") and number:
            return call, Affine(scale / number, shift / number)
        return None

    def _note_product(self, tensors: list[Tensor]) -> None:
        for tensor, other in (tensors, tensors[::-1]):
            known = self._known(tensor)
            if known is not None and known.affine is not None and tensor is not other:
                self.of(known.affine[0]).factor.add(known.affine[1])

    def _width(self, given: list[Tensor]) -> tuple[int, int] | None:
        for tensor in given:
            known = self._known(tensor)
            if known is not None and known.width is not None:
                return known.width
        return None

    def _known(self, tensor: Tensor) -> _Known | None:
        known = self._of.get(id(tensor))
        if known is None or known.tensor() is not tensor:  # the id may have been another tensor's
            return None
        return known

    def _carried_by(self, tensor: Tensor) -> Mapping[Call, _Carried]:
        known = self._known(tensor)
        return {} if known is None else known.calls

    def _carried(self, given: list[Tensor]) -> dict[Call, _Carried]:
        """The calls that any of the tensors carries, each with the least that is certain of its sign."""
        carried: dict[Call, _Carried] = {}
        for tensor in given:
            for call, how in self._carried_by(tensor).items():
                before = carried.get(call, how)
                carried[call] = _Carried(min(before.sign, how.sign), before.direct or how.direct)
        return carried

    def _calls(self, tensor: Tensor) -> frozenset[Call]:
        """The calls that a tensor comes from with neither a layer nor a product in between."""
        return frozenset(call for call, how in self._carried_by(tensor).items() if how.direct)

    def _is_weight(self, tensor: Tensor) -> bool:
        if isinstance(tensor, nn.Parameter):
            return True
        known = self._known(tensor)
        return known is not None and known.weight


def _layer_width(func: Any, args: Any, made: list[Tensor]) -> tuple[int, int] | None:
    """Channels that a linear layer or a convolution takes and gives."""
    if not args or not isinstance(args[0], Tensor) or not made:
        return None
    before, after = args[0], made[0]
    if before.dim() == 0 or after.dim() == 0:
        return None
    name = name_of(func)
    if name == "linear":
        return before.shape[-1], after.shape[-1]
    if name in CONVOLUTIONS:
        dim = -1 - int(name[-2])  # conv2d has two dimensions after that of the channels
        return before.shape[dim], after.shape[dim]
    return None


def learns(module: nn.Module) -> bool:
    """Whether a module has weights; a temperature or a margin is one number.

    Args:
        module: any.

    Returns:
        Whether it has.
    """
    return any(is_lazy(parameter) or parameter.numel() > 1 for parameter in module.parameters())


def in_method(frame: FrameType | None, entries: Collection[CodeType]) -> bool:
    """Whether a method other than ``forward`` of a module with weights makes a call, such as ``encode``.

    Args:
        frame: where the call is made.
        entries: of the functions that enter a module, which they have under the name ``module``.

    Returns:
        Whether it does; methods of the module that has been entered do not count.
    """
    owners: list[nn.Module] = []
    while frame is not None and code_of(frame) not in entries:
        owner = _owner_of_method(frame)
        if owner is not None:
            owners.append(owner)
        frame = caller_of(frame)
    entered = None if frame is None else variable_of(frame, "module")
    return any(owner is not entered and learns(owner) for owner in owners)


def _owner_of_method(frame: FrameType) -> nn.Module | None:
    """The module whose method runs in a frame; None for any other function."""
    code = code_of(frame)
    if code.co_argcount == 0:
        return None
    owner = variable_of(frame, code.co_varnames[0])
    if not isinstance(owner, nn.Module):
        return None
    method = inspect.getattr_static(type(owner), code.co_name, None)
    if not callable(method):
        return None
    is_method = getattr(inspect.unwrap(method), "__code__", None) is code
    return owner if is_method else None


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if not is_lazy(values):
            yield values
    elif isinstance(values, (list, tuple)):
        for value in cast("list[Any]", values):
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
