"""List folders and match globs, on a local disk and in object stores."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from raypipe.storage.faults import retrying
from raypipe.storage.file_info import FileInfo, file_info, hidden
from raypipe.storage.local_listing import local_files, local_folders, local_matches
from raypipe.storage.places import filesystem, name
from raypipe.storage.remote_listing import stored_files, stored_folders


def walk(uri: str, with_hidden: bool = False) -> Iterator[FileInfo]:
    """Yield all files below a folder in path order; nothing if the folder does not exist.

    Local links are followed. Hidden files are left out by default. Several parts of an object store
    are listed in parallel.

    Raises
    ------
    OSError
        For a local folder that cannot be read. The error names it.
    """
    fs, path = filesystem(uri)
    retry = functools.partial(retrying, what=uri)
    if isinstance(fs, LocalFileSystem):
        return local_files(path, retry, with_hidden=with_hidden)
    return stored_files(fs, path, retry, with_hidden)


def listing(uri: str) -> list[FileInfo]:
    """Return `walk` as a list. For folders that are known to hold few files."""
    return list(walk(uri))


def folders(uri: str) -> list[str]:
    """Return the sorted names of the visible folders directly in a folder.

    Of an object store, only those among the first 1,000 entries are returned.
    """
    fs, path = filesystem(uri)
    retry = functools.partial(retrying, what=uri)
    try:
        if isinstance(fs, LocalFileSystem):
            return local_folders(path, retry)
        return stored_folders(fs, path, retry)
    except (FileNotFoundError, NotADirectoryError):
        return []


def names(uri: str) -> set[str]:
    """Return the names of the visible files directly in a folder; empty if it does not exist."""
    fs, path = filesystem(uri)
    try:
        paths = retrying(lambda: fs.ls(path, detail=False), uri)
    except (FileNotFoundError, NotADirectoryError):
        return set()
    return {base for base in map(name, paths) if not base.startswith(".")}


def entries(uri: str) -> dict[str, FileInfo | None]:
    """Return everything directly in a folder by name, hidden files included; folders as None.

    Empty if the folder does not exist.
    """
    fs, path = filesystem(uri)
    try:
        details = retrying(lambda: fs.ls(path, detail=True), uri)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    result: dict[str, FileInfo | None] = {}
    for detail in details:
        full = detail["name"].rstrip("/")
        kind = _target_type(full) if detail.get("islink") else detail["type"]
        if full != path.rstrip("/") and kind is not None:
            result[name(full)] = None if kind == "directory" else file_info(name(full), detail)
    return result


def _target_type(link: str) -> str | None:
    """Return what a local link leads to, which a listing does not report; None if it is broken."""
    if os.path.isdir(link):
        return "directory"
    return "file" if os.path.exists(link) else None


def glob_root(uri: str) -> str:
    """Return the part of a glob before its first wildcard, up to a slash; `uri` if it has none."""
    wildcard = min((position for position in map(uri.find, "*?[") if position >= 0), default=-1)
    if wildcard < 0:
        return uri
    return uri[:wildcard].rpartition("/")[0] or ("/" if uri.startswith("/") else ".")


def matching(uri: str) -> list[FileInfo]:
    """Return the visible files that match a glob, sorted, with paths relative to `glob_root`.

    A glob has `*`, `?`, `[...]`, and `**` for any depth.
    """
    fs, path = filesystem(uri)
    root = filesystem(glob_root(uri))[1]
    if isinstance(fs, LocalFileSystem):
        return list(local_matches(path, root, functools.partial(retrying, what=uri)))
    root = root.rstrip("/") + "/"
    details: dict[str, dict[str, Any]] = retrying(lambda: fs.glob(path, detail=True), uri)
    files = [
        file_info(full.removeprefix(root), detail)
        for full, detail in details.items()
        if detail["type"] == "file" and not full.endswith("/")
    ]
    return sorted(file for file in files if not hidden(file.path))
