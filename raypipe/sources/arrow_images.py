"""Images in Arrow columns: which types can hold them, and how one value is read.

A column holds encoded bytes (binary, or lists of 8-bit numbers), Hugging Face's
struct<bytes, path>, or pixels as nested lists.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from raypipe.sources.values import printable

ImageOrReason = tuple[bytes | np.ndarray | None, str]
"""Encoded bytes or pixels, and ""; or None and why there is no image."""
ReadByPath = Callable[[str], bytes | None]
"""Returns an image that a table holds only by its path; None if it cannot be read."""
ReadImage = Callable[[pa.Scalar], ImageOrReason]


def image_reader(type: pa.DataType, by_path: ReadByPath | None = None) -> ReadImage | None:
    """Return the function that reads one value of an image column.

    Its argument is a value of the column's `storage_array`.

    Parameters
    ----------
    type : pyarrow.DataType
        Type of the column.
    by_path : callable, optional
        Reads images of which a struct holds only the path.

    Returns
    -------
    callable or None
        None if a column of this type cannot hold images.
    """
    if isinstance(type, pa.BaseExtensionType):
        return image_reader(type.storage_type, by_path)
    if is_bytes(type):
        return _from_bytes
    if (
        pt.is_struct(type)
        and type.get_field_index("bytes") >= 0
        and is_bytes(type.field("bytes").type)
    ):
        return lambda scalar: _from_struct(scalar, by_path)
    if (pt.is_list(type) or pt.is_large_list(type)) and (
        pt.is_uint8(type.value_type) or pt.is_int8(type.value_type)
    ):
        return _from_byte_list
    depth, inner_type = 0, type
    while is_list(inner_type):
        depth, inner_type = depth + 1, inner_type.value_type
    return _from_nested_lists if depth in {2, 3} and pt.is_integer(inner_type) else None


def storage_array(array: pa.Array) -> pa.Array:
    """Return the array without extension type and dictionary encoding.

    Scalars of an extension type run code of the extension's author, so they are avoided.
    """
    while isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    return array.dictionary_decode() if pt.is_dictionary(array.type) else array


def value_type(type: pa.DataType) -> pa.DataType:
    """Return the type of the values of a `storage_array`."""
    while isinstance(type, pa.BaseExtensionType):
        type = type.storage_type
    return type.value_type if pt.is_dictionary(type) else type


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
    return pt.is_list(type) or pt.is_large_list(type) or pt.is_fixed_size_list(type)


def _from_bytes(scalar: pa.Scalar) -> ImageOrReason:
    return (scalar.as_py(), "") if scalar.is_valid else (None, "no image: null")


def _from_struct(scalar: pa.StructScalar, by_path: ReadByPath | None) -> ImageOrReason:
    if not scalar.is_valid:
        return None, "no image: null"
    if scalar["bytes"].is_valid:
        return scalar["bytes"].as_py(), ""
    path = scalar["path"].as_py() if scalar.type.get_field_index("path") >= 0 else None
    if not path:
        return None, "no image: bytes are null"
    content = by_path(path) if by_path is not None else None
    if content is None:
        return None, f"no image: the file holds only its path, {printable(path)!r}"
    return content, ""


def _from_byte_list(scalar: pa.Scalar) -> ImageOrReason:
    """Return encoded bytes stored as a list of 8-bit numbers, signed or not."""
    if not scalar.is_valid:
        return None, "no image: null"
    if scalar.values.null_count:
        return None, "bytes are null"
    return np.asarray(scalar.values).tobytes(), ""


def _from_nested_lists(scalar: pa.Scalar) -> ImageOrReason:
    """Nested lists of whole numbers 0..255 -> uint8 [height, width] or [height, width, 3]."""
    if not scalar.is_valid:
        return None, "no image: null"
    values, shape = scalar.values, [len(scalar.values)]
    while is_list(values.type):
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
