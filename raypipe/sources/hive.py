"""Partition columns: values that folders named `key=value` give to all rows below them.

Hive, Spark, pyarrow and Ray Data write partitioned tables this way. The column is not in the files.
"""

from __future__ import annotations

from urllib.parse import unquote

import pyarrow as pa

from raypipe.sources.values import number_or_name

_NULL = "__HIVE_DEFAULT_PARTITION__"


def partition_values(path: str) -> dict[str, int | str | None]:
    """Return the partition columns of a file by its relative path.

    Text that is a whole number becomes one.
    """
    result: dict[str, int | str | None] = {}
    for folder in path.split("/")[:-1]:
        name, equals, value = folder.partition("=")
        if equals and name:
            result[unquote(name)] = None if value == _NULL else number_or_name(unquote(value))
    return result


def with_partitions(schema: pa.Schema, path: str) -> pa.Schema:
    """Return the columns of a file with its partition columns, as text.

    A column that the file itself has counts, not the folder.
    """
    for name in partition_values(path):
        if name not in schema.names:
            schema = schema.append(pa.field(name, pa.string()))
    return schema
