"""Rehearse: predict scores that need training on the sample, in small, where the truth is known.

See `raypipe.assessment.rehearsal` for the reason. A second proxy is trained, with the settings of
the proxy, on the half of the seed set that a hash selects. The other half relates to it as all
other samples relate to the seed set. It starts from other weights than the proxy. The stage is
skipped unless `Config.rehearses`.

`rehearsal/` is a small run of its own, written by the stages of this one:

- `index/classes.json`, `seed/`, `proxy/`, as in a run: the decoded half and its proxy;
- `measured/<shard>.parquet`: sample_id, label and the score of the half in the training of that
  proxy;
- `seen/<shard>.parquet`: every seed sample as that proxy sees it: sample_id, label, embedding,
  loss, margin, entropy, and trained, whether the sample is in the half.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.assessment.rank_agreement import MIN_SAMPLES
from raypipe.config import Config
from raypipe.config.choices import PROXY_STATISTICS
from raypipe.distributed.actor_pool import Batch, WorkerContext, stream
from raypipe.distributed.context import Context
from raypipe.distributed.usage import Stopwatch
from raypipe.errors import StageError
from raypipe.runs.checkpoints import load_checkpoint
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import ProxyManifest, SeedManifest
from raypipe.runs.rehearsal import SCORES_FOLDER, SEEN_FOLDER, inner_run
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import read_shard, shard_table
from raypipe.runs.sizes import MIN_SEED_SAMPLES
from raypipe.runs.unit_result import UnitResult
from raypipe.sources.id_sampling import part_rule
from raypipe.stages.base import Stage
from raypipe.stages.measure.trajectories import score_shards, shard_rows
from raypipe.stages.proxy.stage import ProxyStage


class RehearseStage(Stage):
    """Train a second proxy on half of the seed set, and look at both halves with it."""

    name = "rehearse"
    needs = ("measure",)

    def applies_to(self, config: Config) -> bool:
        return config.rehearses

    def settings(self, config: Config) -> dict[str, Any]:
        return {"score": config.score, "options": config.measure.own_options(config.score)}

    def complete(self, context: Context, record: StageRecord) -> bool:
        inner = inner_run(context.run)
        shards = set(SeedManifest.read(context.run).shards)
        return "manifest.json" in storage.names(inner.seed_folder) and all(
            shards <= inner.done(folder) for folder in ("seed", SCORES_FOLDER, SEEN_FOLDER)
        )

    def execute(self, context: Context, record: StageRecord) -> None:
        seed = SeedManifest.read(context.run)
        inner = _inner_context(context)
        if "manifest.json" not in storage.names(inner.run.seed_folder):
            _write_half(context, record, seed, inner.run)
        half = SeedManifest.read(inner.run)
        proxy, training = ProxyStage(), StageRecord()
        if not proxy.complete(inner, training):
            context.progress.say(
                f"{self.name:<11} {context.config.score} requires training on the sample. A second "
                f"proxy, trained on {half.samples:,} of the {seed.samples:,} seed samples, shows "
                "how scores differ without it"
            )
            proxy.execute(inner, training)
        record.cpu_seconds += training.cpu_seconds
        record.gpu_seconds += training.gpu_seconds
        _score_half(inner, record, half)
        _write_seen(context, inner.run, record, seed)
        record.samples = half.samples
        record.detail = {
            "trained": half.samples,
            "others": seed.samples - half.samples,
            **training.detail,
        }


def _inner_context(context: Context) -> Context:
    """Return the context of the small run.

    Its proxy starts from other weights: two trainings that are compared must not start alike. It is
    a single one, also with `proxy.repeats`.
    """
    config = context.config
    proxy = config.proxy.model_copy(update={"seed": config.proxy.seed + 1, "repeats": 1})
    return context.within(config.model_copy(update={"proxy": proxy}), inner_run(context.run))


def _write_half(context: Context, record: StageRecord, seed: SeedManifest, inner: Run) -> None:
    """Copy the half that the second proxy is trained on into the small run."""
    run = context.run
    if not storage.exists(inner.classes_file):
        # pseudo-labels become plain labels in the copy
        classes = run.classes()
        storage.write_json(inner.classes_file, {"names": classes.names, "numeric": classes.numeric})
    done = inner.done("seed")
    context.run_tasks(
        [shard for shard in seed.shards if shard not in done],
        functools.partial(_halve, run.uri, context.config.proxy.seed, len(seed.per_class)),
        record.add_cost,
    )
    half = SeedManifest.from_shards(inner, seed.shards, 0.0)
    others = seed.samples - half.samples
    classes_present = sum(count > 0 for count in half.per_class)
    if half.samples < MIN_SEED_SAMPLES or others < MIN_SAMPLES or classes_present < 2:
        raise StageError(
            f"{seed.samples} seed samples are too few for a rehearsal on half of them: "
            f"{half.samples} would be trained on and {others} judged. Raise seed.fraction, or set "
            "extrapolate.rehearsal to false"
        )
    half.write(inner)


def _score_half(inner: Context, record: StageRecord, half: SeedManifest) -> None:
    """Write the score of the half in the training of the second proxy."""
    done = inner.run.done(SCORES_FOLDER)
    groups = [[unit] for unit in shard_rows(half) if unit.shard not in done]
    function = functools.partial(
        score_shards, inner.config, inner.run.uri, SCORES_FOLDER, [inner.config.score]
    )
    inner.run_tasks(groups, function, record.add_cost)


def _write_seen(context: Context, inner: Run, record: StageRecord, seed: SeedManifest) -> None:
    """Pass the whole seed set through the second proxy."""
    config, done = context.config, inner.done(SEEN_FOLDER)
    missing = [shard for shard in seed.shards if shard not in done]
    if not missing:
        return
    pool = context.cluster.pool(config.embed)
    with context.progress.meter("rehearse", seed.samples) as meter:
        sizes = zip(seed.shards, seed.shard_samples, strict=True)
        meter.already(sum(size for shard, size in sizes if shard in done))

        def collect(result: UnitResult) -> None:
            meter.add(result.samples)
            record.add_cost(result, pool.num_gpus)

        stream(
            missing,
            functools.partial(_read, context.run.uri),
            functools.partial(SecondProxy, WorkerContext.of(context, pool)),
            pool,
            config.cluster.patience_seconds,
            collect,
        )


def _halve(run_uri: str, seed: int, classes: int, shard: str) -> UnitResult:
    """Write the samples of a seed shard that are in the half. Runs in a task."""
    watch, run = Stopwatch(), Run(run_uri)
    ids, images, labels = read_shard(run, shard)
    rows = _rows_of_half(ids, seed)
    table = shard_table(
        [ids[row] for row in rows], labels[rows].tolist(), images[rows], classes, images.shape[-1]
    )
    storage.write_table(inner_run(run).seed_shard(shard), table)
    return UnitResult(shard, len(rows), cpu_seconds=watch.lap())


def _rows_of_half(ids: list[str], seed: int) -> np.ndarray:
    """Return the rows of the samples that the second proxy is trained on."""
    rule = part_rule(2, seed)
    return np.flatnonzero([rule(sample_id) == 0 for sample_id in ids])


def _read(run_uri: str, shard: str) -> Batch:
    """Read a seed shard. Runs in a task."""
    ids, images, labels = read_shard(Run(run_uri), shard)
    return {"sample_id": np.array(ids), "label": labels, "image": images}


class SecondProxy:
    """Runs the second proxy over seed shards; writes one file per shard."""

    def __init__(self, worker: WorkerContext) -> None:
        from raypipe.vision.devices import AdaptiveBatch, set_threads

        set_threads(worker.threads)
        config = worker.config
        self._config, self._run, self._watch = config, worker.run, Stopwatch()
        self._device = worker.device
        images = config.embed.images_at_once(worker.gpu, config.proxy.image_size)
        self._at_once = AdaptiveBatch(images)
        inner = inner_run(self._run)
        final = ProxyManifest.read(inner).parts[0].trained.final
        self._model = load_checkpoint(inner, final, self._device)

    def __call__(self, shard: str, batch: Batch) -> UnitResult:
        from raypipe.vision.forward import forward

        started, gpu = time.monotonic(), self._device == "cuda"
        ids, labels = batch["sample_id"].tolist(), batch["label"]
        outputs = forward(
            self._model,
            batch["image"],
            labels,
            self._at_once,
            self._device,
            gpu and self._config.proxy.amp,
        )
        trained = np.zeros(len(ids), bool)
        trained[_rows_of_half(ids, self._config.proxy.seed)] = True
        embedding = outputs["embedding"]
        data = {
            "sample_id": pa.array(ids, pa.string()),
            "label": pa.array(labels, pa.int32()),
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(embedding.reshape(-1)), embedding.shape[1]
            ),
            **{name: pa.array(outputs[name], pa.float32()) for name in PROXY_STATISTICS},
            "trained": pa.array(trained),
        }
        uri = inner_run(self._run).path(SEEN_FOLDER, f"{shard}.parquet")
        storage.write_table(uri, pa.table(data))
        gpu_seconds = time.monotonic() - started if gpu else 0.0
        return UnitResult(shard, len(ids), cpu_seconds=self._watch.lap(), gpu_seconds=gpu_seconds)
