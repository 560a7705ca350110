"""Write shards in MosaicML's MDS, which `streaming.StreamingDataset` reads.

Layout of a shard (mosaicml-streaming, `streaming/base/format/mds`), all numbers little-endian
uint32: number of samples; n + 1 offsets from the start of the file; the columns as JSON; the
samples. A sample is the sizes of its columns of variable size, then the bytes of all its columns in
the order of their names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import IO, Any

import numpy as np

from raypipe.errors import ConfigError
from raypipe.exports.finished import FinishedExport
from raypipe.exports.formats import Item

INDEX_FILE = "index.json"
MAX_BYTES = 2**32 - 1
"""Offsets in a shard have 32 bits."""
_COLUMNS = {
    "class": "str",
    "image": "bytes",
    "label": "int",
    "sample_id": "str",
    "score": "float32",
}
_SIZES = {"int": 8, "float32": 4}


def write_mds(
    file: IO[bytes], items: Iterable[Item], classes: Sequence[str], weighted: bool
) -> int:
    """Write an MDS shard and return the number of samples.

    Columns are class (""  for an unlabelled sample), image (encoded), label (-1 if unlabelled),
    sample_id, score, and weight if the keep-list has weights. Raises ConfigError for a shard of
    4 GiB or more, which MDS cannot hold. `classes` is not used.
    """
    rows = [_row(item) for item in items]
    config = json.dumps(_config(weighted), sort_keys=True).encode()
    sizes = np.fromiter(map(len, rows), np.int64, len(rows))
    offsets = 4 + 4 * (len(rows) + 1) + len(config) + np.concatenate([[0], np.cumsum(sizes)])
    if offsets[-1] > MAX_BYTES:
        raise ConfigError(
            f"a shard of {offsets[-1]:,} bytes is too large for MDS, whose limit is "
            f"{MAX_BYTES:,}; set shard_samples to less than {len(rows)}"
        )
    file.write(np.uint32(len(rows)).tobytes() + offsets.astype("<u4").tobytes() + config)
    for row in rows:
        file.write(row)
    return len(rows)


def _row(item: Item) -> bytes:
    label = -1 if item.label is None else item.label
    numbers = [np.float32(item.score)] + [np.float32(item.weight)] * (item.weight is not None)
    name, sample_id = item.name.encode(), item.sample_id.encode()
    sizes = np.array([len(name), len(item.image), len(sample_id)], "<u4").tobytes()
    return b"".join(
        [
            sizes,
            name,
            item.image,
            np.int64(label).tobytes(),
            sample_id,
            *(number.tobytes() for number in numbers),
        ]
    )


def _config(weighted: bool) -> dict[str, Any]:
    """Return how the samples of a shard are stored, as the shard and the index have it."""
    columns = _COLUMNS | ({"weight": "float32"} if weighted else {})
    return {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": [],
        "size_limit": None,
        "column_names": list(columns),
        "column_encodings": list(columns.values()),
        "column_sizes": [_SIZES.get(encoding) for encoding in columns.values()],
    }


def mds_index(export: FinishedExport) -> dict[str, bytes]:
    """Return the file that names all shards. StreamingDataset needs it."""
    shards = [
        {
            **_config(export.weighted),
            "raw_data": {"basename": shard.name, "bytes": shard.bytes, "hashes": {}},
            "zip_data": None,
            "samples": shard.samples,
        }
        for shard in export.shards
    ]
    return {INDEX_FILE: json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode()}
