"""A corpus of bad inputs: what large datasets really contain, and files made to do harm.

Every image and label is small enough to be written in each format.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raypipe import storage
from raypipe.sources.crc32c import masked_crc32c

MAX_PIXELS = 1_000_000
UNREADABLE = r"not a readable JPEG, PNG, WebP, GIF, BMP or TIFF image"
ANY_DAMAGE = (
    rf"empty: 0 bytes|{UNREADABLE}|cannot be decoded: .|pixels are more than max_pixels|no pixels"
)


@dataclass(frozen=True)
class BadSample:
    """One odd sample.

    Attributes
    ----------
    key : str
        Its name; valid as a file name.
    image : bytes
    label : int, str, float or None
    extension : str
        Ending of the image's file name, in formats that have one.
    words : str or None
        Pattern that the reject reason has to match. "" if the sample is usable; None if it is
        either usable or rejected with a reason like `ANY_DAMAGE`.
    """

    key: str
    image: bytes
    label: int | str | float | None = 0
    extension: str = "png"
    words: str | None = ""


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(height: int = 12, width: int = 12, seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


GOOD = encode(picture(), "PNG")
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF"}
"""Extension -> Pillow's name."""


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims that many pixels."""

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
        + png_chunk(b"IEND", b"")
    )


def truncated() -> Iterator[BadSample]:
    """An image of each format, cut at every tenth byte."""
    for extension, format in FORMATS.items():
        data = encode(picture(), format)
        for length in range(0, len(data), 10):
            yield BadSample(
                f"{extension}-cut-{length:04d}",
                data[:length],
                0,
                extension,
                None if length else "empty: 0 bytes",
            )


def bad_images() -> Iterator[BadSample]:
    """Files that are not images or not what their name says, and unusual images."""
    frames = [picture(seed=1), picture(seed=2)]
    cmyk = Image.new("CMYK", (12, 12), (10, 200, 30, 40))
    yield BadSample("zero-bytes", b"", words="empty: 0 bytes")
    yield BadSample("png-named-jpg", GOOD, extension="jpg")
    yield BadSample(
        "text-named-jpg", b"thumbs.db is not an image\n" * 20, extension="jpg", words=UNREADABLE
    )
    yield BadSample(
        "html-named-png", b"<html><body>404 Not Found</body></html>", words="an HTML page instead"
    )
    yield BadSample(
        "pdf-named-png", b"%PDF-1.7\n1 0 obj <</Type /Catalog>> endobj\n%%EOF", words=UNREADABLE
    )
    yield BadSample(
        "postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run", words=UNREADABLE
    )
    yield BadSample("zeros", bytes(4096), words=UNREADABLE)
    yield BadSample("header-alone", b"\x89PNG\r\n\x1a\n" + bytes(52), words=UNREADABLE)
    yield BadSample(
        "bomb", bomb(60_000, 60_000), words=r"60000x60000 pixels are more than max_pixels = 1000000"
    )
    yield BadSample(
        "true-bomb",
        encode(Image.new("1", (4000, 4000)), "PNG"),
        words=r"4000x4000 pixels are more than max_pixels",
    )
    yield BadSample(
        "gif-bomb",
        b"GIF89a\xff\xff\xff\xff\x00\x00\x00" + bytes(20),
        extension="gif",
        words=r"max_pixels|cannot be decoded|not a",
    )
    yield BadSample("liar", bomb(900, 900), words=r"cannot be decoded: .*(truncated|broken)")
    yield BadSample("cmyk", encode(cmyk, "JPEG"), extension="jpg")
    yield BadSample("grey-16-bit", encode(Image.new("I;16", (12, 12), 4000), "PNG"))
    yield BadSample(
        "floating-point",
        encode(Image.new("F", (12, 12), 0.5), "TIFF"),
        extension="tif",
        words="floating-point pixels",
    )
    yield BadSample("one-pixel", encode(picture(1, 1), "PNG"))
    yield BadSample("wide", encode(picture(2, 20_000), "JPEG"), extension="jpeg")
    yield BadSample("tall", encode(picture(20_000, 1), "PNG"))
    yield BadSample(
        "animated-gif",
        encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        extension="gif",
    )
    yield BadSample(
        "animated-webp",
        encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        extension="webp",
    )
    yield BadSample("bytes-after-the-end", GOOD + b"x" * 100)


def bad_labels() -> Iterator[BadSample]:
    """Wrong numeric labels, for a source of three classes (`source.num_classes`)."""
    yield BadSample("no-label", GOOD, None)
    yield BadSample("negative", GOOD, -2, words=r"label -2 is outside 0\.\.2")
    yield BadSample("unknown", GOOD, -1, words="")
    yield BadSample("too-large", GOOD, 3, words=r"label 3 is outside 0\.\.2")
    yield BadSample("far-too-large", GOOD, 10**15, words=r"label 10{15} is outside 0\.\.2")
    yield BadSample("fraction", GOOD, 0.5, words=r"label .*0\.5")
    yield BadSample("not-a-number", GOOD, float("nan"))


def good_samples(count: int, start: int = 0) -> list[BadSample]:
    """Samples without any fault."""
    return [BadSample(f"good-{start + number:02d}", GOOD, number % 3) for number in range(count)]


def parquet_bytes(samples: list[BadSample], labels: Any = None, **options: Any) -> bytes:
    """Columns image, label and key.

    Labels are floating-point if some are fractions or missing.
    """
    values = [sample.label for sample in samples]
    columns = {
        "image": pa.array([sample.image for sample in samples], pa.binary()),
        "label": pa.array(values, labels),
        "key": [sample.key for sample in samples],
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def tar_bytes(samples: list[BadSample], *members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """The image and `.cls` of each sample, followed by other members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for sample in samples:
            pair = [(sample.extension, sample.image)]
            if sample.label is not None:
                pair.append(("cls", str(sample.label).encode()))
            for extension, content in pair:
                info = tarfile.TarInfo(f"{sample.key}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        for info, content in members:
            info.size = len(content) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def path_tricks() -> Iterator[tuple[tarfile.TarInfo, bytes, str]]:
    """Members of a tar that point outside it, with their reject reasons."""
    for name in ("../../evil.png", "a/../../evil.png", "/etc/evil.png"):
        yield tarfile.TarInfo(name), GOOD, "a path out of the tar, which is not followed"
    kinds = {
        "soft": tarfile.SYMTYPE,
        "hard": tarfile.LNKTYPE,
        "char": tarfile.CHRTYPE,
        "block": tarfile.BLKTYPE,
        "fifo": tarfile.FIFOTYPE,
    }
    for name, kind in kinds.items():
        info = tarfile.TarInfo(f"{name}.png")
        info.type, info.linkname = kind, "/etc/passwd"
        yield info, b"", "a link or special file, which is not followed"


def write_source(format: str, place: str, samples: list[BadSample]) -> dict[str, Any]:
    """Write samples in a format (parquet, tar, tar.gz, folder, tfrecord, mds) below `place`.

    Returns the settings of a source that reads them.
    """
    if format == "parquet":
        half = len(samples) // 2
        for name, part in (("a", samples[:half]), ("b", samples[half:])):
            storage.write_bytes(
                f"{place}/{name}.parquet", parquet_bytes(part, pa.float64(), row_group_size=16)
            )
        return {"uri": place, "format": "parquet", "id_column": "key"}
    if format == "folder":
        for sample in samples:
            storage.write_bytes(
                f"{place}/class-{sample.label}/{sample.key}.{sample.extension}", sample.image
            )
        return {"uri": place, "format": "imagefolder"}
    if format == "tfrecord":
        records = [
            example(
                {
                    "image": sample.image,
                    "key": sample.key,
                    **({} if sample.label is None else {"label": sample.label}),
                }
            )
            for sample in samples
        ]
        storage.write_bytes(f"{place}/a.tfrecord", tfrecord_bytes(records))
        return {"uri": place, "format": "tfrecord", "id_column": "key"}
    if format == "mds":
        rows = [
            {
                "image": sample.image,
                "key": sample.key.encode(),
                "label": np.float64(np.nan if sample.label is None else sample.label).tobytes(),
            }
            for sample in samples
        ]
        encodings = {"image": "bytes", "key": "str", "label": "float64"}
        storage.write_bytes(f"{place}/shard.00000.mds", mds_shard_bytes(rows, encodings))
        storage.write_bytes(f"{place}/index.json", mds_index(("shard.00000.mds", len(rows))))
        return {"uri": place, "format": "mds", "id_column": "key"}
    content = tar_bytes(samples)
    storage.write_bytes(
        f"{place}/a.{format}", gzip.compress(content) if format == "tar.gz" else content
    )
    return {"uri": place, "format": "webdataset"}


def example(features: dict[str, Any]) -> bytes:
    """A `tf.train.Example`; values are bytes, text, whole numbers or fractions, or lists of them."""

    def field(number: int, content: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(content)) + content

    def feature(value: Any) -> bytes:
        values = value if isinstance(value, list) else [value]
        if all(isinstance(item, int) for item in values):
            numbers = b"".join(varint(item & (1 << 64) - 1) for item in values)
            return field(3, field(1, numbers))
        if all(isinstance(item, float) for item in values):
            return field(2, field(1, struct.pack(f"<{len(values)}f", *values)))
        texts = (item.encode() if isinstance(item, str) else item for item in values)
        return field(1, b"".join(field(1, text) for text in texts))

    entries = (
        field(1, name.encode()) + field(2, feature(value)) for name, value in features.items()
    )
    return field(1, b"".join(field(1, entry) for entry in entries))


def varint(value: int) -> bytes:
    """A whole number as protobuf writes it."""
    content = bytearray()
    while value > 0x7F:
        content.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*content, value])


