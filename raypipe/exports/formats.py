"""Write shards as WebDataset tars, or as Parquet in the layout of Hugging Face.

The bytes depend on the samples only. They contain no time, user or machine.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raypipe.errors import SourceError

GROUP_ROWS, GROUP_BYTES = 1000, 32 << 20
"""A row group ends at this many samples or bytes. Readers hold a whole row group in memory."""

_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    *((start, "tiff") for start in (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")),
)


class Item(NamedTuple):
    """One sample of a shard.

    Attributes
    ----------
    key : str
        Name of the sample, unique in the export.
    sample_id : str
        Its id in the keep-list.
    image : bytes
        The encoded image.
    extension : str
        File name extension of the image, without a dot.
    label : int or None
        Class index; None for an unlabelled sample.
    name : str
        Name of the class; "" for an unlabelled sample.
    score : float
        Its score; higher means keep.
    weight : float or None
        Training weight; None if the keep-list has no weights.
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
    """Return an encoded image and its file name extension.

    Stored bytes are returned unchanged, an array is encoded as PNG. Raises SourceError if the bytes
    are not an image.
    """
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
    """Write a WebDataset shard and return the number of samples.

    A sample has its image, `.cls` (the class index, if labelled) and `.json`: sample_id, score, and
    where they exist label, class and weight. `classes` and `weighted` are used by Parquet only.
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
    header = tarfile.TarInfo(name)  # time, user and group are 0 by default
    header.size = len(content)
    file.write(header.tobuf(tarfile.USTAR_FORMAT))
    file.write(content)
    file.write(bytes(-len(content) % tarfile.BLOCKSIZE))


def write_parquet(
    file: IO[bytes], items: Iterable[Item], classes: Sequence[str], weighted: bool
) -> int:
    """Write a Parquet shard in the layout of Hugging Face and return the number of samples.

    Columns are image (struct of bytes and path), label (with the names of the classes), sample_id,
    score, and weight if the keep-list has weights. A row group ends at GROUP_ROWS samples or
    GROUP_BYTES bytes.
    """
    schema, count = parquet_schema(classes, weighted), 0
    compression = dict.fromkeys((*schema.names[1:], "image.path"), "zstd") | {"image.bytes": "none"}
    with pq.ParquetWriter(
        file, schema, compression=compression, use_dictionary=["label"]
    ) as writer:
        for rows in row_groups(items):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema), row_group_size=GROUP_ROWS)
            count += len(rows)
    return count


def row_groups(items: Iterable[Item]) -> Iterator[list[dict[str, Any]]]:
    """Yield rows of `parquet_schema`, at most GROUP_ROWS samples or about GROUP_BYTES at a time."""
    rows, size = list[dict[str, Any]](), 0
    for item in items:
        rows.append(
            {
                "image": {"bytes": item.image, "path": f"{item.key}.{item.extension}"},
                "label": item.label,
                "sample_id": item.sample_id,
                "score": item.score,
                "weight": item.weight,
            }
        )
        size += len(item.image)
        if len(rows) == GROUP_ROWS or size >= GROUP_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def parquet_schema(classes: Sequence[str], weighted: bool) -> pa.Schema:
    """Return the schema, with the features that `datasets.load_dataset` reads from its metadata."""
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
