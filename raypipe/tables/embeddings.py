"""Read tables of embeddings: Parquet files with one row per sample. No Ray.

An embedding is a list of float16, float32 or float64 in any of Arrow's layouts, or an array as Ray
Data writes it. Ids are text, whole numbers or UUIDs; a number stands for the text of its digits. At
most `BATCH_ROWS` embeddings and one page of a column are in memory at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from raypipe.errors import SourceError
from raypipe.sources.arrow_types import id_texts, storage_array, vectors
from raypipe.sources.hive import partition_values
from raypipe.sources.values import BINARY
from raypipe.tables.files import EMBEDDING, ID, LABEL, opened
from raypipe.tables.fragments import TableFragment

BATCH_ROWS = 8192


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


def read_batches(
    fragment: TableFragment, groups: Iterable[int] | None = None
) -> Iterator[EmbeddingBatch]:
    """Read the rows of a fragment in order; `groups` restricts them to some row groups."""
    selected = set(groups) if groups is not None else None
    with opened(fragment.uri) as parquet:
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
    with opened(fragment.uri) as parquet:
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
        a key of `problems.PROBLEMS`, and a colon.
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
