"""Seed: draw the seed set and the audit set, and decode them once to the proxy's input size.

A sample is in the seed set when a hash of its id is below the fraction. So the same samples are
drawn everywhere and always, whatever else is in the source. A seed set that is drawn does not
change when the source grows: new samples are scored with the existing extrapolator.

In the same pass, another hash draws an audit set from the samples outside the seed set. The proxy
is never trained on it. Scores at its checkpoints can be measured on it all the same, and show how
well scores of samples outside the seed set are predicted.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.distributed.usage import Stopwatch
from raypipe.errors import StageError
from raypipe.runs.duplicates import reject_duplicates
from raypipe.runs.ledger import StageRecord, content_hash
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.rejects import RejectCounter, hash_order, summarize_rejects
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import (
    audit_name,
    distinguished_classes,
    shard_statistics,
    shard_table,
)
from raypipe.runs.sizes import MIN_SEED_SAMPLES, SEED_SHARD_SAMPLES
from raypipe.runs.unit_result import UnitResult
from raypipe.sources import ClassMap, Fragment, RawSample, open_source
from raypipe.sources.id_sampling import audit_fraction, audit_rule, in_sample
from raypipe.stages.base import Stage
from raypipe.vision.decode import decode_batch


@dataclass(frozen=True)
class SeedShard:
    """A seed shard to be drawn: its name and the consecutive fragments that it is drawn from."""

    name: str
    fragments: list[Fragment]

    @property
    def samples(self) -> int:
        """Samples of the fragments."""
        return sum(fragment.samples for fragment in self.fragments)

    @property
    def files(self) -> set[str]:
        """Names of the seed shard and of its audit shard."""
        return {self.name, audit_name(self.name)}


@dataclass(frozen=True)
class DrawnShard(UnitResult):
    """What a task reports of a seed shard.

    `samples` are those that it read; `drawn` of them are in the seed or audit set, and `rejects`
    are among these.
    """

    drawn: int = 0


class SeedStage(Stage):
    """Draw the seed set and the audit set."""

    name = "seed"
    needs = ("index",)

    def settings(self, config: Config) -> dict[str, Any]:
        return {
            **config.seed.model_dump(),
            "image_size": config.proxy.image_size,
            "max_pixels": config.source.max_pixels,
        }

    def complete(self, context: Context, record: StageRecord) -> bool:
        try:
            manifest = SeedManifest.read(context.run)
        except FileNotFoundError:
            return False
        return set(manifest.all_shards) <= context.run.done("seed")

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = context.config, context.run
        readable = [fragment for fragment in run.fragments() if not fragment.error]
        shards = _plan_shards(readable, config.seed.fraction)
        samples = sum(shard.samples for shard in shards)
        audit = audit_fraction(config.seed, samples)
        tally = RejectCounter(config.source.max_reject_fraction, samples)
        _draw_missing(context, record, shards, audit, tally)
        tally.check(all_read=True)
        manifest = SeedManifest.from_shards(run, sorted(shard.name for shard in shards), audit)
        current = {name for shard in shards for name in shard.files}
        for stale in run.done("seed") - current:
            storage.delete(run.seed_shard(stale))
        _check_size(manifest, config)
        manifest.write(run)
        record.samples = manifest.samples
        written = manifest.as_json()
        names = ("samples", "per_class", "mean", "std", "audit_samples")
        record.detail = {name: written[name] for name in names} | {"rejects": tally.rejects}


def _plan_shards(fragments: Sequence[Fragment], fraction: float) -> list[SeedShard]:
    """Group consecutive fragments that give about SEED_SHARD_SAMPLES seed samples."""
    shards: list[SeedShard] = []
    group: list[Fragment] = []
    samples = 0
    for fragment in fragments:
        group.append(fragment)
        samples += fragment.samples
        if samples * fraction >= SEED_SHARD_SAMPLES or fragment is fragments[-1]:
            content = content_hash(item.fragment_id for item in group)
            shards.append(SeedShard(f"seed-{len(shards):05d}-{content}", group))
            group, samples = [], 0
    return shards


def _draw_missing(
    context: Context,
    record: StageRecord,
    shards: Sequence[SeedShard],
    audit: float,
    tally: RejectCounter,
) -> None:
    """Draw the shards that do not exist, and tally the rejects of all."""
    config, run = context.config, context.run
    files = run.done("seed")
    done = [shard for shard in shards if shard.files <= files]
    missing = [shard for shard in shards if not shard.files <= files]
    with context.progress.meter("seed", sum(shard.samples for shard in shards)) as meter:
        meter.already(sum(shard.samples for shard in done))
        for name in sorted(shard.name for shard in done):
            statistics = shard_statistics(run, name)
            tally.add(statistics.get("drawn", 0), statistics.get("rejects", "[]"))
        tally.check()
        meter.queue(len(missing))

        def collect(result: DrawnShard) -> None:
            record.add_cost(result)
            before = tally.rejects
            tally.add(result.drawn, result.reasons)
            meter.add(result.samples, result.unit, tally.rejects - before)
            tally.check()

        units = hash_order(missing, lambda shard: shard.name)
        context.run_tasks(units, functools.partial(_draw, config, run.uri, audit), collect)


@dataclass(frozen=True)
class _DecodedFragment:
    """The drawn samples of one fragment.

    Attributes
    ----------
    drawn : int
        Samples drawn, rejects included.
    ids, labels : list
        Ids and class indices of the n usable ones.
    images : np.ndarray
        Their pixels, uint8 [n, 3, size, size].
    rejects : list of tuple
        Id and reason of the others.
    """

    drawn: int
    ids: list[str]
    labels: list[int]
    images: np.ndarray
    rejects: list[tuple[str, str]]


def _draw(config: Config, run_uri: str, audit: float, shard: SeedShard) -> DrawnShard:
    """Read the fragments of a seed shard; write it and its audit shard. Runs in a task."""
    watch, run, source = Stopwatch(), Run(run_uri), open_source(config.source)
    classes, size = run.classes(), config.proxy.image_size
    in_seed = in_sample(config.seed.fraction, config.seed.seed)
    in_audit = audit_rule(config.seed, audit)
    decoded: list[_DecodedFragment] = []
    for fragment in shard.fragments:
        read = source.read(
            run.with_members(fragment), lambda sample_id: in_seed(sample_id) or in_audit(sample_id)
        )
        raw = list(reject_duplicates(run, fragment, read, source.ids_can_repeat))
        decoded.append(_decode(raw, classes, size, config.source.max_pixels))
    ids = [sample_id for item in decoded for sample_id in item.ids]
    labels = [label for item in decoded for label in item.labels]
    rejects = [reject for item in decoded for reject in item.rejects]
    images = np.concatenate([item.images for item in decoded])
    drawn = sum(item.drawn for item in decoded)
    statistics: dict[str, Any] = {"drawn": drawn, "rejects": summarize_rejects(rejects)}
    if classes.clusters:
        statistics["unlabelled"] = True
    of_seed = np.array([in_seed(sample_id) for sample_id in ids], bool)
    for name, mask in ((shard.name, of_seed), (audit_name(shard.name), ~of_seed)):
        rows = np.flatnonzero(mask)
        table = shard_table(
            [ids[row] for row in rows],
            [labels[row] for row in rows],
            images[rows],
            distinguished_classes(classes),
            size,
            statistics,
        )
        storage.write_table(run.seed_shard(name), table)
    return DrawnShard(
        shard.name,
        shard.samples,
        len(rejects),
        statistics["rejects"],
        watch.lap(),
        drawn=drawn,
    )


def _decode(
    raw: Sequence[RawSample], classes: ClassMap, size: int, max_pixels: int
) -> _DecodedFragment:
    """Decode drawn samples, and separate those that cannot be used."""
    images, unreadable = decode_batch(raw, size, max_pixels)
    labelled = [classes.label_of(sample) for sample in raw]
    labels = [label for label, _ in labelled]
    reasons = [
        reason or bad_label for reason, (_, bad_label) in zip(unreadable, labelled, strict=True)
    ]
    good = [
        row
        for row, reason in enumerate(reasons)
        if not reason and (labels[row] >= 0 or classes.clusters)
    ]
    return _DecodedFragment(
        len(raw),
        [raw[row].sample_id for row in good],
        [labels[row] for row in good],
        images[good],
        [(sample.sample_id, reason) for sample, reason in zip(raw, reasons, strict=True) if reason],
    )


def _check_size(manifest: SeedManifest, config: Config) -> None:
    """Raise StageError when the seed set is too small to train on."""
    fraction = config.seed.fraction
    if config.unsupervised and manifest.samples < MIN_SEED_SAMPLES:
        raise StageError(
            f"the seed set has {manifest.samples} readable samples; at least {MIN_SEED_SAMPLES} "
            f"are needed. Raise seed.fraction (now {fraction:g})"
        )
    classes_present = sum(count > 0 for count in manifest.per_class)
    too_small = manifest.samples < MIN_SEED_SAMPLES or classes_present < 2
    if not config.unsupervised and too_small:
        raise StageError(
            f"the seed set has {manifest.samples} labelled, readable samples of {classes_present} "
            f"classes; at least {MIN_SEED_SAMPLES} samples of 2 classes are needed. Raise "
            f"seed.fraction (now {fraction:g}), or check the labels with `raypipe inspect`"
        )
