"""Entropy-based activation function optimisation (EAFO) while a model trains.

Attach one callback to a Lightning trainer, and every activation of the model follows its own data during training::

    from lightning.pytorch import Trainer
    from eafo_dynamic import EAFOCallback

    trainer = Trainer(callbacks=[EAFOCallback()])
    trainer.fit(model, data)

The idea is that of "A Method on Searching Better Activation Functions" (arXiv 2405.12954), made dynamic.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from eafo_dynamic.internals import renamed

if TYPE_CHECKING:
    from eafo_dynamic.apply.checkpoints import apply_from_checkpoint as apply_from_checkpoint
    from eafo_dynamic.apply.corrections import load_corrections as load_corrections
    from eafo_dynamic.apply.corrections import save_corrections as save_corrections
    from eafo_dynamic.apply.hub import push_to_hub as push_to_hub
    from eafo_dynamic.apply.merge import load_merged as load_merged
    from eafo_dynamic.apply.merge import merge as merge
    from eafo_dynamic.apply.merge import save_merged as save_merged
    from eafo_dynamic.apply.standalone import CorrectedActivation as CorrectedActivation
    from eafo_dynamic.apply.standalone import CRReLU as CRReLU
    from eafo_dynamic.apply.surgery import disabled as disabled
    from eafo_dynamic.apply.surgery import unwrap as unwrap
    from eafo_dynamic.apply.wrapping import wrap as wrap
    from eafo_dynamic.correction.bases import register_activation as register_activation
    from eafo_dynamic.entropy.metric import ActivationEntropy as ActivationEntropy
    from eafo_dynamic.errors import EAFOError as EAFOError
    from eafo_dynamic.experiments.search.searching import search as search
    from eafo_dynamic.find.sites import find_sites as find_sites
    from eafo_dynamic.internals.version import __version__ as __version__
    from eafo_dynamic.policy.controller import EAFOController as EAFOController
    from eafo_dynamic.records import CorrectionLog as CorrectionLog
    from eafo_dynamic.trainers.huggingface import EAFOTrainerCallback as EAFOTrainerCallback
    from eafo_dynamic.trainers.lightning.callback import EAFOCallback as EAFOCallback
    from eafo_dynamic.trainers.lightning.monitor import ActivationMonitor as ActivationMonitor
    from eafo_dynamic.trainers.optim import own_group as own_group

_HOMES = {
    "ActivationEntropy": "entropy.metric",
    "ActivationMonitor": "trainers.lightning.monitor",
    "CRReLU": "apply.standalone",
    "CorrectedActivation": "apply.standalone",
    "CorrectionLog": "records",
    "EAFOCallback": "trainers.lightning.callback",
    "EAFOController": "policy.controller",
    "EAFOError": "errors",
    "EAFOTrainerCallback": "trainers.huggingface",
    "__version__": "internals.version",
    "apply_from_checkpoint": "apply.checkpoints",
    "disabled": "apply.surgery",
    "find_sites": "find.sites",
    "load_corrections": "apply.corrections",
    "load_merged": "apply.merge",
    "merge": "apply.merge",
    "own_group": "trainers.optim",
    "push_to_hub": "apply.hub",
    "register_activation": "correction.bases",
    "save_corrections": "apply.corrections",
    "save_merged": "apply.merge",
    "search": "experiments.search.searching",
    "unwrap": "apply.surgery",
    "wrap": "apply.wrapping",
}

# not the one that needs transformers, so that `from eafo_dynamic import *` works without it
__all__ = [name for name in _HOMES if name != "EAFOTrainerCallback"]  # pyright: ignore[reportUnsupportedDunderAll]


renamed.install()


def __getattr__(name: str) -> Any:
    # importing the package must not import torch or lightning before one of them is needed
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
