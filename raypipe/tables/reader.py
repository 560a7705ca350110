"""Read tables of embeddings and scores: Parquet files with one row per sample. No Ray.

An embedding is a list of float16, float32 or float64 in any of Arrow's layouts, or an array as Ray
Data writes it. Ids are text, whole numbers or UUIDs; a number stands for the text of its digits.
The input is one file, or a folder of any depth whose files have any name that ends in .parquet. At
most `BATCH_ROWS` embeddings and one page of a column are in memory at once.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.arrow_types import (
    ID_TYPES,
    described,
    holds_ids,
    holds_vectors,
    id_texts,
    is_string,
    is_whole,
    storage_array,
    value_type,
    vectors,
)
from raypipe.sources.classes import LabelSpellings
from raypipe.sources.columns import ColumnError, class_names, features_of
from raypipe.sources.hive import padded_partition, partition_values
from raypipe.sources.location import Location, refuse_web_folder
from raypipe.sources.parquet.reader import split_of_file
from raypipe.sources.splits import SplitOfFiles, several_splits
from raypipe.sources.values import BINARY, damage_reason
from raypipe.sources.versioned import refuse_versioned_table

_OTHER_TABLES = {".csv", ".tsv", ".json", ".jsonl", ".npy", ".npz", ".pkl", ".pt", ".feather"}
ID, LABEL, EMBEDDING = "sample_id", "label", "embedding"
FRAGMENT_ROWS = 16_384
"""Row groups are combined up to this many rows, into one unit of work and one score shard."""
BATCH_ROWS = 8192
READ_BYTES = 8 << 20
MAX_IDS, SHOWN_IDS = 100, 5
"""Ids of each kind of problem that are recorded, and how many of these a message names."""
PROBLEMS = {
    "score_without_id": "scores without a sample_id, ignored",
    "score_not_finite": (
        "scores that are missing, NaN or infinite; these samples count as not scored"
    ),
    "score_repeated": "samples that have the same score more than once, used once",
    "score_without_embedding": "scored samples without an embedding, ignored",
    "embedding_without_id": "embeddings without a sample_id, left out",
    "embedding_missing": "samples whose embedding is null, left out",
    "embedding_width": (
        "samples whose embedding has another width than those of the scored samples, left out"
    ),
    "embedding_not_finite": (
        "samples with missing, NaN or infinite values in the embedding, left out"
    ),
}
"""Problems that do not stop an extrapolation, and how each is handled."""


class ProblemCounts:
    """Number of problems of each kind, with the first ids.

    Parameters
    ----------
    counts : dict, optional
        Initial state, as `as_dict` returns it.
    """

    def __init__(self, counts: dict[str, dict[str, Any]] | None = None) -> None:
        self._counts: dict[str, dict[str, Any]] = counts or {}

    def add(self, kind: str, ids: Iterable[str]) -> None:
        """Count one problem per id. `kind` is a key of `PROBLEMS`."""
        for sample_id in ids:
            problem = self._counts.setdefault(kind, {"count": 0, "ids": []})
            problem["count"] += 1
            if len(problem["ids"]) < MAX_IDS:
                problem["ids"].append(sample_id)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return `count` and the first `ids` of every kind that occurred, as JSON."""
        return {kind: self._counts[kind] for kind in PROBLEMS if kind in self._counts}

    def lines(self) -> list[str]:
        """Return one line of text per kind that occurred."""
        return [
            f"{PROBLEMS[kind]}: {problem['count']:,} "
            f"({shortened(problem['ids'], problem['count'])})"
            for kind, problem in self.as_dict().items()
        ]


def shortened(ids: list[str], count: int) -> str:
    """Return the first of `count` ids as text: "a, b, c, ..."."""
    return ", ".join(ids[:SHOWN_IDS]) + (", ..." if count > len(ids[:SHOWN_IDS]) else "")


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


