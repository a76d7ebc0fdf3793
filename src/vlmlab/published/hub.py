"""A folder goes to a hub, where that was asked for."""

from __future__ import annotations

from pathlib import Path

from vlmlab.contracts.errors import UserError, reason


def push(folder: Path, repo: str, endpoint: str | None = None) -> str:
    """Upload a folder as a private repository, by the user's own token; one that is there keeps who may see it.

    Args:
        folder: what ``export`` has written.
        repo: owner and name.
        endpoint: of the hub; None: the usual one.

    Returns:
        Where it is.

    Raises:
        UserError: the hub is out of reach or refuses; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint)
    try:
        made = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Exportable by vlmlab export")
    except Exception as error:  # of the network, of the hub, or of the name, each with classes of its own
        raise UserError(
            f"hub={repo} cannot be written ({reason(error)}); the folder is whole, and `hf upload` pushes it later."
        ) from error
    return str(made)
