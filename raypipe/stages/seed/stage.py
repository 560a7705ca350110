"""Seed: draw the seed set and the audit set, and decode them once to the proxy's input size.

A sample is in the seed set when a hash of its id is below the fraction. So the same samples are
drawn everywhere and always, whatever else is in the source. A seed set that is drawn does not
change when the source grows: new samples are scored with the existing extrapolator.

In the same pass, another hash draws an audit set from the samples outside the seed set. The proxy
is never trained on it. Scores at its checkpoints can be measured on it all the same, and show how
well scores of samples outside the seed set are predicted.

The stage has two steps. Tasks draw the samples of groups of fragments (`raypipe.stages.seed.draw`)
into `drawn/`. Then tasks gather them into seed shards (`raypipe.stages.seed.gather`) whose content
depends on the ids alone, see `raypipe.runs.seed_shards`. `drawn/` is deleted at the end.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from raypipe import storage
from raypipe.config import Config, SourceSettings
from raypipe.distributed.context import Context
from raypipe.errors import StageError
from raypipe.runs.drawn_samples import drawn_statistics
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.rejects import RejectCounter, hash_order
from raypipe.runs.run import Run
from raypipe.runs.sizes import MIN_SEED_SAMPLES
from raypipe.sources import open_source
from raypipe.sources.formats import LABEL_PLACES
from raypipe.stages.base import Stage
from raypipe.stages.seed.draw import DrawResult, draw_samples
from raypipe.stages.seed.gather import GatherResult, gather_shards
from raypipe.stages.seed.plan import SeedPlan
from raypipe.text import counted
from raypipe.vision.bit_depth import BitsInUse

READERS = 16
"""Footers that are read concurrently."""
USE_CLUSTERS = (
    "for a source without labels, set source.label_column to null and pseudo_labels.clusters to a "
    "number: clusters then take the place of classes"
)


class SeedStage(Stage):
    """Draw the seed set and the audit set."""

    name = "seed"
    needs = ("index",)

    def settings(self, config: Config) -> dict[str, Any]:
        return {
            **config.seed.model_dump(),
            "image_size": config.proxy.image_size,
            "max_pixels": config.source.max_pixels,
            **({"bit_depth": config.source.bit_depth} if config.source.bit_depth != 16 else {}),
            **({"channels": config.proxy.channels} if config.proxy.channels != 3 else {}),
        }

    def complete(self, context: Context, record: StageRecord) -> bool:
        try:
            manifest = SeedManifest.read(context.run)
        except FileNotFoundError:
            return False
        return set(manifest.all_shards) <= context.run.done("seed")

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = context.config, context.run
        if not config.unsupervised and not run.classes().names:
            raise StageError(without_labels(config.source))
        readable = [fragment for fragment in run.fragments() if not fragment.error]
        plan = SeedPlan.of(readable, config)
        _check_unused(run, plan)
        tally = RejectCounter(config.source.max_reject_fraction, plan.samples)
        bits = _draw_missing(context, record, plan, tally)
        tally.check(all_read=True)
        if foreseen := tally.outlook():
            context.progress.say(f"note: {foreseen}")
        _gather_missing(context, record, plan)
        manifest = SeedManifest.from_shards(run, plan.shards, plan.audit)
        for stale in run.done("seed") - plan.files:
            storage.delete(run.seed_shard(stale))
        if problem := size_problem(manifest, config, plan.samples):
            raise StageError(problem)
        manifest.write(run)
        record.samples = manifest.samples
        written = manifest.as_json()
        names = ("samples", "per_class", "mean", "std", "audit_samples")
        record.detail = {name: written[name] for name in names} | {"rejects": tally.rejects}
        record.detail["bits_in_use"] = dataclasses.asdict(bits)
        if note := bits.note(config.source.bit_depth):
            context.progress.say(f"note: {note}")
        storage.delete(run.drawn_folder)


def _check_unused(run: Run, plan: SeedPlan) -> None:
    """Raise StageError if a proxy was trained on another division into shards than the planned one.

    This happens when shards were lost and the source has changed since, or version 0.2.0 or earlier
    wrote them. The rows of the trajectory would then be those of other samples.
    """
    if not storage.exists(run.seed_manifest_file) or not storage.names(run.proxy_folder):
        return
    shards = set(SeedManifest.read(run).all_shards)
    lost = shards - run.done("seed")
    if lost - plan.files:
        raise StageError(
            f"{len(lost)} of {len(shards)} seed and audit shards are lost, such as "
            f"seed/{min(lost)}.parquet, and cannot be written again as the proxy saw them; "
            "use a new run folder"
        )


def _draw_missing(
    context: Context, record: StageRecord, plan: SeedPlan, tally: RejectCounter
) -> BitsInUse:
    """Draw the samples of the fragments that have no drawn file, and tally the rejects of all.

    Returns the bits that 16-bit images use.
    """
    bits = BitsInUse()
    config, run = context.config, context.run
    files = run.done("drawn")
    done = [unit for unit in plan.units if unit.name in files]
    missing = [unit for unit in plan.units if unit.name not in files]
    with context.progress.meter("seed", plan.samples) as meter:
        meter.already(sum(unit.samples for unit in done))
        names = sorted(unit.name for unit in done)
        read = functools.partial(drawn_statistics, run)
        for _, statistics in storage.ahead(read, names, run.uri, READERS):
            tally.add(statistics["drawn"], statistics["rejects"])
            bits += BitsInUse(**statistics.get("bits_in_use", {}))
        tally.check()
        meter.queue(len(missing))

        def collect(result: DrawResult) -> None:
            nonlocal bits
            record.add_cost(result)
            bits += BitsInUse(**result.bits_in_use)
            before = tally.rejects
            tally.add(result.drawn, result.reasons)
            meter.add(result.samples, result.unit, tally.rejects - before)
            tally.check()

        units = hash_order(missing, lambda unit: unit.name)
        draw = functools.partial(draw_samples, config, run.uri, plan.audit, plan.ranges)
        context.run_tasks(units, draw, collect)
    return bits


def _gather_missing(context: Context, record: StageRecord, plan: SeedPlan) -> None:
    """Write the seed shards that do not exist."""
    run = context.run
    files = run.done("seed")
    drawn = [unit.name for unit in plan.units]
    gather = functools.partial(gather_shards, context.config, run.uri, drawn, len(plan.shards))
    missing = [group for group in plan.groups() if not group.files <= files]
    with context.progress.meter("gather", len(plan.shards), "shards") as meter:
        meter.already(len(plan.shards) - sum(len(group.names) for group in missing))

        def collect(result: GatherResult) -> None:
            record.add_cost(result)
            meter.add(result.shards)

        context.run_tasks(missing, gather, collect)


def without_labels(source: SourceSettings) -> str:
    """Return the message about a source in which no sample has a label."""
    format = source.format if source.format != "auto" else open_source(source).format
    place = LABEL_PLACES.get(format, "where the format states them")
    return f"the source has no labels. They are read from {place}. Add them, or {USE_CLUSTERS}"


def size_problem(manifest: SeedManifest, config: Config, total: int) -> str:
    """Return why a seed set cannot be trained on, and what to do; "" if it can.

    Parameters
    ----------
    manifest : SeedManifest
    config : Config
    total : int
        Samples of the source, readable or not.
    """
    fraction = config.seed.fraction
    if config.unsupervised:
        if manifest.samples >= MIN_SEED_SAMPLES:
            return ""
        problem = f"the seed set has {manifest.samples} readable samples"
        needed = f"at least {MIN_SEED_SAMPLES} are needed"
    else:
        present = sum(count > 0 for count in manifest.per_class)
        if manifest.samples >= MIN_SEED_SAMPLES and present >= 2:
            return ""
        problem = (
            f"the seed set has {manifest.samples} labelled, readable samples of "
            f"{counted(present, 'class', 'classes')}"
        )
        needed = f"at least {MIN_SEED_SAMPLES} samples of 2 classes are needed"
        if len(manifest.per_class) < 2:
            return (
                f"{problem}; {needed}, but the source has one class. Check where the labels are "
                f"with `raypipe inspect`; {USE_CLUSTERS}"
            )
    if total < MIN_SEED_SAMPLES:
        return f"{problem}; {needed}, but the source has {counted(total, 'sample')}. Add samples"
    if fraction >= 1:
        return (
            f"{problem}; {needed}, and seed.fraction is 1. Check the source with `raypipe inspect`"
        )
    return (
        f"{problem}; {needed}. Raise seed.fraction (now {fraction:g}), or check the source with "
        "`raypipe inspect`"
    )
