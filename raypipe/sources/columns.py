"""Columns of Arrow tables: which one holds images, labels and ids, and how their values are read.

Shared by every format whose samples are rows: Parquet files, and the Arrow files of Hugging Face's `datasets`.
"""

from __future__ import annotations

import abc
import functools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from raypipe.config import SourceSettings
from raypipe.sources.base import IdFilter, RawSample, SourceFile
from raypipe.sources.common import MISSING, FileSource, damage, stored_label, text
from raypipe.storage import Reader

AUTO = "auto"
IMAGE_NAMES = (
    "image",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "picture",
    "photo",
    "image_bytes",
    "bytes",
)
LABEL_NAMES = (
    "label",
    "labels",
    "cls",
    "fine_label",
    "class",
    "class_id",
    "class_label",
    "category",
    "category_id",
    "target",
)
"""Names that `auto` looks for, in this order, without regard to case."""
NO_LABELS = frozenset(
    {"id", "idx", "index", "__index_level_0__", "image_id", "row", "width", "height"}
)
"""Columns of numbers that `auto` does not take for labels, even where there is no other."""

Image = tuple[bytes | np.ndarray | None, str]
"""Encoded bytes or pixels, and ""; or None and why there is no image."""
ByPath = Callable[[str], bytes | None]
"""The bytes of an image that a table holds only by its path; None where it cannot be had."""

FILES_ASKED, FILES_TRIED, READERS = 16, 100, 16
"""Files, spread evenly, of which most decide what `auto` stands for; files opened, at most, to find any in which it is clear; at a time."""


class ColumnError(ValueError):
    """The columns of a table do not fit the settings; the message says which there are and what to set."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns, and the names of the classes where the table states them."""

    image: str
    label: str | None
    identity: str | None
    class_names: tuple[str, ...] | None


