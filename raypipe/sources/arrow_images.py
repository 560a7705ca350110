"""Images in Arrow columns: which types can hold them, and how one value is read.

A column holds encoded bytes (binary, or lists of 8-bit numbers), Hugging Face's
struct<bytes, path>, or pixels: nested lists, or arrays of an extension type such as those of Ray.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from raypipe.sources.arrow_types import (
    Tensors,
    is_bytes,
    is_dictionary,
    is_list,
    stores_tensors,
    tensors,
    value_type,
)
from raypipe.sources.values import printable

ImageOrReason = tuple[bytes | np.ndarray | None, str]
"""Encoded bytes or pixels, and ""; or None and why there is no image."""
ReadByPath = Callable[[str], bytes | None]
"""Returns an image that a table holds only by its path; None if it cannot be read."""
ReadImage = Callable[[pa.Scalar], ImageOrReason]


def image_reader(field: pa.Field, by_path: ReadByPath | None = None) -> ReadImage | None:
    """Return the function that reads one value of an image column.

    Its argument is a value of the column's `encoded_array`.

    Parameters
    ----------
    field : pyarrow.Field
        The column, with the metadata that can name an extension type.
    by_path : callable, optional
        Reads images of which a struct holds only the path.

    Returns
    -------
    callable or None
        None if a column of this type cannot hold images.
    """
    read = _value_reader(field, value_type(field.type), by_path)
    if read is None or not is_dictionary(field.type):
        return read
    return lambda scalar: read(scalar.value)


def _value_reader(
    field: pa.Field, type: pa.DataType, by_path: ReadByPath | None
) -> ReadImage | None:
    if stores_tensors(field):
        arrays = tensors(field)
        if arrays is None:
            return None
        shape = arrays.array_shape
        usable = shape is None or len(shape) == 2 or (len(shape) == 3 and shape[2] in {1, 3})
        if not (usable and pt.is_integer(arrays.value)):
            return None
        return functools.partial(_from_tensor, arrays)
    if is_bytes(type):
        return _from_bytes
    if (
        pt.is_struct(type)
        and type.get_field_index("bytes") >= 0
        and is_bytes(type.field("bytes").type)
    ):
        return lambda scalar: _from_struct(scalar, by_path)
    if is_list(type) and (pt.is_uint8(type.value_type) or pt.is_int8(type.value_type)):
        # a fixed number of bytes would be an image only by accident
        return None if pt.is_fixed_size_list(type) else _from_byte_list
    depth, inner_type = 0, type
    while is_list(inner_type):
        depth, inner_type = depth + 1, inner_type.value_type
    return _from_nested_lists if depth in {2, 3} and pt.is_integer(inner_type) else None


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
    return checked_pixels(numbers.reshape(shape))


def _from_tensor(arrays: Tensors, scalar: pa.Scalar) -> ImageOrReason:
    """Return a stored array of whole numbers 0..255 as pixels, uint8."""
    if not scalar.is_valid:
        return None, "no image: null"
    shape, values = arrays.shape, scalar
    if shape is None:
        if not (scalar["data"].is_valid and scalar["shape"].is_valid):
            return None, "no image: null"
        shape, values = tuple(scalar["shape"].as_py()), scalar["data"]
    if values.values.null_count or None in shape:
        return None, "pixels are null"
    numbers = np.asarray(values.values)
    if min(shape, default=0) < 0 or len(numbers) != math.prod(shape):
        return None, f"{len(numbers)} numbers are stored for the shape {list(shape)}"
    image = numbers.reshape(shape)
    if arrays.order is not None:
        if sorted(arrays.order) != list(range(image.ndim)):
            return None, f"axes {list(arrays.order)} do not fit the shape {list(shape)}"
        image = image.transpose(arrays.order)
    return checked_pixels(image)


def checked_pixels(image: np.ndarray) -> ImageOrReason:
    """Check an array of pixels; a single channel is dropped."""
    shape = list(image.shape)
    if image.ndim not in {2, 3} or (image.ndim == 3 and shape[2] not in {1, 3}):
        return None, f"pixels have shape {shape}, not [height, width] or [height, width, 3]"
    if image.size == 0 or image.min() < 0 or image.max() > 255:
        return None, "pixels are not within 0..255" if image.size else "no pixels"
    pixels = np.ascontiguousarray(image.astype(np.uint8))
    return (pixels[:, :, 0] if image.ndim == 3 and shape[2] == 1 else pixels), ""
