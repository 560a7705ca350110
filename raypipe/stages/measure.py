"""Measure: the measured score of every seed sample.

MoSo takes two passes over the seed set. The first sums the gradients of every checkpoint: tasks over seed shards, whose sums
are added in a tree of fixed shape, so that the result does not depend on the number of workers and the driver sees none
of them. The second streams the shards through actors that hold all checkpoints and mean gradients.

Writes, under `measured/`: `gradients/epoch-0007.safetensors`, `alignments/<shard>.parquet` (sample_id, label,
alignments float32 [checkpoints]) and, when all are there, `<shard>.parquet` (sample_id, label, score).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config
from raypipe.errors import StageError
from raypipe.rundir import Run, StageRecord
from raypipe.stages.base import Context, Stage
from raypipe.stages.cluster import Pool
from raypipe.stages.proxy import load_checkpoint, proxy_manifest
from raypipe.stages.seed import read_shard, seed_manifest
from raypipe.stages.streaming import Columns, Stopwatch, failure, stream

MOST_GROUPS = 64
"""Partial sums of the mean gradient: enough to keep many workers busy, few enough to add up quickly."""
FAN_IN = 4


class MeasureStage(Stage):
    name = "measure"
    needs = ("proxy",)

    def settings(self, config: Config) -> dict[str, Any]:
        return {"score": config.measure.score, "weights": config.measure.weights}

    def complete(self, context: Context, record: StageRecord) -> bool:
        try:
            shards = seed_manifest(context.run)["shards"]
        except FileNotFoundError:
            return False
        return set(shards) <= context.run.done("measured")

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run, seed = context.config, context.run, seed_manifest(context.run)
        pool = context.cluster.pool(config.measure)
        shards, done = seed["shards"], run.done("measured/alignments")
        total = seed["samples"]
        files = [item["file"] for item in proxy_manifest(run)["checkpoints"]]
        files = [file for file in files if file not in storage.names(run.path("measured", "gradients"))]
        with context.progress.meter("measure", 2 * total) as meter:
            if files:
                record.cpu_seconds += _mean_gradients(config, run, seed, files, pool, meter.add)
            else:
                meter.already(total)
            missing = [shard for shard in shards if shard not in done]
            meter.already(sum(count for shard, count in zip(shards, seed["shard_samples"], strict=True) if shard in done))

            def collect(result: dict[str, Any]) -> None:
                meter.add(result["samples"])
                record.cpu_seconds += result["cpu_seconds"]
                record.gpu_seconds += result["gpu_seconds"]

            stream(
                missing,
                functools.partial(_read, run.uri),
                MosoActor,
                {"config": config, "run_uri": run.uri, "threads": pool.threads, "gpu": pool.num_gpus > 0},
                pool,
                config.cluster.patience_seconds,
                collect,
            )
        record.samples, record.detail = _combine(config, run, seed)


def _mean_gradients(config: Config, run: Run, seed: dict[str, Any], files: list[str], pool: Pool, on_done: Any) -> float:
    """Write the mean gradient at every checkpoint of `files`. Returns processor seconds."""
    import ray

    shards = seed["shards"]
    groups = [group.tolist() for group in np.array_split(np.array(shards), min(MOST_GROUPS, len(shards)))]
    gpu = pool.num_gpus > 0
    add_up = ray.remote(num_cpus=pool.num_cpus, num_gpus=pool.num_gpus, max_retries=-1, num_returns=len(files) + 1)(
        _gradient_sums
    )
    merge = ray.remote(num_cpus=pool.num_cpus, max_retries=-1)(_add)
    store = ray.remote(num_cpus=pool.num_cpus, max_retries=-1)(_store_gradient)
    partial: list[list[Any]] = [[] for _ in files]
    reports = []
    for group in groups:
        *sums, report = add_up.remote(run.uri, group, files, config.measure.batch_size, pool.threads, gpu)
        reports.append(report)
        for column, value in zip(partial, sums, strict=True):
            column.append(value)
    stored = []
    for file, column in zip(files, partial, strict=True):
        while len(column) > 1:
            column = [merge.remote(*column[start : start + FAN_IN]) for start in range(0, len(column), FAN_IN)]
        stored.append(store.remote(run.uri, file, seed["samples"], column[0]))
    del partial, column, sums
    seconds = 0.0
    try:
        while reports:
            ready, reports = ray.wait(reports)
            for result in ray.get(ready):
                seconds += result["cpu_seconds"]
                on_done(result["samples"])
        ray.get(stored)
    except Exception as error:
        raise failure(error) from error
    return seconds


def _gradient_sums(run_uri: str, shards: list[str], files: list[str], batch_size: int, threads: int, gpu: bool) -> list[Any]:
    """For every checkpoint the sum of the gradients over some seed shards, then a report. Runs in a task."""
    import torch

    from raypipe.scores.moso import gradient_sum

    watch, run = Stopwatch(), Run(run_uri)
    torch.set_num_threads(threads)
    device = "cuda" if gpu else "cpu"
    models = [load_checkpoint(run, file, device) for file in files]
    totals: list[dict[str, Any]] = [{} for _ in files]
    count = 0
    for shard in shards:
        _, images, labels = read_shard(run, shard)
        for start in range(0, len(labels), batch_size):
            pixels = torch.from_numpy(images[start : start + batch_size].copy()).to(device)
            target = torch.from_numpy(labels[start : start + batch_size]).to(device)
            for model, total in zip(models, totals, strict=True):
                for name, value in gradient_sum(model, pixels, target).items():
                    total[name] = total[name] + value if name in total else value
        count += len(labels)
    sums = [{name: value.cpu().numpy() for name, value in total.items()} for total in totals]
    return [*sums, {"samples": count, "cpu_seconds": watch.lap()}]


def _add(*parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    result = dict(parts[0]) if parts else {}
    for part in parts[1:]:
        for name, value in part.items():
            result[name] = result[name] + value if name in result else value
    return result


def _store_gradient(run_uri: str, file: str, samples: int, total: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save

    mean = {name: np.ascontiguousarray(value / np.float32(samples)) for name, value in total.items()}
    if not all(np.isfinite(value).all() for value in mean.values()):
        raise StageError(
            f"the mean gradient at {file} is not finite: the proxy's training diverged; lower proxy.lr and run again"
        )
    storage.write_bytes(Run(run_uri).path("measured", "gradients", file), save(mean))


def _read(run_uri: str, shard: str) -> Columns:
    ids, images, labels = read_shard(Run(run_uri), shard)
    # a shard without samples still passes through, as one row that says so
    if not ids:
        return {
            "shard": np.array([shard]),
            "sample_id": np.array([""]),
            "label": np.array([-1]),
            "image": np.zeros((1, *images.shape[1:]), np.uint8),
        }
    return {"shard": np.full(len(ids), shard), "sample_id": np.array(ids), "label": labels, "image": images}


class MosoActor:
    """Alignments of whole seed shards at every checkpoint; writes one file per shard."""

    def __init__(self, config: Config, run_uri: str, threads: int, gpu: bool) -> None:
        import torch
        from safetensors.torch import load

        torch.set_num_threads(threads)
        self._config, self._run, self._device, self._watch = config, Run(run_uri), "cuda" if gpu else "cpu", Stopwatch()
        files = [item["file"] for item in proxy_manifest(self._run)["checkpoints"]]
        self._models = [load_checkpoint(self._run, file, self._device) for file in files]
        gradients = [load(storage.read_bytes(self._run.path("measured", "gradients", file))) for file in files]
        self._gradients = [{name: value.to(self._device) for name, value in item.items()} for item in gradients]

    def __call__(self, batch: Columns) -> Columns:
        import time

        import torch

        from raypipe.scores.moso import alignments

        started = time.monotonic()
        keep = batch["label"] >= 0
        ids, labels, images = batch["sample_id"][keep], batch["label"][keep], batch["image"][keep]
        result = np.zeros((len(ids), len(self._models)), np.float32)
        size = self._config.measure.batch_size
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            pixels, target = torch.from_numpy(images[part]).to(self._device), torch.from_numpy(labels[part]).to(self._device)
            for column, (model, gradient) in enumerate(zip(self._models, self._gradients, strict=True)):
                result[part, column] = alignments(model, gradient, pixels, target).cpu().numpy()
        shard = str(batch["shard"][0])
        values = pa.FixedSizeListArray.from_arrays(pa.array(result.reshape(-1)), result.shape[1])
        table = pa.table(
            {"sample_id": pa.array(ids.tolist(), pa.string()), "label": pa.array(labels, pa.int32()), "alignments": values}
        )
        storage.write_table(self._run.path("measured", "alignments", f"{shard}.parquet"), table)
        gpu_seconds = time.monotonic() - started if self._device == "cuda" else 0.0
        row = {"unit": shard, "samples": len(ids), "cpu_seconds": self._watch.lap(), "gpu_seconds": gpu_seconds}
        return {key: np.array([value]) for key, value in row.items()}


def _combine(config: Config, run: Run, seed: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Scores from the alignments, one shard at a time. Returns the number of samples and the stage's detail."""
    from raypipe.scores.moso import combine

    manifest = proxy_manifest(run)
    rates = np.array([item["lr"] for item in manifest["checkpoints"]])
    count, total, square = 0, np.zeros(len(rates)), np.zeros(len(rates))
    for shard in seed["shards"]:
        aligned = _aligned(run, shard)[1]
        if not np.isfinite(aligned).all():
            raise StageError(
                f"{int((~np.isfinite(aligned)).any(1).sum())} samples of {shard} have an alignment that is not finite; lower proxy.lr"
            )
        count += len(aligned)
        total += aligned.sum(0)
        square += np.square(aligned).sum(0)
    if count != seed["samples"]:
        raise StageError(f"{count} of {seed['samples']} seed samples were measured; run again to measure the rest")
    spread = np.sqrt(np.maximum(square / count - (total / count) ** 2, 0))
    for shard in seed["shards"]:
        table, aligned = _aligned(run, shard)
        score = combine(aligned, rates, config.measure.weights, steps=manifest["steps"], samples=count, spread=spread)
        table = table.select(["sample_id", "label"]).append_column("score", pa.array(score))
        storage.write_table(run.path("measured", f"{shard}.parquet"), table)
    detail = {
        "score": config.measure.score,
        "checkpoints": len(rates),
        "mean": (total / count).tolist(),
        "spread": spread.tolist(),
    }
    return count, detail


def _aligned(run: Run, shard: str) -> tuple[pa.Table, np.ndarray]:
    table = storage.read_table(run.path("measured", "alignments", f"{shard}.parquet"))
    column = table["alignments"].combine_chunks()
    return table, np.asarray(column.flatten(), np.float64).reshape(len(table), -1)
