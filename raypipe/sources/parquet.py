"""Parquet files: one row per sample; images are encoded bytes, Hugging Face's struct<bytes, path>, or nested lists of pixels.

Only the row groups and columns that are needed are read, a few megabytes (or one page, where that is more) at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.sources.base import FileScan, Fragment, RawSample, Source, SourceFile, Wanted
from raypipe.sources.common import Location, damage, stored_label, text
from raypipe.storage import Reader

READ_BYTES = 8 << 20
"""Bytes of one request for a column; no more of a column is held than its largest page."""
BATCH_BYTES, BATCH_ROWS = 32 << 20, 256
"""Bounds of the rows decoded at a time."""


class ParquetSource(Source):
    """Rows of Parquet files. Sample ids are "<relative path>#<row number in the file>", or the id column's values."""

    format = "parquet"

    def __init__(self, settings: SourceSettings) -> None:
        super().__init__(settings)
        self._location = Location(settings)

    def files(self) -> Iterator[SourceFile]:
        for file in self._location.files(self.format):
            yield SourceFile(file.path, file.size, file.stamp)

    def scan(self, file: SourceFile) -> FileScan:
        if file.size == 0:
            return self.broken(file, "empty: 0 bytes")
        try:
            opened = storage.open_read(self._location.uri(file.path))
        except FileNotFoundError:
            return self.broken(file, "no such file: deleted since it was listed, or its name is not UTF-8")
        with opened as stored:
            try:
                parquet = _open(stored)
                groups, problem = _row_groups(parquet, file.size), self._problem(parquet.schema_arrow)
            except Exception as error:
                return self.broken(file, f"not a readable Parquet file: {damage(stored, error)}")
            if problem and sum(groups):  # a file without rows loses nothing, whatever its columns
                return self.broken(file, problem)
            names = _class_names(parquet.schema_arrow, self.settings.label_column)
            labels = frozenset[int | str]() if names is not None else self._labels(stored, parquet)
        return FileScan(self.cut(file, sum(groups), list(accumulate(groups))), names, labels)

    def read(self, fragment: Fragment, wanted: Wanted | None = None) -> Iterator[RawSample]:
        with storage.open_read(self._location.uri(fragment.path)) as stored:
            reason = "the file has fewer rows than when it was indexed"
            groups: list[int] = []
            try:
                parquet = _open(stored)
                problem = self._problem(parquet.schema_arrow)
                groups, reason = ([], problem) if problem else (_row_groups(parquet, None), reason)
            except Exception as error:
                reason = f"not a readable Parquet file: {damage(stored, error)}"
            first, position, seen = 0, fragment.start, set[str]()
            for group, rows in enumerate(groups):
                begin, end = max(fragment.start, first) - first, min(fragment.stop, first + rows) - first
                if begin < end:
                    for sample in self._group(stored, parquet, fragment.path, group, first, begin, end, wanted):
                        yield _once(sample, seen)
                    position = first + end
                first += rows
            for row in range(position, fragment.stop):
                sample_id = f"{fragment.path}#{row}"
                if wanted is None or wanted(sample_id):
                    yield RawSample(sample_id, None, None, reason)

    def _group(
        self,
        stored: Reader,
        parquet: pq.ParquetFile,
        path: str,
        group: int,
        first: int,
        begin: int,
        end: int,
        wanted: Wanted | None,
    ) -> Iterator[RawSample]:
        """Samples of rows `begin` to `end` of one row group, whose first row is row `first` of the file."""
        settings, count = self.settings, end - begin
        labels: list[Any]
        try:
            labels = _values(parquet, group, settings.label_column, begin, end)
            label_reason = ""
        except Exception as error:
            labels, label_reason = [None] * count, f"label: damaged row group {group}: {damage(stored, error)}"
        ids, id_reasons = [f"{path}#{first + row}" for row in range(begin, end)], [""] * count
        if settings.id_column is not None:
            try:
                values = _values(parquet, group, settings.id_column, begin, end)
                id_reasons = ["" if value is not None else f"no id: {settings.id_column} is null" for value in values]
                ids = [text(str(value)) if value is not None else ids[index] for index, value in enumerate(values)]
            except Exception as error:
                id_reasons = [f"no id: damaged row group {group}: {damage(stored, error)}"] * count
        rows = [row for row in range(count) if wanted is None or wanted(ids[row])]
        images = _images(stored, parquet, group, settings.image_column, [begin + row for row in rows])
        negative_is_missing = _class_names(parquet.schema_arrow, settings.label_column) is not None
        for row, (image, reason) in zip(rows, images, strict=True):
            label, wrong = stored_label(labels[row])
            if negative_is_missing and isinstance(label, int) and label < 0:
                label = None  # what Hugging Face writes for an unknown class
            reason = id_reasons[row] or reason or label_reason or wrong
            yield RawSample(ids[row], None if reason else image, label, reason)

    def _problem(self, schema: pa.Schema) -> str:
        """Why the columns do not fit the settings; "" when they do."""
        settings = self.settings
        for name, column in (
            ("image_column", settings.image_column),
            ("label_column", settings.label_column),
            ("id_column", settings.id_column),
        ):
            found = schema.names.count(column) if column is not None else 1
            if found != 1:
                state = f"there are {found} columns" if found else "there is no column"
                return f"{state} {column!r}; columns are {', '.join(schema.names[:20])}; set source.{name}"
        image, label = schema.field(settings.image_column).type, schema.field(settings.label_column).type
        if _image_reader(image) is None:
            return (
                f"column {settings.image_column!r} is {image}; expected encoded bytes, struct<bytes, path> "
                "or lists of pixels (height, width or height, width, 3)"
            )
        plain = label.value_type if pt.is_dictionary(label) else label
        if not (pt.is_integer(plain) or pt.is_floating(plain) or pt.is_boolean(plain) or _is_string(plain) or pt.is_null(plain)):
            return f"column {settings.label_column!r} is {label}; expected one number or name per sample; set source.label_column"
        if settings.id_column is not None:
            identity = schema.field(settings.id_column).type
            if not (pt.is_integer(identity) or _is_string(identity)):
                return f"column {settings.id_column!r} is {identity}; expected text or whole numbers; set source.id_column"
        return ""

    def _labels(self, stored: Reader, parquet: pq.ParquetFile) -> frozenset[int | str]:
        """The distinct labels. Row groups whose labels are damaged are left out; their samples become rejects."""
        result: set[int | str] = set()
        for group in range(parquet.metadata.num_row_groups):
            try:
                for batch in parquet.iter_batches(65_536, [group], [self.settings.label_column], use_threads=False):
                    distinct = (
                        stored_label(value)[0] for value in _plain(batch.column(self.settings.label_column)).unique().to_pylist()
                    )
                    result.update(label for label in distinct if label is not None)
            except Exception as error:
                damage(stored, error)
        return frozenset(result)


