"""Read and write the shards of the seed set and the audit set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.runs.layout import Run
from raypipe.sources import ClassMap


def read_shard(run: Run, shard: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Ids, images uint8 [n, 3, size, size] and labels int64 [n] of a seed or audit shard; the images share the file's memory."""
    ids, images, labels = read_images(run, shard)
    return (
        ids,
        images,
        shard_labels(run, shard)["label"].to_numpy().astype(np.int64)
        if (labels < 0).any()
        else labels,
    )


def read_images(run: Run, shard: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """As `read_shard`, without pseudo-labels: the labels of an unlabelled source are -1."""
    table = storage.read_table(run.path("seed", f"{shard}.parquet"))
    size = json.loads(table.schema.metadata[b"raypipe"])["image_size"]
    count = len(table)
    if count == 0:
        return [], np.zeros((0, 3, size, size), np.uint8), np.zeros(0, np.int64)
    column = table["image"].combine_chunks()
    pixels = np.frombuffer(
        column.buffers()[1], np.uint8, count * 3 * size * size, column.offset * 3 * size * size
    )
    return (
        table["sample_id"].to_pylist(),
        pixels.reshape(count, 3, size, size),
        table["label"].to_numpy().astype(np.int64),
    )


def shard_labels(run: Run, shard: str) -> pa.Table:
    """sample_id and label, or pseudo-label, of a seed or audit shard, without reading its images."""
    with storage.open_read(run.path("seed", f"{shard}.parquet")) as file:
        parquet = pq.ParquetFile(file)
        if not json.loads(parquet.schema_arrow.metadata[b"raypipe"]).get("unlabelled"):
            return parquet.read(["sample_id", "label"])
    return storage.read_table(run.path("labels", f"{shard}.parquet"), ["sample_id", "label"])


def audit_name(shard: str) -> str:
    """The audit shard that is drawn with a seed shard."""
    return "audit" + shard.removeprefix("seed")


def distinguished_classes(classes: ClassMap) -> int:
    """Classes that labels of the source tell apart: none, where clusters are to stand for them."""
    return 0 if classes.clusters else len(classes.names)


def shard_table(
    ids: list[str],
    labels: list[int],
    images: np.ndarray,
    classes: int,
    size: int,
    about: Mapping[str, Any] = MappingProxyType({}),
) -> pa.Table:
    """A shard with what the manifest needs of it in its metadata; `about` is there, too: samples drawn, and the rejects among them."""
    pixels = images.reshape(len(ids), 3 * size * size)
    channels = pixels.reshape(len(ids), 3, size * size).astype(np.float64) / 255
    statistics = {
        "image_size": size,
        "samples": len(ids),
        "per_class": np.bincount(
            np.array([label for label in labels if label >= 0], np.int64), minlength=classes
        ).tolist(),
        "sum": channels.sum((0, 2)).tolist(),
        "square": np.square(channels).sum((0, 2)).tolist(),
        **about,
    }
    image_type = pa.binary(3 * size * size)
    columns = [
        pa.array(ids, pa.string()),
        pa.array(labels, pa.int32()),
        pa.FixedSizeBinaryArray.from_buffers(
            image_type, len(ids), [None, pa.py_buffer(pixels.tobytes())]
        ),
    ]
    return pa.table(columns, ["sample_id", "label", "image"]).replace_schema_metadata(
        {"raypipe": json.dumps(statistics)}
    )


def shard_statistics(run: Run, shard: str) -> dict[str, Any]:
    with storage.open_read(run.path("seed", f"{shard}.parquet")) as file:
        return json.loads(pq.read_schema(file).metadata[b"raypipe"])
