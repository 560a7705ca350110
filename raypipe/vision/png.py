"""Drop the chunks of a PNG that say nothing about its pixels.

Pillow reads text and colour profiles, with limits on their size, and rejects the whole image when a
limit is exceeded or such a chunk is damaged. The pixels of these images are fine: generators store
prompts of megabytes, editors whole histories.
"""

from __future__ import annotations

import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_KEPT = frozenset({b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"sBIT"})
"""Optional chunks that change what is decoded: transparency, orientation, frames."""
_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_ORIENTATION_KEYS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
"""Texts in which Pillow looks for the orientation."""
_MAX_TEXT = 1 << 20
"""Bytes of a text, decompressed, that Pillow accepts."""


def without_metadata(data: bytes) -> bytes:
    """Return a PNG without the chunks that do not matter; other data as they are.

    From the first chunk on whose length cannot be true, everything is kept: the decoder reports it.
    """
    if not data.startswith(SIGNATURE):
        return data
    kept = [data[: len(SIGNATURE)]]
    start = position = len(SIGNATURE)
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if end > len(data):
            break
        if not _matters(data, position, end):
            kept.append(data[start:position])
            start = end
        position = end
    if len(kept) == 1:
        return data
    return b"".join([*kept, data[start:]])


def _matters(data: bytes, position: int, end: int) -> bool:
    """Return whether a chunk, from its length to its checksum, can change the decoded image."""
    name = data[position + 4 : position + 8]
    optional = name[:1].islower()
    if not optional or name in _KEPT:
        return True
    content = position + 8
    if name not in _TEXTS or not data.startswith(_ORIENTATION_KEYS, content, end):
        return False
    text = data[content : end - 4]
    return len(text) < _MAX_TEXT and _expanded(name, text) <= _MAX_TEXT


def _expanded(name: bytes, text: bytes) -> int:
    """Return the decompressed size of a text; more than the limit if it is damaged."""
    rest = text.partition(b"\0")[2]
    if name == b"iTXt":
        compressed, rest = rest[:1] == b"\x01", rest[2:].split(b"\0", 2)[-1]
    else:
        compressed, rest = name == b"zTXt", rest[1:]
    if not compressed:
        return len(rest)
    try:
        return len(zlib.decompressobj().decompress(rest, _MAX_TEXT + 1))
    except zlib.error:
        return _MAX_TEXT + 1
