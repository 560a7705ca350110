"""Arrow types as raypipe reads them: one meaning for every layout, encoding and extension type.

Text, bytes and lists have several layouts, any column can be encoded with a dictionary, and
extension types wrap others. A field of an extension type that nobody registered arrives as its
storage type, with the name of the extension in its metadata; Ray registers its types on import.
Both are read alike.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

UUID = "arrow.uuid"
FIXED_TENSORS = ("arrow.fixed_shape_tensor", "ray.data.arrow_tensor", "ray.data.arrow_tensor_v2")
"""Extensions that store each array as a flat list; all arrays of a column have one shape."""
RAGGED_TENSORS = ("arrow.variable_shape_tensor", "ray.data.arrow_variable_shaped_tensor")
"""Extensions that store each array as struct<data, shape>."""
ID_TYPES = "text or whole numbers"


@dataclass(frozen=True)
class Tensors:
    """How a column of arrays stores them.

    Attributes
    ----------
    value : pyarrow.DataType
        Type of the numbers.
    shape : tuple of int or None
        Shape of every stored array; None if each array has its own.
    order : tuple of int or None
        Axes of the stored array in the order of those of the array; None if they are the same.
    """

    value: pa.DataType
    shape: tuple[int, ...] | None
    order: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.value} arrays of different shapes"
        return f"{self.value} arrays of shape {list(self.array_shape or ())}"

    @property
    def array_shape(self) -> tuple[int, ...] | None:
        """Shape of every array, after its axes are reordered."""
        if self.shape is None or self.order is None:
            return self.shape
        return tuple(self.shape[axis] for axis in self.order)


def tensors(field: pa.Field) -> Tensors | None:
    """Return how a column stores arrays; None if it is no column of a known extension for them."""
    name, stated = _extension(field)
    storage = _storage(field.type)
    if name in FIXED_TENSORS and is_list(storage):
        # Ray states the shape alone
        stated = {"shape": stated} if isinstance(stated, list) else stated
        shape = _axes(stated, "shape")
        return Tensors(storage.value_type, shape, _axes(stated, "permutation")) if shape else None
    if (
        name in RAGGED_TENSORS
        and pt.is_struct(storage)
        and storage.get_field_index("data") >= 0
        and storage.get_field_index("shape") >= 0
        and is_list(storage.field("data").type)
    ):
        value = storage.field("data").type.value_type
        return Tensors(value, None, _axes(stated, "permutation"))
    return None


def stores_tensors(field: pa.Field) -> bool:
    """Return whether a column is of an extension for arrays, readable or not."""
    return _extension(field)[0] in FIXED_TENSORS + RAGGED_TENSORS


def described(field: pa.Field) -> str:
    """Return what a column holds, for messages."""
    arrays = tensors(field)
    if arrays is not None:
        return str(arrays)
    if stores_tensors(field):
        return (
            f"{_extension(field)[0]} without a readable shape (Ray 2.49 to 2.54 pickles it; write "
            "the files again with another version)"
        )
    return str(field.type)


def storage_array(array: pa.Array) -> pa.Array:
    """Return the array without extension type, dictionary encoding and layouts of views.

    Scalars of an extension type run code of the extension's author, so they are avoided.
    """
    array = encoded_array(array)
    return encoded_array(array.dictionary_decode()) if pt.is_dictionary(array.type) else array


def encoded_array(array: pa.Array) -> pa.Array:
    """Return the array as `storage_array` does, but with its dictionary encoding.

    A dictionary of images can be much larger when it is decoded.
    """
    while isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    return _plain_layout(array)


def value_type(type: pa.DataType) -> pa.DataType:
    """Return the type of the values of a `storage_array`."""
    type = _storage(type)
    return _without_views(_storage(type.value_type)) if pt.is_dictionary(type) else type


def is_dictionary(type: pa.DataType) -> bool:
    """Return whether an `encoded_array` of this type has a dictionary."""
    return pt.is_dictionary(_storage(type))


def is_string(type: pa.DataType) -> bool:
    """Return whether values are text, in any of Arrow's layouts."""
    return pt.is_string(type) or pt.is_large_string(type) or pt.is_string_view(type)


def is_bytes(type: pa.DataType) -> bool:
    """Return whether values are bytes, in any of Arrow's layouts."""
    return (
        pt.is_binary(type)
        or pt.is_large_binary(type)
        or pt.is_fixed_size_binary(type)
        or pt.is_binary_view(type)
    )


def is_list(type: pa.DataType) -> bool:
    """Return whether values are lists, in any of Arrow's layouts."""
    return (
        pt.is_list(type)
        or pt.is_large_list(type)
        or pt.is_fixed_size_list(type)
        or pt.is_list_view(type)
        or pt.is_large_list_view(type)
    )


def is_whole(type: pa.DataType) -> bool:
    """Return whether values are integers, or decimals without digits after the point."""
    return pt.is_integer(type) or (pt.is_decimal(type) and type.scale == 0)