def tfrecord_bytes(records: list[bytes]) -> bytes:
    """A TFRecord file."""

    def checked(content: bytes) -> bytes:
        return content + struct.pack("<I", masked_crc32c(content))

    return b"".join(checked(struct.pack("<Q", len(record))) + checked(record) for record in records)


def mds_shard_bytes(samples: list[dict[str, bytes]], encodings: dict[str, str]) -> bytes:
    """An MDS shard of encoded values; the columns are in the order of their names."""
    names = sorted(encodings)
    sizes = [8 if encodings[name] in {"int", "float64"} else None for name in names]
    described = json.dumps(
        {
            "column_names": names,
            "column_encodings": [encodings[name] for name in names],
            "column_sizes": sizes,
        }
    ).encode()
    rows = [
        b"".join(
            struct.pack("<I", len(sample[name]))
            for name, size in zip(names, sizes, strict=True)
            if size is None
        )
        + b"".join(sample[name] for name in names)
        for sample in samples
    ]
    first = 4 * (len(rows) + 2) + len(described)
    offsets = np.cumsum([first, *map(len, rows)])
    head = struct.pack("<I", len(rows)) + offsets.astype("<u4").tobytes()
    return head + described + b"".join(rows)


def mds_index(*shards: tuple[str, int]) -> bytes:
    """The index of shards with these names and numbers of samples."""
    entries = [
        {"format": "mds", "raw_data": {"basename": name}, "zip_data": None, "samples": samples}
        for name, samples in shards
    ]
    return json.dumps({"version": 2, "shards": entries}).encode()
