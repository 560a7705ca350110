"""Read row groups, columns and images of one Parquet file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raypipe.config import SourceSettings
from raypipe.sources.arrow_images import ImageOrReason, image_reader
from raypipe.sources.arrow_types import encoded_array, id_texts, storage_array
from raypipe.sources.columns import TableColumns, choose_columns, features_of, split_of_rows
from raypipe.sources.hive import partition_values, with_partitions
from raypipe.sources.splits import split_alias, split_column
from raypipe.sources.table_source import read_rows, row_ids
from raypipe.sources.types import IdFilter, RawSample
from raypipe.sources.values import damage_reason
from raypipe.storage import Reader

READ_BYTES = 8 << 20
"""Bytes of one request for a column. Of a larger column, at most its largest page is held."""
BATCH_BYTES, BATCH_ROWS = 32 << 20, 256
"""Limits of the rows decoded at a time."""


def open_parquet(stored: Reader, request: int = READ_BYTES) -> pq.ParquetFile:
    """Open a Parquet file that is read in requests of `request` bytes.

    A smaller file is read one column of a row group at a time. This bounds memory: a buffered
    reader grows to the size that a page's header claims, up to 2 GB, whereas pages of a column that
    was read in one piece cannot exceed it, whatever they claim.
    """
    size = stored.seek(0, 2)
    return pq.ParquetFile(
        stored,
        buffer_size=request if size > request else 0,
        pre_buffer=False,
        page_checksum_verification=True,
    )


def columns_of(parquet: pq.ParquetFile, settings: SourceSettings, path: str) -> TableColumns:
    """Return the columns by the settings, those of a partition included. Raises ColumnError."""
    schema = with_partitions(parquet.schema_arrow, path)
    return choose_columns(schema, features_of(parquet.schema_arrow), settings)


def split_of_file(
    parquet: pq.ParquetFile,
    used: Collection[str | None],
    on_damage: Callable[[Exception], object],
) -> str:
    """Return the split that a column of this name gives to all rows of a file; "" without one.

    Parameters
    ----------
    parquet : pyarrow.parquet.ParquetFile
    used : collection of str or None
        Columns that mean something else.
    on_damage : callable
        Called if the column cannot be read; unless it raises, those rows do not count.

    Raises
    ------
    ColumnError
        If the rows are of several splits.
    """
    metadata, values = parquet.metadata, set[object]()
    names = [metadata.schema.column(column).path for column in range(metadata.num_columns)]
    stated = split_column(names, used)
    column = stated or split_alias(names, used)
    if column is None:
        return ""
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(names.index(column)).statistics
        if statistics is not None and statistics.has_min_max and statistics.min == statistics.max:
            values.add(statistics.min)
            continue
        try:
            for batch in parquet.iter_batches(65_536, [group], [column], use_threads=False):
                values.update(storage_array(batch.column(column)).unique().to_pylist())
        except Exception as error:
            on_damage(error)
    split = split_of_rows(values, name=column)
    return split if stated else ""  # of other columns, several splits in one file are a problem


def row_counts(parquet: pq.ParquetFile, size: int | None) -> list[int]:
    """Return the number of rows of each row group.

    Parameters
    ----------
    parquet : pyarrow.parquet.ParquetFile
    size : int or None
        Bytes of the file, to reject impossible counts.

    Raises
    ------
    ValueError
        If the counts cannot be true.
    """
    metadata = parquet.metadata
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
        raise ValueError(f"{metadata.num_rows} rows stated, but the row groups have {counts[:8]}")
    if size is not None and metadata.num_rows > 8 * size:
        raise ValueError(f"{metadata.num_rows} rows stated in {size} bytes")
    return counts


@dataclass(frozen=True)
class RowGroup:
    """One row group of an open Parquet file.

    Attributes
    ----------
    stored : Reader
        The file, for its storage faults.
    parquet : pyarrow.parquet.ParquetFile
    columns : TableColumns
    path : str
        Relative path of the file; default ids begin with it.
    number : int
        Number of the row group in the file, from 0.
    first : int
        Row of the file at which the row group begins.
    """

    stored: Reader
    parquet: pq.ParquetFile
    columns: TableColumns
    path: str
    number: int
    first: int

    def samples(self, begin: int, end: int, keep_id: IdFilter | None) -> Iterator[RawSample]:
        """Yield the samples of rows `begin` to `end` (exclusive) of the row group."""
        rows = _Rows(self, begin, end)
        own = row_ids(self.path, range(self.first + begin, self.first + end))
        return read_rows(rows, self.columns, own, keep_id)

    def values(self, column: str, begin: int, end: int) -> list[Any]:
        """Return rows `begin` to `end` (exclusive) of a small column, or of a partition column.

        Raises ValueError, or whatever pyarrow raises for damaged content.
        """
        if column not in self.parquet.schema_arrow.names:
            return [partition_values(self.path)[column]] * (end - begin)
        parts = self._parts(column, begin, end)
        return [value for part in parts for value in storage_array(part).to_pylist()]

    def ids(self, column: str, begin: int, end: int) -> list[str | None]:
        """Return rows `begin` to `end` (exclusive) of a column of ids. Raises as `values` does."""
        if column not in self.parquet.schema_arrow.names:
            return [str(value) for value in self.values(column, begin, end)]
        field = self.parquet.schema_arrow.field(column)
        parts = self._parts(column, begin, end)
        return [value for part in parts for value in id_texts(part, field).to_pylist()]

    def _parts(self, column: str, begin: int, end: int) -> list[pa.Array]:
        parts: list[pa.Array] = []
        first = 0
        for batch in self.parquet.iter_batches(8192, [self.number], [column], use_threads=False):
            rows = max(0, end - max(begin, first))
            parts.append(batch.column(column).slice(max(0, begin - first), rows))
            first += batch.num_rows
            if first >= end:
                break
        if sum(map(len, parts)) != end - begin:
            raise ValueError(f"{column} ends after {first} rows")
        return parts

    def images(self, rows: list[int]) -> Iterator[ImageOrReason]:
        """Yield the image, or the reason why there is none, of each of `rows` (ascending)."""
        column = self.columns.image
        reader = image_reader(self.parquet.schema_arrow.field(column))
        assert reader is not None  # choose_columns has checked the type
        batch_rows = int(min(BATCH_ROWS, max(1, BATCH_BYTES / max(1.0, self.row_bytes))))
        done, first, reason = 0, 0, "the row group ends early"
        batches = self.parquet.iter_batches(batch_rows, [self.number], [column], use_threads=False)
        while done < len(rows):
            try:
                array = encoded_array(next(batches).column(column))
                stop = first + len(array)
                images: list[ImageOrReason] = []
                while done + len(images) < len(rows) and rows[done + len(images)] < stop:
                    images.append(reader(array[rows[done + len(images)] - first]))
            except StopIteration:
                break
            except Exception as error:
                reason = self.damage(error)
                break
            yield from images
            done, first = done + len(images), stop
        for _ in range(done, len(rows)):
            yield None, reason

    @property
    def row_bytes(self) -> float:
        """Average bytes of a row, uncompressed."""
        metadata = self.parquet.metadata.row_group(self.number)
        return metadata.total_byte_size / max(1, metadata.num_rows)

    def damage(self, error: Exception) -> str:
        """Return the reject reason for an exception. Raises storage faults."""
        return f"damaged row group {self.number}: {damage_reason(self.stored, error)}"


@dataclass(frozen=True)
class _Rows:
    """Rows `begin` to `end` (exclusive) of a row group; a `RowReader`."""

    group: RowGroup
    begin: int
    end: int

    def values(self, column: str) -> list[Any]:
        return self.group.values(column, self.begin, self.end)

    def ids(self, column: str) -> list[str | None]:
        return self.group.ids(column, self.begin, self.end)

    def images(self, rows: list[int]) -> Iterator[ImageOrReason]:
        return self.group.images([self.begin + row for row in rows])

    def damage(self, error: Exception) -> str:
        return self.group.damage(error)
