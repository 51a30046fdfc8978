"""A module that has a function of its own for each of its calls, and the hooks that tell its calls apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from eafo_dynamic.apply.frames import STACK, close_frame, open_frame, route
from eafo_dynamic.apply.known import KnownCalls, warn_of_order
from eafo_dynamic.errors import SiteError
from eafo_dynamic.find.evidence import BY_ORDER, Evidence
from eafo_dynamic.find.wrapped import CarriesCorrection
from eafo_dynamic.internals.torch_internals import callers, current_frame

__all__ = ["CallCounter", "CorrectedCalls", "Order", "order_of"]

Order = Sequence[tuple[Sequence[str], Sequence[str], Sequence[int | None]]]
"""The calls of one activation in a forward: where each is made, children before it, and the numbers of its functions
in turn; None: the base itself. Primitives only; see ``find.evidence``."""


def order_of(known: KnownCalls, numbers: Mapping[int, int]) -> Order:
    """The calls that an owner knows, with functions in the place of sites.

    Args:
        known: the calls.
        numbers: of the functions, by ``id`` of the site.

    Returns:
        The order.
    """
    rows = zip(known.rows, known.sites, strict=True)
    return [(list(row.places), list(row.after), [numbers.get(id(site)) for site in sites]) for row, sites in rows]


def _by_evidence(order: Sequence[Any]) -> Order:
    """An order as it is now; version 0.1.0 had a number of a function for each call, and knew no more of it."""
    if all(isinstance(call, (list, tuple)) for call in order):
        return order
    warn_of_order("the merged model")
    return [(BY_ORDER.places, BY_ORDER.after, order)]


class CallCounter:
    """Forward hooks of a module that calls shared activations: each of its forwards tells the calls apart.

    Args:
        orders: for each ``CorrectedCalls``, by its name, which function the calls in a forward have.
        parents: modules whose children tell that they have returned.
    """

    eafo_kind: ClassVar[str] = "merged"
    eafo_name: ClassVar[str] = ""
    eafo_sites: ClassVar[list[Any]] = []
    eafo_functions: ClassVar[frozenset[str]] = frozenset()
    eafo_written: ClassVar[frozenset[Any]] = frozenset()

    def __init__(self, orders: Mapping[str, Order], parents: Sequence[str] = ()) -> None:
        self.parents = tuple(parents)
        self.orders = {name: _by_evidence(order) for name, order in orders.items()}
        self.eafo_routes: dict[str, KnownCalls] = {}
        for name, order in self.orders.items():
            known: Any = KnownCalls()
            for places, after, numbers in order:
                for turn, number in enumerate(numbers):
                    known.put(Evidence(tuple(places), tuple(after)), turn, number)
            self.eafo_routes[name] = known

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["orders"], state.get("parents", ()))

    def register(self, owner: nn.Module) -> None:
        """Registers the hooks.

        Args:
            owner: the module whose forwards make the calls.
        """
        owner.register_forward_pre_hook(self.begin, prepend=True)
        owner.register_forward_hook(self.end, prepend=True, always_call=True)  # before it tells that it has returned

    def begin(self, owner: nn.Module, args: Any) -> None:
        """Opens a frame.

        Args:
            owner: whose forward begins.
            args: its arguments.
        """
        telling: Any = self
        if torch.compiler.is_compiling():
            open_frame(telling, 0)
            return
        here = current_frame(1)
        _forget_interrupted(here)
        open_frame(telling, id(here))
        STACK.frames[-1].python = here

    def end(self, *_: Any) -> None:
        """Closes it, also where the forward raised."""
        close_frame(None)


def _forget_interrupted(here: FrameType | None) -> None:
    """Drops forwards that a KeyboardInterrupt ended: torch runs no hook for it."""
    frames = STACK.frames
    newest = frames[-1] if frames else None
    if newest is None or newest.python is None:
        return
    alive = {id(frame) for frame in callers(here)}
    while frames:
        python = frames[-1].python
        if python is None or id(python) in alive:
            return
        frames.pop()


class CorrectedCalls(CarriesCorrection, nn.Module):
    """An activation that one forward calls several times, each time with a correction of its own.

        f_k(z) = base(z) + eps_k * sigma_k * ghat_k((z - mu_k) / sigma_k)        in call k

    Hooks of the module around them (``CallCounter``) tell the calls apart, as in the model that was merged. A call that
    they do not know is the base's.

    Args:
        name: what the hooks know it by.
        base: the activation.
        functions: the functions, each a ``CorrectedActivation`` of the base.
    """

    def __init__(self, name: str, base: nn.Module, functions: Sequence[nn.Module]) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.functions = nn.ModuleList(functions)

    def __prepare_scriptable__(self) -> Any:
        raise SiteError(
            f"{self.name}: torch.jit.script cannot tell calls apart that have a function of their own each. "
            "Take torch.jit.trace(model, x), or torch.export."
        )

    def forward(self, z: Tensor | None = None, **named: Tensor) -> Tensor:
        """Applies the function of this call.

        Args:
            z: pre-activations, any shape, floating point.
            **named: the same under the name that the base's forward has for it, instead of z.

        Returns:
            f_k(z), of the shape of z; z itself, overwritten, if the base is in place.

        Raises:
            SiteError: outside the forward of any module that makes its calls.
        """
        if z is None:
            (z,) = named.values()
        owner, k = route(self.name, torch.compiler.is_compiling(), 3)
        if owner is None:
            raise SiteError(
                f"{self.name} has a function of its own for each call in a forward of the module around it, and is "
                "called outside of any, so which call this is cannot be known. Run the whole module around it."
            )
        number: Any = k
        result: Tensor = self.base(z) if number is None else self.functions[number](z)
        return result
