"""The rows of a Ray Dataset that a keep-list names."""

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


def filter_dataset(
    dataset: ray.data.Dataset, kept: pa.Table, id_column: str, root: str
) -> ray.data.Dataset:
    """The rows whose id, which may stand below `root`, is in `kept`, a table of sample_id and columns to add; in their order.

    The table goes to the object store once, sorted by a hash of the ids, and a batch is joined to it by binary search: each worker
    looks at the copy of its machine, and builds no table of its own.
    """
    ids = kept["sample_id"].combine_chunks()
    hashes = hash_ids(ids)
    order = np.argsort(hashes, kind="stable")
    shared = ray.put((hashes[order], kept.take(pa.array(order)).combine_chunks()))
    result = dataset.map_batches(
        functools.partial(_join, shared, id_column, _starts(root)),
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
    )
    result.context.execution_options.preserve_order = True
    return result


def _starts(root: str) -> tuple[str, ...]:
    """What paths below a folder begin with: Ray leaves out the protocol."""
    return (root.rstrip("/") + "/", storage.filesystem(root)[1].rstrip("/") + "/") if root else ()


def _join(
    shared: ray.ObjectRef, id_column: str, starts: Sequence[str], batch: pa.Table
) -> pa.Table:
    if id_column not in batch.column_names:
        raise SourceError(
            f"the dataset has no column {id_column!r}; it has {', '.join(batch.column_names)}. Name it with id_column"
        )
    hashes, kept = ray.get(shared)
    ids = pc.cast(batch[id_column], pa.string()).combine_chunks()
    for start in starts:
        ids = pc.if_else(pc.starts_with(ids, start), pc.utf8_slice_codeunits(ids, len(start)), ids)
    if not len(hashes):
        return batch.slice(0, 0)
    found = pa.array(
        np.minimum(np.searchsorted(hashes, hash_ids(pc.fill_null(ids, ""))), len(hashes) - 1)
    )
    # the id itself is compared, so that an equal hash is no match
    same = pc.fill_null(pc.equal(pc.take(kept["sample_id"].combine_chunks(), found), ids), False)
    result = batch.filter(same)
    for name in kept.column_names[1:]:
        result = result.drop_columns(name) if name in result.column_names else result
        result = result.append_column(name, kept[name].take(found.filter(same)))
    return result
