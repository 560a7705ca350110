"""Embeddings and scores as their owner has them: Parquet files with a row per sample, read piece by piece and checked. No Ray.

An embedding is a list, or a list of fixed size, of float16, float32 or float64. Ids are text or whole numbers; a number is the text
of its digits. Files have any name that ends in .parquet, in a folder of any depth; one file is as good. Of the embeddings, no more
is held at once than `BATCH_ROWS` rows, and one page of a column.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.location import Location
from raypipe.sources.values import damage_reason

ID, LABEL, EMBEDDING = "sample_id", "label", "embedding"
PIECE_ROWS = 16_384
"""Row groups are put together up to so many rows, to one unit of work and one shard of scores."""
BATCH_ROWS = 8192
READ_BYTES = 8 << 20
KEPT, SHOWN = 100, 5
"""Ids of each kind of problem that are kept, and of these, that are named in a line."""
PROBLEMS = {
    "score_without_id": "scores without a sample_id, ignored",
    "score_not_finite": "scores that are missing, NaN or infinite, of samples that count as not scored",
    "score_repeated": "samples that have the same score more than once, used once",
    "score_without_embedding": "scored samples without an embedding, ignored",
    "embedding_without_id": "embeddings without a sample_id, left out",
    "embedding_missing": "samples whose embedding is null, left out",
    "embedding_width": "samples whose embedding has another width than those of the scored samples, left out",
    "embedding_not_finite": "samples with missing, NaN or infinite values in the embedding, left out",
}
"""Problems that do not end an extrapolation, and what becomes of them."""


class ProblemTally:
    """How many problems of each kind, and the first ids."""

    def __init__(self, found: dict[str, dict[str, Any]] | None = None) -> None:
        self._found: dict[str, dict[str, Any]] = found or {}

    def add(self, kind: str, ids: Iterable[str]) -> None:
        for sample_id in ids:
            found = self._found.setdefault(kind, {"count": 0, "ids": []})
            found["count"] += 1
            if len(found["ids"]) < KEPT:
                found["ids"].append(sample_id)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """`count` and the first `ids` of every kind that occurred, as JSON."""
        return {kind: self._found[kind] for kind in PROBLEMS if kind in self._found}

    def lines(self) -> list[str]:
        """One line in words for each kind that occurred."""
        return [
            f"{PROBLEMS[kind]}: {found['count']:,} ({name_some(found['ids'], found['count'])})"
            for kind, found in self.as_dict().items()
        ]


def name_some(ids: list[str], count: int) -> str:
    """The first of `count` ids in words: "a, b, c, ..."."""
    return ", ".join(ids[:SHOWN]) + (", ..." if count > len(ids[:SHOWN]) else "")


@dataclass(frozen=True)
class Piece:
    """A run of row groups of one file of embeddings: the unit of work.

    name    of the shard made from it; changes when the file does
    uri     of the file, and `path` below the folder that was given
    groups  (number, rows) of each row group
    first   number of its first row in the file
    labels  what the labels of all files are: "integer", "string", or "" where no file has any
    """

    name: str
    uri: str
    path: str
    groups: tuple[tuple[int, int], ...]
    first: int
    labels: str

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.groups)


@dataclass(frozen=True)
class Batch:
    """Rows of a piece. ids: text, null where there is none; label: int64 or text, null where there is none; `first`: row number."""

    ids: pa.Array
    label: pa.Array
    embedding: pa.Array
    first: int

    def names(self, path: str) -> list[str]:
        """Ids, and file and row where there is none."""
        return [
            f"{path}#{self.first + row}" if sample_id is None else sample_id
            for row, sample_id in enumerate(self.ids.to_pylist())
        ]


def stored_files(uri: str) -> list[tuple[str, storage.FileInfo]]:
    """URI and listing of every Parquet file of a file or folder. Raises SourceError where there is none."""
    location = Location(SourceSettings(uri=uri))
    try:
        return [(location.uri(file.path), file) for file in location.files("parquet")]
    except SourceError as error:
        raise SourceError(str(error).removesuffix("; set source.uri")) from None


@contextmanager
def _opened(uri: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file. Raises SourceError, also from within, when it is damaged."""
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


