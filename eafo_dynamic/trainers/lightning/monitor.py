"""``ActivationMonitor``: the callback that watches and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from eafo_dynamic.internals.declared import Described, options_class, same, takes
from eafo_dynamic.policy.options import Options
from eafo_dynamic.trainers.lightning.callback import EAFOCallback
from eafo_dynamic.trainers.options import WrittenOptions

__all__ = ["ActivationMonitor", "MonitorOptions"]


@options_class
class MonitorOptions(WrittenOptions):
    """Options of ``ActivationMonitor``: those of ``EAFOCallback`` that move nothing."""

    target_modules: str | Sequence[str] | None = same(Options, "target_modules", None)
    exclude_modules: str | Sequence[str] | None = same(Options, "exclude_modules", None)
    filter_fn: Callable[[nn.Module, str], bool] | None = same(Options, "filter_fn", None)
    functional: str = same(Options, "functional", "")
    update_every_n_steps: int = same(Options, "update_every_n_steps", 0)
    update_starting_at_step: int = same(Options, "update_starting_at_step", 0)
    collect_every_n_steps: int | None = same(Options, "collect_every_n_steps", None)
    samples_per_site: int = same(Options, "samples_per_site", 0)
    resolution: float = same(Options, "resolution", 0.0)


class ActivationMonitor(EAFOCallback):
    """Watches every activation of a model while it trains, and changes nothing.

    Outputs, gradients and ``state_dict`` are those of the model without it, bit for bit, and it adds no parameter::

        trainer = Trainer(callbacks=[ActivationMonitor()])

    Calls are watched, not modules: ``F.relu(x)`` too, and a ReLU that is used twice at each of its places. Entropy,
    dead units, flat parts, range and moments of every call go to the correction log, their means to the loggers. What
    is unusual goes to the column ``event`` and, in plain words, to Python's logger ``eafo_dynamic``. Of a call a few
    thousand numbers are kept from one round to the next.

    It is ``EAFOCallback(policy="observe")``, without the options that move corrections; see ``__init__``.

    Raises:
        ConfigError: if options cannot work; the message has each of them with its value and how to fix it.
    """

    @takes(MonitorOptions)
    def __init__(self, options: MonitorOptions) -> None:
        given = {name: getattr(options, name) for name in Described.of(MonitorOptions)}
        super().__init__(policy="observe", **given)
