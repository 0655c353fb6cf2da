"""An exported folder to the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

from fastft.common.errors import UserError

_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def check_id(repo_id: str) -> None:
    """Refuses what is no id of a repository, before anything is written.

    Raises:
        UserError: it is none.
    """
    if not _ID.fullmatch(repo_id):
        raise UserError(f"got --push {repo_id}, expected OWNER/NAME: letters, digits, - _ and .")


def push(folder: Path, names: Sequence[str], repo_id: str) -> str:
    """Puts files of a folder into a model's repository, which is made as a private one where there is none.

    Returns:
        The address of what was written there.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo_id, exist_ok=True, private=True)
        said = api.upload_folder(
            folder_path=folder, repo_id=repo_id, allow_patterns=list(names), commit_message="Export of fastft"
        )
    except Exception as error:  # the hub's own errors and its HTTP library's: all mean that nothing was published
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"the export is in {folder}, but it could not be pushed to {repo_id} ({type(error).__name__}: {reason}); "
            "`hf auth login` or HF_TOKEN lets you write there, and `hf upload` sends the folder"
        ) from error
    return str(said)