def read_scores(uri: str, column: str, tally: ProblemTally) -> pa.Table:
    """`sample_id` string and `score` float32 of every scored sample, once each, sorted by id. Problems go into the tally.

    A score that is null, NaN, infinite or too large for float32 is none. Raises SourceError when a column is missing or of a wrong
    type, when a sample has two different scores, and when no score is left.
    """
    parts = [pa.table({ID: pa.array([], pa.string()), "score": pa.array([], pa.float64())})]
    for file, info in stored_files(uri):
        row = 0
        with _opened(file) as parquet:
            schema = parquet.schema_arrow
            _check_id(file, schema)
            kind = _type(file, schema, column)
            if not (pt.is_floating(kind) or pt.is_integer(kind)):
                raise SourceError(f"{file}: column {column!r} is {kind}; numbers are expected")
            for batch in parquet.iter_batches(
                1 << 16, columns=sorted({ID, column}), use_threads=False
            ):
                ids = _text(batch.column(ID))
                with np.errstate(over="ignore"):
                    score = pc.cast(batch.column(column), pa.float64(), safe=False).to_numpy(
                        zero_copy_only=False
                    )
                    good = np.isfinite(score.astype(np.float32))
                there = ids.is_valid().to_numpy(zero_copy_only=False)
                tally.add(
                    "score_without_id", (f"{info.path}#{row + i}" for i in np.flatnonzero(~there))
                )
                tally.add("score_not_finite", ids.filter(pa.array(there & ~good)).to_pylist())
                keep = pa.array(there & good)
                parts.append(
                    pa.table({ID: ids.filter(keep), "score": pa.array(score).filter(keep)})
                )
                row += len(batch)
    table = pa.concat_tables(parts)
    if not len(table):
        raise SourceError(f"{uri}: no sample has a finite score in column {column!r}")
    table = table.group_by(ID, use_threads=False).aggregate(
        [("score", "min"), ("score", "max"), ("score", "count")]
    )
    table = table.sort_by(ID)
    differing = table.filter(pc.not_equal(table["score_min"], table["score_max"]))[ID].to_pylist()
    if differing:
        raise SourceError(
            f"{uri}: samples with scores that differ: {len(differing):,} ({name_some(differing, len(differing))}); leave one for each"
        )
    tally.add("score_repeated", table.filter(pc.greater(table["score_count"], 1))[ID].to_pylist())
    return pa.table(
        {
            ID: table[ID].combine_chunks(),
            "score": pc.cast(table["score_min"], pa.float32()).combine_chunks(),
        }
    )


def plan_embeddings(uri: str) -> list[Piece]:
    """Cut all files into pieces, in the order of the files, from their footers alone.

    Raises SourceError for a damaged file, a column that is missing or of a wrong type, labels of two kinds, no rows.
    """
    files = stored_files(uri)
    with ThreadPoolExecutor(16) as threads:
        footers = list(threads.map(lambda file: _footer(file[0]), files))
    kinds = {labels for _, labels in footers if labels}
    if len(kinds) > 1:
        raise SourceError(
            f"{uri}: labels are numbers in some files and text in others; use one kind"
        )
    labels = next(iter(kinds), "")
    pieces = [
        piece
        for (file, info), (groups, _) in zip(files, footers)
        for piece in _cut(file, info, groups, labels)
    ]
    if not pieces:
        raise SourceError(f"{uri}: the files have no rows")
    return pieces


def _footer(uri: str) -> tuple[list[int], str]:
    """Rows of each row group, and the kind of the labels."""
    with _opened(uri) as parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
        groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    _check_id(uri, schema)
    kind = _type(uri, schema, EMBEDDING)
    if not (
        pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind)
    ) or not pt.is_floating(kind.value_type):
        raise SourceError(
            f"{uri}: column {EMBEDDING!r} is {kind}; a list of float16, float32 or float64 is expected"
        )
    if LABEL not in schema.names:
        return groups, ""
    stored = _type(uri, schema, LABEL)
    plain = stored.value_type if pt.is_dictionary(stored) else stored
    if pt.is_integer(plain) or pt.is_floating(
        plain
    ):  # where labels are missing, pandas makes whole numbers floating
        return groups, "integer"
    if pt.is_string(plain) or pt.is_large_string(plain):
        return groups, "string"
    if pt.is_null(plain):
        return groups, ""
    raise SourceError(
        f"{uri}: column {LABEL!r} is {stored}; whole numbers or text are expected, null where there is no label"
    )


def _cut(uri: str, info: storage.FileInfo, groups: list[int], labels: str) -> Iterator[Piece]:
    run: list[tuple[int, int]] = []
    first = position = 0
    for number, rows in enumerate([*groups, None]):
        if run and (rows is None or sum(held for _, held in run) + rows > PIECE_ROWS):
            yield Piece(
                _piece_name(info, first, position), uri, info.path, tuple(run), first, labels
            )
            run = []
        if rows:
            first = position if not run else first
            run.append((number, rows))
        position += rows or 0


