"""The test results of a training beside those of the same training without corrections."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI

from eafo_dynamic.errors import EAFOError
from eafo_dynamic.experiments.configured import AGAINST_PLAIN

__all__ = ["check_comparable", "seed_of_both", "side_by_side", "test_results"]


def check_comparable(arguments: Sequence[str]) -> None:
    """Refuses what cannot be trained a second time without corrections.

    Args:
        arguments: of the command line, the command first.

    Raises:
        EAFOError: if the command is not fit, or goes on from a checkpoint.
    """
    if arguments[:1] != ["fit"]:
        raise EAFOError(f"{AGAINST_PLAIN} is an option of fit, not of {' '.join(arguments[:1])}.")
    if any(each.partition("=")[0] == "--ckpt_path" for each in arguments):
        raise EAFOError(f"{AGAINST_PLAIN} trains both models from the start. Leave --ckpt_path out.")


def seed_of_both() -> str:
    """The seed of the training that has just ended, which the next one has too.

    Returns:
        The seed.

    Raises:
        EAFOError: if there was none.
    """
    seed = os.environ.get("PL_GLOBAL_SEED")  # where Lightning keeps it
    if seed is None:
        raise EAFOError(f"{AGAINST_PLAIN} needs a seed, so that both models start alike. Add --seed_everything 0")
    return seed


def test_results(cli: LightningCLI) -> dict[str, float]:
    """Tests the model as training has left it.

    Args:
        cli: after its fit.

    Returns:
        The metrics by name.

    Raises:
        EAFOError: if the model has no ``test_step``.
    """
    if type(cli.model).test_step is LightningModule.test_step:
        raise EAFOError(f"{AGAINST_PLAIN} compares test results, and {type(cli.model).__name__} has no test_step.")
    found = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    return {name: float(value) for results in found for name, value in results.items()}


def side_by_side(corrected: Mapping[str, float], plain: Mapping[str, float], seed: str) -> list[str]:
    """Both results as a table for the terminal.

    Args:
        corrected: metrics of the model with corrections.
        plain: of the one without.
        seed: of both.

    Returns:
        Lines.
    """
    names = [name for name in corrected if name in plain]
    width = max(map(len, names), default=0)
    lines = [f"  {name:<{width}}  {corrected[name]:>10.4g}  {plain[name]:>10.4g}" for name in names]
    return [
        f"EAFO: on the test data, with seed {seed}:",
        f"  {'':<{width}}  {'corrected':>10}  {'plain':>10}",
        *lines,
        "  One seed says little; eafo-dynamic compare trains with several, and gives intervals.",
    ]
