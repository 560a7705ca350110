"""Write a Lance dataset: every shard is a fragment, and one commit makes all of them visible."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from raypipe import storage
from raypipe.errors import ConfigError
from raypipe.exports.finished import FinishedExport
from raypipe.exports.formats import Item, row_groups
from raypipe.sources.lance import client_options

DATA = "data"
FOLDERS = (DATA, "_versions", "_transactions")
"""Folders of a Lance dataset that an export writes."""


def check_lance() -> None:
    """Raise ConfigError if the package pylance is not installed."""
    if importlib.util.find_spec("lance") is None:
        raise ConfigError(
            "format lance needs the package pylance, which is not installed; "
            "pip install 'raypipe[lance]'"
        )


def lance_schema(weighted: bool) -> pa.Schema:
    """Return the columns: image (encoded), label, class, sample_id, score, and weight if any."""
    columns = [
        ("image", pa.binary()),
        ("label", pa.int64()),
        ("class", pa.string()),
        ("sample_id", pa.string()),
        ("score", pa.float32()),
    ]
    return pa.schema([*columns, *([("weight", pa.float32())] * weighted)])


def write_fragment(
    to: str, items: Iterable[Item], classes: Sequence[str], weighted: bool
) -> tuple[str, int, dict[str, Any]]:
    """Write a fragment, which is invisible until it is committed.

    Returns
    -------
    str
        Path of its data file in the dataset.
    int
        Number of samples.
    dict
        The fragment's metadata, for the commit.
    """
    from lance.fragment import LanceFragment

    schema, count = lance_schema(weighted), 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal count
        for rows in row_groups(items):
            count += len(rows)
            yield pa.RecordBatch.from_pylist([_row(row, classes) for row in rows], schema=schema)

    first = next(remaining := batches(), None)
    if first is None:
        return "", 0, {}
    reader = pa.RecordBatchReader.from_batches(schema, itertools.chain([first], remaining))
    fragment = LanceFragment.create(
        to, reader, schema=schema, mode="overwrite", storage_options=client_options(to)
    )
    (file,) = fragment.files
    return f"{DATA}/{file.path}", count, fragment.to_json()


def _row(row: dict[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    name = None if row["label"] is None else classes[row["label"]]
    return {**row, "image": row["image"]["bytes"], "class": name}


def commit_lance(export: FinishedExport) -> dict[str, bytes]:
    """Commit all fragments as one version, unless the last version has just these.

    Data files of writers that were killed are deleted. Returns no further files.
    """
    import lance
    from lance.fragment import FragmentMetadata

    expected = {shard.name for shard in export.shards}
    if _committed(export.to) != expected:
        fragments = [
            FragmentMetadata.from_json(json.dumps(dict(shard.detail))) for shard in export.shards
        ]
        operation = lance.LanceOperation.Overwrite(lance_schema(export.weighted), fragments)
        lance.LanceDataset.commit(export.to, operation, storage_options=client_options(export.to))
    for name in storage.names(storage.join(export.to, DATA)):
        if name.endswith(".lance") and f"{DATA}/{name}" not in expected:
            storage.delete(storage.join(export.to, DATA, name))
    return {}


def _committed(to: str) -> set[str]:
    """Return the data files of the last version; none if nothing is committed."""
    import lance

    try:
        dataset = lance.dataset(to, storage_options=client_options(to))
    except ValueError:  # no dataset
        return set()
    return {
        f"{DATA}/{file.path}"
        for fragment in dataset.get_fragments()
        for file in fragment.data_files()
    }
