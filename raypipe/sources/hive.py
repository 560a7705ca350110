"""Partition columns: values that folders named `key=value` give to all rows below them.

Hive, Spark, pyarrow and Ray Data write partitioned tables this way. The column is not in the files.
"""

from __future__ import annotations

from urllib.parse import unquote

import pyarrow as pa

from raypipe.sources.values import number_or_name, padded_spelling

_NULL = "__HIVE_DEFAULT_PARTITION__"


def partition_values(path: str) -> dict[str, int | str | None]:
    """Return the partition columns of a file by its relative path.

    Text that is a whole number becomes one.
    """
    texts = _texts(path)
    return {name: None if text is None else number_or_name(text) for name, text in texts.items()}


def padded_partition(path: str, column: str) -> frozenset[str]:
    """Return the spelling of a partition column if it is an unusual one of a number.

    See `FileScan.padded`. Empty if the file has no such partition column.
    """
    return frozenset({padded_spelling(_texts(path).get(column) or "")} - {""})


def _texts(path: str) -> dict[str, str | None]:
    """Return the partition columns of a file as text; None for null."""
    parts = (folder.partition("=") for folder in path.split("/")[:-1])
    return {
        unquote(name): None if value == _NULL else unquote(value)
        for name, equals, value in parts
        if equals and name
    }


def with_partitions(schema: pa.Schema, path: str) -> pa.Schema:
    """Return the columns of a file with its partition columns, as text.

    A column that the file itself has counts, not the folder.
    """
    for name in partition_values(path):
        if name not in schema.names:
            schema = schema.append(pa.field(name, pa.string()))
    return schema
