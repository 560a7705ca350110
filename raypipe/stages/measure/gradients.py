"""Values at the proxy's checkpoints for the scores of the seed set and the audit set.

For MoSo, GraNd, and loss, EL2N and entropy with `at: checkpoints`. The work has two passes. The
first, for MoSo alone, computes the mean gradient of the seed set at every checkpoint
(`raypipe.stages.measure.mean_gradient`). The second streams the shards through actors that hold all
checkpoints and mean gradients.

Writes, under `measured/`:

- `calibrated-*/<checkpoint>`, where BatchNorm is recalibrated;
- `gradients-*/<checkpoint>`, for MoSo;
- `checkpoints-*/<shard>.parquet`: sample_id, label and, float32 [checkpoints], alignments and
  squares (MoSo), lengths (GraNd), loss, distance (EL2N), entropy.

Folder names end in a hash of the settings that the content depends on: another weighting of the
checkpoints reuses them.

With a proxy trained on adversarial examples (`proxy.adversary`), both passes take losses and
gradients at adversarial examples against each checkpoint: of the loss that the training minimises,
the maximum over the ball, whose gradient is the gradient at the maximum (Danskin's theorem).

With several proxies (`proxy.parts`, `proxy.repeats`), both passes run for one after the other, and
each of these folders has a subfolder for each proxy. The first pass is over the samples of the
proxy's part. So is the second, except with cross-fitting (`proxy.cross_fit`), where it is over
those of all others.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.distributed.actor_pool import Batch, stream
from raypipe.distributed.context import Context
from raypipe.distributed.usage import Stopwatch
from raypipe.progress import Meter
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.partition import SeedPart, proxy_parts
from raypipe.runs.unit_result import UnitResult
from raypipe.stages.measure.gradient_job import GradientJob, measured_checkpoints, needs_self_term
from raypipe.stages.measure.mean_gradient import write_mean_gradients
from raypipe.stages.measure.recalibration import recalibrate_checkpoints

if TYPE_CHECKING:
    from torch import Tensor


def measure_gradients(context: Context, record: StageRecord) -> None:
    """Run both passes, or what an interrupted attempt left of them."""
    parts = proxy_parts(context.run)
    seed = SeedManifest.read(context.run)
    proxy = context.config.proxy
    # with cross-fitting, every proxy but those of its own part measures a sample
    proxies = proxy.repeats * (proxy.parts - 1 if proxy.cross_fits else 1)
    # audit samples are not part of the mean gradients that they are aligned with
    summed = proxy.repeats * seed.samples * ("moso" in context.config.measure.scores)
    measured = proxies * (seed.samples + seed.audit_samples)
    self_term = needs_self_term(context.config, parts)
    with context.progress.meter("measure", summed + measured) as meter:
        for part in parts:
            _measure_part(context, record, part, self_term, meter)


def _measure_part(
    context: Context, record: StageRecord, part: SeedPart, self_term: bool, meter: Meter
) -> None:
    config, run, seed = context.config, context.run, SeedManifest.read(context.run)
    pool = context.cluster.pool(config.measure)
    job = GradientJob.of(context, part, self_term)
    done = run.done(job.folders.checkpoints)
    if config.measure.recalibrates:
        record.cpu_seconds += recalibrate_checkpoints(job, pool)
    if "moso" in config.measure.scores:
        present = storage.names(run.path(job.folders.gradients))
        files = [file for file in part.trained.files if file not in present]
        if files:
            record.cpu_seconds += write_mean_gradients(job, files, seed.shards, pool, meter.add)
        else:
            meter.already(part.samples)
    meter.already(sum(job.count_measured(shard) for shard in seed.all_shards if shard in done))
    missing = [shard for shard in seed.all_shards if shard not in done]
    measure_shards(context, record, part, self_term, missing, meter.add)


def measure_shards(
    context: Context,
    record: StageRecord,
    part: SeedPart,
    self_term: bool,
    shards: list[str],
    on_done: Callable[[int], None],
) -> None:
    """Run the second pass over some shards in `seed/`.

    Parameters
    ----------
    context, record
        The run, and the ledger's record that the cost is added to.
    part
        The part of the seed set whose proxy is used. Its samples are measured, or with
        cross-fitting those of all other parts.
    self_term
        Whether MoSo takes the sample itself out of the mean gradient.
    shards
        Names of the shards.
    on_done
        Called with the number of samples of each finished shard.
    """
    pool = context.cluster.pool(context.config.measure)

    def collect(result: UnitResult) -> None:
        on_done(result.samples)
        record.add_cost(result, pool.num_gpus)

    job = GradientJob.of(context, part, self_term)
    stream(
        shards,
        functools.partial(read_shard, job),
        functools.partial(GradientActor, job),
        pool,
        context.config.cluster.patience_seconds,
        collect,
    )


def read_shard(job: GradientJob, shard: str) -> Batch:
    """Read the samples of a shard that the job measures. Runs in a task."""
    ids, images, labels = job.read_measured(shard)
    return {"sample_id": np.array(ids), "label": labels, "image": images}


class GradientActor:
    """Computes the values of whole shards at every checkpoint; writes one file per shard."""

    def __init__(self, job: GradientJob) -> None:
        from raypipe.stages.measure.checkpoint_values import CheckpointValues, ValuePlan
        from raypipe.vision.devices import AdaptiveBatch, set_threads

        set_threads(job.worker.threads)
        self._job, self._run, self._watch = job, job.run, Stopwatch()
        self._at_once = AdaptiveBatch(job.images_at_once)
        plan = ValuePlan.choose(job.config.measure, job.self_term)
        checkpoints = measured_checkpoints(job.config, job.part)
        self._checkpoints = [CheckpointValues(job, plan, item.file) for item in checkpoints]

    def __call__(self, shard: str, batch: Batch) -> UnitResult:
        started = time.monotonic()
        columns = self._measure(batch["image"], batch["label"])
        data = {
            "sample_id": pa.array(batch["sample_id"].tolist(), pa.string()),
            "label": pa.array(batch["label"], pa.int32()),
        }
        for name, column in columns.items():
            data[name] = pa.FixedSizeListArray.from_arrays(
                pa.array(column.reshape(-1)), column.shape[1]
            )
        uri = self._run.path(self._job.folders.checkpoints, f"{shard}.parquet")
        storage.write_table(uri, pa.table(data))
        gpu_seconds = time.monotonic() - started if self._job.worker.gpu else 0.0
        return UnitResult(
            shard, len(batch["label"]), cpu_seconds=self._watch.lap(), gpu_seconds=gpu_seconds
        )

    def _measure(self, images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        """Return the values of n samples by name, float32 [n, checkpoints] each."""
        import torch

        from raypipe.vision.devices import to_device

        size = self._at_once.size
        # Tensors stay on the device until the end, so that the GPU is waited for once.
        results: list[list[dict[str, Tensor]]] = [[] for _ in self._checkpoints]
        for start in range(0, max(1, len(labels)), size):
            rows = slice(start, start + size)
            pixels = to_device(images[rows], self._job.device)
            target = to_device(labels[rows], self._job.device)
            for checkpoint, batches in zip(self._checkpoints, results, strict=True):
                batches += self._at_once(checkpoint, pixels, target)
        return {
            name: torch.stack(
                [torch.cat([batch[name] for batch in batches]).float() for batches in results], 1
            )
            .cpu()
            .numpy()
            for name in results[0][0]
        }
