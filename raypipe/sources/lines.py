"""Parse a file list: is it a table or text, and what are the path and label of each line.

A list is parsed as follows:

- `.csv` and `.tsv` are tables. The delimiter of a `.tsv` is the tab; that of a `.csv` is the first
  of `,` `;` and tab that its first line has. A `.csv` has the usual quotes, but a quoted cell must
  not hold a line end: an open quote would swallow the lines that follow. In a `.tsv` a quotation
  mark is a letter like any other.
- Anything else is plain text, unless its first line has a tab (then it is read as a `.tsv`), or a
  comma right after an image's ending or after the name of a column (then as a `.csv`).
- The first row of a table is a header if none of its cells ends like an image file, and one is the
  name of the path or label column or has such an ending below it. The columns are found by these
  names, without regard to case; if no column has a usual name for paths, the one that ends like an
  image file is taken, else the first. Without a header, the path is first and the label second.
  Lines of several splits by a column `split` are refused.
- A line of plain text is a path, white space and a label. Paths can have spaces: the line is split
  after the last image ending that is followed by white space, and not at all if the line itself
  ends like an image file. Without an image ending, it is split at the last white space if a whole
  number follows. A line that cannot be split is a path without a label.
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
from raypipe.sources.formats import IMAGE_EXTENSIONS
from raypipe.sources.splits import SPLIT_ALIASES, SPLIT_COLUMN, split_of_value
from raypipe.storage import Reader

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")
LABEL_COLUMNS = ("label", "class", "category", "target")
"""Usual column names, tried in this order unless the settings name a column."""
READ_BYTES = 4 << 20

_ENDINGS = "|".join(extension.removeprefix(".") for extension in IMAGE_EXTENSIONS)
_IMAGE = re.compile(rf".*\.(?:{_ENDINGS})", re.IGNORECASE | re.DOTALL)
_IMAGE_AND_LABEL = re.compile(rf"(.*\.(?:{_ENDINGS}))\s+(\S.*)", re.IGNORECASE | re.DOTALL)
_ANYTHING_AND_NUMBER = re.compile(r"(.*\S)\s+([+-]?[0-9]+)", re.DOTALL)
_JSON = re.compile(r'\s*([{[]\s*$|{"|\[[{"])')
_IMAGE_AND_COMMA = re.compile(rf'[^,]*\.(?:{_ENDINGS})"?\s*,', re.IGNORECASE)


class Line(NamedTuple):
    """One entry of a list.

    Attributes
    ----------
    number : int
        Number of the line in the file, from 1.
    path : str
        "" if the line has none.
    label : str or None
        None if the line has none.
    """

    number: int
    path: str
    label: str | None


def read_lines(uri: str, settings: SourceSettings) -> Iterator[Line]:
    """Yield the lines of a list that are not blank.

    Raises
    ------
    SourceError
        If the list cannot be parsed. Storage faults raise as well.
    """
    with storage.open_read(uri, READ_BYTES) as stored:
        encoding = (
            "utf-16"
            if stored.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            else "utf-8-sig"
        )
        stored.seek(0)
        # Invalid bytes are shown escaped: no such file exists, and the reject shows the name.
        blocks: Any = _Blocks(stored)
        file = io.TextIOWrapper(blocks, encoding, errors="backslashreplace", newline="")
        first = ""
        while (not first.strip() or first.startswith("#")) and (line := file.readline(1 << 16)):
            first = line
        file.seek(0)
        if _JSON.match(first):
            raise SourceError(
                f"{uri}: JSON, which is not read as a list of images; write it as CSV with the "
                "columns path and label"
            )
        delimiter = _delimiter(storage.name(uri), first.strip("\r\n"), settings)
        if not delimiter:
            yield from _parse_text(file)
            return
        has_quotes = delimiter != "\t" or storage.name(uri).lower().endswith(".csv")
        yield from _parse_table(uri, _rows(uri, file, delimiter, has_quotes), settings)


def _rows(
    uri: str, file: Iterable[str], delimiter: str, has_quotes: bool
) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of each line of a table.

    Raises SourceError for a quoted cell that holds a line end.
    """
    rows = csv.reader(
        file,
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE,
    )
    number = 1
    try:
        for row in rows:
            # an open quote in the last line leaves the line end in its last cell
            if rows.line_num > number or (row and row[-1].endswith(("\n", "\r"))):
                raise SourceError(
                    f"{uri}: line {number}: a quoted cell contains the end of the line; close the "
                    "quote, double a quotation mark that is a letter, or remove the line end"
                )
            yield number, row
            number += 1
    except csv.Error as error:
        raise SourceError(f"{uri}: line {number}: {error}; is a quote not closed?") from None


class _Blocks(io.BufferedIOBase):
    """A stored file read in large blocks.

    TextIOWrapper reads 8 KiB at a time, each of which would be a request.
    """

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
    """Return the delimiter of a table; "" for plain text."""
    ending = name.lower().rpartition(".")[2]
    if ending == "tsv":
        return "\t"
    if ending == "csv":
        return next((mark for mark in ",;\t" if mark in first), ",")
    if "\t" in first:
        return "\t"
    cells = next(csv.reader([first]), [])
    has_header = len(cells) > 1 and _is_header(cells, [], settings)
    return "," if _IMAGE_AND_COMMA.match(first) or has_header else ""


def _parse_text(file: Iterable[str]) -> Iterator[Line]:
    stripped = ((number, line.strip()) for number, line in enumerate(file, 1))
    for number, line in itertools.dropwhile(lambda item: _is_comment([item[1]]), stripped):
        if not line:
            continue
        if _IMAGE.fullmatch(line):
            yield Line(number, line, None)
        elif match := _IMAGE_AND_LABEL.fullmatch(line) or _ANYTHING_AND_NUMBER.fullmatch(line):
            yield Line(number, match[1], match[2])
        else:
            yield Line(number, line, None)


