"""The Parquet files of a table: which there are, and their columns.

A table is one file, or a folder of any depth whose files have any name that ends in .parquet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources.arrow_types import ID_TYPES, described, holds_ids
from raypipe.sources.location import Location, refuse_web_folder
from raypipe.sources.splits import several_splits
from raypipe.sources.values import damage_reason
from raypipe.sources.versioned import refuse_versioned_table

ID, LABEL, EMBEDDING = "sample_id", "label", "embedding"
READ_BYTES = 8 << 20
_OTHER_TABLES = {".csv", ".tsv", ".json", ".jsonl", ".npy", ".npz", ".pkl", ".pt", ".feather"}


def stored_files(uri: str) -> list[tuple[str, storage.FileInfo]]:
    """List URI and file information of the Parquet files at a URI.

    Raises SourceError for none, for files of several splits, and for a table of several versions.
    """
    refuse_web_folder(uri)
    location = Location(SourceSettings(uri=uri))
    refuse_versioned_table(uri, location, "write its current version as Parquet")
    try:
        files = location.files("parquet")
    except SourceError as error:
        raise SourceError(str(error).removesuffix("; check source.uri")) from None
    if (ending := os.path.splitext(uri)[1].lower()) in _OTHER_TABLES:
        raise SourceError(
            f"{uri}: {ending} is not read; write the table as Parquet, for example with "
            "pandas.DataFrame.to_parquet"
        )
    splits = several_splits([file.path for file in files])
    if splits is not None and not location.names_files:
        raise SourceError(
            f"{uri}: the files are of several splits: {splits.counts}; give the files of one, such "
            f"as {storage.join(uri, splits.include or 'train-*')}"
        )
    return [(location.uri(file.path), file) for file in files]


@contextmanager
def opened(uri: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file. Damage raises SourceError, also when it shows in the body."""
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


def column_field(uri: str, schema: pa.Schema, name: str) -> pa.Field:
    """Return the field of a column; raise SourceError unless there is exactly one."""
    if schema.names.count(name) != 1:
        raise SourceError(
            f"{uri}: no column {name!r} (or more than one); "
            f"the columns are {', '.join(schema.names)}"
        )
    return schema.field(name)


def check_id(uri: str, schema: pa.Schema) -> None:
    """Raise SourceError unless the file has a column of ids."""
    field = column_field(uri, schema, ID)
    if not holds_ids(field):
        raise SourceError(f"{uri}: column {ID!r} is {described(field)}; expected {ID_TYPES}")
