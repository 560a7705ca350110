"""Random samples of embedded images, of bounded size: the samples with the lowest hash of their id.

The hash has nothing to do with content or reading order. The draw is therefore random, the same at
every attempt, and can be combined: the lowest of two draws are a draw from both sets together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import SeedSettings
from raypipe.distributed.context import Context
from raypipe.runs.run import Run
from raypipe.selection.hashing import hash64, lowest
from raypipe.sources import Fragment
from raypipe.sources.id_sampling import in_sample

COLUMNS = ["sample_id", "label", "embedding"]
SALT = 0x6E69676874
"""Hash seed of this draw, so that it is independent of the draws of selection strategies."""
LOCAL_FRAGMENTS = 64
"""Up to this many fragments are read by the driver, which is faster than starting Ray."""
TASK_FRAGMENTS = 16
"""Fragments that one task reads."""
NO_LIMIT = 2**64 - 1
"""Upper limit of `order` that admits all samples."""


def order_of(ids: pa.Array) -> np.ndarray:
    """Return the place of samples in the draw, uint64 [n]: a hash of their ids."""
    return hash64(ids, SALT)


def draw(
    context: Context,
    fragments: Sequence[Fragment],
    count: int,
    *,
    from_seed_set: bool,
    only: Mapping[str, np.ndarray] | None = None,
) -> pa.Table:
    """Draw up to `count` embedded samples at random.

    Parameters
    ----------
    fragments : sequence of Fragment
        Fragments to draw from; they must be embedded.
    count : int
        Maximal number of samples.
    from_seed_set : bool
        True draws from the samples that the hash rule of the seed set selects, False from all
        others.
    only : mapping of str to numpy.ndarray, optional
        By fragment, `order_of` the samples that can be drawn, uint64. Fragments that it does not
        name are drawn from as a whole.

    Returns
    -------
    pyarrow.Table
        Columns sample_id, label, embedding, order (uint64, ascending) and fragment; no columns
        without fragments.
    """
    if not fragments:
        return pa.table({})
    only = only or {}
    names = sorted(fragment.fragment_id for fragment in fragments)
    samples = sum(
        len(only[fragment.fragment_id]) if fragment.fragment_id in only else fragment.samples
        for fragment in fragments
    )
    limit = _expected_limit(context.config.seed, samples, count, from_seed_set)
    groups = [
        [(name, only.get(name)) for name in names[start : start + TASK_FRAGMENTS]]
        for start in range(0, len(names), TASK_FRAGMENTS)
    ]
    read = functools.partial(_draw_from, context.run.uri, context.config.seed, from_seed_set, limit)
    tables: list[pa.Table] = []
    if len(names) <= LOCAL_FRAGMENTS:
        with ThreadPoolExecutor(4) as threads:
            tables += threads.map(read, groups)
    else:
        context.run_tasks(groups, read, tables.append)
    return lowest(tables, count)


def _expected_limit(settings: SeedSettings, samples: int, count: int, from_seed_set: bool) -> int:
    """Return an `order` below which there are almost certainly `count` samples.

    Rows above it need not be sent to the driver.
    """
    eligible = samples * (settings.fraction if from_seed_set else 1 - settings.fraction)
    six_deviations_above = count + 6 * math.sqrt(count) + 10
    share = six_deviations_above / max(1.0, eligible)
    return NO_LIMIT if share >= 1 else int(share * NO_LIMIT)


def embeddings_of(table: pa.Table) -> np.ndarray:
    """Return the embeddings of a draw, float32 [n, d]; [0, 0] for a draw without fragments."""
    if "embedding" not in table.column_names:
        return np.zeros((0, 0), np.float32)
    return storage.matrix_of(table["embedding"]).astype(np.float32, copy=False)


def _draw_from(
    run_uri: str,
    settings: SeedSettings,
    from_seed_set: bool,
    limit: int,
    fragments: Sequence[tuple[str, np.ndarray | None]],
) -> pa.Table:
    """Return the rows of some fragments below a limit. Runs in a task or a thread of the driver."""
    run, in_seed_set, tables = Run(run_uri), in_sample(settings.fraction, settings.seed), []
    for name, only in fragments:
        table = storage.read_table(run.embedding_shard(name), COLUMNS).replace_schema_metadata(None)
        if not len(table):
            continue
        ids = table["sample_id"].combine_chunks()
        order = order_of(ids)
        allowed = order < np.uint64(limit)
        if only is not None:
            allowed &= np.isin(order, only)
        rows = np.array(
            [
                row
                for row in np.flatnonzero(allowed).tolist()
                if in_seed_set(ids[row].as_py()) == from_seed_set
            ],
            np.int64,
        )
        table = table.take(pa.array(rows)).append_column("order", pa.array(order[rows]))
        tables.append(table.append_column("fragment", pa.array([name] * len(rows), pa.string())))
    return pa.concat_tables(tables) if tables else pa.table({})