def _parse_table(
    uri: str, rows: Iterable[tuple[int, list[str]]], settings: SourceSettings
) -> Iterator[Line]:
    filled = itertools.dropwhile(
        lambda item: _is_comment(item[1]),
        ((number, row) for number, row in rows if any(cell.strip() for cell in row)),
    )
    start = list(itertools.islice(filled, 2))
    path, label = _find_columns(uri, [row for _, row in start], settings)
    split, split_name, first_split = -1, "", ""
    columns = 0  # any number
    if path < 0:  # no header
        path, label = _columns_without_header([row for _, row in start])
    else:
        columns = len(start[0][1])
        if settings.include == "*":  # otherwise the settings choose the lines
            header = [cell.strip() for cell in start[0][1]]
            split = _position(header, (SPLIT_COLUMN, *SPLIT_ALIASES))
            split_name = header[split]
        split = -1 if split in (path, label) else split
        start = start[1:]
    for number, row in itertools.chain(start, filled):
        if columns and any(cell.strip() for cell in row[columns:]):
            raise SourceError(
                f"{uri}: line {number} has {len(row)} cells, but the header has {columns}; quote "
                "cells that contain the delimiter"
            )
        name = split_of_value(split_name, _cell(row, split)) if split >= 0 else ""
        first_split = first_split or name
        if name != first_split and name:
            raise SourceError(
                f"{uri}: line {number}: column {split_name!r} is {_cell(row, split)!r}, but the "
                f"lines before it are of the split {first_split}; write a list of one split, or "
                "remove the column to read all lines as one"
            )
        yield Line(number, _cell(row, path), _cell(row, label) or None)


def _is_comment(row: list[str]) -> bool:
    """Return whether a line above the header is a comment."""
    return row[0].lstrip().startswith("#") and not any(
        _IMAGE.fullmatch(cell.strip()) for cell in row
    )


def _cell(row: list[str], column: int) -> str:
    return row[column].strip() if 0 <= column < len(row) else ""


def _find_columns(uri: str, start: list[list[str]], settings: SourceSettings) -> tuple[int, int]:
    """Positions of the path and the label column.

    `start` holds the first two rows. The label's position is -1 if there is none; both are -1 if
    the first row is no header.
    """
    header = [cell.strip() for cell in start[0]] if start else []
    below = start[1] if len(start) > 1 else []
    if not _is_header(header, below, settings):
        if settings.path_column is not None:
            raise SourceError(
                f"{uri}: no column {settings.path_column!r} in its first line, "
                f"{', '.join(header)!r}; see source.path_column"
            )
        return -1, -1
    path = _find_path_column(uri, header, below, settings)
    _check_unique(uri, header, path, "path")
    if settings.label_column is None:
        return path, -1
    label = _position(header, _label_names(settings))
    _check_unique(uri, header, label, "label")
    if label < 0 and len(header) > 1:
        raise SourceError(
            f"{uri}: no column {_label_names(settings)[0]!r} among {', '.join(header)}; "
            "set source.label_column"
        )
    return path, label


def _check_unique(uri: str, header: list[str], column: int, kind: str) -> None:
    """Raise SourceError if another column has the same name. A `column` of -1 is not checked."""
    name = header[column] if column >= 0 else ""
    if name and header.count(name) > 1:
        raise SourceError(
            f"{uri}: {header.count(name)} columns are called {name!r}; rename all but the one "
            f"with the {kind}s"
        )


def _find_path_column(
    uri: str, header: list[str], below: list[str], settings: SourceSettings
) -> int:
    """Position of the path column in a table with a header."""
    if settings.path_column is not None:
        path = _position(header, (settings.path_column,))
        if path < 0:
            raise SourceError(
                f"{uri}: no column {settings.path_column!r} among {', '.join(header)}; "
                "set source.path_column"
            )
        return path
    path = _position(header, PATH_COLUMNS)
    if path >= 0:
        return path
    images = (column for column, cell in enumerate(below) if _IMAGE.fullmatch(cell.strip()))
    return next(images, 0)


def _columns_without_header(start: list[list[str]]) -> tuple[int, int]:
    """Positions of the path and the label column of a table without a header.

    The path is the first cell of the first row that ends like an image file, or else the first
    cell. The label follows it, or is the cell before it.
    """
    row = start[0] if start else []
    images = (column for column, cell in enumerate(row) if _IMAGE.fullmatch(cell.strip()))
    path = next(images, 0)
    return path, path + 1 if path + 1 < len(row) or not path else path - 1


def _is_header(row: list[str], below: list[str], settings: SourceSettings) -> bool:
    cells = [cell.strip() for cell in row]
    if any(_IMAGE.fullmatch(cell) for cell in cells):
        return False
    paths = PATH_COLUMNS if settings.path_column is None else (settings.path_column,)
    return _position(cells, (*paths, *_label_names(settings))) >= 0 or any(
        _IMAGE.fullmatch(cell.strip()) for cell in below
    )


def _label_names(settings: SourceSettings) -> tuple[str, ...]:
    column = settings.label_column
    return LABEL_COLUMNS if column is None or column in ("auto", LABEL_COLUMNS[0]) else (column,)


def _position(header: list[str], names: tuple[str, ...]) -> int:
    """Position of the first name that a column has, in the same case or any; -1 if none does."""
    lowered = [cell.lower() for cell in header]
    for name in names:
        if name in header:
            return header.index(name)
        if name.lower() in lowered:
            return lowered.index(name.lower())
    return -1
