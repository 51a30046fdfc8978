"""Corrections on the Hugging Face Hub, through ``huggingface_hub``."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from eafo_dynamic.apply.corrections import CARD_NAME, FILE_NAME, save_corrections
from eafo_dynamic.errors import SiteError, one_line
from eafo_dynamic.internals.hub import hub

__all__ = ["push_to_hub"]

_CARD_OF_REPOSITORY = "README.md"


def push_to_hub(
    model: nn.Module,
    repository: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Add corrections of activations",
) -> str:
    """Uploads the corrections of a model, with their card, to a repository of the Hugging Face Hub.

    The repository may be new, or that of a model or an adapter: nothing else of it is changed. Its card becomes theirs
    only where there is none. ``load_corrections(model, "hf://owner/name")`` fetches them.

    Args:
        model: wrapped.
        repository: ``owner/name``; it is made if it does not exist.
        private: whether a new one is private; None: as the account has it.
        token: of the Hub; None: the one of ``hf auth login``.
        message: of the commit.

    Returns:
        Address of the commit.

    Raises:
        SiteError: if the model has no corrections, or the Hub refuses.
    """
    package = hub()
    api = package.HfApi(token=token)
    with TemporaryDirectory() as folder:
        save_corrections(model, folder)
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            card = CARD_NAME
            if not api.file_exists(repository, _CARD_OF_REPOSITORY):
                card = _CARD_OF_REPOSITORY
            operations = [
                package.CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(Path(folder) / file))
                for name, file in ((FILE_NAME, FILE_NAME), (card, CARD_NAME))
            ]
            return str(api.create_commit(repository, operations=operations, commit_message=message))
        except Exception as error:
            raise SiteError(f"{repository} cannot be pushed to the Hub ({one_line(error)}).") from error
