"""Lance datasets: one fragment of the dataset is one file of the source.

Lance keeps every version of a dataset. A run reads one of them, so that all of its workers see the
same rows. Deleted rows are not read, and the rows around them keep their ids.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import SourceError, StorageError
from raypipe.sources.arrow_images import ImageOrReason, image_reader
from raypipe.sources.arrow_types import encoded_array, id_texts, storage_array
from raypipe.sources.base import Source
from raypipe.sources.columns import (
    ColumnError,
    TableColumns,
    choose_columns,
    distinct_labels,
    features_of,
    split_of_rows,
)
from raypipe.sources.splits import split_column
from raypipe.sources.table_source import read_rows, reject_repeated_ids
from raypipe.sources.types import FileScan, Fragment, IdFilter, RawSample, SourceFile
from raypipe.text import error_text

SCHEME = "lance://"
ENDING = ".lance"
BLOB = b"lance-encoding:blob"
"""Key in the metadata of a blob column."""
TAKE_ROWS = 64
"""Images that are read at a time."""
MAX_RETRIES = 10
"""Attempts of Lance's own client after a request failed."""
_PLACE_IN_CODE = re.compile(r",? ?/\S+\.rs:\d+(:\d+)?")
_FROM_STORE = ("Generic S3", "Generic GCS", "Generic MicrosoftAzure", "error sending request")
"""Words of a fault of an object store, in an error of Lance."""


class LanceSource(Source):
    """Rows of a Lance dataset.

    Sample ids are "row-<row id>" if the dataset has stable row ids, otherwise
    "fragment-<id>#<place of the row in the fragment>", or the id column's values.
    """

    format = "lance"
    random_access = True
    labels_by_name = True

    def resolved_settings(self, image_size: int = 0) -> SourceSettings:
        """Return the settings with a version and with the columns that `auto` stands for."""
        settings = super().resolved_settings()
        try:
            columns = self._columns
        except ColumnError as error:
            raise SourceError(f"{self.settings.uri}: {error}") from None
        return settings.model_copy(
            update={
                "version": str(self._dataset.version),
                "image_column": columns.image,
                "label_column": columns.label,
            }
        )

    def files(self) -> Iterator[SourceFile]:
        fields = self._used_fields()
        fragments = self._dataset.get_fragments()
        if not fragments:
            raise SourceError(f"{self.settings.uri}: the dataset has no rows")
        for fragment in fragments:
            content = fragment.metadata.to_json()
            files = [file for file in content["files"] if fields & set(file["fields"])]
            # files of columns that are not read can change
            identity = json.dumps([files, content["deletion_file"]], sort_keys=True)
            stamp = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
            size = sum(file["file_size_bytes"] or 0 for file in files)
            yield SourceFile(f"fragment-{fragment.fragment_id}", size, stamp)

    def scan(self, file: SourceFile) -> FileScan:
        fragment = self._fragment(file.path)
        if fragment is None:
            return self.unreadable_file(file, "the fragment is not in this version")
        try:
            columns = self._columns
            labels: set[int | str] = set()
            rows, split = fragment.count_rows(), ""
            if columns.label is not None and columns.class_names is None:
                for batch in fragment.scanner(columns=[columns.label]).to_batches():
                    labels |= distinct_labels(batch.column(0))
            used = {columns.image, columns.label, columns.identity}
            if (column := split_column(self._dataset.schema.names, used)) is not None:
                batches = fragment.scanner(columns=[column]).to_batches()
                values = [batch.column(0).unique().to_pylist() for batch in batches]
                split = split_of_rows({value for some in values for value in some})
        except ColumnError as error:
            return self.unreadable_file(file, error)
        except Exception as error:
            return self.unreadable_file(file, f"not a readable fragment: {_damage(error)}")
        fragments = self.cut_fragments(file, rows)
        return FileScan(fragments, columns.class_names, frozenset(labels), split=split)

    def read(self, fragment: Fragment, keep_id: IdFilter | None = None) -> Iterator[RawSample]:
        if not fragment.samples:
            return
        stored = self._fragment(fragment.path)
        reason, ids = "the fragment has fewer rows than when it was indexed", list[str]()
        if stored is not None:
            try:
                ids = self._row_ids(stored, fragment)
            except Exception as error:
                reason = f"not a readable fragment: {_damage(error)}"
        schema = _plain_schema(self._dataset.schema)
        rows = _Rows(stored, schema, self._columns, fragment.start, len(ids))
        yield from reject_repeated_ids(read_rows(rows, self._columns, ids, keep_id))
        for row in range(fragment.start + len(ids), fragment.stop):
            sample_id = f"{fragment.path}#row-{row}"
            if keep_id is None or keep_id(sample_id):
                yield RawSample(sample_id, None, None, reason)

    def _row_ids(self, stored: Any, fragment: Fragment) -> list[str]:
        """Return the default ids of the rows of a fragment of the index."""
        stable = self._dataset.has_stable_row_ids
        table = stored.scanner(
            columns=[],
            offset=fragment.start,
            limit=fragment.samples,
            with_row_id=stable,
            with_row_address=not stable,
        ).to_table()
        if stable:
            return [f"row-{row}" for row in table["_rowid"].to_pylist()]
        places = table["_rowaddr"].to_pylist()
        return [f"{fragment.path}#{place & 0xFFFFFFFF}" for place in places]

    @functools.cached_property
    def _dataset(self) -> Any:
        return _open(self.settings.uri, self.settings.version)

    @functools.cached_property
    def _columns(self) -> TableColumns:
        schema = _plain_schema(self._dataset.schema)
        return choose_columns(schema, features_of(schema), self.settings)

    def _fragment(self, path: str) -> Any:
        return self._dataset.get_fragment(int(path.removeprefix("fragment-")))

    def _used_fields(self) -> set[int]:
        """Return the ids of the fields of the columns that are read; of all if they are unclear."""
        try:
            columns = self._columns
            used = {columns.image, columns.label, columns.identity}
        except ColumnError:
            used = set(self._dataset.schema.names)
        pending = [field for field in self._dataset.lance_schema.fields() if field.name() in used]
        ids = set()
        while pending:
            field = pending.pop()
            ids.add(field.id())
            pending += field.children()
        return ids


