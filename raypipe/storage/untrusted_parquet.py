"""Read Parquet files of unknown origin, with memory bounded by the size of the file.

A few hundred bytes can claim billions of rows, or repeat one long text in all of them. The numbers
in the footer are therefore checked against the size of the file before anything is decoded. Texts
are decoded as a dictionary first, and expanded to the rows only if their total length is allowed.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

VALUES_PER_BYTE = 8
"""Maximum values per byte of the file. A unique id takes more space than that in every row."""
SLACK_VALUES = 65_536
"""Values that are allowed in any file, however small."""
MAX_DECODED_BYTES = 8 << 30
"""Maximum decoded bytes of one column, and of its expanded texts."""


def read_checked(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """Return the content of a Parquet file as a table.

    Parameters
    ----------
    data : bytes
        The whole file.
    columns : list of str, optional
        Columns to read. Default: all.

    Raises
    ------
    ValueError
        If the numbers in the footer cannot be true, or a column is missing.
    pyarrow.ArrowException
        If the content is damaged.
    """
    metadata = pq.read_metadata(pa.BufferReader(data))
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    rows = [group.num_rows for group in groups]
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
        raise ValueError(f"{metadata.num_rows:,} rows stated, but the row groups have {rows[:8]}")
    max_values, names = VALUES_PER_BYTE * len(data) + SLACK_VALUES, set[str]()
    for group in groups:
        for number in range(group.num_columns):
            column = group.column(number)
            names.add(column.path_in_schema)
            if not 0 <= column.num_values <= max_values or metadata.num_rows > max_values:
                raise ValueError(
                    f"{max(column.num_values, metadata.num_rows):,} values stated in "
                    f"{len(data):,} bytes"
                )
            if not 0 <= column.total_uncompressed_size <= MAX_DECODED_BYTES:
                raise ValueError(f"{column.total_uncompressed_size:,} bytes stated for one column")
    schema = metadata.schema.to_arrow_schema()
    if missing := [name for name in columns or () if name not in schema.names]:
        present = ", ".join(schema.names) or "none"
        raise ValueError(f"no column {', '.join(missing)}; columns: {present}")
    texts = [field.name for field in schema if _text_type(field.type) and field.name in names]
    table = pq.ParquetFile(pa.BufferReader(data), metadata=metadata, read_dictionary=texts).read(
        columns, use_threads=len(data) > 1 << 20
    )
    for position, name in enumerate(table.column_names):
        if name in texts:
            kind = _text_type(schema.field(name).type)
            table = table.set_column(
                position,
                pa.field(name, kind, schema.field(name).nullable),
                _expand(table.column(position), kind),
            )
    return table.select(columns) if columns is not None else table


def _text_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type of the texts or bytes in a column; None for a column of another type."""
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return value if pa.types.is_string(value) or pa.types.is_binary(value) else None


def _expand(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Expand dictionary-encoded texts. Raises ValueError if their total length is not allowed."""
    import pyarrow.compute as pc  # takes as long as all of pyarrow

    if not pa.types.is_dictionary(column.type):
        return column
    total = sum(
        pc.sum(pc.binary_length(chunk.dictionary).cast(pa.int64()).take(chunk.indices)).as_py() or 0
        for chunk in column.chunks
        if len(chunk)
    )
    if total > MAX_DECODED_BYTES:
        raise ValueError(f"{total:,} bytes of text in one column")
    return column.cast(kind)
