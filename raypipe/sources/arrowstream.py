"""Arrow IPC streams with random access to their record batches.

pyarrow reads a stream as a whole, from front to back. This module walks the message headers only
(Apache Arrow, columnar format, section "Encapsulated message format"; flatbuffers of Message.fbs),
so that the rows of a batch can be counted without reading its body, and a batch can be read from
its byte offset. Everything read from a header is checked: a damaged file raises `DamagedStream` and
nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.types as pt

from raypipe.storage import Reader

SCHEMA, DICTIONARY, BATCH = 1, 2, 3
MAX_HEADER_BYTES = 1 << 26
"""Bytes of a message without its body; a larger one is taken for damage."""
_CONTINUATION = b"\xff\xff\xff\xff"


class DamagedStream(ValueError):
    """The stream is damaged; the message says how."""


@dataclass(frozen=True)
class Message:
    """One message of a stream.

    Attributes
    ----------
    kind : int
        SCHEMA, DICTIONARY or BATCH.
    offset : int
        Byte at which the message begins.
    body : int
        Byte at which its body begins.
    stop : int
        Byte at which the next message begins. Beyond the end of the file if it is cut off.
    rows : int
        Rows of a record batch.
    buffers : tuple of (int, int) or None
        Offset within the body and bytes of each buffer of an uncompressed record batch.
    """

    kind: int
    offset: int
    body: int
    stop: int
    rows: int = 0
    buffers: tuple[tuple[int, int], ...] | None = None


class ArrowStream:
    """An Arrow IPC stream.

    The constructor reads the schema. It raises DamagedStream, and storage faults.
    """

    def __init__(self, stored: Reader) -> None:
        self._stored = stored
        self._size = stored.seek(0, 2)
        self._dictionaries: list[bytes] = []
        first = next(self._messages(0), None)
        if first is None or first.kind != SCHEMA:
            raise DamagedStream("it does not begin with a schema")
        self._head, self._first = self._read(first), first.stop
        try:
            self.schema: pa.Schema = pa.ipc.read_schema(pa.py_buffer(self._head))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DamagedStream(f"its schema cannot be read: {error}") from None
        self.has_dictionaries = False

    def batches(self, offset: int = 0) -> Iterator[Message]:
        """Yield the record batches from the message at byte `offset` on; 0 is the first message.

        Raises DamagedStream at the point where no further message can be found. A stream ends with
        a marker; one without it is damaged after its last batch. A batch whose body is cut off is
        still yielded before DamagedStream is raised.
        """
        for message in self._messages(offset or self._first):
            if message.kind == DICTIONARY:
                self.has_dictionaries = True
                self._dictionaries.append(self._read(message))
            elif message.kind == BATCH:
                yield message
            else:
                raise DamagedStream(f"a second schema at byte {message.offset}")

    def load(self, message: Message) -> pa.RecordBatch:
        """Return a fully validated record batch. Raises DamagedStream."""
        data = self._read(message)
        try:
            if self._dictionaries:
                whole = b"".join((self._head, *self._dictionaries, data))
                batch = pa.ipc.open_stream(pa.BufferReader(whole)).read_next_batch()
            else:
                batch = pa.ipc.read_record_batch(
                    pa.ipc.read_message(pa.py_buffer(data)), self.schema
                )
            batch.validate(full=True)  # pyarrow would follow offsets out of bounds unchecked
        except (pa.ArrowException, OSError, ValueError, StopIteration) as error:
            raise _damaged_batch(message, error) from None
        if batch.num_rows != message.rows:
            raise _damaged_batch(message, f"{batch.num_rows} rows, not {message.rows}")
        return batch

    def column(self, message: Message, name: str) -> pa.Array:
        """Return one column of a record batch, if possible without reading the others.

        Raises DamagedStream.
        """
        position = self.schema.get_field_index(name)
        field = self.schema.field(position)
        counts = [_buffer_count(self.schema.field(before).type) for before in range(position)]
        own = _buffer_count(field.type)
        simple = (
            pt.is_primitive(field.type)
            or pt.is_string(field.type)
            or pt.is_large_string(field.type)
        )
        if not simple or own is None or None in counts or message.buffers is None:
            return self.load(message).column(position)
        first = sum(count or 0 for count in counts)
        own_buffers = message.buffers[first : first + own]
        if len(own_buffers) < own:
            raise _damaged_batch(message, "too few buffers")
        buffers = [
            pa.py_buffer(self._bytes(message.body + start, length)) if length else None
            for start, length in own_buffers
        ]
        if field.type == pa.string() or field.type == pa.large_string():
            buffers[2] = buffers[2] or pa.py_buffer(b"")
        try:
            array = pa.Array.from_buffers(field.type, message.rows, buffers)
            array.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _damaged_batch(message, error) from None
        return array

    def _messages(self, position: int) -> Iterator[Message]:
        while True:
            start = self._bytes(position, 8)
            if start[:4] != _CONTINUATION:
                raise DamagedStream(f"no message at byte {position}")
            (length,) = struct.unpack_from("<i", start, 4)
            if length == 0:
                return
            if not 0 < length <= MAX_HEADER_BYTES:
                raise DamagedStream(f"no message at byte {position}")
            message = _message(self._bytes(position + 8, length), position, position + 8 + length)
            yield message
            position = message.stop

    def _read(self, message: Message) -> bytes:
        return self._bytes(message.offset, message.stop - message.offset)

    def _bytes(self, position: int, length: int) -> bytes:
        if position + length > self._size:
            raise DamagedStream(
                f"it is cut off: {self._size} bytes instead of more than {position + length - 1}"
            )
        self._stored.seek(position)
        data = self._stored.read(length)
        if len(data) != length:
            raise DamagedStream(f"it is cut off at byte {position + len(data)}")
        return data


def _message(header: bytes, offset: int, body: int) -> Message:
    """Parse a message from its flatbuffer.

    `offset` and `body` are the bytes of the file at which the message and its body begin. Raises
    DamagedStream if it is not a valid message.
    """
    try:
        root = _Table(header, struct.unpack_from("<I", header)[0])
        kind, length = root.number(1, "<B"), root.number(3, "<q")
        if kind not in {SCHEMA, DICTIONARY, BATCH} or not 0 <= length < 1 << 50:
            raise DamagedStream(f"an unknown message at byte {offset}")
        if kind != BATCH:
            return Message(kind, offset, body, body + length)
        batch = root.table(2)
        rows, nodes, buffers = batch.number(0, "<q"), batch.pairs(1), batch.pairs(2)
        compressed = batch.position(3) > 0
    except (struct.error, IndexError) as error:
        raise DamagedStream(f"a damaged message at byte {offset}: {error}") from None
    # A message has no checksum: numbers that depend on one another are compared instead.
    if not nodes or any(count != rows for count, _ in nodes[:1]) or not 0 <= rows <= length:
        raise DamagedStream(f"a damaged message at byte {offset}: {rows} rows in {length} bytes")
    if any(not 0 <= begin <= begin + size <= length for begin, size in buffers):
        raise DamagedStream(f"a damaged message at byte {offset}: a buffer beyond its body")
    return Message(BATCH, offset, body, body + length, rows, None if compressed else buffers)


def _damaged_batch(message: Message, problem: object) -> DamagedStream:
    return DamagedStream(f"damaged record batch at byte {message.offset}: {problem}")


class _Table:
    """A table of a flatbuffer. Raises struct.error or IndexError for positions out of bounds."""

    def __init__(self, data: bytes, position: int) -> None:
        self._data, self._position = data, position
        self._fields = position - struct.unpack_from("<i", data, self._checked(position))[0]
        (self._size,) = struct.unpack_from("<H", data, self._checked(self._fields))

    def position(self, field: int) -> int:
        """Position of the value of a field; 0 if the field is absent."""
        entry = 4 + 2 * field
        if entry + 2 > self._size:
            return 0
        (relative,) = struct.unpack_from("<H", self._data, self._checked(self._fields + entry))
        return self._position + relative if relative else 0

    def number(self, field: int, format: str) -> int:
        position = self.position(field)
        return int(struct.unpack_from(format, self._data, position)[0]) if position else 0

    def table(self, field: int) -> _Table:
        return _Table(self._data, self._target(field))

    def pairs(self, field: int) -> tuple[tuple[int, int], ...]:
        """Return a vector of structs of two 64-bit numbers each."""
        if not self.position(field):
            return ()
        start = self._target(field)
        (count,) = struct.unpack_from("<I", self._data, start)
        if 16 * count > len(self._data):
            raise IndexError("a vector beyond the message")
        values = struct.unpack_from(f"<{2 * count}q", self._data, start + 4)
        return tuple(zip(values[::2], values[1::2], strict=True))

    def _target(self, field: int) -> int:
        position = self.position(field)
        if not position:
            raise IndexError("a field is missing")
        return self._checked(position + int(struct.unpack_from("<I", self._data, position)[0]))

    def _checked(self, position: int) -> int:
        if not 0 <= position < len(self._data):
            raise IndexError("a position beyond the message")
        return position


def _buffer_count(type: pa.DataType) -> int | None:
    """Count the buffers of a column in a record batch, including those of nested columns.

    None if this module does not know the type's layout.
    """
    if isinstance(type, pa.BaseExtensionType):
        return _buffer_count(type.storage_type)
    if pt.is_null(type):
        return 0
    if (
        pt.is_primitive(type)
        or pt.is_fixed_size_binary(type)
        or pt.is_dictionary(type)
        or pt.is_decimal(type)
    ):
        return 2
    if (
        pt.is_binary(type)
        or pt.is_string(type)
        or pt.is_large_binary(type)
        or pt.is_large_string(type)
    ):
        return 3
    if pt.is_struct(type):
        inner, base = (
            [_buffer_count(type.field(number).type) for number in range(type.num_fields)],
            1,
        )
    elif pt.is_fixed_size_list(type):
        inner, base = [_buffer_count(type.value_type)], 1
    elif pt.is_list(type) or pt.is_large_list(type):
        inner, base = [_buffer_count(type.value_type)], 2
    else:
        return None
    return None if None in inner else base + sum(count or 0 for count in inner)
