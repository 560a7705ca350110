"""Measure scores at checkpoints for any samples of the source, after the stage is done.

The samples are decoded into a temporary shard in `seed/`, measured with the checkpoints and mean
gradients of the run, and deleted. Nothing stays in `measured/`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.distributed.usage import Stopwatch
from raypipe.runs.duplicates import reject_duplicates
from raypipe.runs.ledger import StageRecord, content_hash
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.partition import proxy_parts
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import EXTRA_PREFIX, remove_extra_shards, shard_table
from raypipe.sources import Fragment, open_source
from raypipe.stages.measure.checkpoint_scores import CheckpointScores
from raypipe.stages.measure.gradient_job import (
    GradientFolders,
    measured_checkpoints,
    needs_self_term,
)
from raypipe.stages.measure.gradients import measure_shards
from raypipe.vision.decode import decode_batch
from raypipe.vision.own_code import transform_of

LabelledImages = dict[str, tuple[int, np.ndarray]]
"""Label (-1 for none) and pixels, uint8 [3, size, size], by sample_id."""


def can_measure(config: Config, run: Run) -> bool:
    """Return whether the run still has the checkpoints and mean gradients that measuring needs.

    `raypipe clean`, `proxy.keep_intermediate` and copies without `measured/` leave runs without
    them.
    """
    folders = GradientFolders.of(config, run)
    for part in proxy_parts(run):
        of_part = folders.of_part(part)
        needed = [of_part.calibrated if config.measure.recalibrates else part.checkpoints]
        if "moso" in config.measure.scores:
            needed.append(of_part.gradients)
        files = {item.file for item in measured_checkpoints(config, part)}
        if any(not files <= storage.names(run.path(folder)) for folder in needed):
            return False
    return True


def measure_samples(
    context: Context, record: StageRecord, fragments: Sequence[Fragment], samples: pa.Table
) -> pa.Table:
    """Measure the scores at checkpoints of some samples outside the seed set.

    Parameters
    ----------
    context, record
        The run, and the record of the stage that the cost is added to.
    fragments
        The fragments that the samples are in, and any others.
    samples
        Columns sample_id, label and fragment. With pseudo-labels, `label` is that of the sample;
        otherwise its label is read again from the source.

    Returns
    -------
    pa.Table
        sample_id, label and the scores at checkpoints, of the samples that can still be read.
    """
    images = _read_images(context, record, fragments, samples)
    shard = _write_shard(context, samples, images)
    scores = measure_extra_shard(context, record, shard)
    remove_extra_shards(context.run)
    return scores


def measure_extra_shard(context: Context, record: StageRecord, shard: str) -> pa.Table:
    """Measure one more shard in `seed/`, of samples outside the seed set, at the checkpoints.

    Returns
    -------
    pa.Table
        sample_id, label and the scores at checkpoints.
    """
    config, run = context.config, context.run
    parts, folder = proxy_parts(run), GradientFolders.of(config, run).checkpoints
    self_term = needs_self_term(config, parts)
    for part in parts:
        measure_shards(context, record, part, self_term, [shard], lambda samples: None)
    scores = CheckpointScores.read(config, run, SeedManifest.read(run))
    table = scores.of_shard(shard, audit=True)
    for part in parts:
        storage.delete(run.path(part.below(folder), f"{shard}.parquet"))
    return table


def _read_images(
    context: Context, record: StageRecord, fragments: Sequence[Fragment], samples: pa.Table
) -> LabelledImages:
    """Decode the images of the samples in tasks, and add the time to the record."""
    ids: dict[str, list[str]] = {}
    for row in samples.select(["sample_id", "fragment"]).to_pylist():
        ids.setdefault(row["fragment"], []).append(row["sample_id"])
    units = [
        (fragment, ids[fragment.fragment_id])
        for fragment in fragments
        if fragment.fragment_id in ids
    ]
    images: LabelledImages = {}

    def collect(result: _ReadResult) -> None:
        images.update(result.images)
        record.cpu_seconds += result.cpu_seconds

    context.run_tasks(units, functools.partial(_read, context.config, context.run.uri), collect)
    return images


def _write_shard(
    context: Context, samples: pa.Table, images: Mapping[str, tuple[int, np.ndarray]]
) -> str:
    """Write the samples that have an image as a temporary shard in `seed/`; return its name."""
    run, size = context.run, context.config.proxy.image_size
    labels = dict(zip(samples["sample_id"].to_pylist(), samples["label"].to_pylist(), strict=True))
    ids = [sample_id for sample_id in labels if sample_id in images]
    pixels = np.zeros((0, context.config.proxy.channels, size, size), np.uint8)
    if ids:
        pixels = np.stack([images[sample_id][1] for sample_id in ids])
    # without a label in the source, the given label is the pseudo-label
    known = [images[name][0] if images[name][0] >= 0 else labels[name] for name in ids]
    shard = EXTRA_PREFIX + content_hash(ids)
    table = shard_table(ids, known, pixels, len(run.classes().names), size)
    storage.write_table(run.seed_shard(shard), table)
    return shard


@dataclass(frozen=True)
class _ReadResult:
    images: LabelledImages
    cpu_seconds: float


def _read(config: Config, run_uri: str, unit: tuple[Fragment, list[str]]) -> _ReadResult:
    """Decode some samples of a fragment; those that cannot be read are left out. Runs in a task."""
    fragment, ids = unit
    watch, run, source, requested = Stopwatch(), Run(run_uri), open_source(config.source), set(ids)
    classes, read = run.classes(), source.read(run.with_members(fragment), requested.__contains__)
    samples = [
        sample
        for sample in reject_duplicates(run, fragment, read, source.ids_can_repeat)
        if sample.sample_id in requested
    ]
    images, reasons = decode_batch(
        samples,
        config.proxy.image_size,
        config.source.max_pixels,
        bit_depth=config.source.bit_depth,
        transform=transform_of(config.source),
        channels=config.proxy.channels,
    )
    labels = [classes.label_of(sample)[0] for sample in samples]
    valid = {
        sample.sample_id: (label, image)
        for sample, label, image, reason in zip(samples, labels, images, reasons, strict=True)
        if (label >= 0 or classes.clusters) and not reason
    }
    return _ReadResult(valid, watch.lap())
