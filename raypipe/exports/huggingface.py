"""Write what `datasets.Dataset.save_to_disk` would write, which `datasets.load_from_disk` reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import IO, Any

import pyarrow as pa

from raypipe.exports.card import dataset_card
from raypipe.exports.finished import FinishedExport
from raypipe.exports.formats import Item, parquet_schema, row_groups

CARD_FILE = "README.md"
FILES = ("state.json", "dataset_info.json", CARD_FILE)


def write_arrow(
    file: IO[bytes], items: Iterable[Item], classes: Sequence[str], weighted: bool
) -> int:
    """Write a shard as an Arrow stream and return the number of samples.

    Columns, features and the limits of a record batch are those of `formats.write_parquet`.
    """
    schema, count = parquet_schema(classes, weighted), 0
    with pa.ipc.new_stream(file, schema) as writer:
        for rows in row_groups(items):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            count += len(rows)
    return count


def huggingface_files(export: FinishedExport) -> dict[str, bytes]:
    """Return the state, the features and the dataset card, which make the folder a dataset."""
    features = json.loads(parquet_schema(export.classes, export.weighted).metadata[b"huggingface"])
    size = sum(shard.bytes for shard in export.shards)
    split = {"name": "train", "num_bytes": size, "num_examples": export.samples}
    info = {
        "citation": "",
        "description": "",
        "features": features["info"]["features"],
        "homepage": "",
        "license": "",
        "dataset_size": size,
        "splits": {"train": {**split, "dataset_name": "raypipe"}},
    }
    state: dict[str, Any] = {
        "_data_files": [{"filename": shard.name} for shard in export.shards],
        "_fingerprint": export.fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    return {
        "dataset_info.json": json.dumps(info, indent=2).encode(),
        CARD_FILE: dataset_card(export).encode(),
        "state.json": json.dumps(state, indent=2).encode(),  # last: it makes the folder a dataset
    }
