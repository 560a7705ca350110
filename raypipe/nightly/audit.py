"""A fresh audit: scores at checkpoints measured on a few of the samples that came after the seed set, beside those predicted.

Their images lie in `seed/night-*.parquet` while they are measured, and nothing of that stays. Score shards are left as they are: the
samples keep their predicted scores.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.errors import StageError
from raypipe.nightly.sampling import lowest
from raypipe.runs.duplicates import reject_duplicates
from raypipe.runs.layout import Run
from raypipe.runs.ledger import StageRecord, content_hash
from raypipe.selection.hashing import hash64
from raypipe.sources import Fragment, open_source
from raypipe.vision.decode import decode_batch

SALT = 0x6175646974
"""Tells this draw from others by a hash of the id."""
PREFIX = "night-"
COLUMNS = ["sample_id", "label", "score", "measured"]


@dataclass(frozen=True)
class NewRows:
    """What the score shards of new fragments say.

    classes     labelled samples of each class, int64 [classes]
    candidates  of the samples with a predicted score and a label, drawn at random: sample_id, label, score, fragment
    """

    classes: np.ndarray
    candidates: pa.Table


def scan_new(run: Run, fragments: Sequence[Fragment], count: int) -> NewRows:
    """Go through the score shards of new fragments once; `count` candidates for an audit are drawn."""
    classes, drawn = np.zeros(len(run.classes().names), np.int64), pa.table({})
    read = functools.partial(_shard, run)
    for fragment, table in storage.ahead(
        read, [fragment.fragment_id for fragment in fragments], run.uri
    ):
        label = table["label"].fill_null(-1).to_numpy()
        classes += np.bincount(label[label >= 0], minlength=len(classes))
        rows = np.flatnonzero((label >= 0) & ~table["measured"].to_numpy())
        part = table.take(pa.array(rows)).drop_columns(["measured"])
        part = part.append_column(
            "order", pa.array(hash64(part["sample_id"].combine_chunks(), SALT))
        )
        drawn = lowest(
            [drawn, part.append_column("fragment", pa.array([fragment] * len(part), pa.string()))],
            count,
        )
    return NewRows(classes, drawn)


def audit_new(
    context: Context, fragments: Sequence[Fragment], candidates: pa.Table
) -> tuple[pa.Table, StageRecord]:
    """Measure candidates: sample_id, label, measured, predicted (float64), in the order drawn; and what that cost.

    Raises StageError where a score is not finite.
    """
    config, run, record = context.config, context.run, StageRecord()
    wanted: dict[str, list[str]] = {}
    for row in candidates.select(["sample_id", "fragment"]).to_pylist():
        wanted.setdefault(row["fragment"], []).append(row["sample_id"])
    units = [
        (fragment, wanted[fragment.fragment_id])
        for fragment in fragments
        if fragment.fragment_id in wanted
    ]
    found: dict[str, tuple[int, np.ndarray]] = {}

    def collect(result: dict[str, Any]) -> None:
        found.update(result["images"])
        record.cpu_seconds += result["cpu_seconds"]

    from raypipe.runs.seed_shards import shard_table
    from raypipe.stages.measure.stage import measure_extra_shard

    context.run_tasks(units, functools.partial(_read, config, run.uri), collect)
    table = candidates.filter(
        pa.array(
            [sample_id in found for sample_id in candidates["sample_id"].to_pylist()], pa.bool_()
        )
    )
    ids = table["sample_id"].to_pylist()
    shard, size = PREFIX + content_hash(ids), config.proxy.image_size
    images = (
        np.stack([found[sample_id][1] for sample_id in ids])
        if ids
        else np.zeros((0, 3, size, size), np.uint8)
    )
    # a pseudo-label is that of the sample's embedding
    labels = [
        found[sample_id][0] if found[sample_id][0] >= 0 else told
        for sample_id, told in zip(ids, table["label"].to_pylist())
    ]
    storage.write_table(
        run.path("seed", f"{shard}.parquet"),
        shard_table(ids, labels, images, len(run.classes().names), size),
    )
    scores = measure_extra_shard(context, record, shard)
    remove_leftovers(run)
    measured = dict(
        zip(scores["sample_id"].to_pylist(), scores[config.score].to_pylist(), strict=True)
    )
    values = np.array([measured[sample_id] for sample_id in ids], np.float64)
    if not np.isfinite(values).all():
        raise StageError(
            f"{config.score} of {int((~np.isfinite(values)).sum())} new samples is not finite"
        )
    predicted = table["score"].to_numpy().astype(np.float64)
    columns = {
        "sample_id": table["sample_id"],
        "label": table["label"],
        "measured": values,
        "predicted": predicted,
    }
    return pa.table(columns), record


def remove_leftovers(run: Run) -> None:
    """Remove the images of audits, also of one that was interrupted."""
    for shard in run.done("seed"):
        if shard.startswith(PREFIX):
            storage.delete(run.path("seed", f"{shard}.parquet"))


def _shard(run: Run, fragment: str) -> pa.Table:
    return storage.read_table(run.path("scores", f"{fragment}.parquet"), COLUMNS)


def _read(config: Config, run_uri: str, unit: tuple[Fragment, list[str]]) -> dict[str, Any]:
    """Label and pixels uint8 [3, size, size] of some samples of a fragment, by id; one that cannot be read any more is left out.

    Runs in a task.
    """
    from raypipe.distributed.usage import Stopwatch

    fragment, ids = unit
    watch, run, source, wanted = Stopwatch(), Run(run_uri), open_source(config.source), set(ids)
    classes, read = run.classes(), source.read(run.with_members(fragment), wanted.__contains__)
    samples = [
        sample
        for sample in reject_duplicates(run, fragment, read, source.ids_can_repeat)
        if sample.sample_id in wanted
    ]
    images, reasons = decode_batch(samples, config.proxy.image_size, config.source.max_pixels)
    labels = [classes.label_of(sample)[0] for sample in samples]
    good = {
        sample.sample_id: (label, image)
        for sample, label, image, reason in zip(samples, labels, images, reasons, strict=True)
        if (label >= 0 or classes.clusters) and not reason
    }
    return {"images": good, "cpu_seconds": watch.lap()}
