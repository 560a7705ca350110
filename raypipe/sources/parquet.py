"""Parquet files: one row per sample; images are encoded bytes, Hugging Face's struct<bytes, path>, or nested lists of pixels.

Only the row groups and columns that are needed are read, a few megabytes (or one page, where that is more) at a time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raypipe.config import SourceSettings
from raypipe.sources.base import FileScan, Fragment, Preview, RawSample, SourceFile, Wanted
from raypipe.sources.columns import (
    ColumnError,
    Columns,
    Image,
    TableSource,
    choose,
    distinct_labels,
    features_of,
    image_reader,
    once,
    plain,
    rows,
)
from raypipe.sources.common import damage
from raypipe.storage import Reader

READ_BYTES = 8 << 20
"""Bytes of one request for a column; no more of a larger one is held than its largest page."""
BATCH_BYTES, BATCH_ROWS = 32 << 20, 256
"""Bounds of the rows decoded at a time."""


class ParquetSource(TableSource):
    """Rows of Parquet files. Sample ids are "<relative path>#<row number in the file>", or the id column's values."""

    format = "parquet"

    def schema(self, path: str, stored: Reader) -> tuple[pa.Schema, dict[str, Any]]:
        schema = _open(stored).schema_arrow
        return schema, features_of(schema)

    def scan_stored(self, file: SourceFile, stored: Reader) -> FileScan:
        settings = self.settled()
        try:
            parquet = _open(stored)
            groups, columns = _row_groups(parquet, file.size), _columns(parquet, settings)
        except ColumnError as error:
            # a file without rows loses nothing, whatever its columns
            return self.broken(file, error) if parquet.metadata.num_rows else FileScan(())
        except Exception as error:
            return self.broken(file, f"not a readable Parquet file: {damage(stored, error)}")
        names = columns.class_names
        labels = frozenset[int | str]()
        if names is None and columns.label is not None:
            labels = self._labels(stored, parquet, columns.label)
        return FileScan(self.cut(file, sum(groups), list(accumulate(groups))), names, labels)

    def read(self, fragment: Fragment, wanted: Wanted | None = None) -> Iterator[RawSample]:
        if not fragment.samples:
            return
        with self.open(fragment.path) as stored:
            yield from once(self._read(stored, fragment, wanted))

    def preview(self, file: SourceFile, places: int, each: int, draw: random.Random, whole: bool) -> Preview:
        from raypipe.sources.parquet_preview import preview

        return preview(self, file, places, each, draw, super().preview(file, places, each, draw, True) if whole else None)

    def _read(self, stored: Reader, fragment: Fragment, wanted: Wanted | None) -> Iterator[RawSample]:
        settings, reason = self.settled(), "the file has fewer rows than when it was indexed"
        groups: list[int] = []
        try:
            parquet = _open(stored)
            columns, groups = _columns(parquet, settings), _row_groups(parquet, None)
        except ColumnError as error:
            reason = str(error)
        except Exception as error:
            reason = f"not a readable Parquet file: {damage(stored, error)}"
        first, position = 0, fragment.start
        for group, count in enumerate(groups):
            begin, end = max(fragment.start, first) - first, min(fragment.stop, first + count) - first
            if begin < end:
                yield from self._group(stored, parquet, columns, fragment.path, group, first, begin, end, wanted)
                position = first + end
            first += count
        for row in range(position, fragment.stop):
            sample_id = f"{fragment.path}#{row}"
            if wanted is None or wanted(sample_id):
                yield RawSample(sample_id, None, None, reason)

    @staticmethod
    def _group(
        stored: Reader,
        parquet: pq.ParquetFile,
        columns: Columns,
        path: str,
        group: int,
        first: int,
        begin: int,
        end: int,
        wanted: Wanted | None,
    ) -> Iterator[RawSample]:
        """Samples of rows `begin` to `end` of one row group, whose first row is row `first` of the file."""
        return rows(
            columns,
            path,
            first + begin,
            end - begin,
            values=lambda name: _values(parquet, group, name, begin, end),
            images=lambda chosen: _images(stored, parquet, group, columns.image, [begin + row for row in chosen]),
            damaged=lambda error: f"damaged row group {group}: {damage(stored, error)}",
            wanted=wanted,
        )

    @staticmethod
    def _labels(stored: Reader, parquet: pq.ParquetFile, column: str) -> frozenset[int | str]:
        """The distinct labels. Row groups whose labels are damaged are left out; their samples become rejects."""
        result: set[int | str] = set()
        for group in range(parquet.metadata.num_row_groups):
            try:
                for batch in parquet.iter_batches(65_536, [group], [column], use_threads=False):
                    result |= distinct_labels(batch.column(column))
            except Exception as error:
                damage(stored, error)
        return frozenset(result)


def _open(stored: Reader, request: int = READ_BYTES) -> pq.ParquetFile:
    """The file, read in requests of so many bytes; a smaller file a column of a row group at a time.

    A buffer grows to what a page's header says, up to 2 GB. Of a column read in one piece pages are parts, whatever they say.
    """
    size = stored.seek(0, 2)
    return pq.ParquetFile(stored, buffer_size=request if size > request else 0, pre_buffer=False, page_checksum_verification=True)


def _columns(parquet: pq.ParquetFile, settings: SourceSettings) -> Columns:
    return choose(parquet.schema_arrow, features_of(parquet.schema_arrow), settings)


def _row_groups(parquet: pq.ParquetFile, size: int | None) -> list[int]:
    """Rows of each row group. Raises ValueError where the numbers cannot be true."""
    metadata = parquet.metadata
    groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows:
        raise ValueError(f"{metadata.num_rows} rows stated, but the row groups have {groups[:8]}")
    if size is not None and metadata.num_rows > 8 * size:
        raise ValueError(f"{metadata.num_rows} rows stated in {size} bytes")
    return groups


def _values(parquet: pq.ParquetFile, group: int, column: str, begin: int, end: int) -> list[Any]:
    """Rows `begin` to `end` of a small column of one row group. Raises what pyarrow raises for damaged content, or ValueError."""
    result: list[Any] = []
    first = 0
    for batch in parquet.iter_batches(8192, [group], [column], use_threads=False):
        result += plain(batch.column(column)).slice(max(0, begin - first), max(0, end - max(begin, first))).to_pylist()
        first += batch.num_rows
        if first >= end:
            break
    if len(result) != end - begin:
        raise ValueError(f"{column} ends after {first} rows")
    return result


def _images(stored: Reader, parquet: pq.ParquetFile, group: int, column: str, rows: list[int]) -> Iterator[Image]:
    """Image or reason of each of `rows` (ascending, counted within the row group)."""
    reader = image_reader(parquet.schema_arrow.field(column).type)
    assert reader is not None  # the schema has been checked
    metadata = parquet.metadata.row_group(group)
    row_bytes = metadata.total_byte_size / max(1, metadata.num_rows)
    batch_rows = int(min(BATCH_ROWS, max(1, BATCH_BYTES / max(1.0, row_bytes))))
    done, first, reason = 0, 0, "the row group ends early"
    batches = parquet.iter_batches(batch_rows, [group], [column], use_threads=False)
    while done < len(rows):
        try:
            array = plain(next(batches).column(column))
            found: list[Image] = []
            while done + len(found) < len(rows) and rows[done + len(found)] < first + len(array):
                found.append(reader(array[rows[done + len(found)] - first]))
        except StopIteration:
            break
        except Exception as error:
            reason = f"damaged row group {group}: {damage(stored, error)}"
            break
        yield from found
        done, first = done + len(found), first + len(array)
    for _ in range(done, len(rows)):
        yield None, reason
