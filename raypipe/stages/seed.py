"""Seed: keeps a sample when a hash of its id falls under the fraction, decoded once to the proxy's input size.

The same sample is drawn everywhere and for ever, whatever else is in the source. A source that grows does not change a
seed set that is drawn: new samples are scored with the extrapolator that exists.

In the same pass an audit set is drawn by another hash from the samples outside the seed set. The proxy is never trained on it;
scores at its checkpoints can be measured on it all the same, and tell how well scores of samples outside the seed set are predicted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.config import Config, SeedSettings
from raypipe.errors import RunError, StageError
from raypipe.images import decode_batch
from raypipe.rundir import FIT_NAME, Run, StageRecord, content_hash
from raypipe.sources import ClassMap, Fragment, open_source
from raypipe.stages.base import Context, Stage
from raypipe.stages.duplicates import once
from raypipe.stages.rejects import Tally, fair_order, summarize
from raypipe.stages.streaming import Stopwatch, run_tasks

SHARD_SAMPLES = 512
"""Seed samples in a shard, about: fragments are read in groups that give so many."""
Rule = Callable[[str], bool]


class SeedStage(Stage):
    name = "seed"
    needs = ("index",)

    def settings(self, config: Config) -> dict[str, Any]:
        return {**config.seed.model_dump(), "image_size": config.proxy.image_size, "max_pixels": config.source.max_pixels}

    def complete(self, context: Context, record: StageRecord) -> bool:
        try:
            manifest = seed_manifest(context.run)
        except FileNotFoundError:
            return False
        return {*manifest["shards"], *manifest["audit_shards"]} <= context.run.done("seed")

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = context.config, context.run
        groups = _groups([fragment for fragment in run.fragments() if not fragment.error], config)
        samples = sum(fragment.samples for _, group in groups for fragment in group)
        audit = audit_fraction(config.seed, samples)
        files = run.done("seed")
        done = {name for name, _ in groups if {name, audit_name(name)} <= files}
        tally = Tally(config.source.max_reject_fraction, samples)
        with context.progress.meter("seed", samples) as meter:

            def collect(result: dict[str, Any]) -> None:
                record.cpu_seconds += result["cpu_seconds"]
                before = tally.rejects
                tally.add(result["drawn"], result["rejects"])
                meter.add(result["samples"], result["unit"], tally.rejects - before)
                tally.check()

            meter.already(sum(fragment.samples for name, group in groups if name in done for fragment in group))
            for name in sorted(done):
                before = _statistics(run, name)
                tally.add(before.get("drawn", 0), before.get("rejects", "[]"))
            tally.check()
            context.cluster  # Ray is started before tasks are made
            missing = [unit for unit in fair_order(groups, lambda unit: unit[0]) if unit[0] not in done]
            meter.queue(len(missing))
            run_tasks(missing, functools.partial(_draw, config, run.uri, audit), collect)
        tally.check(all_read=True)
        shards = sorted(name for name, _ in groups)
        manifest = make_manifest(run, shards, audit)
        for stale in run.done("seed") - set(shards) - {audit_name(name) for name in shards}:
            storage.delete(run.path("seed", f"{stale}.parquet"))
        _check(manifest, config)
        storage.write_json(run.path("seed", "manifest.json"), manifest)
        record.samples = manifest["samples"]
        record.detail = {key: manifest[key] for key in ("samples", "per_class", "mean", "std", "audit_samples")}
        record.detail["rejects"] = tally.rejects


def seed_manifest(run: Run) -> dict[str, Any]:
    """What the seed set is: samples, per_class, mean and std per channel (0..1), image_size, names of its shards in order.

    `unlabelled` where the source has no labels; then per_class is of pseudo-labels, and empty before there are any.
    And what the audit set is: audit_fraction of the samples outside the seed set, audit_samples, audit_shards (those with any), audit_shard_samples.
    """
    manifest = storage.read_json(run.path("seed", "manifest.json"))
    if manifest.get("unlabelled"):
        with contextlib.suppress(FileNotFoundError):  # before there are pseudo-labels
            manifest["per_class"] = storage.read_json(run.path("labels", "labels.json"))["per_class"]
    if not all(map(FIT_NAME, (*manifest.get("shards", ()), *manifest.get("audit_shards", ())))):
        raise RunError(f"{run.uri}: seed/manifest.json is damaged: a shard of it has no name of a shard")
    return manifest


def read_shard(run: Run, shard: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Ids, images uint8 [n, 3, size, size] and labels int64 [n] of a seed or audit shard; the images share the file's memory."""
    ids, images, labels = read_images(run, shard)
    return ids, images, shard_labels(run, shard)["label"].to_numpy().astype(np.int64) if (labels < 0).any() else labels


