"""List the files below a local folder in path order, without holding the whole listing in memory.

A folder is read in the order of its names. Only the names of the folders on the current path are
held, so a listing of millions of files needs little memory.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

from raypipe.storage.file_info import FileInfo, hidden_name

Retry = Callable[[Callable[[], Any]], Any]
"""Runs a storage request and repeats it after transient faults."""


def local_files(
    root: str,
    retry: Retry,
    enter: Callable[[str], bool] | None = None,
    with_hidden: bool = False,
) -> Iterator[FileInfo]:
    """Yield every file below a local folder; nothing if the folder does not exist.

    Links are followed, including links to folders, unless a link leads back to one of its own
    parent folders. A `lost+found` at the top, pipes, sockets and devices are left out, and so are
    hidden files and folders by default (`raypipe.storage.file_info.hidden`). A broken link is
    listed as a file of 0 bytes.

    Parameters
    ----------
    root : str
        Absolute path of the folder.
    retry : Retry
        Runs each request.
    enter : callable, optional
        Takes the relative path of a folder and returns whether to list it. Default: all folders.
    with_hidden : bool
        Whether hidden files and folders are listed.

    Raises
    ------
    OSError
        For a folder that cannot be read. The error names it.
    """
    names = functools.partial(_names, retry=retry, with_hidden=with_hidden)
    yield from _below(root, "", [], names, retry, enter or (lambda folder: True))


def local_folders(root: str, retry: Retry) -> list[str]:
    """Return the sorted names of the visible folders directly in a local folder. Raises OSError."""
    return [name[:-1] for name in _names(root, retry) if name.endswith("/")]


def local_matches(pattern: str, root: str, retry: Retry) -> Iterator[FileInfo]:
    """Yield the local files that match a glob. Raises OSError.

    Paths are relative to `root`, the part of the glob before its first wildcard. Only folders that
    match a part of the glob are listed.
    """
    parts = pattern.removeprefix(root.rstrip("/") + "/").split("/")
    files = local_files(root, retry, lambda folder: _can_contain(folder.split("/"), parts))
    return (file for file in files if _matches(file.path.split("/"), parts))


def _matches(names: list[str], parts: list[str]) -> bool:
    """Return whether the components of a path match the components of a glob."""
    if not parts or not names:
        return not parts and not names
    if parts[0] == "**":
        return len(parts) == 1 or any(
            _matches(names[start:], parts[1:]) for start in range(len(names))
        )
    return fnmatch.fnmatchcase(names[0], parts[0]) and _matches(names[1:], parts[1:])


def _can_contain(names: list[str], parts: list[str]) -> bool:
    """Return whether a file below the folder with these path components can match the glob."""
    if not parts or not names or parts[0] == "**":
        return bool(parts)
    return fnmatch.fnmatchcase(names[0], parts[0]) and _can_contain(names[1:], parts[1:])


def _below(
    folder: str,
    prefix: str,
    parents: list[tuple[int, int]],
    names_in: Callable[[str], list[str]],
    retry: Retry,
    enter: Callable[[str], bool],
) -> Iterator[FileInfo]:
    """Yield the files below `folder`; `parents` holds device and inode of the folders above it."""
    try:
        names = names_in(folder)
        status = os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return  # the folder does not exist, or it was deleted after its parent was read
    inode = (status.st_dev, status.st_ino)
    if inode in parents:
        return
    for name in names:
        path = f"{folder.rstrip('/')}/{name}"
        if not name.endswith("/"):
            with contextlib.suppress(FileNotFoundError):
                status = retry(functools.partial(_stat, path))
                if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                    size = status.st_size if stat.S_ISREG(status.st_mode) else 0
                    yield FileInfo(prefix + name, size, str(status.st_mtime))
        elif enter(prefix + name[:-1]) and not (name == "lost+found/" and not prefix):
            yield from _below(path[:-1], prefix + name, [*parents, inode], names_in, retry, enter)


def _names(folder: str, retry: Retry, with_hidden: bool = False) -> list[str]:
    """Return the names in a folder; folders end in a slash, so that they sort as whole paths do."""

    def read() -> list[str]:
        with os.scandir(folder) as entries:
            return [
                entry.name + "/" * _is_folder(entry)
                for entry in entries
                if with_hidden or not hidden_name(entry.name)
            ]

    return sorted(retry(read))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circular link
        return False


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError:
        return os.lstat(path)  # succeeds for a broken link; otherwise raises the same error again
