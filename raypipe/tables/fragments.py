"""Divide tables of embeddings into fragments, the units of work. Reads only the footers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.types as pt

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.arrow_types import described, holds_vectors, is_string, is_whole, value_type
from raypipe.sources.classes import LabelSpellings
from raypipe.sources.columns import ColumnError, class_names, features_of
from raypipe.sources.hive import padded_partition, partition_values
from raypipe.sources.location import Location
from raypipe.sources.parquet.reader import split_of_file
from raypipe.sources.splits import SplitOfFiles
from raypipe.tables.files import (
    EMBEDDING,
    ID,
    LABEL,
    check_id,
    column_field,
    opened,
    stored_files,
)

FRAGMENT_ROWS = 16_384
"""Row groups are combined up to this many rows, into one unit of work and one score shard."""


@dataclass(frozen=True)
class TableFragment:
    """Consecutive row groups of one file of embeddings: the unit of work.

    Attributes
    ----------
    name : str
        Name of its score shard; changes when the file changes.
    uri, path : str
        URI of the file, and its path inside the input folder.
    groups : tuple of (int, int)
        Number and rows of each row group.
    first : int
        Index of its first row in the file.
    labels : str
        Type of the labels in all files: "integer", "string", or "" if no file has labels.
    """

    name: str
    uri: str
    path: str
    groups: tuple[tuple[int, int], ...]
    first: int
    labels: str

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(rows for _, rows in self.groups)


def plan_embeddings(uri: str) -> list[TableFragment]:
    """Divide all files into fragments, in the order of the files. Reads only the footers.

    Raises
    ------
    SourceError
        For a damaged file, a column that is missing or of a wrong type, labels of two types, or no
        rows.
    """
    files = stored_files(uri)
    with ThreadPoolExecutor(16) as threads:
        footers = list(threads.map(lambda file: _footer(file[0], file[1].path), files))
    split, spellings = SplitOfFiles("give the files of one split"), LabelSpellings()
    named = Location(SourceSettings(uri=uri)).names_files
    for (_, info), footer in zip(files, footers, strict=True):
        split.add(info.path, "" if named else footer.split)
        if footer.partition:
            spellings.add(info.path, footer.partition, padded_partition(info.path, LABEL))
    label_types = {footer.labels for footer in footers if footer.labels}
    if len(label_types) > 1:
        raise SourceError(
            f"{uri}: labels are numbers in some files and text in others; use one type"
        )
    if len({footer.names for footer in footers if footer.labels}) > 1:
        raise SourceError(
            f"{uri}: the files state different class names, or the same in another order; write "
            f"column {LABEL!r} as text"
        )
    labels = next(iter(label_types), "")
    fragments = [
        fragment
        for (file, info), footer in zip(files, footers, strict=True)
        for fragment in _divide(file, info, footer.groups, labels)
    ]
    if not fragments:
        raise SourceError(f"{uri}: the files have no rows")
    return fragments


class _Footer(NamedTuple):
    """What a file states of its rows.

    Attributes
    ----------
    groups
        Rows of each row group.
    labels
        Type of the labels.
    names
        Names of the classes.
    split
        Split of the rows.
    partition
        The label that a folder `label=value` gives to all rows; empty without one.
    """

    groups: list[int]
    labels: str
    names: tuple[str, ...] | None
    split: str
    partition: frozenset[int | str]


def _footer(uri: str, path: str) -> _Footer:
    with opened(uri) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
        groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        try:
            split = split_of_file(parquet, (ID, LABEL, EMBEDDING), _reraise)
        except ColumnError as error:
            raise SourceError(f"{uri}: {error}") from None
    check_id(uri, schema)
    field = column_field(uri, schema, EMBEDDING)
    if not holds_vectors(field):
        raise SourceError(
            f"{uri}: column {EMBEDDING!r} is {described(field)}; "
            "expected a list of float16, float32 or float64"
        )
    names = class_names(features_of(schema), LABEL)
    label = None if LABEL in schema.names else partition_values(path).get(LABEL)
    partition = frozenset[int | str]() if label is None else frozenset({label})
    return _Footer(groups, _label_type(uri, schema, path), names, split, partition)


def _reraise(error: Exception) -> None:
    raise error


def _label_type(uri: str, schema: pa.Schema, path: str) -> str:
    """Return "integer", "string", or "" for a file without labels."""
    if LABEL not in schema.names:
        value = partition_values(path).get(LABEL)
        return "" if value is None else "integer" if isinstance(value, int) else "string"
    kind = column_field(uri, schema, LABEL).type
    plain = value_type(kind)
    # pandas writes whole numbers as floating-point numbers if some are missing
    if is_whole(plain) or pt.is_floating(plain) or pt.is_boolean(plain):
        return "integer"
    if is_string(plain):
        return "string"
    if pt.is_null(plain):
        return ""
    raise SourceError(
        f"{uri}: column {LABEL!r} is {kind}; "
        "expected whole numbers or text, and null for a missing label"
    )


def _divide(
    uri: str, info: storage.FileInfo, groups: list[int], labels: str
) -> Iterator[TableFragment]:
    """Combine the row groups of a file, given their rows, into fragments."""
    combined: list[tuple[int, int]] = []
    first = position = 0
    for number, rows in enumerate([*groups, None]):
        total = sum(held for _, held in combined)
        if combined and (rows is None or total + rows > FRAGMENT_ROWS):
            name = _fragment_name(info, first, position)
            yield TableFragment(name, uri, info.path, tuple(combined), first, labels)
            combined = []
        if rows:
            first = position if not combined else first
            combined.append((number, rows))
        position += rows or 0


def _fragment_name(info: storage.FileInfo, start: int, stop: int) -> str:
    """Return a valid file name: a readable start, then a hash that identifies the content."""
    identity = "\0".join((info.path, str(info.size), info.stamp, str(start), str(stop)))
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    stem = info.path.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    readable = re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-")[:40]
    return f"{readable or 'file'}-{start:09d}-{digest}"
