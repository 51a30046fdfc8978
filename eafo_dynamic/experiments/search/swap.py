"""Callbacks that make a candidate of a model: other activations, another learning rate."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from eafo_dynamic.errors import SiteError
from eafo_dynamic.experiments.search.candidates import make_base
from eafo_dynamic.find.sites import find_sites

__all__ = ["ScaleRate", "SwapActivations", "swap_activations"]


class SwapActivations(Callback):
    """Gives a model another activation in place of its own, before training begins.

    It must stand before an EAFOCallback. Modules of the families of ReLU, GELU, SiLU, Mish and ELU are replaced; calls
    of functions, such as F.relu(x), cannot be.

    Args:
        base: name of the activation.
    """

    def __init__(self, base: str) -> None:
        self.base = base
        make_base(base)  # an unknown name is an error here

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replaces the activations, once."""
        if not getattr(pl_module, "_eafo_swapped", False):
            swap_activations(pl_module, self.base)
            pl_module._eafo_swapped = True  # type: ignore[assignment]


def swap_activations(model: nn.Module, base: str) -> list[str]:
    """Replaces the activation modules of a model.

    Args:
        model: changed in place. A module that stands at several places is replaced by one at all of them.
        base: name of the activation.

    Returns:
        Names of the modules that were replaced.

    Raises:
        SiteError: if there is none.
    """
    names = {site.module for site in find_sites(model).wrapped}
    old = {id(model.get_submodule(name)) for name in names}
    new: dict[int, nn.Module] = {}
    replaced: list[str] = []
    for path, parent in list(model.named_modules(remove_duplicate=False)):
        for name, child in list(parent.named_children()):
            if id(child) not in old:
                continue
            module = new.setdefault(id(child), make_base(base))
            module.train(child.training)
            for tensor in (*parent.parameters(), *parent.buffers()):
                module.to(tensor.device)
                break
            setattr(parent, name, module)
            replaced.append(f"{path}.{name}".lstrip("."))
    if not replaced:
        raise SiteError(
            f"base={base!r}: the model has no activation module that could be replaced. Use modules such as nn.ReLU() "
            "in place of functions, or search over corrections alone: bases: [own]."
        )
    return replaced


class ScaleRate(Callback):
    """Multiplies all learning rates, also those that schedulers start from.

    Args:
        rate: the factor.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Changes optimisers and schedulers."""
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for key in ("lr", "initial_lr", "max_lr", "min_lr"):
                    if key in group:
                        group[key] *= self.rate
        for config in trainer.lr_scheduler_configs:
            if hasattr(config.scheduler, "base_lrs"):
                config.scheduler.base_lrs = [self.rate * lr for lr in config.scheduler.base_lrs]