def read_images(run: Run, shard: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """As `read_shard`, without pseudo-labels: the labels of an unlabelled source are -1."""
    table = storage.read_table(run.path("seed", f"{shard}.parquet"))
    size = json.loads(table.schema.metadata[b"raypipe"])["image_size"]
    count = len(table)
    if count == 0:
        return [], np.zeros((0, 3, size, size), np.uint8), np.zeros(0, np.int64)
    column = table["image"].combine_chunks()
    pixels = np.frombuffer(column.buffers()[1], np.uint8, count * 3 * size * size, column.offset * 3 * size * size)
    return table["sample_id"].to_pylist(), pixels.reshape(count, 3, size, size), table["label"].to_numpy().astype(np.int64)


def shard_labels(run: Run, shard: str) -> pa.Table:
    """sample_id and label, or pseudo-label, of a seed or audit shard, without reading its images."""
    with storage.open_read(run.path("seed", f"{shard}.parquet")) as file:
        parquet = pq.ParquetFile(file)
        if not json.loads(parquet.schema_arrow.metadata[b"raypipe"]).get("unlabelled"):
            return parquet.read(["sample_id", "label"])
    return storage.read_table(run.path("labels", f"{shard}.parquet"), ["sample_id", "label"])


def audit_name(shard: str) -> str:
    """The audit shard that is drawn with a seed shard."""
    return "audit" + shard.removeprefix("seed")


def audit_fraction(settings: SeedSettings, samples: int) -> float:
    """The share of the samples outside the seed set that makes an audit set of the wanted size, of that many samples in all."""
    outside = samples * (1 - settings.fraction)
    return min(1.0, settings.audit_samples(samples) / outside) if outside >= 1 else 0.0


def audit_rule(settings: SeedSettings, fraction: float) -> Rule:
    """The rule of the audit draw, which leaves the seed set out; see `audit_fraction`."""
    seeds, audits = wanted(settings.fraction, settings.seed), wanted(fraction, settings.seed, b"audit")
    return lambda sample_id: audits(sample_id) and not seeds(sample_id)


def wanted(fraction: float, seed: int, purpose: bytes = b"") -> Rule:
    """The rule of the draw: a function sample_id -> bool. Draws for other purposes are independent of one another."""
    key, limit = seed.to_bytes(16, "little") + purpose, int(fraction * 2**64)

    def rule(sample_id: str) -> bool:
        digest = hashlib.blake2b(sample_id.encode("utf-8", "surrogateescape"), digest_size=8, key=key).digest()
        return int.from_bytes(digest, "little") < limit

    return rule


def _groups(fragments: list[Fragment], config: Config) -> list[tuple[str, list[Fragment]]]:
    """Runs of fragments that give about SHARD_SAMPLES seed samples, each with the name of its shard."""
    result: list[tuple[str, list[Fragment]]] = []
    group: list[Fragment] = []
    samples = 0
    for fragment in fragments:
        group.append(fragment)
        samples += fragment.samples
        if samples * config.seed.fraction >= SHARD_SAMPLES or fragment is fragments[-1]:
            name = f"seed-{len(result):05d}-{content_hash(item.fragment_id for item in group)}"
            result.append((name, group))
            group, samples = [], 0
    return result


def _draw(config: Config, run_uri: str, audit: float, unit: tuple[str, list[Fragment]]) -> dict[str, Any]:
    """Read a group of fragments and write its seed shard and its audit shard. Runs in a task."""
    name, group = unit
    watch, run, source = Stopwatch(), Run(run_uri), open_source(config.source)
    classes, size = run.classes(), config.proxy.image_size
    seeds, audits = wanted(config.seed.fraction, config.seed.seed), audit_rule(config.seed, audit)
    ids: list[str] = []
    labels: list[int] = []
    blocks: list[np.ndarray] = []
    drawn, rejects = 0, []
    for fragment in group:
        read = source.read(run.with_members(fragment), lambda sample_id: seeds(sample_id) or audits(sample_id))
        samples = list(once(run, fragment, read, source.ids_can_repeat))
        images, reasons = decode_batch(samples, size, config.source.max_pixels)
        found = [classes.label_of(sample) for sample in samples]
        reasons = [reason or wrong for reason, (_, wrong) in zip(reasons, found, strict=True)]
        index = [label for label, _ in found]
        drawn += len(samples)
        rejects += [(sample.sample_id, reason) for sample, reason in zip(samples, reasons, strict=True) if reason]
        good = [row for row, reason in enumerate(reasons) if not reason and (index[row] >= 0 or classes.clusters)]
        ids += [samples[row].sample_id for row in good]
        labels += [index[row] for row in good]
        blocks.append(images[good])
    images, mine = np.concatenate(blocks), np.array([seeds(sample_id) for sample_id in ids], bool)
    about: dict[str, Any] = {"drawn": drawn, "rejects": summarize(rejects)}
    unlabelled = {"unlabelled": True} if classes.clusters else {}
    for shard, rows in ((name, mine), (audit_name(name), ~mine)):
        kept = np.flatnonzero(rows)
        table = shard_table(
            [ids[row] for row in kept], [labels[row] for row in kept], images[kept], _told(classes), size, about | unlabelled
        )
        storage.write_table(run.path("seed", f"{shard}.parquet"), table)
    return {"unit": name, "samples": sum(fragment.samples for fragment in group), "cpu_seconds": watch.lap(), **about}


def _told(classes: ClassMap) -> int:
    """Classes that labels of the source tell apart: none, where clusters are to stand for them."""
    return 0 if classes.clusters else len(classes.names)


def shard_table(
    ids: list[str],
    labels: list[int],
    images: np.ndarray,
    classes: int,
    size: int,
    about: Mapping[str, Any] = MappingProxyType({}),
) -> pa.Table:
    """A shard with what the manifest needs of it in its metadata; `about` is there, too: samples drawn, and the rejects among them."""
    pixels = images.reshape(len(ids), 3 * size * size)
    channels = pixels.reshape(len(ids), 3, size * size).astype(np.float64) / 255
    statistics = {
        "image_size": size,
        "samples": len(ids),
        "per_class": np.bincount(np.array([label for label in labels if label >= 0], np.int64), minlength=classes).tolist(),
        "sum": channels.sum((0, 2)).tolist(),
        "square": np.square(channels).sum((0, 2)).tolist(),
        **about,
    }
    image_type = pa.binary(3 * size * size)
    columns = [
        pa.array(ids, pa.string()),
        pa.array(labels, pa.int32()),
        pa.FixedSizeBinaryArray.from_buffers(image_type, len(ids), [None, pa.py_buffer(pixels.tobytes())]),
    ]
    return pa.table(columns, ["sample_id", "label", "image"]).replace_schema_metadata({"raypipe": json.dumps(statistics)})


def _statistics(run: Run, shard: str) -> dict[str, Any]:
    with storage.open_read(run.path("seed", f"{shard}.parquet")) as file:
        return json.loads(pq.read_schema(file).metadata[b"raypipe"])


def make_manifest(run: Run, shards: list[str], audit: float) -> dict[str, Any]:
    """What `seed_manifest` gives, from the shards; audit: the share of the samples outside the seed set that is in the audit set."""
    known = run.classes()
    totals, sizes, per_class, sums, squares = 0, [], np.zeros(_told(known), int), np.zeros(3), np.zeros(3)
    size = 0
    for shard in shards:
        found = _statistics(run, shard)
        size = found["image_size"]
        totals += found["samples"]
        sizes.append(found["samples"])
        per_class += np.array(found["per_class"], int)
        sums += found["sum"]
        squares += found["square"]
    pixels = max(1, totals * size * size)
    mean = sums / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 1e-6))
    audited = {audit_name(shard): _statistics(run, audit_name(shard))["samples"] for shard in shards} if audit else {}
    return {
        "samples": totals,
        "image_size": size,
        "per_class": per_class.tolist(),
        "mean": mean.round(6).tolist(),
        "std": std.round(6).tolist(),
        "shards": shards,
        "shard_samples": sizes,
        "audit_fraction": audit,
        "audit_samples": sum(audited.values()),
        "audit_shards": [shard for shard, count in audited.items() if count],
        "audit_shard_samples": [count for count in audited.values() if count],
        **({"unlabelled": True} if known.clusters else {}),
    }


def _check(manifest: dict[str, Any], config: Config) -> None:
    present = sum(count > 0 for count in manifest["per_class"])
    if config.unsupervised and manifest["samples"] < 20:
        raise StageError(
            f"the seed set has {manifest['samples']} readable samples; at least 20 are needed. Raise seed.fraction (now {config.seed.fraction:g})"
        )
    if not config.unsupervised and (manifest["samples"] < 20 or present < 2):
        raise StageError(
            f"the seed set has {manifest['samples']} labelled, readable samples of {present} classes; "
            f"at least 20 samples of 2 classes are needed. Raise seed.fraction (now {config.seed.fraction:g}), or check the labels "
            "with `raypipe inspect`"
        )