def is_lance(uri: str) -> bool:
    """Return whether a URI names a Lance dataset."""
    return uri.startswith(SCHEME) or uri.rstrip("/").lower().endswith(ENDING)


def _open(uri: str, version: str | None) -> Any:
    """Open a version of a dataset, by default the newest. Raises SourceError and StorageError."""
    try:
        import lance
    except ImportError as error:
        raise SourceError(
            f"{uri}: Lance datasets need the package pylance, which cannot be imported ({error}); "
            "pip install 'raypipe[lance]'"
        ) from None
    place = uri.removeprefix(SCHEME)
    place = place if "://" in place else os.path.abspath(os.path.expanduser(place))
    number = int(version) if version is not None and version.isdecimal() else version
    options = client_options(place)
    try:
        return lance.dataset(place, version=number, storage_options=options)
    except Exception as error:
        reason = _damage(error)
        if "was not found" in reason and version is None:
            raise SourceError(f"{uri}: no Lance dataset here; check source.uri") from None
        readable = _newest_readable(lance, place, options) if version is None else None
        if readable is not None:
            raise SourceError(
                f"{uri}: the newest version cannot be read ({reason}); its writer may have been "
                f"interrupted. Set source.version to {readable}, the last readable one, or write "
                "it again"
            ) from None
        opened = "" if version is None else f"version {version}: "
        raise SourceError(
            f"{uri}: {opened}cannot be read ({reason}); check source.uri and source.version"
        ) from None


