"""Read row groups, columns and images of one Parquet file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq

from raypipe.config import SourceSettings
from raypipe.sources.base import IdFilter, RawSample
from raypipe.sources.columns import (
    Columns,
    Image,
    choose,
    features_of,
    image_reader,
    plain,
    rows,
)
from raypipe.sources.common import damage
from raypipe.storage import Reader

READ_BYTES = 8 << 20
"""Bytes of one request for a column; no more of a larger one is held than its largest page."""
BATCH_BYTES, BATCH_ROWS = 32 << 20, 256
"""Bounds of the rows decoded at a time."""


def open_parquet(stored: Reader, request: int = READ_BYTES) -> pq.ParquetFile:
    """The file, read in requests of so many bytes; a smaller file a column of a row group at a time.

    A buffer grows to what a page's header says, up to 2 GB. Of a column read in one piece pages are parts, whatever they say.
    """
    size = stored.seek(0, 2)
    return pq.ParquetFile(
        stored,
        buffer_size=request if size > request else 0,
        pre_buffer=False,
        page_checksum_verification=True,
    )


def columns_of(parquet: pq.ParquetFile, settings: SourceSettings) -> Columns:
    return choose(parquet.schema_arrow, features_of(parquet.schema_arrow), settings)


def row_groups(parquet: pq.ParquetFile, size: int | None) -> list[int]:
    """Rows of each row group. Raises ValueError where the numbers cannot be true."""
    metadata = parquet.metadata
    groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows:
        raise ValueError(f"{metadata.num_rows} rows stated, but the row groups have {groups[:8]}")
    if size is not None and metadata.num_rows > 8 * size:
        raise ValueError(f"{metadata.num_rows} rows stated in {size} bytes")
    return groups


def read_values(
    parquet: pq.ParquetFile, group: int, column: str, begin: int, end: int
) -> list[Any]:
    """Rows `begin` to `end` of a small column of one row group. Raises what pyarrow raises for damaged content, or ValueError."""
    result: list[Any] = []
    first = 0
    for batch in parquet.iter_batches(8192, [group], [column], use_threads=False):
        result += (
            plain(batch.column(column))
            .slice(max(0, begin - first), max(0, end - max(begin, first)))
            .to_pylist()
        )
        first += batch.num_rows
        if first >= end:
            break
    if len(result) != end - begin:
        raise ValueError(f"{column} ends after {first} rows")
    return result


def read_group(
    stored: Reader,
    parquet: pq.ParquetFile,
    columns: Columns,
    path: str,
    group: int,
    first: int,
    begin: int,
    end: int,
    wanted: IdFilter | None,
) -> Iterator[RawSample]:
    """Samples of rows `begin` to `end` of one row group, whose first row is row `first` of the file."""
    return rows(
        columns,
        path,
        first + begin,
        end - begin,
        values=lambda name: read_values(parquet, group, name, begin, end),
        images=lambda chosen: read_images(
            stored, parquet, group, columns.image, [begin + row for row in chosen]
        ),
        damaged=lambda error: f"damaged row group {group}: {damage(stored, error)}",
        wanted=wanted,
    )


def read_images(
    stored: Reader, parquet: pq.ParquetFile, group: int, column: str, chosen: list[int]
) -> Iterator[Image]:
    """Image or reason of each of `chosen` (ascending, counted within the row group)."""
    reader = image_reader(parquet.schema_arrow.field(column).type)
    assert reader is not None  # the schema has been checked
    metadata = parquet.metadata.row_group(group)
    row_bytes = metadata.total_byte_size / max(1, metadata.num_rows)
    batch_rows = int(min(BATCH_ROWS, max(1, BATCH_BYTES / max(1.0, row_bytes))))
    done, first, reason = 0, 0, "the row group ends early"
    batches = parquet.iter_batches(batch_rows, [group], [column], use_threads=False)
    while done < len(chosen):
        try:
            array = plain(next(batches).column(column))
            found: list[Image] = []
            while done + len(found) < len(chosen) and chosen[done + len(found)] < first + len(
                array
            ):
                found.append(reader(array[chosen[done + len(found)] - first]))
        except StopIteration:
            break
        except Exception as error:
            reason = f"damaged row group {group}: {damage(stored, error)}"
            break
        yield from found
        done, first = done + len(found), first + len(array)
    for _ in range(done, len(chosen)):
        yield None, reason
