"""Push an export in Hugging Face's format to the Hub."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raypipe import storage
from raypipe.errors import ConfigError, RunError
from raypipe.exports.huggingface import CARD_FILE

MARK = "raypipe.json"
"""File of a repository that records which export it holds, and whether all of it is there. It is
uploaded before any shard, so that a push that was interrupted can be repeated, and again at the
end."""
_OWN_FILES = (".gitattributes", CARD_FILE)


def check_hub_client() -> None:
    """Raise ConfigError if the package datasets is not installed."""
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            "push_to needs the package datasets, which is not installed; pip install 'raypipe[hf]'"
        )


def check_hub(name: str, fingerprint: str, *, force: bool = False) -> None:
    """Check that an export can be pushed, before it is written. Takes the arguments of the push.

    Raises
    ------
    RunError
        If the Hub cannot be reached, there is no token that can write, or the repository exists
        and holds something else.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with _errors_of_hub(name, "Nothing was exported"):
        token = api.whoami().get("auth", {}).get("accessToken", {})
        if token.get("role") == "read":
            raise RunError(
                f"{name}: cannot be pushed to the Hugging Face Hub: the token "
                f"{token.get('displayName', '')!r} can only read; log in with one that can write"
            )
        if api.repo_exists(name, repo_type="dataset"):
            _check_repository(api, name, fingerprint, force)


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
        Push to a repository that holds something else. Its split `train` and its card are replaced;
        other files stay.

    Raises
    ------
    RunError
        If the repository holds something else, or the Hub refuses or cannot be reached.
    """
    import datasets
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with _errors_of_hub(name, f"The export in {to} is complete"):
        api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
        _check_repository(api, name, fingerprint, force)
        data = datasets.load_from_disk(to)
        _upload_mark(api, name, fingerprint, complete=False)
        data.push_to_hub(name, split="train")
        # push_to_hub replaces the front matter: it adds the features and the files of the split
        pushed = huggingface_hub.DatasetCard.load(name)
        card = huggingface_hub.DatasetCard(storage.read_bytes(storage.join(to, CARD_FILE)).decode())
        added = {**pushed.data.to_dict(), **card.data.to_dict()}
        card.data = huggingface_hub.DatasetCardData(**added)
        _upload(api, name, CARD_FILE, str(card).encode())
        _upload_mark(api, name, fingerprint, complete=True)


@contextmanager
def _errors_of_hub(name: str, state: str) -> Iterator[None]:
    """Turn errors of the Hub's client, HTTP or the disk into a RunError of one line."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        yield
    except RunError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        denied = isinstance(error, LocalTokenNotFoundError) or status in (401, 403)
        remedy = (
            "log in with `hf auth login` or set HF_TOKEN, with a token that can write there, and "
            "rerun"
            if denied
            else "rerun to try again"
        )
        raise RunError(
            f"{name}: cannot be pushed to the Hugging Face Hub ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); {remedy}. {state}"
        ) from error


def _check_repository(api: Any, name: str, fingerprint: str, force: bool) -> None:
    """Raise RunError if a repository holds anything but this export, unless `force` is set."""
    files = set(api.list_repo_files(name, repo_type="dataset"))
    if force or not files - set(_OWN_FILES):
        return
    if MARK in files:
        path = api.hf_hub_download(name, MARK, repo_type="dataset")
        if _marked(storage.read_bytes(path)) == fingerprint:
            return
    raise RunError(
        f"{name}: the repository contains other files, such as {min(files - set(_OWN_FILES))}; "
        "give another name (--force pushes to it: the split train and the card are replaced, "
        "other files stay)"
    )


def _marked(mark: bytes) -> str | None:
    """Return the fingerprint in the content of `MARK`; None if it is not such a file."""
    try:
        content = json.loads(mark)
    except ValueError:
        return None
    return content.get("raypipe_export") if isinstance(content, dict) else None


def _upload_mark(api: Any, name: str, fingerprint: str, *, complete: bool) -> None:
    mark = {"raypipe_export": fingerprint, "complete": complete}
    _upload(api, name, MARK, json.dumps(mark).encode())


def _upload(api: Any, name: str, file: str, content: bytes) -> None:
    api.upload_file(
        path_or_fileobj=content,
        path_in_repo=file,
        repo_id=name,
        repo_type="dataset",
        commit_message=f"Upload {file}",
    )
