"""Choose the image, label and id columns of an Arrow table.

Shared by every format whose samples are rows: Parquet files, and the Arrow files of Hugging Face's
`datasets`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.types as pt

from raypipe.config import SourceSettings
from raypipe.sources.arrow_images import image_reader
from raypipe.sources.arrow_types import (
    ID_TYPES,
    described,
    holds_ids,
    is_dictionary,
    is_string,
    storage_array,
    stores_tensors,
    value_type,
)
from raypipe.sources.classes import distinct
from raypipe.sources.splits import SPLIT_COLUMN, split_of_value
from raypipe.sources.values import stored_label

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
"""Column names that `auto` looks for, in this order, without regard to case."""
NEVER_LABELS = frozenset(
    {"id", "idx", "index", "__index_level_0__", "image_id", "row", "width", "height"}
)
"""Columns of numbers that `auto` never takes for labels, even if there is no other."""

_POINTERS = frozenset(
    {"path", "file", "filename", "file_name", "filepath", "file_path", "image_path", "url", "uri"}
    | {"image_url", "top_level_url"}
)
"""Columns of text that name images instead of holding them, in lower case."""

Features = Mapping[str, Any]
"""Hugging Face's description of the columns, by column name; often empty."""


class ColumnError(ValueError):
    """The columns of a table do not fit the settings; the message lists them and what to set."""


@dataclass(frozen=True)
class TableColumns:
    """Names of the columns of a table.

    Attributes
    ----------
    image : str
    label : str or None
        None if labels are not read.
    identity : str or None
        Column of sample ids; None if ids are row numbers.
    class_names : tuple of str or None
        Names of the classes, if the table states them.
    """

    image: str
    label: str | None
    identity: str | None
    class_names: tuple[str, ...] | None

    @functools.cached_property
    def has_distinct_names(self) -> bool:
        """Whether the table names its classes, no two of them alike."""
        return self.class_names is not None and distinct(self.class_names)


