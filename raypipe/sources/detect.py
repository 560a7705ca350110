"""Determine the format of a source (`source.format: auto`).

The names of its files decide. If none has a known ending, the first bytes of a few files do.
"""

from __future__ import annotations

import itertools

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.formats import EXTENSIONS, TRIES, format_of, has_ending
from raypipe.sources.hub import INFO_FILE, SCHEME, SPLITS_FILE, STATE_FILE
from raypipe.sources.lance import is_lance
from raypipe.sources.lines import read_lines
from raypipe.sources.location import Location, describe
from raypipe.sources.mds import INDEX_FILE
from raypipe.sources.places365 import LIST_EXTENSIONS, training_list

MAX_FILES = 20_000
"""File names that are examined, so that a listing of millions is not made twice."""


_REMEDIES = {
    (".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar"): "unpack the archives",
    (INDEX_FILE, STATE_FILE, INFO_FILE): "set source.uri to the folder of the dataset",
    (".jsonl", ".json", ".ndjson", ".xlsx", ".xls"): "write a list of images as CSV with the "
    "columns path and label",
    (".lance", ".manifest", ".txn"): "if it is a Lance dataset, set source.format to lance",
    (
        ".arrow",
        ".feather",
        ".h5",
        ".hdf5",
        ".npz",
        ".npy",
        ".mdb",
        ".beton",
        ".rec",
        ".pkl",
    ): "write the samples as Parquet, tars or another format that is read",
}
"""Endings of names -> what to do with such files."""
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Names of the file in which Hugging Face's image folders hold labels and captions."""


def detect_format(settings: SourceSettings) -> str:
    """Return the name of the format, from the first `MAX_FILES` files.

    Raises
    ------
    SourceError
        If the format is not clear; the message lists what kinds of files there are.
    """
    scheme, colon, _ = settings.uri.partition(":")
    if colon and scheme in {"digits", "torchvision", "synthetic"}:
        return scheme
    if settings.uri.startswith(SCHEME):
        return "huggingface"
    if is_lance(settings.uri):
        return "lance"
    if _is_image_list(settings) or training_list(settings.uri) is not None:
        return "filelist"
    location = Location(settings)
    files = list(itertools.islice(location.stream(), MAX_FILES))
    names = {file.path for file in files}
    if SPLITS_FILE in names or {STATE_FILE, INFO_FILE} <= names:
        return "huggingface"
    _refuse_metadata(settings.uri, names)
    formats = [
        format for format in EXTENSIONS if any(has_ending(file.path, format) for file in files)
    ]
    if not formats:
        shown = {format_of(location.head(file)) for file in files[:TRIES]} - {""}
        formats = sorted(shown)
    if len(formats) == 1:
        return formats[0]
    if not formats:
        raise SourceError(
            f"{settings.uri}: cannot determine the format: no Parquet, tar, TFRecord, MDS or image "
            f"file among {describe(files)}; {_remedy(names)}"
        )
    raise SourceError(
        f"{settings.uri}: cannot determine the format: found {' and '.join(formats)} among "
        f"{describe(files)}; set source.format, or narrow source.include"
    )


def _remedy(names: set[str]) -> str:
    """Return what to do with files of none of the formats, by the first that is known."""
    for name in sorted(names):
        last = name.rpartition("/")[2].lower()
        for endings, remedy in _REMEDIES.items():
            if last.endswith(endings):
                return remedy
    return "check source.uri and source.include, or set source.format"


def _is_image_list(settings: SourceSettings) -> bool:
    """Whether the source is a list of images, not a list of shards."""
    if not settings.uri.lower().endswith(LIST_EXTENSIONS) or not storage.is_file(settings.uri):
        return False
    shards = tuple(
        ending
        for format, endings in EXTENSIONS.items()
        if format != "imagefolder"
        for ending in endings
    )
    return not any(
        line.path.lower().endswith(shards)
        for line in itertools.islice(read_lines(settings.uri, settings), 10)
    )


def _refuse_metadata(uri: str, names: set[str]) -> None:
    """Raise SourceError for images next to a table about them, which nobody would read."""
    tables = [name for name in names if name.rpartition("/")[2] in METADATA]
    table = min(tables, key=lambda name: (name.count("/"), name), default=None)
    images = EXTENSIONS["imagefolder"]
    if table is None or not any(name.lower().endswith(images) for name in names):
        return
    found = f"{uri.rstrip('/')}/{table}"
    use = (
        f"set source.uri to {found}, with source.format filelist"
        if table.endswith(".csv")
        else f"write {table} as CSV (file_name, label) and set source.uri to that file"
    )
    raise SourceError(
        f"{uri}: {table} describes the images next to it. To read labels from it, {use}; to take "
        "folders as classes and ignore it, set source.format to imagefolder"
    )
