"""The format of a source from the names of its files."""

from __future__ import annotations

from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.common import EXTENSIONS, Location, describe
from raypipe.sources.hub import DICT, INFO, SCHEME, STATE


def detect_format(settings: SourceSettings) -> str:
    """The name of the format. Lists the source; raises SourceError, saying what is there, when it is unclear."""
    if settings.uri.startswith("digits:"):
        return "digits"
    if settings.uri.startswith(SCHEME):
        return "huggingface"
    files = Location(settings).listing()
    names = {file.path for file in files}
    if DICT in names or {STATE, INFO} <= names:
        return "huggingface"
    counts = {format: sum(file.path.lower().endswith(endings) for file in files) for format, endings in EXTENSIONS.items()}
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