def _open(stored: Reader) -> pq.ParquetFile:
    return pq.ParquetFile(stored, buffer_size=READ_BYTES, pre_buffer=False, page_checksum_verification=True)


def _row_groups(parquet: pq.ParquetFile, size: int | None) -> list[int]:
    """Rows of each row group. Raises ValueError where the numbers cannot be true."""
    metadata = parquet.metadata
    groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows:
        raise ValueError(f"{metadata.num_rows} rows stated, but the row groups have {groups[:8]}")
    if size is not None and metadata.num_rows > 8 * size:
        raise ValueError(f"{metadata.num_rows} rows stated in {size} bytes")
    return groups


def _is_string(type: pa.DataType) -> bool:
    return pt.is_string(type) or pt.is_large_string(type) or pt.is_string_view(type)


def _is_bytes(type: pa.DataType) -> bool:
    return pt.is_binary(type) or pt.is_large_binary(type) or pt.is_fixed_size_binary(type) or pt.is_binary_view(type)


def _is_list(type: pa.DataType) -> bool:
    return pt.is_list(type) or pt.is_large_list(type) or pt.is_fixed_size_list(type)


def _class_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """Names of a Hugging Face ClassLabel column, which stand in the schema's metadata."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(str(name) for name in names) if isinstance(names, list) and names else None


def _plain(array: pa.Array) -> pa.Array:
    return array.dictionary_decode() if pt.is_dictionary(array.type) else array


def _values(parquet: pq.ParquetFile, group: int, column: str, begin: int, end: int) -> list[Any]:
    """Rows `begin` to `end` of a small column of one row group. Raises what pyarrow raises for damaged content, or ValueError."""
    result: list[Any] = []
    first = 0
    for batch in parquet.iter_batches(8192, [group], [column], use_threads=False):
        result += _plain(batch.column(column)).slice(max(0, begin - first), max(0, end - max(begin, first))).to_pylist()
        first += batch.num_rows
        if first >= end:
            break
    if len(result) != end - begin:
        raise ValueError(f"{column} ends after {first} rows")
    return result


Image = tuple[bytes | np.ndarray | None, str]


def _images(stored: Reader, parquet: pq.ParquetFile, group: int, column: str, rows: list[int]) -> Iterator[Image]:
    """Image or reason of each of `rows` (ascending, counted within the row group)."""
    reader = _image_reader(parquet.schema_arrow.field(column).type)
    assert reader is not None  # the schema has been checked
    metadata = parquet.metadata.row_group(group)
    row_bytes = metadata.total_byte_size / max(1, metadata.num_rows)
    batch_rows = int(min(BATCH_ROWS, max(1, BATCH_BYTES / max(1.0, row_bytes))))
    done, first, reason = 0, 0, "the row group ends early"
    batches = parquet.iter_batches(batch_rows, [group], [column], use_threads=False)
    while done < len(rows):
        try:
            array = next(batches).column(column)
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


def _image_reader(type: pa.DataType) -> Callable[[pa.Scalar], Image] | None:
    """How one value of the image column is read; None for a column that cannot hold images."""
    if isinstance(type, pa.BaseExtensionType):
        inner = _image_reader(type.storage_type)
        return (
            None
            if inner is None
            else lambda scalar: inner(scalar.value if scalar.is_valid else pa.scalar(None, type.storage_type))
        )
    if _is_bytes(type):
        return _from_bytes
    if pt.is_struct(type) and type.get_field_index("bytes") >= 0 and _is_bytes(type.field("bytes").type):
        return _from_struct
    depth, inner_type = 0, type
    while _is_list(inner_type):
        depth, inner_type = depth + 1, inner_type.value_type
    return _from_lists if depth in {2, 3} and pt.is_integer(inner_type) else None


def _from_bytes(scalar: pa.Scalar) -> Image:
    return (scalar.as_py(), "") if scalar.is_valid else (None, "no image: null")


def _from_struct(scalar: pa.StructScalar) -> Image:
    if not scalar.is_valid:
        return None, "no image: null"
    if scalar["bytes"].is_valid:
        return scalar["bytes"].as_py(), ""
    path = scalar["path"].as_py() if scalar.type.get_field_index("path") >= 0 else None
    return None, f"no image: the file holds only its path, {path!r}" if path else "no image: bytes are null"


def _from_lists(scalar: pa.Scalar) -> Image:
    """Nested lists of whole numbers 0..255 -> uint8 [height, width] or [height, width, 3]."""
    if not scalar.is_valid:
        return None, "no image: null"
    values, shape = scalar.values, [len(scalar.values)]
    while _is_list(values.type):
        lengths = set(values.value_lengths().to_pylist()) if not pt.is_fixed_size_list(values.type) else {values.type.list_size}
        if len(lengths) != 1 or None in lengths:
            return None, "the rows of the image differ in length"
        values = values.flatten()
        shape.append(lengths.pop())
    if values.null_count:
        return None, "pixels are null"
    numbers = np.asarray(values)
    if len(numbers) != np.prod(shape):
        return None, "the rows of the image differ in length"
    if len(shape) == 3 and shape[2] not in {1, 3}:
        return None, f"pixels have shape {shape}, not [height, width, 3]"
    if numbers.size == 0 or numbers.min() < 0 or numbers.max() > 255:
        return None, "pixels are not within 0..255" if numbers.size else "no pixels"
    pixels = numbers.astype(np.uint8).reshape(shape)
    return (pixels[:, :, 0] if shape[-1] == 1 and len(shape) == 3 else pixels), ""


def _once(sample: RawSample, seen: set[str]) -> RawSample:
    """The sample, or a reject where its id occurred before in the fragment."""
    if sample.sample_id in seen:
        return sample._replace(image=None, reason="duplicate id: an earlier row has it too")
    seen.add(sample.sample_id)
    return sample