def _piece_name(info: storage.FileInfo, start: int, stop: int) -> str:
    """A name fit for a file on any storage: readable start, then a hash of all that identifies the content."""
    identity = "\0".join((info.path, str(info.size), info.stamp, str(start), str(stop)))
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9]+", "-", info.path.rsplit("/", 1)[-1].rsplit(".", 1)[0]).strip(
        "-"
    )[:40]
    return f"{readable or 'file'}-{start:09d}-{digest}"


def read_batches(piece: Piece, groups: Iterable[int] | None = None) -> Iterator[Batch]:
    """The rows of a piece in order, or those of some of its row groups."""
    wanted = set(groups) if groups is not None else None
    with _opened(piece.uri) as parquet:
        columns = [name for name in (ID, LABEL, EMBEDDING) if name in parquet.schema_arrow.names]
        first = piece.first
        for group, rows in piece.groups:
            position = first
            first += rows
            if wanted is not None and group not in wanted:
                continue
            for part in parquet.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False
            ):
                label = part.column(LABEL) if LABEL in columns else pa.nulls(len(part))
                yield Batch(
                    _text(part.column(ID)), _labels(piece, label), part.column(EMBEDDING), position
                )
                position += len(part)


def read_ids(piece: Piece) -> Iterator[tuple[int, pa.Array, pa.Array]]:
    """Number, ids and labels of each row group of a piece, without reading embeddings."""
    with _opened(piece.uri) as parquet:
        columns = [name for name in (ID, LABEL) if name in parquet.schema_arrow.names]
        for group, _ in piece.groups:
            table = parquet.read_row_group(group, columns, use_threads=False).combine_chunks()
            label = table[LABEL].combine_chunks() if LABEL in columns else pa.nulls(len(table))
            yield group, _text(table[ID].combine_chunks()), _labels(piece, label)


def widths(embedding: pa.Array) -> np.ndarray:
    """Length of every embedding, int64 [n]; -1 where there is none."""
    return pc.fill_null(pc.cast(pc.list_value_length(embedding), pa.int64()), -1).to_numpy(
        zero_copy_only=False
    )


def matrix(embedding: pa.Array, rows: np.ndarray) -> np.ndarray:
    """Embeddings at `rows`, a mask of bools, which all have one width: float32 [k, d], NaN where a value is missing."""
    values = embedding.filter(pa.array(rows)).flatten()
    with np.errstate(over="ignore"):
        flat = pc.cast(values, pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    count = int(rows.sum())
    return np.asarray(flat, np.float32).reshape(count, len(flat) // count if count else 0)


def usable(batch: Batch, width: int) -> tuple[list[str], np.ndarray]:
    """Why each row is left out, "" where it is not; and the embeddings of those that are not, float32 [k, width].

    A reason begins with the kind of the problem, a key of `PROBLEMS`, and a colon.
    """
    found, there = widths(batch.embedding), batch.ids.is_valid().to_numpy(zero_copy_only=False)
    good = there & (found == width)
    values = matrix(batch.embedding, good)
    finite = np.isfinite(values).all(1)
    reason = [
        "embedding_without_id: sample_id is null"
        if not known
        else "embedding_missing: embedding is null"
        if size < 0
        else f"embedding_width: {size} values, where others have {width}"
        if size != width
        else ""
        for known, size in zip(there.tolist(), found.tolist())
    ]
    for row in np.flatnonzero(good)[~finite]:
        reason[row] = "embedding_not_finite: values that are missing, NaN or infinite"
    return reason, values[finite].reshape(-1, width)


def _type(uri: str, schema: pa.Schema, name: str) -> pa.DataType:
    if schema.names.count(name) != 1:
        raise SourceError(
            f"{uri}: there is no column {name!r} (or more than one); the columns are {', '.join(schema.names)}"
        )
    return schema.field(name).type


def _check_id(uri: str, schema: pa.Schema) -> None:
    kind = _type(uri, schema, ID)
    plain = kind.value_type if pt.is_dictionary(kind) else kind
    if not (pt.is_string(plain) or pt.is_large_string(plain) or pt.is_integer(plain)):
        raise SourceError(f"{uri}: column {ID!r} is {kind}; text or whole numbers are expected")


def _text(column: pa.Array) -> pa.Array:
    return pc.cast(column, pa.string())


def _labels(piece: Piece, column: pa.Array) -> pa.Array:
    """Labels as int64 or text. A negative number is no label, nor is NaN."""
    if piece.labels != "integer":
        return pc.cast(column, pa.string())
    if pt.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    try:
        label = pc.cast(column, pa.int64())
    except pa.ArrowInvalid as error:
        raise SourceError(
            f"{piece.uri}: column {LABEL!r} has values that are not whole numbers ({error})"
        ) from None
    return pc.if_else(pc.less(label, 0), pa.scalar(None, pa.int64()), label)
