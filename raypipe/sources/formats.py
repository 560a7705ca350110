"""Which files belong to a format: by the ending of the name, otherwise by the first bytes.

Images without an ending, or with an unusual one, are images. To find them, the first `TRIES` files
of each unknown ending are opened. If one of them has the format, all files of that ending after it
are accepted; content that then cannot be read is a reject. All other files are left out, counted by
ending.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from raypipe.sources.tfrecords import is_header
from raypipe.storage import FileInfo
from raypipe.text import counted

IMAGE_EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".jfif",
    ".jpe",
)
EXTENSIONS = {
    "parquet": (".parquet",),
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    "mds": (".mds", ".mds.zstd", ".mds.gz", ".mds.bz2", ".mds.br", ".mds.snappy"),
    "tfrecord": (".tfrecord", ".tfrecords", ".tfrec", ".tfrecord.gz", ".tfrecords.gz"),
    "imagefolder": IMAGE_EXTENSIONS,
}
"""Format -> file name endings, compared without regard to case."""
NOUNS = {
    "parquet": "Parquet files",
    "webdataset": "tars",
    "mds": "MDS shards",
    "tfrecord": "TFRecord files",
    "imagefolder": "images",
}
"""Format -> what its files are called in messages."""
_LABEL_COLUMN = "a column, such as label (source.label_column)"
LABEL_PLACES = {
    "parquet": _LABEL_COLUMN,
    "huggingface": _LABEL_COLUMN,
    "lance": _LABEL_COLUMN,
    "mds": _LABEL_COLUMN,
    "tfrecord": "a feature, such as label (source.label_column)",
    "webdataset": "a member of each sample, .cls or .txt or a field of .json; not from the names "
    "of tars and folders",
    "imagefolder": "the folders in source.uri, one a class. Other layouts need a list of the "
    "images with their labels (format filelist)",
    "filelist": "the second column of the list, or the one called label (source.label_column)",
}
"""Format -> where its labels are read from."""
TRIES = 8
"""Files of an unknown ending that are opened before all of them are taken for something else."""
MAX_TRIES = 200
"""Files that are opened in all."""
HEAD_BYTES = 512

_SHARD_NUMBER = re.compile(r"-\d{5}-of-\d{5}$")
"""What TensorFlow appends to names of shards: data.tfrecord-00000-of-00128."""
_MAGIC = {
    "gzip": b"\x1f\x8b",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\0",
    "zstd": b"\x28\xb5\x2f\xfd",
    "zip": b"PK\x03\x04",
    "7z": b"7z\xbc\xaf\x27\x1c",
}
"""Compression -> the bytes that its files begin with."""
_COMPRESSED = re.compile(r"\.(gz|zstd|bz2|br|snappy)$", re.IGNORECASE)
_ENDING = re.compile(r"\.[a-z_][a-z0-9_]{0,7}")


class LeftOut(NamedTuple):
    """Files of one ending that belong to another format; `example` is the path of the first."""

    files: int
    example: str


class FormatFilter:
    """Tells the files of a format from others, in the order of a listing.

    Parameters
    ----------
    format : str
        A key of `EXTENSIONS`.
    head : callable
        Returns the first `HEAD_BYTES` of a file; b"" if it cannot be read.
    """

    def __init__(self, format: str, head: Callable[[FileInfo], bytes]) -> None:
        self._format, self._head = format, head
        self._accepted: set[str] = set()
        self._tries = Counter[str]()
        self._count, self._example = Counter[str](), dict[str, str]()

    def accepts(self, file: FileInfo) -> bool:
        """Return whether a file belongs to the format; count it as left out if not."""
        if has_ending(file.path, self._format):
            return True
        name = file.path.rpartition("/")[2]
        if self._format == "parquet" and name.startswith("_"):
            return False  # by convention no data: _SUCCESS, _metadata
        ending = ending_of(name)
        backup = has_ending(_BACKUP.sub("", name), self._format)
        if not backup and (ending in self._accepted or self._has_content(file, ending)):
            self._accepted.add(ending)
            return True
        self._count[ending] += 1
        self._example.setdefault(ending, file.path)
        return False

    def _has_content(self, file: FileInfo, ending: str) -> bool:
        if not file.size or self._tries[ending] >= TRIES or self._tries.total() >= MAX_TRIES:
            return False
        self._tries[ending] += 1
        return format_of(self._head(file)) == self._format

    @property
    def left_out(self) -> dict[str, LeftOut]:
        """The files that were not accepted, by ending ("" without one), most frequent first."""
        return {
            ending: LeftOut(count, self._example[ending])
            for ending, count in self._count.most_common()
        }


def has_ending(path: str, format: str) -> bool:
    """Return whether the ending of a name is that of a format; see `EXTENSIONS`."""
    return _SHARD_NUMBER.sub("", path.lower()).endswith(EXTENSIONS[format])


_BACKUP = re.compile(
    r"~$|\.(?:bak|backup|orig|old|tmp|temp|part|partial|crdownload|swp)$", re.IGNORECASE
)
"""What editors and downloads append to the name of a file: an earlier or an unfinished one."""
_COPY_MARK = re.compile(
    r"(?<=[^/])(?: \(\d+\)| - Copy(?: \(\d+\))?| copy(?: \d+)?| \((?:another |\d+\w\w )?copy\))"
    r"(?=(?:\.[^/. ]*)*$)"
)
"""What Windows, macOS, GNOME and browsers append to the name of a copy."""


def copied_name(path: str) -> str:
    """Return the path of the file that the name of a copy comes from; of others, the path."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + _COPY_MARK.sub("", name.removeprefix("Copy of "), count=1)


def uncompressed_name(path: str) -> str:
    """Return the name of a compressed file as it was before; that of any other file as it is."""
    if path.lower().endswith(".tgz"):
        return path[: -len(".tgz")] + ".tar"
    return _COMPRESSED.sub("", path)


def ending_of(name: str) -> str:
    """Return the ending of a file name in lower case; "" for none, as in `0001.0002`."""
    ending = os.path.splitext(name)[1].lower()
    return ending if _ENDING.fullmatch(ending) else ""


def format_of(head: bytes) -> str:
    """Return the format that the first bytes of a file show, or "".

    TIFF and BMP are not recognised: raw photographs look like TIFFs, and two bytes are too few.
    """
    if (
        head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a"))
        or head[:4] + head[8:12] == b"RIFFWEBP"
    ):
        return "imagefolder"
    if head.startswith(b"PAR1"):
        return "parquet"
    if head[257:262] == b"ustar":
        return "webdataset"
    return "tfrecord" if is_header(head) else ""


def compression_of(head: bytes) -> str:
    """Return the name of the compression that the first bytes of a file show, or ""."""
    return next((name for name, magic in _MAGIC.items() if head.startswith(magic)), "")


def describe_left_out(format: str, left_out: Mapping[str, LeftOut]) -> str:
    """Return a phrase such as "3 files (not images): 2 .txt (such as a.txt), 1 .json (...)"."""
    total = sum(item.files for item in left_out.values())
    listed = [
        f"{item.files:,} {ending or 'without an ending'} (such as {item.example})"
        for ending, item in list(left_out.items())[:4]
    ] + ["..."] * (len(left_out) > 4)
    return f"{counted(total, 'file')} (not {NOUNS[format]}): {', '.join(listed)}"