@dataclass(frozen=True)
class EmbeddingBatch:
    """Consecutive rows of a fragment.

    Attributes
    ----------
    ids : pyarrow.Array
        Text; null for a missing id.
    label : pyarrow.Array
        int64 or text; null for a missing label.
    embedding : pyarrow.Array
        Lists of floating-point numbers.
    first : int
        Index of the first row in the file.
    """

    ids: pa.Array
    label: pa.Array
    embedding: pa.Array
    first: int

    def names(self, path: str) -> list[str]:
        """Return the ids, with "<path>#<row>" for rows without one."""
        return [
            f"{path}#{self.first + row}" if sample_id is None else sample_id
            for row, sample_id in enumerate(self.ids.to_pylist())
        ]


def stored_files(uri: str) -> list[tuple[str, storage.FileInfo]]:
    """List URI and file information of the Parquet files at a URI.

    Raises SourceError for none, for files of several splits, and for a table of several versions.
    """
    refuse_web_folder(uri)
    location = Location(SourceSettings(uri=uri))
    refuse_versioned_table(uri, location, "write its current version as Parquet")
    try:
        files = location.files("parquet")
    except SourceError as error:
        raise SourceError(str(error).removesuffix("; check source.uri")) from None
    if (ending := os.path.splitext(uri)[1].lower()) in _OTHER_TABLES:
        raise SourceError(
            f"{uri}: {ending} is not read; write the table as Parquet, for example with "
            "pandas.DataFrame.to_parquet"
        )
    splits = several_splits([file.path for file in files])
    if splits is not None and not location.names_files:
        raise SourceError(
            f"{uri}: the files are of several splits: {splits.counts}; give the files of one, such "
            f"as {storage.join(uri, splits.include or 'train-*')}"
        )
    return [(location.uri(file.path), file) for file in files]


