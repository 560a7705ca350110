"""Parse `tf.train.Example`, the protobuf message in which TFRecord files hold a sample.

Only the parts that a sample needs are read, without TensorFlow and without a protobuf package:

    Example  = {1: Features}           SequenceExample = {1: Features (context), 2: ...}
    Features = {1: repeated {1: name, 2: Feature}}
    Feature  = {1: {1: bytes...}} or {2: {1: float...}} or {3: {1: int64...}}
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

Values = list[bytes] | list[float] | list[int]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class NotAnExample(ValueError):
    """The content of a record is not an Example."""


def parse_example(record: memoryview) -> dict[str, Values]:
    """Return the features of an Example by name. Bytes are copied, in the order of the record.

    Raises
    ------
    NotAnExample
    """
    try:
        return {
            name: values
            for number, features in _fields(record)
            if number == 1 and isinstance(features, memoryview)
            for name, values in _features(features)
        }
    except (IndexError, struct.error, UnicodeDecodeError):
        raise NotAnExample("the record is not a tf.train.Example") from None


def _features(content: memoryview) -> Iterator[tuple[str, Values]]:
    for number, entry in _fields(content):
        if number != 1 or not isinstance(entry, memoryview):
            continue
        name = ""
        values: Values = list[bytes]()
        for part, value in _fields(entry):
            if part == 1 and isinstance(value, memoryview):
                name = str(value, "utf-8")
            elif part == 2 and isinstance(value, memoryview):
                values = _values(value)
        yield name, values


def _values(feature: memoryview) -> Values:
    """Return the values of a Feature; [] if it has none."""
    for kind, content in _fields(feature):
        if not isinstance(content, memoryview):
            continue
        items = [item for number, item in _fields(content) if number == 1]
        if kind == 1:
            return [bytes(item) for item in items if isinstance(item, memoryview)]
        if kind == 2:
            return [value for item in items for value in _floats(item)]
        if kind == 3:
            return [value for item in items for value in _integers(item)]
    return list[bytes]()


def _floats(item: memoryview | int) -> Iterator[float]:
    """Yield numbers, packed or single."""
    if isinstance(item, memoryview):
        yield from (value for (value,) in struct.iter_unpack("<f", item))
    else:
        yield struct.unpack("<f", struct.pack("<I", item))[0]


def _integers(item: memoryview | int) -> Iterator[int]:
    """Yield signed numbers of 64 bits, packed or single."""
    if isinstance(item, int):
        yield _signed(item)
        return
    position = 0
    while position < len(item):
        value, position = _varint(item, position)
        yield _signed(value)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Yield number and content of each field of a message."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if kind == _BYTES:
            length, position = _varint(message, position)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise NotAnExample("the record is not a tf.train.Example")
        content = message[position : position + length]
        if len(content) < length:
            raise NotAnExample("the record is not a tf.train.Example: a field is cut off")
        position += length
        yield number, content if kind == _BYTES else int.from_bytes(content, "little")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return a number and the position after it."""
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise NotAnExample("the record is not a tf.train.Example")
