"""Filter a Ray Dataset by a keep-list."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from raypipe import storage
from raypipe.errors import SourceError
from raypipe.selection.hashing import hash_ids
from raypipe.sources.arrow_types import ID_TYPES, described, holds_ids, id_texts


def filter_dataset(
    dataset: ray.data.Dataset, keep_list: pa.Table, id_column: str, root: str
) -> ray.data.Dataset:
    """Return the rows whose id is in a keep-list, in their order, with added columns.

    The keep-list is put into the object store once, sorted by a hash of the ids. Batches are joined
    by binary search, so that workers share one copy per machine and build no tables of their own.

    Parameters
    ----------
    dataset : ray.data.Dataset
        The dataset.
    keep_list : pyarrow.Table
        sample_id, and the columns to add.
    id_column : str
        Column of the dataset that holds the ids.
    root : str
        Folder that ids of the dataset can start with; "" for none.
    """
    ids = keep_list["sample_id"].combine_chunks()
    hashes = hash_ids(ids)
    order = np.argsort(hashes, kind="stable")
    shared = ray.put((hashes[order], keep_list.take(pa.array(order)).combine_chunks()))
    result = dataset.map_batches(
        functools.partial(_join, shared, id_column, _prefixes(root)),
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
    )
    result.context.execution_options.preserve_order = True
    return result


def _prefixes(root: str) -> tuple[str, ...]:
    """Return the prefixes of paths inside a folder: Ray leaves out the protocol."""
    return (root.rstrip("/") + "/", storage.filesystem(root)[1].rstrip("/") + "/") if root else ()


def _join(
    shared: ray.ObjectRef, id_column: str, prefixes: Sequence[str], batch: pa.Table
) -> pa.Table:
    if id_column not in batch.column_names:
        raise SourceError(
            f"the dataset has no column {id_column!r}; it has {', '.join(batch.column_names)}. "
            "Set id_column to the column of the ids"
        )
    hashes, keep_list = ray.get(shared)
    field = batch.schema.field(id_column)
    if not holds_ids(field) and not pa.types.is_null(field.type):
        raise SourceError(
            f"column {id_column!r} is {described(field)}; expected {ID_TYPES}. Set id_column to "
            "the column of the ids"
        )
    ids = id_texts(batch[id_column].combine_chunks(), field)
    for prefix in prefixes:
        inside = pc.starts_with(ids, prefix)
        ids = pc.if_else(inside, pc.utf8_slice_codeunits(ids, len(prefix)), ids)
    if not len(hashes):
        return batch.slice(0, 0)
    positions = pa.array(
        np.minimum(np.searchsorted(hashes, hash_ids(pc.fill_null(ids, ""))), len(hashes) - 1)
    )
    # ids are compared, because different ids can have the same hash
    candidates = pc.take(keep_list["sample_id"].combine_chunks(), positions)
    same = pc.fill_null(pc.equal(candidates, ids), False)
    result = batch.filter(same)
    for name in keep_list.column_names[1:]:
        result = result.drop_columns(name) if name in result.column_names else result
        result = result.append_column(name, keep_list[name].take(positions.filter(same)))
    return result