@contextmanager
def _opened(uri: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file. Damage raises SourceError, also when it shows in the body."""
    try:
        stored = storage.open_read(uri)
    except FileNotFoundError:
        raise SourceError(f"{uri}: no such file") from None
    with stored:
        try:
            yield pq.ParquetFile(
                stored, buffer_size=READ_BYTES, pre_buffer=False, page_checksum_verification=True
            )
        except (pa.ArrowException, OSError) as error:
            raise SourceError(
                f"{uri}: not a readable Parquet file: {damage_reason(stored, error)}"
            ) from None


# -- scores -----------------------------------------------------------------------------


def read_scores(uri: str, column: str, problems: ProblemCounts) -> pa.Table:
    """Read the scores of all scored samples.

    A score that is null, NaN, infinite or too large for float32 counts as missing.

    Parameters
    ----------
    uri : str
        File or folder.
    column : str
        Column of the scores.
    problems : ProblemCounts
        Receives the problems.

    Returns
    -------
    pyarrow.Table
        `sample_id` string and `score` float32, one row per sample, sorted by id.

    Raises
    ------
    SourceError
        If a column is missing or of a wrong type, a sample has two different scores, or no score is
        left.
    """
    parts = [pa.table({ID: pa.array([], pa.string()), "score": pa.array([], pa.float64())})]
    for file, info in stored_files(uri):
        parts += _valid_scores(file, info.path, column, problems)
    table = pa.concat_tables(parts)
    if not len(table):
        raise SourceError(f"{uri}: no sample has a finite score in column {column!r}")
    table = table.group_by(ID, use_threads=False).aggregate(
        [("score", "min"), ("score", "max"), ("score", "count")]
    )
    table = table.sort_by(ID)
    conflicting = table.filter(pc.not_equal(table["score_min"], table["score_max"]))[ID].to_pylist()
    if conflicting:
        count = len(conflicting)
        raise SourceError(
            f"{uri}: samples with conflicting scores: {count:,} ({shortened(conflicting, count)}); "
            "keep one score per sample"
        )
    repeated = table.filter(pc.greater(table["score_count"], 1))[ID].to_pylist()
    problems.add("score_repeated", repeated)
    return pa.table(
        {
            ID: table[ID].combine_chunks(),
            "score": pc.cast(table["score_min"], pa.float32()).combine_chunks(),
        }
    )


def _valid_scores(uri: str, path: str, column: str, problems: ProblemCounts) -> Iterator[pa.Table]:
    """Read ids and scores, float64, of the rows of one file that have both."""
    first = 0
    with _opened(uri) as parquet:
        schema = parquet.schema_arrow
        _check_id(uri, schema)
        kind = _field(uri, schema, column).type
        plain = value_type(kind)
        if not (pt.is_floating(plain) or pt.is_integer(plain) or pt.is_decimal(plain)):
            raise SourceError(f"{uri}: column {column!r} is {kind}; expected numbers")
        for batch in parquet.iter_batches(1 << 16, columns=sorted({ID, column}), use_threads=False):
            ids = id_texts(batch.column(ID), schema.field(ID))
            has_id = ids.is_valid().to_numpy(zero_copy_only=False)
            with np.errstate(over="ignore"):
                score = pc.cast(
                    storage_array(batch.column(column)), pa.float64(), safe=False
                ).to_numpy(zero_copy_only=False)
                finite = np.isfinite(score.astype(np.float32))
            rows_without_id = np.flatnonzero(~has_id)
            problems.add("score_without_id", (f"{path}#{first + row}" for row in rows_without_id))
            problems.add("score_not_finite", ids.filter(pa.array(has_id & ~finite)).to_pylist())
            valid = pa.array(has_id & finite)
            yield pa.table({ID: ids.filter(valid), "score": pa.array(score).filter(valid)})
            first += len(batch)


# -- embeddings -------------------------------------------------------------------------


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
    with _opened(uri) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
        groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        try:
            split = split_of_file(parquet, (ID, LABEL, EMBEDDING), _reraise)
        except ColumnError as error:
            raise SourceError(f"{uri}: {error}") from None
    _check_id(uri, schema)
    field = _field(uri, schema, EMBEDDING)
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
    kind = _field(uri, schema, LABEL).type
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


def read_batches(
    fragment: TableFragment, groups: Iterable[int] | None = None
) -> Iterator[EmbeddingBatch]:
    """Read the rows of a fragment in order; `groups` restricts them to some row groups."""
    selected = set(groups) if groups is not None else None
    with _opened(fragment.uri) as parquet:
        schema = parquet.schema_arrow
        columns = [name for name in (ID, LABEL, EMBEDDING) if name in schema.names]
        first = fragment.first
        for group, rows in fragment.groups:
            position = first
            first += rows
            if selected is not None and group not in selected:
                continue
            for part in parquet.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False
            ):
                label = part.column(LABEL) if LABEL in columns else _of_path(fragment, len(part))
                yield EmbeddingBatch(
                    id_texts(part.column(ID), schema.field(ID)),
                    _labels(fragment, label),
                    vectors(part.column(EMBEDDING), schema.field(EMBEDDING)),
                    position,
                )
                position += len(part)


def read_ids(fragment: TableFragment) -> Iterator[tuple[int, pa.Array, pa.Array]]:
    """Read number, ids and labels of each row group of a fragment, without its embeddings."""
    with _opened(fragment.uri) as parquet:
        schema = parquet.schema_arrow
        columns = [name for name in (ID, LABEL) if name in schema.names]
        for group, _ in fragment.groups:
            table = parquet.read_row_group(group, columns, use_threads=False).combine_chunks()
            label = (
                table[LABEL].combine_chunks()
                if LABEL in columns
                else _of_path(fragment, len(table))
            )
            ids = id_texts(table[ID].combine_chunks(), schema.field(ID))
            yield group, ids, _labels(fragment, label)


def widths(embedding: pa.Array) -> np.ndarray:
    """Return the length of every embedding, int64 [n]; -1 for a missing one."""
    return pc.fill_null(pc.cast(pc.list_value_length(embedding), pa.int64()), -1).to_numpy(
        zero_copy_only=False
    )


def matrix(embedding: pa.Array, rows: np.ndarray) -> np.ndarray:
    """Return some embeddings as a matrix.

    Parameters
    ----------
    embedding : pyarrow.Array
        Lists.
    rows : numpy.ndarray
        Mask of the rows, bool [n]. They must all have one width d.

    Returns
    -------
    numpy.ndarray
        float32 [k, d], NaN for missing values.
    """
    values = embedding.filter(pa.array(rows)).flatten()
    with np.errstate(over="ignore"):
        flat = pc.cast(values, pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    count = int(rows.sum())
    return np.asarray(flat, np.float32).reshape(count, len(flat) // count if count else 0)


def usable(batch: EmbeddingBatch, width: int) -> tuple[list[str], np.ndarray]:
    """Return the usable embeddings of a batch.

    Returns
    -------
    list of str
        Per row the reason why it is left out, or "". A reason begins with the kind of the problem,
        a key of `PROBLEMS`, and a colon.
    numpy.ndarray
        Embeddings of the other rows, float32 [k, width].
    """
    sizes, has_id = widths(batch.embedding), batch.ids.is_valid().to_numpy(zero_copy_only=False)
    right_size = has_id & (sizes == width)
    values = matrix(batch.embedding, right_size)
    finite = np.isfinite(values).all(1)
    reasons = [_problem(named, size, width) for named, size in zip(has_id.tolist(), sizes.tolist())]
    for row in np.flatnonzero(right_size)[~finite]:
        reasons[row] = "embedding_not_finite: values that are missing, NaN or infinite"
    return reasons, values[finite].reshape(-1, width)


def _problem(has_id: bool, size: int, width: int) -> str:
    """Return why an embedding of some size (-1 for a missing one) is left out, or ""."""
    if not has_id:
        return "embedding_without_id: sample_id is null"
    if size < 0:
        return "embedding_missing: embedding is null"
    if size != width:
        return f"embedding_width: {size} values, where others have {width}"
    return ""


# -- columns ----------------------------------------------------------------------------


def _field(uri: str, schema: pa.Schema, name: str) -> pa.Field:
    if schema.names.count(name) != 1:
        raise SourceError(
            f"{uri}: no column {name!r} (or more than one); "
            f"the columns are {', '.join(schema.names)}"
        )
    return schema.field(name)


def _check_id(uri: str, schema: pa.Schema) -> None:
    field = _field(uri, schema, ID)
    if not holds_ids(field):
        raise SourceError(f"{uri}: column {ID!r} is {described(field)}; expected {ID_TYPES}")


def _of_path(fragment: TableFragment, rows: int) -> pa.Array:
    """Return the labels of a file without such a column: of its partition, or null."""
    return pa.array([partition_values(fragment.path).get(LABEL)] * rows)


def _labels(fragment: TableFragment, column: pa.Array) -> pa.Array:
    """Return labels as int64 or text. A negative number, NaN or blank text is a missing label."""
    column = storage_array(column)
    if fragment.labels != "integer":
        return _names(fragment, pc.cast(column, pa.string()))
    if pt.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    try:
        label = pc.cast(column, pa.int64())
    except pa.ArrowInvalid as error:
        raise SourceError(
            f"{fragment.uri}: column {LABEL!r} has values that are not whole numbers ({error})"
        ) from None
    return pc.if_else(pc.less(label, 0), pa.scalar(None, pa.int64()), label)


def _names(fragment: TableFragment, text: pa.Array) -> pa.Array:
    """Return class names. Raises SourceError for bytes in place of text, as NumPy pads it."""
    binary = pc.match_substring_regex(text, BINARY.pattern)
    if pc.any(binary).as_py():
        raise SourceError(
            f"{fragment.uri}: column {LABEL!r} has control characters, such as in "
            f"{text.filter(binary)[0].as_py()!r}; write the names without them"
        )
    blank = pc.equal(pc.utf8_trim_whitespace(text), "")
    return pc.if_else(blank, pa.scalar(None, text.type), text)