class TableSource(FileSource):
    """A source of tables. What `auto` stands for is decided once, by most of a few files, and holds for all."""

    @abc.abstractmethod
    def schema(self, path: str, stored: Reader) -> tuple[pa.Schema, dict[str, Any]]:
        """Columns of a file, and Hugging Face's description of them (may be empty). Raises anything where the file is damaged."""

    def settled(self, image_size: int = 0) -> SourceSettings:
        """What is there is read whatever size is wanted. Of columns, `auto` remains where no file makes clear what it stands for."""
        return self._settled

    @functools.cached_property
    def _settled(self) -> SourceSettings:
        settings = super().settled()
        if AUTO not in (settings.image_column, settings.label_column):
            return settings
        files = list(self.files())
        some = files[:: max(1, len(files) // FILES_ASKED)]
        found = Counter((columns.image, columns.label) for columns in self._clear(some, settings))
        if not found:
            found.update(
                (columns.image, columns.label)
                for columns in islice(self._clear(files[:FILES_TRIED], settings), 1)
            )
        for (image, label), _ in found.most_common(1):
            return settings.model_copy(update={"image_column": image, "label_column": label})
        return settings  # every file says for itself what is wrong with it

    def _clear(self, files: Sequence[SourceFile], settings: SourceSettings) -> Iterator[Columns]:
        """The columns of those files in which it is clear."""
        with ThreadPoolExecutor(READERS, thread_name_prefix="raypipe-columns") as threads:
            yield from filter(
                None, threads.map(lambda file: self._columns_of(file, settings), files)
            )

    def _columns_of(self, file: SourceFile, settings: SourceSettings) -> Columns | None:
        if file.stamp == MISSING or file.size == 0:
            return None
        try:
            stored = self.open(file.path)
        except FileNotFoundError:
            return None
        with stored:
            try:
                return choose(*self.schema(file.path, stored), settings)
            except Exception as error:
                damage(stored, error)
                return None


def choose(schema: pa.Schema, features: Mapping[str, Any], settings: SourceSettings) -> Columns:
    """The columns of a table by the settings. Raises ColumnError when they are not there, not clear or of another type.

    features  Hugging Face's description of the columns; may be empty

    `auto` takes the first column with one of the usual names and a fitting type; else the only one that Hugging Face's description
    calls an image or a class; else the only one of a fitting type.
    """
    identity = settings.id_column
    for name, column in (
        ("image", settings.image_column),
        ("label", settings.label_column),
        ("id", identity),
    ):
        if column is not None and (column != AUTO or name == "id"):
            _once_there(schema, column, name)
    image, label = settings.image_column, settings.label_column
    if image == AUTO:
        image = _found(
            schema, "image", IMAGE_NAMES, _holds_images, _holds_images, _of_kind(features, "Image")
        )
    if label == AUTO:
        left = {image, identity} | {name for name in schema.names if name.lower() in NO_LABELS}
        label = _found(
            schema,
            "label",
            LABEL_NAMES,
            _holds_labels,
            lambda type: pt.is_integer(type) or pt.is_boolean(type) or pt.is_dictionary(type),
            _of_kind(features, "ClassLabel"),
            left,
        )
    if not _holds_images(schema.field(image).type):
        raise ColumnError(_wrong_type(schema, image, "image"))
    if label is not None and not _holds_labels(schema.field(label).type):
        raise ColumnError(_wrong_type(schema, label, "label"))
    if identity is not None:
        type = _value_type(schema.field(identity).type)
        if not (pt.is_integer(type) or is_string(type)):
            raise ColumnError(_wrong_type(schema, identity, "id"))
    return Columns(image, label, identity, _class_names(features, label))


_EXPECTED = {
    "image": "encoded bytes, struct<bytes, path> or lists of pixels (height, width or height, width, 3)",
    "label": "one number or name per sample; set source.label_column",
    "id": "text or whole numbers; set source.id_column",
}


def _wrong_type(schema: pa.Schema, column: str, kind: str) -> str:
    return f"column {column!r} is {schema.field(column).type}; expected {_EXPECTED[kind]}"


def _once_there(schema: pa.Schema, column: str, kind: str) -> None:
    found = schema.names.count(column)
    if found != 1:
        state = f"there are {found} columns" if found else "there is no column"
        raise ColumnError(
            f"{state} {column!r}; columns are {', '.join(schema.names[:20])}; set source.{kind}_column"
        )


def _found(
    schema: pa.Schema,
    kind: str,
    usual: Sequence[str],
    fits: Callable[[pa.DataType], bool],
    likely: Callable[[pa.DataType], bool],
    stated: frozenset[str],
    left: Collection[str | None] = (),
) -> str:
    """The column that `auto` takes. Raises ColumnError where there is none, or where there are several and no reason to prefer one."""
    named = [
        name
        for wanted in usual
        for name in sorted(schema.names, key=lambda name: name != wanted)
        if name.lower() == wanted
    ]
    for name in named:
        _once_there(schema, name, kind)
        if fits(schema.field(name).type):
            return name
    candidates = [
        name
        for name in schema.names
        if name not in left
        and schema.names.count(name) == 1
        and (likely(schema.field(name).type) or name in stated)
    ]
    described = [name for name in candidates if name in stated]
    for chosen in (described, candidates):
        if len(chosen) == 1:
            return chosen[0]
    if candidates:
        raise ColumnError(
            f"several columns may hold {kind}s: {', '.join(candidates[:20])}; set source.{kind}_column"
        )
    if named:
        raise ColumnError(_wrong_type(schema, named[0], kind))
    raise ColumnError(
        f"no column is clearly the {kind}; columns are {', '.join(schema.names[:20])}; set source.{kind}_column"
    )


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """Hugging Face's description of the columns in the schema's metadata; empty where there is none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _of_kind(features: Mapping[str, Any], kind: str) -> frozenset[str]:
    return frozenset(
        name
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == kind
    )


def _class_names(features: Mapping[str, Any], column: str | None) -> tuple[str, ...] | None:
    """Names of a ClassLabel column."""
    names = features[column].get("names") if column in _of_kind(features, "ClassLabel") else None
    return tuple(str(name) for name in names) if isinstance(names, list) and names else None


def is_string(type: pa.DataType) -> bool:
    return pt.is_string(type) or pt.is_large_string(type) or pt.is_string_view(type)


def _is_bytes(type: pa.DataType) -> bool:
    return (
        pt.is_binary(type)
        or pt.is_large_binary(type)
        or pt.is_fixed_size_binary(type)
        or pt.is_binary_view(type)
    )


def _is_list(type: pa.DataType) -> bool:
    return pt.is_list(type) or pt.is_large_list(type) or pt.is_fixed_size_list(type)


def _value_type(type: pa.DataType) -> pa.DataType:
    while isinstance(type, pa.BaseExtensionType):
        type = type.storage_type
    return type.value_type if pt.is_dictionary(type) else type


def _holds_images(type: pa.DataType) -> bool:
    return image_reader(type) is not None


def _holds_labels(type: pa.DataType) -> bool:
    plain = _value_type(type)
    return (
        pt.is_integer(plain)
        or pt.is_floating(plain)
        or pt.is_boolean(plain)
        or is_string(plain)
        or pt.is_null(plain)
    )


def plain(array: pa.Array) -> pa.Array:
    """The array as it is stored where its type is an extension, and with its values in place of positions in a dictionary.

    Scalars of an extension are whatever its author made of them, so that they are avoided.
    """
    while isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    return array.dictionary_decode() if pt.is_dictionary(array.type) else array


def distinct_labels(array: pa.Array) -> set[int | str]:
    """The labels that occur in a column; what is no label is left out, since its sample becomes a reject."""
    labels = (stored_label(value)[0] for value in plain(array).unique().to_pylist())
    return {label for label in labels if label is not None}


def rows(
    columns: Columns,
    path: str,
    first: int,
    count: int,
    *,
    values: Callable[[str], list[Any]],
    images: Callable[[list[int]], Iterator[Image]],
    damaged: Callable[[Exception], str],
    wanted: IdFilter | None,
) -> Iterator[RawSample]:
    """The samples of `count` rows, the first of which is row `first` of the file, as far as they are wanted.

    values   the values of a small column, one a row; may raise
    images   the images of some of the rows, counted from 0, in ascending order
    damaged  an exception of `values` in words; raises storage faults
    """
    ids, id_reasons = [f"{path}#{first + row}" for row in range(count)], [""] * count
    if columns.identity is not None:
        try:
            given = values(columns.identity)
            id_reasons = [
                "" if value is not None else f"no id: {columns.identity} is null" for value in given
            ]
            ids = [
                text(str(value)) if value is not None else ids[index]
                for index, value in enumerate(given)
            ]
        except Exception as error:
            id_reasons = [f"no id: {damaged(error)}"] * count
    chosen = [row for row in range(count) if wanted is None or wanted(ids[row])]
    if not chosen:
        return
    labels: list[Any]
    try:
        labels, label_reason = (
            values(columns.label) if columns.label is not None else [None] * count,
            "",
        )
    except Exception as error:
        labels, label_reason = [None] * count, f"label: {damaged(error)}"
    for row, (image, reason) in zip(chosen, images(chosen), strict=True):
        label, wrong = stored_label(labels[row])
        if columns.class_names is not None and isinstance(label, int) and label < 0:
            label = None  # what Hugging Face writes for an unknown class
        reason = id_reasons[row] or reason or label_reason or wrong
        yield RawSample(ids[row], None if reason else image, label, reason)


def once(samples: Iterator[RawSample]) -> Iterator[RawSample]:
    """The samples; one whose id occurred before becomes a reject."""
    seen: set[str] = set()
    for sample in samples:
        repeated = sample.sample_id in seen
        seen.add(sample.sample_id)
        yield (
            sample._replace(image=None, reason="duplicate id: an earlier row has it too")
            if repeated
            else sample
        )


def image_reader(
    type: pa.DataType, by_path: ByPath | None = None
) -> Callable[[pa.Scalar], Image] | None:
    """How one value of the `plain` image column is read; None for a column that cannot hold images."""
    if isinstance(type, pa.BaseExtensionType):
        return image_reader(type.storage_type, by_path)
    if _is_bytes(type):
        return _from_bytes
    if (
        pt.is_struct(type)
        and type.get_field_index("bytes") >= 0
        and _is_bytes(type.field("bytes").type)
    ):
        return lambda scalar: _from_struct(scalar, by_path)
    if (pt.is_list(type) or pt.is_large_list(type)) and (
        pt.is_uint8(type.value_type) or pt.is_int8(type.value_type)
    ):
        return _from_byte_list
    depth, inner_type = 0, type
    while _is_list(inner_type):
        depth, inner_type = depth + 1, inner_type.value_type
    return _from_lists if depth in {2, 3} and pt.is_integer(inner_type) else None


def _from_bytes(scalar: pa.Scalar) -> Image:
    return (scalar.as_py(), "") if scalar.is_valid else (None, "no image: null")


def _from_struct(scalar: pa.StructScalar, by_path: ByPath | None) -> Image:
    if not scalar.is_valid:
        return None, "no image: null"
    if scalar["bytes"].is_valid:
        return scalar["bytes"].as_py(), ""
    path = scalar["path"].as_py() if scalar.type.get_field_index("path") >= 0 else None
    if not path:
        return None, "no image: bytes are null"
    content = by_path(path) if by_path is not None else None
    return (
        (content, "")
        if content is not None
        else (None, f"no image: the file holds only its path, {text(path)!r}")
    )


def _from_byte_list(scalar: pa.Scalar) -> Image:
    """Encoded bytes as a list of numbers of 8 bits, signed or not."""
    if not scalar.is_valid:
        return None, "no image: null"
    if scalar.values.null_count:
        return None, "bytes are null"
    return np.asarray(scalar.values).tobytes(), ""


def _from_lists(scalar: pa.Scalar) -> Image:
    """Nested lists of whole numbers 0..255 -> uint8 [height, width] or [height, width, 3]."""
    if not scalar.is_valid:
        return None, "no image: null"
    values, shape = scalar.values, [len(scalar.values)]
    while _is_list(values.type):
        lengths = (
            set(values.value_lengths().to_pylist())
            if not pt.is_fixed_size_list(values.type)
            else {values.type.list_size}
        )
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
