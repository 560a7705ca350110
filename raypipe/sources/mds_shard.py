"""Read MosaicML's MDS shards without the package `streaming`.

A shard is the number of samples n (uint32), n + 1 offsets (uint32), a description of its columns
as JSON, and the samples. A sample is the sizes of its columns of variable size (uint32 each),
followed by the values. All numbers are little-endian. Values that are pickled are never loaded.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import IO, Any

import numpy as np
import pyarrow as pa

from raypipe.sources.arrow_images import ImageOrReason, checked_pixels
from raypipe.storage import Reader

COMPRESSIONS = {".zstd": "zstd", ".gz": "gzip", ".bz2": "bz2", ".br": "brotli", ".snappy": ""}
"""Ending of a compressed shard -> codec of pyarrow; "" for one without a stream format."""
MAX_SHARD_BYTES = (1 << 32) + (1 << 20)
"""Offsets are of 32 bits."""
PIECE_BYTES = 1 << 20
_TEXT = {"str", "str_int", "str_float", "str_decimal"}
_NUMBERS = {
    "int": "int64",
    **{name: name for name in ("int8", "int16", "int32", "int64")},
    **{name: name for name in ("uint8", "uint16", "uint32", "uint64")},
    **{name: name for name in ("float16", "float32", "float64")},
}
_ARRAY_TYPES = {
    8: "uint8",
    9: "int8",
    16: "uint16",
    17: "int16",
    32: "uint32",
    33: "int32",
    64: "uint64",
    65: "int64",
}
_MODES = {"L": 1, "RGB": 3}


class NotAShard(ValueError):
    """The content is not that of an MDS shard."""


@dataclass(frozen=True)
class Shard:
    """An open shard.

    Attributes
    ----------
    columns : dict of str to str
        Name -> encoding.
    """

    columns: dict[str, str]
    _sizes: dict[str, int | None]
    _offsets: np.ndarray
    _file: IO[bytes]
    _bytes: int

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def sample(self, number: int) -> dict[str, bytes]:
        """Return the encoded columns of a sample. Raises NotAShard if it is cut off or damaged."""
        start, stop = (int(offset) for offset in self._offsets[number : number + 2])
        if stop > self._bytes:
            raise NotAShard(
                f"cut off: the shard has {self._bytes:,} bytes, the sample ends at {stop:,}"
            )
        self._file.seek(start)
        content = self._file.read(stop - start)
        variable = sum(size is None for size in self._sizes.values())
        position = 4 * variable
        sizes = iter(np.frombuffer(content[:position], "<u4").tolist())
        result = {}
        for name, fixed in self._sizes.items():
            size = next(sizes, -1) if fixed is None else fixed
            if size < 0 or position + size > len(content):
                raise NotAShard("the sizes of the columns do not fit the sample")
            result[name] = content[position : position + size]
            position += size
        return result


def open_shard(stored: Reader, path: str) -> Shard:
    """Return the shard in a file. Raises NotAShard; errors of codecs as they are."""
    file: IO[bytes] = stored
    for ending, codec in COMPRESSIONS.items():
        if path.lower().endswith(ending):
            file = io.BytesIO(_decompressed(stored, codec))
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    count = int.from_bytes(file.read(4), "little")
    if 4 * (count + 2) > end:
        raise NotAShard(f"{count:,} samples in {end:,} bytes")
    offsets = np.frombuffer(file.read(4 * (count + 1)), "<u4").astype(np.int64)
    if (np.diff(offsets) < 0).any() or not 4 * (count + 2) <= offsets[0] <= end:
        raise NotAShard("its offsets are not in order")
    try:
        described = json.loads(file.read(int(offsets[0]) - file.tell()))
        names, encodings = described["column_names"], described["column_encodings"]
        sizes = [None if size is None else int(size) for size in described["column_sizes"]]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise NotAShard("the description of its columns cannot be read") from None
    if not len(names) == len(encodings) == len(sizes) == len(set(map(str, names))):
        raise NotAShard("the description of its columns cannot be read")
    names = [str(name) for name in names]
    return Shard(dict(zip(names, map(str, encodings))), dict(zip(names, sizes)), offsets, file, end)


def _decompressed(stored: Reader, codec: str) -> bytes | bytearray:
    if codec:
        with pa.CompressedInputStream(pa.PythonFile(stored, "r"), codec) as stream:
            content = bytearray()  # read(n) would reserve n bytes at once
            while len(content) <= MAX_SHARD_BYTES and (piece := stream.read(PIECE_BYTES)):
                content += piece
    else:
        packed = stored.read()
        size = _snappy_size(packed)
        content = bytearray(pa.Codec("snappy").decompress(packed, size, asbytes=True))
    if len(content) > MAX_SHARD_BYTES:
        raise NotAShard("more than 4 GiB when decompressed")
    return content


def _snappy_size(packed: bytes) -> int:
    size = 0
    for place, byte in enumerate(packed[:5]):
        size |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            break
    if size > MAX_SHARD_BYTES:
        raise NotAShard("more than 4 GiB when decompressed")
    return size


def image_decoder(encoding: str) -> Callable[[bytes], ImageOrReason] | None:
    """Return the function that reads one value of an image column; None for other columns."""
    if encoding in {"jpeg", "png", "bytes"}:
        return lambda value: (value, "")
    if encoding == "pil":
        return _from_pil
    name, _, details = encoding.partition(":")
    if name != "ndarray":
        return None
    type, _, shape = details.partition(":")
    if type and type not in _ARRAY_TYPES.values():
        return None
    fixed = [int(size) for size in shape.split(",")] if shape else None
    return lambda value: _from_array(value, type, fixed)


def value_decoder(encoding: str) -> Callable[[bytes], Any] | None:
    """Return the function that reads a number or text; None for other columns."""
    if encoding in _NUMBERS:
        return lambda value: np.frombuffer(value, np.dtype(_NUMBERS[encoding]).newbyteorder("<"))[
            0
        ].item()
    if encoding not in _TEXT:
        return None
    convert = {"str_int": int, "str_float": float, "str_decimal": Decimal}.get(encoding, str)
    return lambda value: convert(value.decode("utf-8"))


def _from_pil(value: bytes) -> ImageOrReason:
    """Return the pixels of a PIL image: width, height and length of the mode, mode, pixels."""
    width, height, length = np.frombuffer(value[:12], "<u4").tolist()
    mode, pixels = value[12 : 12 + length].decode("ascii"), value[12 + length :]
    if mode not in _MODES:
        return None, f"a PIL image of mode {mode!r}, not L or RGB; store it as png"
    return _shaped(np.frombuffer(pixels, np.uint8), [height, width, _MODES[mode]])


def _from_array(value: bytes, type: str, shape: Sequence[int] | None) -> ImageOrReason:
    """Return an array as pixels. Without a fixed type or shape, the value begins with them."""
    position = 0
    if not type:
        type, position = _ARRAY_TYPES.get(value[0], ""), 1
        if not type:
            return None, "an array of fractions, not of whole numbers"
    if shape is None:
        dimensions, width = value[position] >> 2, 1 << (value[position] & 3)
        stop = position + 1 + dimensions * width
        shape = np.frombuffer(value[position + 1 : stop], f"<u{width}").tolist()
        position = stop
    return _shaped(np.frombuffer(value[position:], np.dtype(type).newbyteorder("<")), shape)


def _shaped(numbers: np.ndarray, shape: Sequence[int]) -> ImageOrReason:
    if int(np.prod(shape, dtype=object)) != len(numbers):
        return None, f"{len(numbers)} numbers are stored for the shape {list(shape)}"
    return checked_pixels(numbers.reshape(shape))
