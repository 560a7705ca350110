"""The lines of a file list: which table or text it is, which columns hold path and label, and each line's path and label.

How a list is read:

- `.csv` and `.tsv` are tables with the usual quotes. The delimiter of a `.tsv` is the tab, of a `.csv` the first of `,` `;` and tab
  that its first line has.
- Anything else is plain text, unless its first line has a tab (then it is read as a `.tsv`), or a comma right after an image's ending or
  after the name of a column (then as a `.csv`).
- The first row of a table is a header when none of its cells ends like an image file, and one is the name of the path or the label
  column or has such an ending below it. The columns are found by these names, in any case; where none is a usual name for
  paths, the column is taken that ends like an image file, else the first. Without a header, the path is first and the label second.
- A line of plain text is a path, white space and a label. A path may have spaces: the line is split after the last image ending that is
  followed by white space, and not at all where the line itself ends like an image file. Where there is no image ending,
  it is split at the last white space if a whole number follows. A line that cannot be split is a path without a label.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.common import IMAGE_EXTENSIONS
from raypipe.storage import Reader

PATH_COLUMNS = ("path", "file", "filename", "image")
LABEL_COLUMNS = ("label", "class", "category", "target")
"""Tried in this order where the settings name no other column."""
READ_BYTES = 4 << 20

_ENDINGS = "|".join(extension.removeprefix(".") for extension in IMAGE_EXTENSIONS)
_IMAGE = re.compile(rf".*\.(?:{_ENDINGS})", re.IGNORECASE | re.DOTALL)
_IMAGE_AND_LABEL = re.compile(rf"(.*\.(?:{_ENDINGS}))\s+(\S.*)", re.IGNORECASE | re.DOTALL)
_ANYTHING_AND_NUMBER = re.compile(r"(.*\S)\s+([+-]?[0-9]+)", re.DOTALL)
_IMAGE_AND_COMMA = re.compile(rf'[^,]*\.(?:{_ENDINGS})"?\s*,', re.IGNORECASE)


class Line(NamedTuple):
    """number: of its last line in the list, from 1; path "" where it has none; label None where it has none."""

    number: int
    path: str
    label: str | None


def lines(uri: str, settings: SourceSettings) -> Iterator[Line]:
    """The lines of a list that are not blank. Raises SourceError where it cannot be understood, and storage faults."""
    with storage.open_read(uri, READ_BYTES) as stored:
        encoding = (
            "utf-16"
            if stored.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            else "utf-8-sig"
        )
        stored.seek(0)
        # bytes that are no text are shown escaped: the file will not be found, and the reject says under which name
        blocks: Any = _Blocks(stored)
        file = io.TextIOWrapper(blocks, encoding, errors="backslashreplace", newline="")
        first = ""
        while not first.strip() and (line := file.readline(1 << 16)):
            first = line
        file.seek(0)
        delimiter = _delimiter(storage.name(uri), first.strip("\r\n"), settings)
        if not delimiter:
            yield from _of_text(file)
            return
        rows = csv.reader(file, delimiter=delimiter)
        try:
            yield from _of_table(uri, rows, settings)
        except csv.Error as error:
            raise SourceError(
                f"{uri}: line {rows.line_num}: {error}; is a quote not closed?"
            ) from None


class _Blocks(io.BufferedIOBase):
    """A stored file read in large pieces: text is decoded from 8 KiB at a time, which would be a request each."""

    def __init__(self, file: Reader) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read1(self, size: int = -1) -> bytes:
        return self._file.read(READ_BYTES)


def _delimiter(name: str, first: str, settings: SourceSettings) -> str:
    """Of a table; "" for plain text."""
    ending = name.lower().rpartition(".")[2]
    if ending == "tsv":
        return "\t"
    if ending == "csv":
        return next((mark for mark in ",;\t" if mark in first), ",")
    if "\t" in first:
        return "\t"
    cells = next(csv.reader([first]), [])
    return (
        ","
        if _IMAGE_AND_COMMA.match(first) or (len(cells) > 1 and _is_header(cells, [], settings))
        else ""
    )


def _of_text(file: Iterable[str]) -> Iterator[Line]:
    for number, line in enumerate(file, 1):
        line = line.strip()
        if not line:
            continue
        if _IMAGE.fullmatch(line):
            yield Line(number, line, None)
        elif found := _IMAGE_AND_LABEL.fullmatch(line) or _ANYTHING_AND_NUMBER.fullmatch(line):
            yield Line(number, found[1], found[2])
        else:
            yield Line(number, line, None)


def _of_table(uri: str, rows: Any, settings: SourceSettings) -> Iterator[Line]:
    filled = ((rows.line_num, row) for row in rows if any(cell.strip() for cell in row))
    start = list(itertools.islice(filled, 2))
    path, label = _columns(uri, [row for _, row in start], settings)
    headless = path < 0
    for number, row in itertools.chain(start if headless else start[1:], filled):
        yield _line(number, row, *((0, 1) if headless else (path, label)))


def _line(number: int, row: list[str], path: int, label: int) -> Line:
    words = row[label].strip() if 0 <= label < len(row) else ""
    return Line(number, row[path].strip() if path < len(row) else "", words or None)


def _columns(uri: str, start: list[list[str]], settings: SourceSettings) -> tuple[int, int]:
    """Columns of path and label, the label's -1 where there is none; (-1, -1) where the first row is no header."""
    header, below = (
        [cell.strip() for cell in start[0]] if start else [],
        start[1] if len(start) > 1 else [],
    )
    if not _is_header(header, below, settings):
        if settings.path_column is not None:
            raise SourceError(
                f"{uri}: no column {settings.path_column!r} in its first line, {', '.join(header)!r}; see source.path_column"
            )
        return -1, -1
    if settings.path_column is not None:
        path = _place(header, (settings.path_column,))
        if path < 0:
            raise SourceError(
                f"{uri}: no column {settings.path_column!r} among {', '.join(header)}; set source.path_column"
            )
    else:
        path = _place(header, PATH_COLUMNS)
        path = (
            path
            if path >= 0
            else next(
                (column for column, cell in enumerate(below) if _IMAGE.fullmatch(cell.strip())), 0
            )
        )
    if settings.label_column is None:
        return path, -1
    label = _place(header, _label_names(settings))
    if label < 0 and len(header) > 1:
        raise SourceError(
            f"{uri}: no column {_label_names(settings)[0]!r} among {', '.join(header)}; set source.label_column"
        )
    return path, label


def _is_header(row: list[str], below: list[str], settings: SourceSettings) -> bool:
    cells = [cell.strip() for cell in row]
    if any(_IMAGE.fullmatch(cell) for cell in cells):
        return False
    paths = PATH_COLUMNS if settings.path_column is None else (settings.path_column,)
    return _place(cells, (*paths, *_label_names(settings))) >= 0 or any(
        _IMAGE.fullmatch(cell.strip()) for cell in below
    )


def _label_names(settings: SourceSettings) -> tuple[str, ...]:
    wanted = settings.label_column
    return LABEL_COLUMNS if wanted is None or wanted in ("auto", LABEL_COLUMNS[0]) else (wanted,)


def _place(header: list[str], names: tuple[str, ...]) -> int:
    """Where the first column is that has one of these names, or else has it in any case; -1 where there is none."""
    lowered = [cell.lower() for cell in header]
    for name in names:
        if name in header:
            return header.index(name)
        if name.lower() in lowered:
            return lowered.index(name.lower())
    return -1