def _newest_readable(lance: Any, place: str, options: dict[str, str]) -> int | None:
    """Return the newest version that can be opened, by the names of the manifests."""
    top = (1 << 64) - 1  # newer versions have smaller names, so that they are listed first
    numbers = [
        top - int(stem) if len(stem) == 20 else int(stem)
        for name in storage.names(storage.join(place, "_versions"))
        if (stem := name.removesuffix(".manifest")).isdecimal()
    ]
    for number in sorted(numbers, reverse=True):
        try:
            return int(lance.dataset(place, version=number, storage_options=options).version)
        except Exception:
            continue
    return None


def client_options(place: str) -> dict[str, str]:
    """Return options of Lance's own client: retries, and S3's endpoint from the AWS variables."""
    options = {"client_max_retries": str(MAX_RETRIES)}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not place.startswith(("s3://", "s3a://")) or not endpoint:
        return options
    return {
        **options,
        "aws_endpoint": endpoint,
        "allow_http": str(endpoint.startswith("http:")).lower(),
    }


def _damage(error: Exception) -> str:
    """Return an error of Lance as a reject reason. Raises StorageError if a request failed."""
    text = _PLACE_IN_CODE.sub("", error_text(error))
    text = re.sub(r"(External error|LanceError\(\w+\)|Wrapped error): ", "", text).strip(" ,")
    if any(words in text for words in _FROM_STORE):
        raise StorageError(
            f"{text}. Check that it can be reached from here, then run the same command again"
        ) from error
    return text


@dataclass(frozen=True)
class _Rows:
    """Rows of one fragment from `first` on; a `RowReader`."""

    fragment: Any
    schema: pa.Schema
    columns: TableColumns
    first: int
    count: int

    def values(self, column: str) -> list[Any]:
        return [value for part in self._parts(column) for value in storage_array(part).to_pylist()]

    def ids(self, column: str) -> list[str | None]:
        field = self.schema.field(column)
        return [
            value for part in self._parts(column) for value in id_texts(part, field).to_pylist()
        ]

    def _parts(self, column: str) -> list[pa.Array]:
        scanner = self.fragment.scanner(columns=[column], offset=self.first, limit=self.count)
        return scanner.to_table().column(column).chunks

    def images(self, rows: list[int]) -> Iterator[ImageOrReason]:
        for start in range(0, len(rows), TAKE_ROWS):
            yield from self._images(rows[start : start + TAKE_ROWS])

    def _images(self, rows: Sequence[int]) -> Iterator[ImageOrReason]:
        column = self.columns.image
        reader = image_reader(self.schema.field(column))
        assert reader is not None  # choose_columns has checked the type
        try:
            array = encoded_array(pa.concat_arrays(self._chunks(column, rows)))
        except Exception as error:
            reason = _damage(error)
            yield from ((None, reason) for _ in rows)
            return
        yield from (reader(array[row]) for row in range(len(rows)))

    def _chunks(self, column: str, rows: Sequence[int]) -> list[pa.Array]:
        """Return the values of some rows of a column."""
        places = [self.first + row for row in rows]
        if not is_blob(self.fragment.schema.field(column)):
            return self.fragment.take(places, columns=[column]).column(column).chunks
        return [  # `take` does not read blobs
            part
            for place in places
            for part in self.fragment.scanner(
                columns=[column], offset=place, limit=1, blob_handling="all_binary"
            )
            .to_table()
            .column(column)
            .chunks
        ]

    def damage(self, error: Exception) -> str:
        return _damage(error)


def is_blob(field: pa.Field) -> bool:
    """Return whether a column is one of Lance's blobs, which are stored apart from the rows."""
    extension = getattr(field.type, "extension_name", "")
    return extension.startswith("lance.blob") or BLOB in (field.metadata or {})


def _plain_schema(schema: pa.Schema) -> pa.Schema:
    """Return a schema in which blobs are bytes."""
    fields = [
        pa.field(field.name, pa.large_binary()) if is_blob(field) else field for field in schema
    ]
    return pa.schema(fields, schema.metadata)
