"""Seed: keeps a sample when a hash of its id falls under the fraction, decoded once to the proxy's input size.

The same sample is drawn everywhere and for ever, whatever else is in the source. A source that grows does not change a
seed set that is drawn: new samples are scored with the extrapolator that exists.

In the same pass an audit set is drawn by another hash from the samples outside the seed set. The proxy is never trained on it;
scores at its checkpoints can be measured on it all the same, and tell how well scores of samples outside the seed set are predicted.
"""

from __future__ import annotations

import functools
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
from raypipe.sources import Fragment, open_source
from raypipe.sources.id_sampling import audit_fraction, audit_rule, in_sample
from raypipe.stages.base import Stage
from raypipe.vision.decode import decode_batch


class SeedStage(Stage):
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
        return {*manifest.shards, *manifest.audit_shards} <= context.run.done("seed")

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = context.config, context.run
        groups = _groups([fragment for fragment in run.fragments() if not fragment.error], config)
        samples = sum(fragment.samples for _, group in groups for fragment in group)
        audit = audit_fraction(config.seed, samples)
        files = run.done("seed")
        done = {name for name, _ in groups if {name, audit_name(name)} <= files}
        tally = RejectCounter(config.source.max_reject_fraction, samples)
        with context.progress.meter("seed", samples) as meter:

            def collect(result: DrawnShard) -> None:
                record.add_cost(result)
                before = tally.rejects
                tally.add(result.drawn, result.reasons)
                meter.add(result.samples, result.unit, tally.rejects - before)
                tally.check()

            meter.already(
                sum(
                    fragment.samples for name, group in groups if name in done for fragment in group
                )
            )
            for name in sorted(done):
                before = shard_statistics(run, name)
                tally.add(before.get("drawn", 0), before.get("rejects", "[]"))
            tally.check()
            missing = [
                unit for unit in hash_order(groups, lambda unit: unit[0]) if unit[0] not in done
            ]
            meter.queue(len(missing))
            context.run_tasks(missing, functools.partial(_draw, config, run.uri, audit), collect)
        tally.check(all_read=True)
        shards = sorted(name for name, _ in groups)
        manifest = SeedManifest.from_shards(run, shards, audit)
        for stale in run.done("seed") - set(shards) - {audit_name(name) for name in shards}:
            storage.delete(run.seed_shard(stale))
        _check(manifest, config)
        manifest.write(run)
        record.samples = manifest.samples
        record.detail = {
            key: manifest.as_json()[key]
            for key in ("samples", "per_class", "mean", "std", "audit_samples")
        }
        record.detail["rejects"] = tally.rejects


def _groups(fragments: list[Fragment], config: Config) -> list[tuple[str, list[Fragment]]]:
    """Runs of fragments that give about SEED_SHARD_SAMPLES seed samples, each with the name of its shard."""
    result: list[tuple[str, list[Fragment]]] = []
    group: list[Fragment] = []
    samples = 0
    for fragment in fragments:
        group.append(fragment)
        samples += fragment.samples
        if samples * config.seed.fraction >= SEED_SHARD_SAMPLES or fragment is fragments[-1]:
            name = f"seed-{len(result):05d}-{content_hash(item.fragment_id for item in group)}"
            result.append((name, group))
            group, samples = [], 0
    return result


@dataclass(frozen=True)
class DrawnShard(UnitResult):
    """What a task reports: `samples` it read, of which it drew `drawn`, with rejects among these."""

    drawn: int = 0


def _draw(
    config: Config, run_uri: str, audit: float, unit: tuple[str, list[Fragment]]
) -> DrawnShard:
    """Read a group of fragments and write its seed shard and its audit shard. Runs in a task."""
    name, group = unit
    watch, run, source = Stopwatch(), Run(run_uri), open_source(config.source)
    classes, size = run.classes(), config.proxy.image_size
    seeds, audits = (
        in_sample(config.seed.fraction, config.seed.seed),
        audit_rule(config.seed, audit),
    )
    ids: list[str] = []
    labels: list[int] = []
    blocks: list[np.ndarray] = []
    drawn, rejects = 0, []
    for fragment in group:
        read = source.read(
            run.with_members(fragment), lambda sample_id: seeds(sample_id) or audits(sample_id)
        )
        raw = list(reject_duplicates(run, fragment, read, source.ids_can_repeat))
        images, reasons = decode_batch(raw, size, config.source.max_pixels)
        found = [classes.label_of(sample) for sample in raw]
        reasons = [reason or wrong for reason, (_, wrong) in zip(reasons, found, strict=True)]
        index = [label for label, _ in found]
        drawn += len(raw)
        rejects += [
            (sample.sample_id, reason)
            for sample, reason in zip(raw, reasons, strict=True)
            if reason
        ]
        good = [
            row
            for row, reason in enumerate(reasons)
            if not reason and (index[row] >= 0 or classes.clusters)
        ]
        ids += [raw[row].sample_id for row in good]
        labels += [index[row] for row in good]
        blocks.append(images[good])
    images, mine = np.concatenate(blocks), np.array([seeds(sample_id) for sample_id in ids], bool)
    about: dict[str, Any] = {"drawn": drawn, "rejects": summarize_rejects(rejects)}
    unlabelled = {"unlabelled": True} if classes.clusters else {}
    for shard, rows in ((name, mine), (audit_name(name), ~mine)):
        kept = np.flatnonzero(rows)
        table = shard_table(
            [ids[row] for row in kept],
            [labels[row] for row in kept],
            images[kept],
            distinguished_classes(classes),
            size,
            about | unlabelled,
        )
        storage.write_table(run.seed_shard(shard), table)
    samples = sum(fragment.samples for fragment in group)
    return DrawnShard(name, samples, len(rejects), about["rejects"], watch.lap(), drawn=drawn)


def _check(manifest: SeedManifest, config: Config) -> None:
    present = sum(count > 0 for count in manifest.per_class)
    if config.unsupervised and manifest.samples < MIN_SEED_SAMPLES:
        raise StageError(
            f"the seed set has {manifest.samples} readable samples; at least {MIN_SEED_SAMPLES} are needed. Raise seed.fraction (now {config.seed.fraction:g})"
        )
    if not config.unsupervised and (manifest.samples < MIN_SEED_SAMPLES or present < 2):
        raise StageError(
            f"the seed set has {manifest.samples} labelled, readable samples of {present} classes; "
            f"at least {MIN_SEED_SAMPLES} samples of 2 classes are needed. Raise seed.fraction (now {config.seed.fraction:g}), or check the labels "
            "with `raypipe inspect`"
        )
