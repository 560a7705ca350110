"""Rehearse: for scores that need training on the sample, the whole in small: see `raypipe.assessment.rehearsal`.

A second proxy is trained, with the settings of the proxy, on the half of the seed set that a hash draws; the other half stands to it as
all other samples stand to the seed set. It starts from other weights than the proxy. Skipped where `Config.rehearses` says so.

`rehearsal/` is a small run of its own, made by the stages of this one:

    index/classes.json, seed/, proxy/   as in a run: the half, decoded, and its proxy
    measured/<shard>.parquet            sample_id, label and the score of the half in the training of that proxy
    seen/<shard>.parquet                every seed sample as that proxy sees it: sample_id, label, embedding, loss, margin, entropy, and
                                        trained, whether it is of the half
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
from raypipe.distributed.actor_pool import Batch, stream
from raypipe.distributed.context import Context
from raypipe.distributed.usage import Stopwatch
from raypipe.errors import StageError
from raypipe.runs.checkpoints import load_checkpoint
from raypipe.runs.layout import Run
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import make_manifest, proxy_manifest, seed_manifest
from raypipe.runs.partition import MIN_PART_SAMPLES
from raypipe.runs.seed_shards import read_shard, shard_table
from raypipe.sources.id_sampling import part_rule
from raypipe.stages.base import Stage
from raypipe.stages.measure.trajectories import score_shards
from raypipe.stages.proxy.stage import ProxyStage

FOLDER, SCORES_FOLDER, SEEN = "rehearsal", "measured", "seen"


class RehearseStage(Stage):
    name = "rehearse"
    needs = ("measure",)

    def applies_to(self, config: Config) -> bool:
        return config.rehearses

    def settings(self, config: Config) -> dict[str, Any]:
        return {"score": config.score, "options": config.measure.options(config.score)}

    def complete(self, context: Context, record: StageRecord) -> bool:
        inner = inner_run(context.run)
        shards = set(seed_manifest(context.run)["shards"])
        return "manifest.json" in storage.names(inner.path("seed")) and all(
            shards <= inner.done(folder) for folder in ("seed", SCORES_FOLDER, SEEN)
        )

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run, inner = context.config, context.run, inner_run(context.run)
        seed = seed_manifest(run)
        # from other weights: two trainings that are compared must not start alike
        alone = config.proxy.model_copy(update={"seed": config.proxy.seed + 1})
        within = context.within(config.model_copy(update={"proxy": alone}), inner)
        if "manifest.json" not in storage.names(inner.path("seed")):
            self._divide(context, record, seed, inner)
        halved = seed_manifest(inner)
        proxy, training = ProxyStage(), StageRecord()
        if not proxy.complete(within, training):
            context.progress.say(
                f"{self.name:<11} {config.score} needs training on the sample: a second proxy, on {halved['samples']:,} of the "
                f"{seed['samples']:,} seed samples, tells how it differs where there was none"
            )
            proxy.execute(within, training)
        record.cpu_seconds += training.cpu_seconds
        record.gpu_seconds += training.gpu_seconds
        self._score(within, record, halved)
        self._look(context, within, record, seed)
        record.samples = halved["samples"]
        record.detail = {
            "trained": halved["samples"],
            "others": seed["samples"] - halved["samples"],
            **training.detail,
        }

    def _divide(
        self, context: Context, record: StageRecord, seed: dict[str, Any], inner: Run
    ) -> None:
        """Copy the half that the second proxy is trained on."""
        run = context.run
        if not storage.exists(inner.path("index", "classes.json")):
            classes = run.classes()  # with pseudo-labels, those of clusters; in the copy of the half they stand as labels do
            storage.write_json(
                inner.path("index", "classes.json"),
                {"names": classes.names, "numeric": classes.numeric},
            )

        def collect(result: dict[str, Any]) -> None:
            record.cpu_seconds += result["cpu_seconds"]

        missing = [shard for shard in seed["shards"] if shard not in inner.done("seed")]
        context.run_tasks(
            missing,
            functools.partial(_halve, run.uri, context.config.proxy.seed, len(seed["per_class"])),
            collect,
        )
        manifest = make_manifest(inner, seed["shards"], 0.0)
        others = seed["samples"] - manifest["samples"]
        if (
            manifest["samples"] < MIN_PART_SAMPLES
            or others < MIN_SAMPLES
            or sum(count > 0 for count in manifest["per_class"]) < 2
        ):
            raise StageError(
                f"{seed['samples']} seed samples are too few for a rehearsal on half of them: {manifest['samples']} would be trained on, "
                f"{others} judged. Raise seed.fraction, or set extrapolate.rehearsal to false"
            )
        storage.write_json(inner.path("seed", "manifest.json"), manifest)

    def _score(self, within: Context, record: StageRecord, halved: dict[str, Any]) -> None:
        """The score of the half in the training of the second proxy."""
        done, first, units = within.run.done(SCORES_FOLDER), 0, []
        for shard, samples in zip(halved["shards"], halved["shard_samples"], strict=True):
            if shard not in done:
                units.append([(shard, first, first + samples)])
            first += samples

        def collect(result: dict[str, Any]) -> None:
            record.cpu_seconds += result["cpu_seconds"]

        if units:
            function = functools.partial(
                score_shards, within.config, within.run.uri, SCORES_FOLDER, [within.config.score]
            )
            within.run_tasks(units, function, collect)

    def _look(
        self, context: Context, within: Context, record: StageRecord, seed: dict[str, Any]
    ) -> None:
        """Pass the whole seed set through the second proxy."""
        config, run, done = context.config, context.run, within.run.done(SEEN)
        missing = [shard for shard in seed["shards"] if shard not in done]
        if not missing:
            return
        pool = context.cluster.pool(config.embed)
        with context.progress.meter("rehearse", seed["samples"]) as meter:
            sizes = dict(zip(seed["shards"], seed["shard_samples"], strict=True))
            meter.already(sum(size for shard, size in sizes.items() if shard in done))

            def collect(result: dict[str, Any]) -> None:
                meter.add(result["samples"])
                record.cpu_seconds += result["cpu_seconds"]
                record.gpu_seconds += result["gpu_seconds"] * pool.num_gpus

            stream(
                missing,
                functools.partial(_read, run.uri),
                SecondProxy,
                {
                    "config": config,
                    "run_uri": run.uri,
                    "threads": pool.threads,
                    "gpu": pool.num_gpus > 0,
                },
                pool,
                config.cluster.patience_seconds,
                collect,
            )


def inner_run(run: Run) -> Run:
    """The small run within a run."""
    return Run(run.path(FOLDER))


def rehearsal(config: Config, run: Run, scores: dict[str, float]) -> tuple[list[str], Any]:
    """Ids of the other half, and the rehearsal; scores: those of the seed set in the training of the proxy, by id."""
    from raypipe.assessment.rehearsal import Rehearsal
    from raypipe.runs.embeddings import nodes_of

    inner, earlier = inner_run(run), dict[str, float]()
    for _, table in storage.iter_tables(inner.path(SCORES_FOLDER)):
        earlier.update(
            zip(table["sample_id"].to_pylist(), table[config.score].to_pylist(), strict=True)
        )
    seen = [
        table
        for _, table in sorted(storage.iter_tables(inner.path(SEEN)), key=lambda item: item[0])
    ]
    table = pa.concat_tables(seen)
    trained = table["trained"].to_numpy()
    parts = [table.filter(pa.array(rows)) for rows in (trained, ~trained)]
    ids = [part["sample_id"].to_pylist() for part in parts]
    first, other = (nodes_of(part) for part in parts)
    before = np.array([earlier[name] for name in ids[0]], np.float64)
    return ids[1], Rehearsal(
        first, before, other, np.array([scores[name] for name in ids[1]], np.float64)
    )


def _halve(run_uri: str, seed: int, classes: int, shard: str) -> dict[str, Any]:
    """Write the part of a seed shard that is in the half. Runs in a task."""
    watch, run = Stopwatch(), Run(run_uri)
    ids, images, labels = read_shard(run, shard)
    rows = _half(ids, seed)
    table = shard_table(
        [ids[row] for row in rows], labels[rows].tolist(), images[rows], classes, images.shape[-1]
    )
    storage.write_table(inner_run(run).path("seed", f"{shard}.parquet"), table)
    return {"cpu_seconds": watch.lap()}


def _half(ids: list[str], seed: int) -> np.ndarray:
    """Rows of the samples that the second proxy is trained on."""
    rule = part_rule(2, seed)
    return np.flatnonzero([rule(sample_id) == 0 for sample_id in ids])


def _read(run_uri: str, shard: str) -> Batch:
    """A seed shard. Runs in a task."""
    ids, images, labels = read_shard(Run(run_uri), shard)
    if not ids:  # a row that says so keeps the unit alive
        return {
            "shard": np.array([shard]),
            "sample_id": np.array([""]),
            "label": np.array([-2]),
            "image": np.zeros((1, *images.shape[1:]), np.uint8),
        }
    return {
        "shard": np.full(len(ids), shard),
        "sample_id": np.array(ids),
        "label": labels,
        "image": images,
    }


class SecondProxy:
    """The proxy of the half, run over seed shards; writes one file for each."""

    def __init__(self, config: Config, run_uri: str, threads: int, gpu: bool) -> None:
        from raypipe.vision.devices import AdaptiveBatch, set_threads

        set_threads(threads)
        self._config, self._run, self._watch = config, Run(run_uri), Stopwatch()
        self._device = "cuda" if gpu else "cpu"
        self._at_once = AdaptiveBatch(config.embed.images_at_once(gpu, config.proxy.image_size))
        inner = inner_run(self._run)
        self._model = load_checkpoint(inner, proxy_manifest(inner)["final"], self._device)

    def __call__(self, batch: Batch) -> Batch:
        from raypipe.vision.forward import forward

        started, gpu = time.monotonic(), self._device == "cuda"
        keep = batch["label"] >= 0
        ids, labels = batch["sample_id"][keep].tolist(), batch["label"][keep]
        shard = str(batch["shard"][0])
        found = forward(
            self._model,
            batch["image"][keep],
            labels,
            self._at_once,
            self._device,
            gpu and self._config.proxy.amp,
        )
        trained = np.zeros(len(ids), bool)
        trained[_half(ids, self._config.proxy.seed)] = True
        embedding = found["embedding"]
        data = {
            "sample_id": pa.array(ids, pa.string()),
            "label": pa.array(labels, pa.int32()),
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(embedding.reshape(-1)), embedding.shape[1]
            ),
            **{name: pa.array(found[name], pa.float32()) for name in PROXY_STATISTICS},
            "trained": pa.array(trained),
        }
        storage.write_table(inner_run(self._run).path(SEEN, f"{shard}.parquet"), pa.table(data))
        gpu_seconds = time.monotonic() - started if gpu else 0.0
        row = {
            "unit": shard,
            "samples": len(ids),
            "cpu_seconds": self._watch.lap(),
            "gpu_seconds": gpu_seconds,
        }
        return {key: np.array([value]) for key, value in row.items()}
