"""Read and write JSON and Parquet files as a whole, and read many of them ahead."""

from __future__ import annotations

import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from raypipe.errors import RaypipeError
from raypipe.storage.files import info, read_bytes, write_bytes
from raypipe.storage.listings import names
from raypipe.storage.places import filesystem, is_local, join
from raypipe.storage.untrusted_parquet import read_checked

T = TypeVar("T")
U = TypeVar("U")

MAX_JSON_BYTES, MAX_TABLE_BYTES = 64 << 20, 4 << 30
"""Largest JSON and Parquet files that are read as a whole."""
READERS, LOCAL_READERS = 8, 2
"""Files to read in parallel. Object stores need several to hide their latency. A local disk has no
such latency, and more threads only wait for one another."""


def read_whole(uri: str, max_bytes: int) -> bytes:
    """Return the content of a file of at most `max_bytes` bytes.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    RaypipeError
        If the file is larger, or is not a regular file.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem) and os.path.exists(path) and not os.path.isfile(path):
        raise RaypipeError(f"{uri}: not a file, but a folder, a pipe or a device")
    size = info(uri).size
    if size > max_bytes:
        raise RaypipeError(
            f"{uri}: {size:,} bytes, but at most {max_bytes:,} are allowed; is it the right file?"
        )
    return read_bytes(uri)


def read_json(uri: str) -> Any:
    """Return the content of a JSON file.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    RaypipeError
        If the file is not valid JSON, or is larger than `MAX_JSON_BYTES`. The error names it.
    """
    try:
        return json.loads(read_whole(uri, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise RaypipeError(f"{uri}: not valid JSON ({error}); was it cut off or edited?") from None


def write_json(uri: str, value: Any) -> None:
    """Write a JSON file atomically."""
    write_bytes(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return the content that `write_json` writes."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Return a Parquet file as a table, or some of its columns.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    RaypipeError
        If the file is not readable Parquet, or is larger than `MAX_TABLE_BYTES`. The error names
        it.
    """
    data = read_whole(uri, MAX_TABLE_BYTES)
    try:
        return read_checked(data, columns)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise RaypipeError(
            f"{uri}: not a readable Parquet file ({error}); delete it and rerun to write it again"
        ) from None


def matrix_of(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of lists of one length d as an array of its type, [n, d]; n can be 0."""
    lists = column.combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(lists), -1) if len(lists) else values.reshape(0, lists.type.list_size)


def write_table(
    uri: str,
    table: pa.Table,
    *,
    compression: str = "zstd",
    row_group_size: int | None = None,
    dictionary: bool = True,
) -> None:
    """Write a Parquet file atomically. The bytes depend on the table and the options only.

    Parameters
    ----------
    uri : str
        The file to write.
    table : pyarrow.Table
        Its content.
    compression : str
        A Parquet codec.
    row_group_size : int, optional
        Rows in a row group. Default: pyarrow's.
    dictionary : bool
        Whether to encode columns with a dictionary. Numbers that rarely repeat are smaller and
        faster to read and write without one.
    """
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        compression=compression,
        row_group_size=row_group_size,
        use_dictionary=dictionary,
    )
    write_bytes(uri, buffer.getvalue())


def write_table_groups(uri: str, groups: Sequence[pa.Table]) -> None:
    """Write tables of one schema as the row groups of a Parquet file, atomically.

    Parameters
    ----------
    uri : str
        The file to write.
    groups : sequence of pyarrow.Table
        At least one. Empty tables get no row group. The metadata is that of the first.
    """
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, groups[0].schema, compression="zstd") as writer:
        for group in groups:
            if len(group):
                table = group.replace_schema_metadata(groups[0].schema.metadata)
                writer.write_table(table, row_group_size=len(group))
    write_bytes(uri, buffer.getvalue())


def ahead(
    function: Callable[[T], U], items: Iterable[T], where: str, threads: int = READERS
) -> Iterator[tuple[T, U]]:
    """Yield every item with `function(item)`, in order, computed ahead in threads.

    Parameters
    ----------
    function : callable
        Reads the file that belongs to an item.
    items : iterable
        What to read. At most `threads` items are taken before the first result is yielded.
    where : str
        URI of the files. At most `LOCAL_READERS` local files are read at a time.
    threads : int
        Number of files to read at a time.

    Yields
    ------
    tuple
        The item and its result.
    """
    threads = min(threads, LOCAL_READERS) if is_local(where) else threads
    with ThreadPoolExecutor(threads, thread_name_prefix="raypipe-read") as pool:
        waiting: deque[tuple[T, Future[U]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) == threads:
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        finally:
            for _, result in waiting:
                result.cancel()


def iter_tables(
    uri: str, columns: list[str] | None = None, *, threads: int = 1
) -> Iterator[tuple[str, pa.Table]]:
    """Yield name and table of every Parquet file directly in a folder, sorted by name.

    With several threads, as many tables are read ahead and held in memory at once. This hides the
    latency of an object store.
    """
    files = sorted(file for file in names(uri) if file.endswith(".parquet"))
    if threads == 1:
        for file in files:
            yield file, read_table(join(uri, file), columns)
        return
    yield from ahead(lambda file: read_table(join(uri, file), columns), files, uri, threads)
