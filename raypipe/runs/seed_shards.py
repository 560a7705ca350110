"""Read and write the shards of the seed set and the audit set.

Shards are canonical: shard k of N holds the samples whose hash lies in the k-th of N equal ranges,
in the order of `raypipe.selection.hashing.canonical_order`. So they depend on the ids alone, and
neither on the format of the source nor on the order of its samples. (Versions up to 0.2.0 wrote the
samples of some consecutive fragments into a shard. Such shards are read alike.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.runs.run import Run
from raypipe.sources import ClassMap

EXTRA_PREFIX = "extra-"
"""Start of the names of temporary shards, of samples outside the seed set and the audit set."""


def read_shard(run: Run, shard: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Read a seed or audit shard.

    Returns
    -------
    list of str
        Ids.
    numpy.ndarray
        Images, uint8 [n, channels, size, size], in the memory of the file.
    numpy.ndarray
        Labels or pseudo-labels, int64 [n].
    """
    ids, images, labels = read_images(run, shard)
    if (labels < 0).any():
        labels = shard_labels(run, shard)["label"].to_numpy().astype(np.int64)
    return ids, images, labels


def read_images(run: Run, shard: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Read a shard like `read_shard`, but with label -1 instead of pseudo-labels."""
    table = storage.read_table(run.seed_shard(shard))
    size = json.loads(table.schema.metadata[b"raypipe"])["image_size"]
    count = len(table)
    if count == 0:
        return [], image_array(table["image"], size), np.zeros(0, np.int64)
    return (
        table["sample_id"].to_pylist(),
        image_array(table["image"], size),
        table["label"].to_numpy().astype(np.int64),
    )


def image_array(column: pa.ChunkedArray, size: int) -> np.ndarray:
    """Return a column of images as uint8 [n, channels, size, size].

    A single chunk is not copied.
    """
    width = column.type.byte_width
    shape = (width // (size * size), size, size)
    if not len(column):
        return np.zeros((0, *shape), np.uint8)
    images = column.combine_chunks()
    pixels = np.frombuffer(
        images.buffers()[1], np.uint8, len(images) * width, images.offset * width
    )
    return pixels.reshape(len(images), *shape)


def image_column(images: np.ndarray) -> pa.Array:
    """Return images, uint8 [n, channels, size, size], as a column of bytes."""
    data = np.ascontiguousarray(images)
    width = int(np.prod(images.shape[1:]))
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(images), [None, pa.py_buffer(data)]
    )


def shard_labels(run: Run, shard: str) -> pa.Table:
    """Return sample_id and label or pseudo-label of a seed or audit shard; reads no images."""
    with storage.open_read(run.seed_shard(shard)) as file:
        parquet = pq.ParquetFile(file)
        if not json.loads(parquet.schema_arrow.metadata[b"raypipe"]).get("unlabelled"):
            return parquet.read(["sample_id", "label"])
    return storage.read_table(run.label_shard(shard), ["sample_id", "label"])


def audit_name(shard: str) -> str:
    """Return the name of the audit shard with the same range of hashes as a seed shard."""
    return "audit" + shard.removeprefix("seed")


def remove_extra_shards(run: Run) -> None:
    """Remove temporary shards, including those of a measurement that was interrupted."""
    for shard in run.done("seed"):
        if shard.startswith(EXTRA_PREFIX):
            storage.delete(run.seed_shard(shard))


def distinguished_classes(classes: ClassMap) -> int:
    """Return the number of classes in the labels of the source; 0 for an unlabelled one."""
    return 0 if classes.clusters else len(classes.names)


def shard_table(
    ids: list[str],
    labels: list[int],
    images: np.ndarray,
    classes: int,
    size: int,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> pa.Table:
    """Return a shard as a table, with the statistics that the manifest needs in its metadata.

    Parameters
    ----------
    ids, labels : list
        One per sample; label -1 for an unlabelled one.
    images : numpy.ndarray
        uint8 [n, channels, size, size].
    classes, size : int
        Number of classes, and side of the images in pixels.
    extra : mapping
        Further metadata: `unlabelled`, whether the source has no labels.
    """
    channels = images.reshape(len(ids), images.shape[1], size * size).astype(np.float64) / 255
    statistics = {
        "image_size": size,
        "samples": len(ids),
        "per_class": np.bincount(
            np.array([label for label in labels if label >= 0], np.int64), minlength=classes
        ).tolist(),
        "sum": channels.sum((0, 2)).tolist(),
        "square": np.square(channels).sum((0, 2)).tolist(),
        **extra,
    }
    columns = [
        pa.array(ids, pa.string()),
        pa.array(labels, pa.int32()),
        image_column(images),
    ]
    return pa.table(columns, ["sample_id", "label", "image"]).replace_schema_metadata(
        {"raypipe": json.dumps(statistics)}
    )


def shard_statistics(run: Run, shard: str) -> dict[str, Any]:
    """Read the statistics in the metadata of a shard."""
    with storage.open_read(run.seed_shard(shard)) as file:
        return json.loads(pq.read_schema(file).metadata[b"raypipe"])
