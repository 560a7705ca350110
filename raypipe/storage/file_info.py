"""What a listing reports of one stored file."""

from __future__ import annotations

from typing import Any, NamedTuple

SYSTEM_FOLDERS = frozenset(
    {
        "@eaDir",  # thumbnails of a Synology NAS
        "#recycle",
        "$RECYCLE.BIN",
        "System Volume Information",
        "__MACOSX",  # of archives that were packed on macOS
        "_temporary",  # of a Spark job that is running or failed
    }
)
"""Names that systems give to what is not part of the data next to it."""


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
        or detail.get("blob_id")  # Hugging Face Hub
        or detail.get("mtime")
        or detail.get("LastModified")
        or ""
    )
    return FileInfo(path, int(detail.get("size") or 0), str(stamp).strip('"'))


def hidden(path: str) -> bool:
    """Return whether a file, or one of its parent folders, has a hidden name."""
    return any(map(hidden_name, path.split("/")))


def hidden_name(name: str) -> bool:
    """Return whether a name starts with a dot or is one of `SYSTEM_FOLDERS`."""
    return name.startswith(".") or name in SYSTEM_FOLDERS
