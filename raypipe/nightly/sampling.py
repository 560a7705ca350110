"""Random samples of what is embedded, of bounded size: the `count` samples with the lowest hash of their id, in any order of reading.

A hash of the id has nothing to do with content or order, so that these are drawn at random from all samples, are the same at every
attempt, and can be drawn from several sets one after the other: of two draws the lowest are a draw from both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe import storage
from raypipe.config import SeedSettings
from raypipe.distributed.context import Context
from raypipe.runs.layout import Run
from raypipe.selection.hashing import hash64
from raypipe.sources import Fragment
from raypipe.sources.id_sampling import in_sample

COLUMNS = ["sample_id", "label", "embedding"]
SALT = 0x6E69676874
"""Tells this draw from those of the strategies of keep-lists."""
LOCAL_FRAGMENTS = 64
"""So many fragments are read by the driver: that takes less time than Ray to start."""
TASK_FRAGMENTS = 16
ALL = 2**64 - 1


def draw(
    context: Context, fragments: Sequence[Fragment], count: int, *, seeds: bool, below: int = ALL
) -> pa.Table:
    """At most `count` samples: sample_id, fragment, label, embedding, order (uint64, rising).

    seeds  whether from those whose id the rule of the seed set takes, or from the others
    below  only samples with an order below this
    """
    if not fragments:
        return pa.table({})
    samples = sum(fragment.samples for fragment in fragments)
    # so many among all of them are hardly ever fewer than `count`, and the rest need not be passed on
    share = min(
        1.0,
        (count + 6 * math.sqrt(count) + 10)
        / max(1.0, samples * _share(context.config.seed, seeds)),
    )
    limit = min(below, int(share * ALL))
    names = sorted(fragment.fragment_id for fragment in fragments)
    groups = [
        names[start : start + TASK_FRAGMENTS] for start in range(0, len(names), TASK_FRAGMENTS)
    ]
    read = functools.partial(_draw, context.run.uri, context.config.seed, seeds, limit)
    found: list[pa.Table] = []
    if len(names) <= LOCAL_FRAGMENTS:
        with ThreadPoolExecutor(4) as threads:
            found += [result["rows"] for result in threads.map(read, groups)]
    else:
        context.run_tasks(groups, read, lambda result: found.append(result["rows"]))
    return lowest(found, count)


def lowest(tables: Sequence[pa.Table], count: int) -> pa.Table:
    """The rows of lowest order of all tables, rising; an id that comes twice has one row."""
    filled = [table for table in tables if len(table)]
    if not filled:
        return pa.table({})
    table = pa.concat_tables(filled).sort_by([("order", "ascending"), ("sample_id", "ascending")])
    ids = table["sample_id"].combine_chunks()
    first = np.ones(len(ids), bool)
    first[1:] = pc.not_equal(ids.slice(1), ids.slice(0, len(ids) - 1)).to_numpy(
        zero_copy_only=False
    )
    return table.filter(pa.array(first)).slice(0, count).combine_chunks()


def embeddings_of(table: pa.Table) -> np.ndarray:
    """float32 [n, d] of a draw that has the column; [0, 0] of one from no fragments."""
    if "embedding" not in table.column_names:
        return np.zeros((0, 0), np.float32)
    width = table.schema.field("embedding").type.list_size
    return np.asarray(table["embedding"].combine_chunks().flatten(), np.float32).reshape(
        len(table), width
    )


def _share(settings: SeedSettings, seeds: bool) -> float:
    return settings.fraction if seeds else 1 - settings.fraction


def _draw(
    run_uri: str, settings: SeedSettings, seeds: bool, limit: int, names: list[str]
) -> dict[str, Any]:
    """The rows below a limit of some fragments. Runs in a task, or in a thread of the driver."""
    run, rule, parts = Run(run_uri), in_sample(settings.fraction, settings.seed), []
    for name in names:
        table = storage.read_table(
            run.path("embeddings", f"{name}.parquet"), COLUMNS
        ).replace_schema_metadata(None)
        if not len(table):
            continue
        ids = table["sample_id"].combine_chunks()
        order = hash64(ids, SALT)
        low = np.flatnonzero(order < np.uint64(limit))
        rows = np.array([row for row in low.tolist() if rule(ids[row].as_py()) == seeds], np.int64)
        part = table.take(pa.array(rows)).append_column("order", pa.array(order[rows]))
        parts.append(part.append_column("fragment", pa.array([name] * len(rows), pa.string())))
    return {"rows": pa.concat_tables(parts) if parts else pa.table({})}
