"""What a listing reports of one stored file."""

from __future__ import annotations

from typing import Any, NamedTuple


class FileInfo(NamedTuple):
    """One stored file.

    Attributes
    ----------
    path : str
        Path relative to the listed folder.
    size : int
        Size in bytes.
    stamp : str
        ETag, or modification time where there is no ETag. Changes when the content changes.
    """

    path: str
    size: int
    stamp: str


def file_info(path: str, detail: dict[str, Any]) -> FileInfo:
    """Return a `FileInfo` from the details that fsspec reports for a file."""
    stamp = (
        detail.get("ETag")
        or detail.get("etag")
        or detail.get("mtime")
        or detail.get("LastModified")
        or ""
    )
    return FileInfo(path, int(detail.get("size") or 0), str(stamp).strip('"'))


def hidden(path: str) -> bool:
    """Return whether a file or one of its parent folders has a name that starts with a dot."""
    return path.startswith(".") or "/." in path
