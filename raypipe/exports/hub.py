"""Push an export in Hugging Face's format to the Hub."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

from raypipe import storage
from raypipe.errors import ConfigError, RunError
from raypipe.exports.huggingface import CARD_FILE

MARK = "raypipe.json"
"""File of a repository that records which export it holds. It is uploaded before any shard."""
_OWN_FILES = (".gitattributes", CARD_FILE)


def check_hub_client() -> None:
    """Raise ConfigError if the package datasets is not installed."""
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            "push_to needs the package datasets, which is not installed; pip install 'raypipe[hf]'"
        )


def push_export(to: str, name: str, fingerprint: str, *, force: bool = False) -> None:
    """Push a finished export to a dataset repository of the Hub, or resume a push.

    Uploaded shards are not uploaded again. A new repository is private.

    Parameters
    ----------
    to
        The folder of the export.
    name
        The repository, as user/name.
    fingerprint
        Hash of the exported rows.
    force
        Replace what the repository holds.

    Raises
    ------
    RunError
        If the repository holds something else, or the Hub refuses or cannot be reached.
    """
    import datasets
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
        _check_repository(api, name, fingerprint, force)
        data = datasets.load_from_disk(to)
        _upload(api, name, MARK, json.dumps({"raypipe_export": fingerprint}).encode())
        data.push_to_hub(name, split="train")
        # push_to_hub replaces the front matter: it adds the features and the files of the split
        pushed = huggingface_hub.DatasetCard.load(name)
        card = huggingface_hub.DatasetCard(storage.read_bytes(storage.join(to, CARD_FILE)).decode())
        added = {**pushed.data.to_dict(), **card.data.to_dict()}
        card.data = huggingface_hub.DatasetCardData(**added)
        _upload(api, name, CARD_FILE, str(card).encode())
    except RunError:
        raise
    except Exception as error:  # of the Hub's client, HTTP or the disk
        raise RunError(
            f"{name}: cannot be pushed to the Hugging Face Hub ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); log in with `hf auth login` or set HF_TOKEN, "
            f"and rerun. The export in {to} is complete"
        ) from error


def _check_repository(api: Any, name: str, fingerprint: str, force: bool) -> None:
    """Raise RunError if a repository holds anything but this export, unless `force` is set."""
    files = set(api.list_repo_files(name, repo_type="dataset"))
    if force or not files - set(_OWN_FILES):
        return
    if MARK in files:
        path = api.hf_hub_download(name, MARK, repo_type="dataset")
        if json.loads(storage.read_bytes(path)) == {"raypipe_export": fingerprint}:
            return
    raise RunError(
        f"{name}: the repository contains other files, such as {min(files - set(_OWN_FILES))}; "
        "give another name (--force replaces them)"
    )


def _upload(api: Any, name: str, file: str, content: bytes) -> None:
    api.upload_file(
        path_or_fileobj=content,
        path_in_repo=file,
        repo_id=name,
        repo_type="dataset",
        commit_message=f"Upload {file}",
    )
