"""Arrow IPC streams with random access: record batches are found by their headers and loaded one at a time.

pyarrow reads a stream front to back and whole. Here the headers alone are walked (Apache Arrow, columnar format, section
"Encapsulated message format"; flatbuffers of Message.fbs), so that a batch can be counted without its body, and read from its
byte offset. Everything that is read of a header is checked: a damaged file raises `Damage`, and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.types as pt

from raypipe.storage import Reader

SCHEMA, DICTIONARY, BATCH = 1, 2, 3
LARGEST_HEADER = 1 << 26
"""Bytes of a message without its body; a larger one is damage."""
_CONTINUATION = b"\xff\xff\xff\xff"


class Damage(ValueError):
    """What is wrong with a stream, in words."""


@dataclass(frozen=True)
class Message:
    """One message of a stream.

    kind     SCHEMA, DICTIONARY or BATCH
    offset   byte at which it begins
    body     byte at which its body begins
    stop     byte at which the next message begins; may lie beyond the end of a file that is cut off
    rows     of a record batch
    buffers  (offset within the body, bytes) of each buffer of a record batch that is not compressed, else None
    """

    kind: int
    offset: int
    body: int
    stop: int
    rows: int = 0
    buffers: tuple[tuple[int, int], ...] | None = None


class ArrowStream:
    """An Arrow IPC stream. Raises Damage, and storage faults, when it is made."""

    def __init__(self, stored: Reader) -> None:
        self._stored = stored
        self._size = stored.seek(0, 2)
        self._dictionaries: list[bytes] = []
        first = next(self._messages(0), None)
        if first is None or first.kind != SCHEMA:
            raise Damage("it does not begin with a schema")
        self._head, self._first = self._read(first), first.stop
        try:
            self.schema: pa.Schema = pa.ipc.read_schema(pa.py_buffer(self._head))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise Damage(f"its schema cannot be read: {error}") from None
        self.has_dictionaries = False

    def batches(self, offset: int = 0) -> Iterator[Message]:
        """The record batches from a message at `offset` on; 0 is the first. Raises Damage where no more can be found.

        A stream ends with a marker; one without it is damaged after its last batch. Of a batch that is cut off, there is the
        message before Damage is raised.
        """
        for message in self._messages(offset or self._first):
            if message.kind == DICTIONARY:
                self.has_dictionaries = True
                self._dictionaries.append(self._read(message))
            elif message.kind == BATCH:
                yield message
            else:
                raise Damage(f"a second schema at byte {message.offset}")

    def load(self, message: Message) -> pa.RecordBatch:
        """A record batch, checked throughout. Raises Damage."""
        data = self._read(message)
        try:
            if self._dictionaries:
                whole = b"".join((self._head, *self._dictionaries, data))
                batch = pa.ipc.open_stream(pa.BufferReader(whole)).read_next_batch()
            else:
                batch = pa.ipc.read_record_batch(
                    pa.ipc.read_message(pa.py_buffer(data)), self.schema
                )
            batch.validate(full=True)  # offsets out of bounds would be read without a check
        except (pa.ArrowException, OSError, ValueError, StopIteration) as error:
            raise Damage(f"damaged record batch at byte {message.offset}: {error}") from None
        if batch.num_rows != message.rows:
            raise Damage(
                f"damaged record batch at byte {message.offset}: {batch.num_rows} rows, not {message.rows}"
            )
        return batch

    def column(self, message: Message, name: str) -> pa.Array:
        """One column of a record batch, where possible without the rest of it. Raises Damage."""
        position = self.schema.get_field_index(name)
        field = self.schema.field(position)
        counts = [_buffers(self.schema.field(before).type) for before in range(position)]
        own = _buffers(field.type)
        simple = (
            pt.is_primitive(field.type)
            or pt.is_string(field.type)
            or pt.is_large_string(field.type)
        )
        if not simple or own is None or None in counts or message.buffers is None:
            return self.load(message).column(position)
        first = sum(count or 0 for count in counts)
        chosen = message.buffers[first : first + own]
        if len(chosen) < own:
            raise Damage(f"damaged record batch at byte {message.offset}: too few buffers")
        buffers = [
            pa.py_buffer(self._bytes(message.body + start, length)) if length else None
            for start, length in chosen
        ]
        if field.type == pa.string() or field.type == pa.large_string():
            buffers[2] = buffers[2] or pa.py_buffer(b"")
        try:
            array = pa.Array.from_buffers(field.type, message.rows, buffers)
            array.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise Damage(f"damaged record batch at byte {message.offset}: {error}") from None
        return array

    def _messages(self, position: int) -> Iterator[Message]:
        while True:
            start = self._bytes(position, 8)
            if start[:4] != _CONTINUATION:
                raise Damage(f"no message at byte {position}")
            (length,) = struct.unpack_from("<i", start, 4)
            if length == 0:
                return
            if not 0 < length <= LARGEST_HEADER:
                raise Damage(f"no message at byte {position}")
            message = _message(self._bytes(position + 8, length), position, position + 8 + length)
            yield message
            position = message.stop

    def _read(self, message: Message) -> bytes:
        return self._bytes(message.offset, message.stop - message.offset)

    def _bytes(self, position: int, length: int) -> bytes:
        if position + length > self._size:
            raise Damage(
                f"it is cut off: {self._size} bytes, and there should be more than {position + length - 1}"
            )
        self._stored.seek(position)
        data = self._stored.read(length)
        if len(data) != length:
            raise Damage(f"it is cut off at byte {position + len(data)}")
        return data


def _message(header: bytes, offset: int, body: int) -> Message:
    """Message from its flatbuffer. Raises Damage where it is none."""
    try:
        root = _Table(header, struct.unpack_from("<I", header)[0])
        kind, length = root.number(1, "<B"), root.number(3, "<q")
        if kind not in {SCHEMA, DICTIONARY, BATCH} or not 0 <= length < 1 << 50:
            raise Damage(f"an unknown message at byte {offset}")
        if kind != BATCH:
            return Message(kind, offset, body, body + length)
        batch = root.table(2)
        rows, nodes, buffers = batch.number(0, "<q"), batch.pairs(1), batch.pairs(2)
        compressed = batch.place(3) > 0
    except (struct.error, IndexError) as error:
        raise Damage(f"a damaged message at byte {offset}: {error}") from None
    # numbers that belong together are compared, since nothing else says that they are true
    if not nodes or any(count != rows for count, _ in nodes[:1]) or not 0 <= rows <= length:
        raise Damage(f"a damaged message at byte {offset}: {rows} rows in {length} bytes")
    if any(not 0 <= begin <= begin + size <= length for begin, size in buffers):
        raise Damage(f"a damaged message at byte {offset}: a buffer beyond its body")
    return Message(BATCH, offset, body, body + length, rows, None if compressed else buffers)


class _Table:
    """A table of a flatbuffer. Raises struct.error or IndexError for what is out of bounds."""

    def __init__(self, data: bytes, position: int) -> None:
        self._data, self._position = data, position
        self._fields = position - struct.unpack_from("<i", data, self._in(position))[0]
        (self._size,) = struct.unpack_from("<H", data, self._in(self._fields))

    def place(self, field: int) -> int:
        """Where the value of a field is; 0 where the field is left out."""
        entry = 4 + 2 * field
        if entry + 2 > self._size:
            return 0
        (relative,) = struct.unpack_from("<H", self._data, self._in(self._fields + entry))
        return self._position + relative if relative else 0

    def number(self, field: int, format: str) -> int:
        place = self.place(field)
        return int(struct.unpack_from(format, self._data, place)[0]) if place else 0

    def table(self, field: int) -> _Table:
        return _Table(self._data, self._target(field))

    def pairs(self, field: int) -> tuple[tuple[int, int], ...]:
        """A vector of structs of two 64-bit numbers."""
        if not self.place(field):
            return ()
        start = self._target(field)
        (count,) = struct.unpack_from("<I", self._data, start)
        if 16 * count > len(self._data):
            raise IndexError("a vector beyond the message")
        values = struct.unpack_from(f"<{2 * count}q", self._data, start + 4)
        return tuple(zip(values[::2], values[1::2], strict=True))

    def _target(self, field: int) -> int:
        place = self.place(field)
        if not place:
            raise IndexError("a field is left out")
        return self._in(place + int(struct.unpack_from("<I", self._data, place)[0]))

    def _in(self, position: int) -> int:
        if not 0 <= position < len(self._data):
            raise IndexError("a position beyond the message")
        return position


def _buffers(type: pa.DataType) -> int | None:
    """How many buffers a column of a type has in a record batch, those of nested columns included; None where it cannot be told."""
    if isinstance(type, pa.BaseExtensionType):
        return _buffers(type.storage_type)
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
        inner, base = [_buffers(type.field(number).type) for number in range(type.num_fields)], 1
    elif pt.is_fixed_size_list(type):
        inner, base = [_buffers(type.value_type)], 1
    elif pt.is_list(type) or pt.is_large_list(type):
        inner, base = [_buffers(type.value_type)], 2
    else:
        return None
    return None if None in inner else base + sum(count or 0 for count in inner)
