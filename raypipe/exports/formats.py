"""Exported shards: samples written as a WebDataset tar or as Parquet in the layout of Hugging Face. No Ray.

The bytes depend on nothing but the samples: no time, no user, no machine is in them.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raypipe.errors import SourceError

GROUP_ROWS, GROUP_BYTES = 1000, 32 << 20
"""A row group of images ends at so many samples or so many bytes: readers hold a whole one."""

_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    *((start, "tiff") for start in (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")),
)


class Item(NamedTuple):
    """One sample of a shard: a name unique in the export, the encoded image and its file name extension, and what the keep-list says of it.

    label   class index, None for an unlabelled sample
    name    of the class, "" where there is none
    weight  None where the keep-list has no weights
    """

    key: str
    sample_id: str
    image: bytes
    extension: str
    label: int | None
    name: str
    score: float
    weight: float | None


def encoded(image: bytes | np.ndarray | None) -> tuple[bytes, str]:
    """Encoded image and its extension: stored bytes as they are, an array as PNG. Raises SourceError for what is no image."""
    if isinstance(image, np.ndarray):
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG")
        return buffer.getvalue(), "png"
    image = image or b""
    for start, extension in _MAGIC:
        if image.startswith(start):
            return image, extension
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return image, "webp"
    raise SourceError(
        "empty: 0 bytes" if not image else "not an image of a format that raypipe reads"
    )


def write_tar(
    file: IO[bytes], items: Iterable[Item], classes: Sequence[str], weighted: bool
) -> int:
    """Write a WebDataset shard: per sample the image, `.cls` (the class index, where there is a label) and `.json`. Returns samples.

    The JSON has sample_id, score, and where there are any label, class and weight. `classes` and `weighted` are for Parquet alone.
    """
    count = 0
    for item in items:
        about: dict[str, Any] = {"sample_id": item.sample_id, "score": item.score}
        if item.label is not None:
            about |= {"label": item.label, "class": item.name}
        if item.weight is not None:
            about["weight"] = item.weight
        _member(file, f"{item.key}.{item.extension}", item.image)
        if item.label is not None:
            _member(file, f"{item.key}.cls", str(item.label).encode())
        _member(file, f"{item.key}.json", json.dumps(about, ensure_ascii=False).encode())
        count += 1
    file.write(bytes(2 * tarfile.BLOCKSIZE))
    return count


def _member(file: IO[bytes], name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)  # time, user and group are 0
    header.size = len(content)
    file.write(header.tobuf(tarfile.USTAR_FORMAT))
    file.write(content)
    file.write(bytes(-len(content) % tarfile.BLOCKSIZE))


def write_parquet(
    file: IO[bytes], items: Iterable[Item], classes: Sequence[str], weighted: bool
) -> int:
    """Write Parquet as Hugging Face does: image struct<bytes, path>, label with the names of the classes, sample_id, score. Returns samples.

    `weight` is a column where the keep-list has weights. A row group has at most GROUP_ROWS samples, and ends at GROUP_BYTES.
    """
    schema = parquet_schema(classes, weighted)
    compression = dict.fromkeys((*schema.names[1:], "image.path"), "zstd") | {"image.bytes": "none"}
    held: list[dict[str, Any]] = []
    count = size = 0
    with pq.ParquetWriter(
        file, schema, compression=compression, use_dictionary=["label"]
    ) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(held, schema=schema), row_group_size=GROUP_ROWS)
            held.clear()

        for item in items:
            row = {
                "image": {"bytes": item.image, "path": f"{item.key}.{item.extension}"},
                "label": item.label,
            }
            held.append(
                {**row, "sample_id": item.sample_id, "score": item.score, "weight": item.weight}
            )
            count, size = count + 1, size + len(item.image)
            if len(held) == GROUP_ROWS or size >= GROUP_BYTES:
                flush()
                size = 0
        if held:
            flush()
    return count


def parquet_schema(classes: Sequence[str], weighted: bool) -> pa.Schema:
    """The columns, and the features that `datasets.load_dataset` reads from the schema's metadata."""
    columns = [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("label", pa.int64()),
        ("sample_id", pa.string()),
        ("score", pa.float32()),
        *([("weight", pa.float32())] * weighted),
    ]
    label = (
        {"names": list(classes), "_type": "ClassLabel"}
        if classes
        else {"dtype": "int64", "_type": "Value"}
    )
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": label,
        "sample_id": {"dtype": "string", "_type": "Value"},
    }
    for name, _ in columns[3:]:
        features[name] = {"dtype": "float32", "_type": "Value"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}}, ensure_ascii=False)}
    return pa.schema(columns, metadata=metadata)


WRITERS = {"webdataset": ("tar", write_tar), "parquet": ("parquet", write_parquet)}
"""Ending and writer of each format of shards."""
