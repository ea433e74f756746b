"""Domains to and from repositories of the Hugging Face Hub."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_da3.errors import CheckpointError, DomainError
from lightning_da3.files.domain_file import read_domain
from lightning_da3.files.folder import SUFFIX, DomainFolder
from lightning_da3.files.names import check_name
from lightning_da3.files.writing import replacing

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def push_domain(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    api: HfApi | None = None,
) -> str:
    """Upload a domain file, which is checked first, into a model repository.

    Args:
        path: A file that `save_domain` wrote.
        repo_id: ``"user/repository"``; made if it is missing.
        private: Whether a new repository is; None: as the account has it.
        api: Knows the server and the token; by default `HfApi()`, which reads them from the
            environment or from what ``hf auth login`` stored.

    Returns:
        The domain's name; its file in the repository is ``<name>.safetensors``.

    Raises:
        CheckpointError: The file is damaged or foreign, or the server refused it.
    """
    name = read_domain(path).metadata.get("domain")
    try:
        check_name(name)
        api = api or _default_api()
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_file(
            path_or_fileobj=Path(path),
            path_in_repo=f"{name}{SUFFIX}",
            repo_id=repo_id,
            commit_message=f"Domain {name}",
        )
    except (DomainError, OSError, ValueError) as error:  # those of the server are OSErrors
        raise CheckpointError(
            f"Cannot push the domain file {str(path)!r} to {repo_id!r}: {error}"
        ) from error
    return str(name)


def pull_domain(
    repo_id: str,
    name: str,
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    api: HfApi | None = None,
) -> Path:
    """Download a domain file, check it, and put it into a folder, whole or not at all.

    Args:
        repo_id: ``"user/repository"``.
        name: The domain's name.
        folder: Where `DomainFolder` or `load_domain` will find it.
        revision: Branch, tag or commit; None: the main branch.
        api: As for `push_domain`.

    Returns:
        The path of ``<folder>/<name>.safetensors``. A file that was there is replaced.

    Raises:
        DomainError: The name is ill-formed, or differs from another in `folder` by case alone.
        CheckpointError: The server has no such file, or it is damaged or foreign; a file that was
            there stays.
    """
    target = DomainFolder(folder)
    path = target.place(name)
    try:
        api = api or _default_api()
        downloaded = api.hf_hub_download(repo_id, path.name, revision=revision)
        read_domain(downloaded)
        target.make()
        with replacing(path) as temporary:
            shutil.copyfile(downloaded, temporary)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"Cannot pull the domain {name!r} from {repo_id!r}: {error}"
        ) from error
    return path


def _default_api() -> HfApi:
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "huggingface_hub is not installed: pip install 'lightning-da3[hub]'."
        ) from error
    return HfApi()