def choose_columns(schema: pa.Schema, features: Features, settings: SourceSettings) -> TableColumns:
    """Return the columns that the settings name or `auto` finds.

    `auto` takes the first column with one of the usual names and a suitable type; else the only
    one that Hugging Face's description calls an image or a class; else the only one of a suitable
    type.

    Raises
    ------
    ColumnError
        If a column is missing, ambiguous or of an unsuitable type.
    """
    identity = settings.id_column
    for kind, column in (
        ("image", settings.image_column),
        ("label", settings.label_column),
        ("id", identity),
    ):
        if column is not None and (column != AUTO or kind == "id"):
            _check_unique(schema.names, column, kind)
    image, label = settings.image_column, settings.label_column
    if image == AUTO:
        image = find_column(
            schema.names,
            "image",
            IMAGE_NAMES,
            accepts=lambda name: _holds_images(schema.field(name)),
            suggests=lambda name: _holds_images(schema.field(name)),
            wrong_type=lambda name: _wrong_type(schema, name, "image"),
            is_text=lambda name: _is_text(schema, name),
            described=_described_as(features, "Image"),
        )
    if label == AUTO:
        label = find_column(
            schema.names,
            "label",
            LABEL_NAMES,
            accepts=lambda name: _holds_labels(schema.field(name)),
            suggests=lambda name: _suggests_labels(schema.field(name)),
            wrong_type=lambda name: _wrong_type(schema, name, "label"),
            is_text=lambda name: _is_text(schema, name),
            described=_described_as(features, "ClassLabel"),
            excluded={image, identity}
            | {name for name in schema.names if name.lower() in NEVER_LABELS},
        )
    if not _holds_images(schema.field(image)):
        raise ColumnError(_wrong_type(schema, image, "image"))
    if label is not None and not _holds_labels(schema.field(label)):
        raise ColumnError(_wrong_type(schema, label, "label"))
    if identity is not None and not holds_ids(schema.field(identity)):
        raise ColumnError(_wrong_type(schema, identity, "id"))
    return TableColumns(image, label, identity, class_names(features, label))


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """Return Hugging Face's description of the columns in a schema's metadata, or {}."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def distinct_labels(array: pa.Array) -> set[int | str]:
    """Return the labels that occur in a column.

    Invalid ones are left out, since their samples become rejects.
    """
    labels = (stored_label(value)[0] for value in storage_array(array).unique().to_pylist())
    return {label for label in labels if label is not None}


def split_of_rows(values: Iterable[object], what: str = "column", name: str = SPLIT_COLUMN) -> str:
    """Return the split that the values of a column, or of a field, name; "" if they name none.

    Raises
    ------
    ColumnError
        If they name several.
    """
    splits = sorted({split_of_value(name, value) for value in values} - {""})
    if len(splits) > 1:
        content = "rows" if what == "column" else "samples"
        raise ColumnError(
            f"{what} {name!r} has several splits ({', '.join(splits)}); write the "
            f"{content} of one split to files of their own, or drop the {what} to read all as one"
        )
    return splits[0] if splits else ""


_EXPECTED = {
    "image": "encoded bytes, struct<bytes, path> or lists of pixels (height, width or height, "
    "width, 3)",
    "label": "one number or name per sample; set source.label_column",
    "id": f"{ID_TYPES}; set source.id_column",
}


def _wrong_type(schema: pa.Schema, column: str, kind: str) -> str:
    return f"column {column!r} is {described(schema.field(column))}; expected {_EXPECTED[kind]}"


def _check_unique(names: Sequence[str], column: str, kind: str) -> None:
    """Raise ColumnError unless the table has exactly one column of this name."""
    count = names.count(column)
    if count != 1:
        state = f"there are {count} columns" if count else "there is no column"
        raise ColumnError(
            f"{state} {column!r}; columns are {', '.join(names[:20])}; set source.{kind}_column"
        )


def find_column(
    names: Sequence[str],
    kind: str,
    usual_names: Sequence[str],
    *,
    accepts: Callable[[str], bool],
    suggests: Callable[[str], bool],
    wrong_type: Callable[[str], str],
    is_text: Callable[[str], bool],
    described: Collection[str] = (),
    excluded: Collection[str | None] = (),
) -> str:
    """Return the column that `auto` takes.

    Parameters
    ----------
    names : sequence of str
        All columns.
    kind : {"image", "label"}
    usual_names : sequence of str
        Lower case, best first.
    accepts : callable
        Whether a column with a usual name can be taken, by its type.
    suggests : callable
        Whether the type alone suggests this kind of column, whatever its name.
    wrong_type : callable
        The message for a column with a usual name of an unsuitable type.
    is_text : callable
        Whether a column holds text, which can name images.
    described : collection of str
        Columns that Hugging Face's description gives this kind.
    excluded : collection
        Columns that are only taken by a usual name.

    Raises
    ------
    ColumnError
        If there is no candidate, or several and no reason to prefer one.
    """
    named = [
        name
        for usual in usual_names
        for name in sorted(names, key=lambda name: name != usual)
        if name.lower() == usual
    ]
    for name in named:
        _check_unique(names, name, kind)
        if accepts(name):
            return name
    candidates = [
        name
        for name in names
        if name not in excluded and names.count(name) == 1 and (suggests(name) or name in described)
    ]
    for choice in ([name for name in candidates if name in described], candidates):
        if len(choice) == 1:
            return choice[0]
    if candidates:
        raise ColumnError(
            f"several columns may hold {kind}s: {', '.join(candidates[:20])}; "
            f"set source.{kind}_column"
        )
    if named:
        raise ColumnError(wrong_type(named[0]))
    pointer = next((name for name in names if name.lower() in _POINTERS and is_text(name)), None)
    if kind == "image" and pointer is not None:
        raise ColumnError(
            f"no column holds images; {pointer!r} names files or addresses, which a table does not "
            "follow: write it as CSV (path, label), with the paths of downloaded files, and set "
            "source.uri to that"
        )
    raise ColumnError(
        f"no column is clearly the {kind}; columns are {', '.join(names[:20])}; "
        f"set source.{kind}_column"
    )


def _is_text(schema: pa.Schema, name: str) -> bool:
    return schema.names.count(name) == 1 and is_string(value_type(schema.field(name).type))


def _described_as(features: Features, kind: str) -> frozenset[str]:
    """Return the columns to which Hugging Face's description gives a kind (`_type`)."""
    return frozenset(
        name
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == kind
    )


def class_names(features: Features, column: str | None) -> tuple[str, ...] | None:
    """Return the class names of a ClassLabel column."""
    if column not in _described_as(features, "ClassLabel"):
        return None
    names = features[column].get("names")
    return tuple(str(name) for name in names) if isinstance(names, list) and names else None


def _holds_images(field: pa.Field) -> bool:
    return image_reader(field) is not None


def _holds_labels(field: pa.Field) -> bool:
    plain = value_type(field.type)
    return not stores_tensors(field) and (
        pt.is_integer(plain)
        or pt.is_floating(plain)
        or pt.is_decimal(plain)
        or pt.is_boolean(plain)
        or is_string(plain)
        or pt.is_null(plain)
    )


def _suggests_labels(field: pa.Field) -> bool:
    type = field.type
    coded = is_dictionary(type) and _holds_labels(field)  # not a dictionary of images
    return pt.is_integer(type) or pt.is_boolean(type) or coded
