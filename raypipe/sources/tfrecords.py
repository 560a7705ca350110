"""Read the records of a TFRecord file, plain or compressed, and check their checksums.

A record is its length (8 bytes, little-endian), the masked CRC-32C of the length, the content, and
the masked CRC-32C of the content. Without a valid length, the next record cannot be found.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from raypipe.sources.crc32c import masked_crc32c
from raypipe.sources.values import damage_reason
from raypipe.storage import Reader

HEADER_BYTES, FOOTER_BYTES = 12, 4
MAX_RECORD_BYTES = 1 << 30
"""Longer records are rejected, not read."""
MAX_FILE_BYTES = 1 << 50
"""More than any file has."""
STEP_BYTES = 1 << 20
"""Bytes read at a time, so that a false length takes no memory."""
PACKED_BYTES = 64 << 10
"""Compressed bytes read at a time. What is read ahead counts in the estimate of a preview."""


class BrokenFile(ValueError):
    """The file cannot be read beyond this record."""


class Record(NamedTuple):
    """One record.

    Attributes
    ----------
    offset : int
        Byte at which it begins, in the uncompressed file.
    content : bytes or None
        None if it was not loaded or is damaged.
    reason : str
        Why it is damaged; "" if it is not.
    """

    offset: int
    content: bytes | None
    reason: str


def is_header(head: bytes) -> bool:
    """Return whether bytes begin with the header of a record."""
    return len(head) >= HEADER_BYTES and _checked(head[:8], head[8:HEADER_BYTES])


def is_compressed(head: bytes) -> bool:
    """Return whether the first bytes of a file are those of gzip or zlib, not a record."""
    return _decompressor(head) is not None and not is_header(head)


def read_records(
    stored: Reader, offset: int, load: Callable[[int], bool], first: int = 0
) -> Iterator[Record]:
    """Yield the records from a byte on.

    Parameters
    ----------
    stored : Reader
        The file.
    offset : int
        Where record `first` begins. 0 for a compressed file.
    load : callable
        Whether to load the record with this number.
    first : int
        Number of the record at `offset`.

    Raises
    ------
    BrokenFile
        If the file is cut off or damaged so that the next record cannot be found.
    """
    stored.seek(0)
    head = stored.read(HEADER_BYTES)
    stored.seek(offset)
    file: IO[bytes] = stored
    if is_compressed(head):
        file = _decompressor(head)(stored)  # type: ignore[misc]
    number = first
    try:
        while header := _read(file, HEADER_BYTES):
            yield _record(file, header, offset, load(number))
            offset += HEADER_BYTES + int.from_bytes(header[:8], "little") + FOOTER_BYTES
            number += 1
    except (OSError, EOFError, zlib.error) as error:
        reason = damage_reason(stored, error)
        raise BrokenFile(f"the compression is damaged: {reason}") from None


def _record(file: IO[bytes], header: bytes, offset: int, load: bool) -> Record:
    """Read the record that a header begins."""
    if len(header) < HEADER_BYTES:
        raise BrokenFile("cut off in the middle of a record")
    if not is_header(header):
        raise BrokenFile("wrong checksum (CRC-32C) of a record's length")
    length = int.from_bytes(header[:8], "little")
    if length > MAX_FILE_BYTES:
        raise BrokenFile(f"a record claims {length:,} bytes")
    too_long = length > MAX_RECORD_BYTES
    if too_long or not load:
        _skip(file, length + FOOTER_BYTES)
        reason = f"{length:,} bytes; at most {MAX_RECORD_BYTES:,} are read" if too_long else ""
        return Record(offset, None, reason)
    content = _read(file, length)
    footer = _read(file, FOOTER_BYTES)
    if len(content) + len(footer) < length + FOOTER_BYTES:
        raise BrokenFile("cut off in the middle of a record")
    if not _checked(content, footer):
        return Record(offset, None, "wrong checksum (CRC-32C) of the record")
    return Record(offset, content, "")


def _checked(content: bytes, crc: bytes) -> bool:
    return masked_crc32c(content) == int.from_bytes(crc, "little")


def _read(file: IO[bytes], length: int) -> bytes:
    """Read up to `length` bytes; fewer only at the end of the file."""
    parts, left = [], length
    while left and (part := file.read(min(left, STEP_BYTES))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _skip(file: IO[bytes], length: int) -> None:
    """Skip bytes. Raises BrokenFile if the file ends before them."""
    if isinstance(file, Reader):
        last = file.seek(file.tell() + length - 1)
        if last >= 0 and not file.read(1):
            raise BrokenFile("cut off in the middle of a record")
        return
    while length:
        part = file.read(min(length, STEP_BYTES))
        if not part:
            raise BrokenFile("cut off in the middle of a record")
        length -= len(part)


class _Zlib(io.RawIOBase):
    """A zlib stream as a file that is read forward."""

    def __init__(self, stored: Reader) -> None:
        self._stored, self._inflate = stored, zlib.decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._inflate.eof:
            data = self._inflate.unconsumed_tail or self._stored.read(PACKED_BYTES)
            part = self._inflate.decompress(data, len(buffer))
            if part:
                buffer[: len(part)] = part
                return len(part)
            if not data:
                raise EOFError("it ends in the middle of the stream")
        return 0


def _decompressor(head: bytes) -> Callable[[Reader], IO[bytes]] | None:
    """Return what opens a compressed file with these first bytes; None for others."""
    if head.startswith(b"\x1f\x8b"):
        return lambda stored: gzip.GzipFile(fileobj=stored)  # type: ignore[return-value]
    if head[:1] == b"\x78" and len(head) > 1 and int.from_bytes(head[:2], "big") % 31 == 0:
        return lambda stored: io.BufferedReader(_Zlib(stored), PACKED_BYTES)
    return None
