"""Parquet files of unknown origin as tables, in memory that the file's own size bounds.

A few hundred bytes can claim billions of rows, and repeat one long text in all of them. Before anything is decoded the numbers in the
footer are held against the file; texts are decoded as a dictionary first, and spread over the rows only where the sum of their lengths allows.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

VALUES_PER_BYTE = 8
"""More values than this for a byte of the file are not believed: an id of its own costs every row more."""
SLACK = 65_536
"""Values that are believed of any file."""
MOST_DECODED = 8 << 30
"""Bytes that a file may have decoded, and the texts of one of its columns."""


def read_checked(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file as a table. Raises ValueError where its numbers cannot be true, and what pyarrow raises for damaged content."""
    metadata = pq.read_metadata(pa.BufferReader(data))
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
        raise ValueError(f"{metadata.num_rows:,} rows stated, but the row groups have {rows[:8]}")
    most, names = VALUES_PER_BYTE * len(data) + SLACK, set[str]()
    for group in groups:
        for number in range(group.num_columns):
            column = group.column(number)
            names.add(column.path_in_schema)
            if not 0 <= column.num_values <= most or metadata.num_rows > most:
                raise ValueError(
                    f"{max(column.num_values, metadata.num_rows):,} values stated in {len(data):,} bytes"
                )
            if not 0 <= column.total_uncompressed_size <= MOST_DECODED:
                raise ValueError(f"{column.total_uncompressed_size:,} bytes stated for one column")
    schema = metadata.schema.to_arrow_schema()
    if missing := [name for name in columns or () if name not in schema.names]:
        raise ValueError(f"no column {', '.join(missing)}, but {', '.join(schema.names) or 'none'}")
    texts = [field.name for field in schema if _text_of(field.type) and field.name in names]
    table = pq.ParquetFile(pa.BufferReader(data), metadata=metadata, read_dictionary=texts).read(
        columns, use_threads=len(data) > 1 << 20
    )
    for place, name in enumerate(table.column_names):
        if name in texts:
            kind = _text_of(schema.field(name).type)
            table = table.set_column(
                place,
                pa.field(name, kind, schema.field(name).nullable),
                _spread(table.column(place), kind),
            )
    return table.select(columns) if columns is not None else table


def _text_of(kind: pa.DataType) -> pa.DataType | None:
    """The type of the texts in a column, spread over its rows; None where it has none."""
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return value if pa.types.is_string(value) or pa.types.is_binary(value) else None


def _spread(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Texts, from a dictionary of them and a number for each row. Raises ValueError where they would be too long together."""
    if not pa.types.is_dictionary(column.type):
        return column
    total = sum(
        pc.sum(pc.binary_length(chunk.dictionary).cast(pa.int64()).take(chunk.indices)).as_py() or 0
        for chunk in column.chunks
        if len(chunk)
    )
    if total > MOST_DECODED:
        raise ValueError(f"{total:,} bytes of text in one column")
    return column.cast(kind)