def holds_ids(field: pa.Field) -> bool:
    """Return whether values have one text that can be a sample id; see `id_texts`."""
    plain = value_type(field.type)
    return _is_uuid(field) or is_whole(plain) or is_string(plain)


def id_texts(array: pa.Array, field: pa.Field) -> pa.Array:
    """Return ids as text, null for a missing one; the column must pass `holds_ids`.

    A whole number is the text of its digits, a UUID its usual form. Nothing passes through
    floating point: 2^53 + 1 stays what it is.
    """
    values = storage_array(array)
    if _is_uuid(field):
        return pa.array(
            [
                value if value is None else str(uuid.UUID(bytes=value))
                for value in values.to_pylist()
            ],
            pa.string(),
        )
    return pc.cast(values, pa.string())


def holds_vectors(field: pa.Field) -> bool:
    """Return whether values are lists of floating-point numbers; see `vectors`."""
    arrays, plain = tensors(field), value_type(field.type)
    if arrays is not None:
        # an axis of length 1 changes nothing; of two longer ones, the order would be a guess
        one = arrays.shape is None or sum(size != 1 for size in arrays.shape) <= 1
        return one and pt.is_floating(arrays.value)
    return not stores_tensors(field) and is_list(plain) and pt.is_floating(plain.value_type)


def vectors(array: pa.Array, field: pa.Field) -> pa.Array:
    """Return lists of numbers, null for a missing one; the column must pass `holds_vectors`.

    Raises pyarrow.ArrowInvalid if one array of several shapes has more than one axis.
    """
    values = storage_array(array)
    arrays = tensors(field)
    if arrays is None or arrays.shape is not None:
        return values
    sizes = pc.list_value_length(pc.struct_field(values, "shape"))
    if (pc.max(sizes).as_py() or 1) > 1:
        raise pa.ArrowInvalid("embeddings are arrays of more than one axis")
    return _plain_layout(pc.struct_field(values, "data"))


def _is_uuid(field: pa.Field) -> bool:
    plain = value_type(field.type)
    return (
        _extension(field)[0] == UUID and pt.is_fixed_size_binary(plain) and plain.byte_width == 16
    )


def _storage(type: pa.DataType) -> pa.DataType:
    while isinstance(type, pa.BaseExtensionType):
        type = type.storage_type
    return _without_views(type)


def _without_views(type: pa.DataType) -> pa.DataType:
    """Return the type with text, bytes and lists in the layouts that all of pyarrow supports."""
    if pt.is_string_view(type):
        return pa.large_string()
    if pt.is_binary_view(type):
        return pa.large_binary()
    if not is_list(type):
        return type
    inner = _without_views(type.value_type)
    viewed = pt.is_list_view(type) or pt.is_large_list_view(type)
    return pa.large_list(inner) if viewed or inner != type.value_type else type


def _plain_layout(array: pa.Array) -> pa.Array:
    """Return an array of the type `_without_views`."""
    plain = _without_views(array.type)
    if plain == array.type:
        return array
    if not is_list(array.type):
        return array.cast(plain)
    # pyarrow 26 casts views of lists to lists with one offset too few, so offsets are computed here
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), pa.int64())
    values = _plain_layout(array.flatten())
    return pa.LargeListArray.from_arrays(offsets, values, mask=pc.is_null(array))


def _extension(field: pa.Field) -> tuple[str, Any]:
    """Return the name of a field's extension and what its metadata state; "" without one."""
    if isinstance(field.type, pa.FixedShapeTensorType):
        order = field.type.permutation
        stated = {"shape": list(field.type.shape), "permutation": order and list(order)}
        return field.type.extension_name, stated
    if isinstance(field.type, pa.BaseExtensionType):
        name = field.type.extension_name
        # pyarrow 26 shows the metadata of its own type for arrays of several shapes only as text
        order = re.search(r"permutation=\[([0-9, ]+)\]", str(field.type))
        if name == RAGGED_TENSORS[0]:
            return name, {"permutation": order and [int(axis) for axis in order[1].split(",")]}
        known = name in FIXED_TENSORS + RAGGED_TENSORS
        return name, _json(field.type.__arrow_ext_serialize__()) if known else None
    metadata = field.metadata or {}
    name = metadata.get(b"ARROW:extension:name", b"").decode("utf-8", "replace")
    return name, _json(metadata.get(b"ARROW:extension:metadata", b""))


def _axes(stated: Any, name: str) -> tuple[int, ...] | None:
    values = stated.get(name) if isinstance(stated, dict) else None
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        return None
    return tuple(values)


def _json(metadata: bytes) -> Any:
    """Return what the metadata of an extension states; None for anything but JSON.

    Ray 2.49 to 2.54 pickled it, and a pickle of somebody else is not opened.
    """
    try:
        return json.loads(metadata)
    except ValueError:
        return None
