"""What a dry run writes down: activation calls, and the forwards around them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import CodeType
from typing import NamedTuple

from eafo_dynamic.find.places import Piece

__all__ = ["SOFT_CAP", "Call", "Frame", "Returned", "Trace"]

SOFT_CAP = "a soft cap, not a hidden activation"


@dataclass(frozen=True)
class Frame:
    """One running forward.

    Args:
        module: FQN.
        instance: how many forwards of the run began before it.
        is_forward: False for what runs outside any forward, such as a training_step.
    """

    module: str
    instance: int
    is_forward: bool = True


class Returned(NamedTuple):
    """A child that has returned.

    Args:
        name: FQN.
        loops: of the code that has called it; see ``places.Piece``.
    """

    name: str
    loops: frozenset[tuple[CodeType, int]]


@dataclass(eq=False)
class Call:
    """One activation call.

    Args:
        module: FQN of the activation module; of a functional call, of the module whose forward makes it.
        path: running forwards, outermost first, without the activation's own.
        shape: of the pre-activation.
        function: name of the function of a functional call; None for a module's.
        parameters: hyper-parameters of the function.
        inplace: whether the function overwrites its input.
        hidden_from_compiler: whether torch.compile would not show the call.
        channel_dim: dimension of the channels of the pre-activation, where it is known.
        role: hidden, gate, range, loss or unknown; see ``roles``. ``part`` of a written-out activation.
        reason: why it is not hidden.
        refusal: why it cannot be corrected, whatever its role.
        pieces: where in the code it is made, innermost first, one for each forward of the path.
        returned: for each forward of the path, its children that have returned, and how many of them before the call.
        in_method: whether a method of another module than the innermost of the path makes it.
        guessed: whether only its behaviour says that it is an activation: ``torch.where(x > 0, x, 0.1 * x)``.
    """

    module: str
    path: tuple[Frame, ...]
    shape: tuple[int, ...]
    function: str | None = None
    parameters: dict[str, object] = field(default_factory=dict)
    inplace: bool = False
    hidden_from_compiler: bool = False
    channel_dim: int | None = None
    role: str = "hidden"
    reason: str = ""
    refusal: str = ""
    pieces: list[Piece] = field(default_factory=list)
    returned: list[tuple[list[Returned], int]] = field(default_factory=list)
    in_method: bool = False
    guessed: bool = False


@dataclass
class Trace:
    """What a dry run saw.

    Args:
        calls: in their order; parts of a written-out activation have the function WRITTEN's role.
        forwards: number of forwards of each module, those inside another forward of it not counted.
        entered: number of all forwards.
        callees: modules whose forward a module's own forward has called.
        refused: kind of the value that an activation module was called with and that cannot be corrected.
        crowded: activation modules that were called with more than one value.
        opaque: activation kernels that ran where no Python function shows them, with the shape of their input; keys
            are the module whose forward ran and the function's name.
        by_channel: modules whose forward writes out an activation with a weight for each channel, with the shape of
            its input.
    """

    calls: list[Call] = field(default_factory=list)
    forwards: Counter[str] = field(default_factory=Counter)
    entered: int = 0
    callees: dict[str, dict[str, None]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    crowded: set[str] = field(default_factory=set)
    opaque: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)
    by_channel: dict[str, tuple[int, ...]] = field(default_factory=dict)
