"""The format of a source from the names of its files."""

from __future__ import annotations

import itertools

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.common import EXTENSIONS, Location, describe
from raypipe.sources.hub import DICT, INFO, SCHEME, STATE
from raypipe.sources.lines import lines
from raypipe.sources.places import ENDINGS, places_list

MOST_FILES = 20_000
"""Names that are looked at: a listing of millions is not made twice."""


def detect_format(settings: SourceSettings) -> str:
    """The name of the format, from the first `MOST_FILES` files. Raises SourceError, saying what is there, when it is unclear."""
    scheme, colon, _ = settings.uri.partition(":")
    if colon and scheme in {"digits", "torchvision", "synthetic"}:
        return scheme
    if settings.uri.startswith(SCHEME):
        return "huggingface"
    if _lists_images(settings) or places_list(settings.uri) is not None:
        return "filelist"
    files = list(itertools.islice(Location(settings).stream(), MOST_FILES))
    names = {file.path for file in files}
    if DICT in names or {STATE, INFO} <= names:
        return "huggingface"
    counts = {
        format: sum(file.path.lower().endswith(endings) for file in files)
        for format, endings in EXTENSIONS.items()
    }
    found = [format for format, count in counts.items() if count]
    if len(found) == 1:
        return found[0]
    if not found:
        raise SourceError(
            f"{settings.uri}: cannot tell the format: no Parquet, tar or image file among {describe(files)}; "
            "check source.uri and source.include, or set source.format"
        )
    raise SourceError(
        f"{settings.uri}: cannot tell the format: there is {' and '.join(found)} among {describe(files)}; "
        "set source.format, or narrow source.include"
    )


def _lists_images(settings: SourceSettings) -> bool:
    """Whether the source is a file list, and not one of shards."""
    if not settings.uri.lower().endswith(ENDINGS) or not storage.is_file(settings.uri):
        return False
    shards = (*EXTENSIONS["parquet"], *EXTENSIONS["webdataset"])
    return not any(
        line.path.lower().endswith(shards)
        for line in itertools.islice(lines(settings.uri, settings), 10)
    )
