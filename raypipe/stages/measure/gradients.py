"""Scores at the proxy's checkpoints (MoSo, GraNd; loss, EL2N and entropy with `at: checkpoints`), of the seed set and the audit set.

In two passes. The first, for MoSo, sums the seed set's gradients of every checkpoint: tasks over seed shards, whose sums are added
in a tree of fixed shape, so that the result does not depend on the number of workers and the driver sees none of them. The second
streams the shards through actors that hold all checkpoints and mean gradients.

Writes, under `measured/`: `calibrated-*/<checkpoint>` where BatchNorm is recalibrated, `gradients-*/<checkpoint>` (MoSo), and
`checkpoints-*/<shard>.parquet`: sample_id, label and, float32 [checkpoints], alignments and squares (MoSo), lengths (GraNd),
loss, distance (EL2N), entropy.
Folder names end in a hash of the settings they depend on: another weighting of the checkpoints finds them as they are.
Of a proxy that was trained on adversarial examples (`proxy.adversary`), losses and gradients of both passes are those at adversarial
examples against each checkpoint: of the loss that the training lowers, max over the ball, whose gradient is that at the maximum (Danskin's theorem).
With several proxies (`proxy.parts`) both passes are made for one after another, each over the samples of its part alone, and
these folders have one below them for each part.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import AdversarySettings, Config
from raypipe.config.measure import RECALIBRATED
from raypipe.distributed.actor_pool import Batch, stream
from raypipe.distributed.cluster import ActorPool
from raypipe.distributed.context import Context
from raypipe.distributed.nodes import run_on_share
from raypipe.distributed.tree_sum import tree_sums
from raypipe.distributed.usage import Stopwatch
from raypipe.errors import StageError
from raypipe.progress import Meter
from raypipe.runs.checkpoints import load_checkpoint
from raypipe.runs.layout import Run
from raypipe.runs.ledger import StageRecord, fingerprint
from raypipe.runs.manifests import seed_manifest
from raypipe.runs.partition import SeedPart, proxy_parts

MOST_GROUPS = 64
"""Partial sums of the mean gradient: enough to keep many workers busy, few enough to add up quickly."""
RECALIBRATION_BATCH = 256
"""Images whose statistics are taken together when BatchNorm is recalibrated; part of what the result is."""
OUTPUTS = {"loss": "loss", "el2n": "distance", "entropy": "entropy"}
"""Which number of one forward pass a score is the mean of."""


@dataclass(frozen=True)
class GradientFolders:
    """Where the two passes write, below the run; with several parts, in a folder for each below these."""

    calibrated: str
    gradients: str
    checkpoints: str

    @classmethod
    def of(cls, config: Config, run: Run) -> GradientFolders:
        moso, grand = config.measure.moso, config.measure.grand
        which = sorted(config.measure.at_checkpoints)
        mean = fingerprint(
            run.ledger()["proxy"].fingerprint,
            moso.gradient,
            config.measure.recalibrate,
            config.measure.precision,
        )
        numbers = fingerprint(
            mean, which, moso.uses_self_term(smallest_part(proxy_parts(run))), grand.gradient
        )
        return cls(
            f"measured/calibrated-{mean}",
            f"measured/gradients-{mean}",
            f"measured/checkpoints-{numbers}",
        )

    def of_part(self, part: SeedPart) -> GradientFolders:
        return GradientFolders(*(part.below(folder) for folder in vars(self).values()))


def smallest_part(parts: list[SeedPart]) -> int:
    """Samples of the smallest part, by which `self_term: auto` is decided for all, so that their scores are alike."""
    return min(part.samples for part in parts)


def measure_gradients(context: Context, record: StageRecord) -> None:
    """Both passes; finishes what an interrupted attempt left."""
    parts = proxy_parts(context.run)
    passes = 1 + ("moso" in context.config.measure.scores)
    audited = seed_manifest(context.run)[
        "audit_samples"
    ]  # they are no part of the mean gradients they are aligned with
    with context.progress.meter(
        "measure", passes * sum(part.samples for part in parts) + audited
    ) as meter:
        for part in parts:
            _measure_part(context, record, part, smallest_part(parts), meter)


def _measure_part(
    context: Context, record: StageRecord, part: SeedPart, fewest: int, meter: Meter
) -> None:
    config, run, seed = context.config, context.run, seed_manifest(context.run)
    pool = context.cluster.pool(config.measure)
    files = [item["file"] for item in part.trained["checkpoints"]]
    moso, folders = "moso" in config.measure.scores, GradientFolders.of(config, run).of_part(part)
    done, shards = run.done(folders.checkpoints), [*seed["shards"], *seed["audit_shards"]]
    if config.measure.recalibrate:
        record.cpu_seconds += _recalibrate(config, run, folders, part, files, pool)
    if moso:
        without = [file for file in files if file not in storage.names(run.path(folders.gradients))]
        if without:
            record.cpu_seconds += _mean_gradients(
                config, run, seed, folders, part, without, pool, meter.add
            )
        else:
            meter.already(part.samples)
    meter.already(sum(part.count(run, shard) for shard in shards if shard in done))
    measure_shards(
        context, record, part, fewest, [shard for shard in shards if shard not in done], meter.add
    )


def measure_shards(
    context: Context,
    record: StageRecord,
    part: SeedPart,
    fewest: int,
    shards: list[str],
    on_done: Callable[[int], None],
) -> None:
    """The second pass over some shards in `seed/`, as of a part of the seed set; `fewest` are the samples of the smallest part."""
    config, run = context.config, context.run
    pool, folders = (
        context.cluster.pool(config.measure),
        GradientFolders.of(config, run).of_part(part),
    )

    def collect(result: dict[str, Any]) -> None:
        on_done(result["samples"])
        record.cpu_seconds += result["cpu_seconds"]
        record.gpu_seconds += result["gpu_seconds"] * pool.num_gpus

    stream(
        shards,
        functools.partial(_read, run.uri, part),
        GradientActor,
        {
            "config": config,
            "run_uri": run.uri,
            "folders": folders,
            "part": part,
            "samples": fewest,
            "threads": pool.threads,
            "gpu": pool.num_gpus > 0,
        },
        pool,
        config.cluster.patience_seconds,
        collect,
    )


def _load(
    config: Config, run: Run, folders: GradientFolders, part: SeedPart, file: str, device: str
) -> Any:
    """A checkpoint, with recalibrated BatchNorm and in the memory format that are asked for."""
    import torch

    model = load_checkpoint(
        run,
        file,
        device,
        folder=folders.calibrated if config.measure.recalibrate else part.checkpoints,
    )
    return (
        model if config.measure.channels_last else model.to(memory_format=torch.contiguous_format)
    )


def _recalibrate(
    config: Config,
    run: Run,
    folders: GradientFolders,
    part: SeedPart,
    files: list[str],
    pool: ActorPool,
) -> float:
    """Write every checkpoint with BatchNorm statistics estimated on the whole part. Returns processor seconds."""
    present = storage.names(run.path(folders.calibrated))
    missing = [file for file in files if file not in present]
    seconds: list[float] = []
    function = functools.partial(
        _recalibrated,
        run.uri,
        folders,
        part,
        config.proxy.adversary,
        pool.threads,
        pool.num_gpus > 0,
    )
    run_on_share(
        missing,
        function,
        lambda result: seconds.append(result["cpu_seconds"]),
        pool.num_cpus,
        pool.num_gpus,
    )
    return sum(seconds)


def _recalibrated(
    run_uri: str,
    folders: GradientFolders,
    part: SeedPart,
    adversary: AdversarySettings | None,
    threads: int,
    gpu: bool,
    file: str,
) -> dict[str, float]:
    from safetensors.torch import save

    from raypipe.scores.calibration import recalibrate
    from raypipe.vision.devices import set_threads, to_device

    watch, run = Stopwatch(), Run(run_uri)
    set_threads(threads)
    device = "cuda" if gpu else "cpu"
    model = load_checkpoint(run, file, device, folder=part.checkpoints)

    # as it was trained: on adversarial examples against the network as it stands in the checkpoint
    attacked = (
        load_checkpoint(run, file, device, folder=part.checkpoints)
        if adversary is not None
        else None
    )

    step = max(
        1, part.samples // RECALIBRATED
    )  # from all shards: the source may be sorted by class

    def batches() -> Any:
        waiting: list[tuple[np.ndarray, np.ndarray]] = []
        seen = 0
        for shard in [*seed_manifest(run)["shards"], None]:
            if shard is not None:
                images, labels = part.read(run, shard)[1:]
                waiting.append((images[-seen % step :: step], labels[-seen % step :: step]))
                seen += len(images)
            images, labels = (np.concatenate(arrays) for arrays in zip(*waiting, strict=True))
            whole = (
                len(images)
                if shard is None
                else len(images) // RECALIBRATION_BATCH * RECALIBRATION_BATCH
            )
            for start in range(0, whole, RECALIBRATION_BATCH):
                rows = slice(start, min(whole, start + RECALIBRATION_BATCH))
                pixels = to_device(images[rows].copy(), device)
                yield (
                    pixels
                    if attacked is None
                    else _worst(attacked, pixels, to_device(labels[rows], device), adversary)
                )
            waiting = [(images[whole:], labels[whole:])]

    recalibrate(model, batches())
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    storage.write_bytes(run.path(folders.calibrated, file), save(weights))
    return {"cpu_seconds": watch.lap()}


def _mean_gradients(
    config: Config,
    run: Run,
    seed: dict[str, Any],
    folders: GradientFolders,
    part: SeedPart,
    files: list[str],
    pool: ActorPool,
    on_done: Callable[[int], None],
) -> float:
    """Write the mean gradient at every checkpoint of `files`. Returns processor seconds."""
    shards = np.array(seed["shards"])
    groups = [group.tolist() for group in np.array_split(shards, min(MOST_GROUPS, len(shards)))]
    seconds: list[float] = []

    def collect(report: dict[str, Any]) -> None:
        seconds.append(report["cpu_seconds"])
        on_done(report["samples"])

    tree_sums(
        groups,
        files,
        functools.partial(
            _gradient_sums, config, run.uri, folders, part, files, pool.threads, pool.num_gpus > 0
        ),
        _add,
        functools.partial(_store_gradient, run.uri, folders.gradients, part.samples),
        pool,
        collect,
    )
    return sum(seconds)


def _gradient_sums(
    config: Config,
    run_uri: str,
    folders: GradientFolders,
    part: SeedPart,
    files: list[str],
    threads: int,
    gpu: bool,
    shards: list[str],
) -> list[Any]:
    """For every checkpoint the sum of the gradients over some seed shards, then a report. Runs in a task."""
    from raypipe.scores.head import head_gradient_sum
    from raypipe.scores.moso import gradient_sum
    from raypipe.vision.devices import AdaptiveBatch, set_threads, to_device
    from raypipe.vision.precision import computing

    watch, run = Stopwatch(), Run(run_uri)
    set_threads(threads)
    device, size = (
        "cuda" if gpu else "cpu",
        config.measure.images_at_once(gpu, config.proxy.image_size),
    )
    at_once = AdaptiveBatch(size)
    rule = head_gradient_sum if config.measure.moso.gradient == "head" else gradient_sum
    models = [_load(config, run, folders, part, file, device) for file in files]
    totals: list[dict[str, Any]] = [{} for _ in files]
    count = 0

    @computing(config.measure.precision, device)
    def sums_of(model: Any, pixels: Any, target: Any) -> dict[str, Any]:
        return rule(model, _worst(model, pixels, target, config.proxy.adversary), target)

    for shard in shards:
        _, images, labels = part.read(run, shard)
        for start in range(0, len(labels), size):
            pixels = to_device(images[start : start + size].copy(), device)
            target = to_device(labels[start : start + size], device)
            for model, total in zip(models, totals, strict=True):
                for sums in at_once(functools.partial(sums_of, model), pixels, target):
                    for name, value in sums.items():
                        total[name] = total[name] + value if name in total else value
        count += len(labels)
    arrays = [{name: value.cpu().numpy() for name, value in total.items()} for total in totals]
    return [*arrays, {"samples": count, "cpu_seconds": watch.lap()}]


def _worst(model: Any, pixels: Any, target: Any, adversary: AdversarySettings | None) -> Any:
    """The images that a loss is taken at: themselves, or, where the proxy was trained so, the worst that an attack finds near them.

    It begins at the images, so that what is measured depends neither on the order nor on the size of batches.
    """
    from raypipe.vision.adversarial import attack

    return pixels if adversary is None else attack(model, pixels, target, adversary)


def _add(*parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    result = dict(parts[0]) if parts else {}
    for part in parts[1:]:
        for name, value in part.items():
            result[name] = result[name] + value if name in result else value
    return result


def _store_gradient(
    run_uri: str, folder: str, samples: int, file: str, total: dict[str, np.ndarray]
) -> None:
    from safetensors.numpy import save

    mean = {
        name: np.ascontiguousarray(value / np.float32(samples)) for name, value in total.items()
    }
    if not all(np.isfinite(value).all() for value in mean.values()):
        raise StageError(
            f"the mean gradient at {file} is not finite: the proxy's training diverged; lower proxy.lr and run again"
        )
    storage.write_bytes(Run(run_uri).path(folder, file), save(mean))


def _read(run_uri: str, part: SeedPart, shard: str) -> Batch:
    ids, images, labels = part.read(Run(run_uri), shard)
    if not ids:  # a shard without samples of the part still passes through, as one row that says so
        images, labels, ids = np.zeros((1, *images.shape[1:]), np.uint8), np.array([-1]), [""]
    return {
        "shard": np.full(len(ids), shard),
        "sample_id": np.array(ids),
        "label": labels,
        "image": images,
    }


class GradientActor:
    """Alignments and lengths of gradients at every checkpoint, of a part's samples of whole seed shards; writes one file per shard.

    samples  those of the smallest part, for `self_term: auto`
    """

    def __init__(
        self,
        config: Config,
        run_uri: str,
        folders: GradientFolders,
        part: SeedPart,
        samples: int,
        threads: int,
        gpu: bool,
    ) -> None:
        from raypipe.vision.devices import AdaptiveBatch, set_threads

        set_threads(threads)
        self._config, self._run, self._device, self._watch = (
            config,
            Run(run_uri),
            "cuda" if gpu else "cpu",
            Stopwatch(),
        )
        self._at_once = AdaptiveBatch(config.measure.images_at_once(gpu, config.proxy.image_size))
        self._folders, self._part = folders, part
        files = [item["file"] for item in part.trained["checkpoints"]]
        self._self_term = config.measure.moso.uses_self_term(samples)
        self._checkpoints = [self._checkpoint(file) for file in files]

    def _checkpoint(self, file: str) -> Callable[[Any, Any], dict[str, Any]]:
        """What gives the numbers of a batch at one checkpoint, by the cheapest way that gives all that the wanted scores need."""
        import torch
        from safetensors.torch import load

        from raypipe.scores.forward_mode import Aligner
        from raypipe.scores.head import head_norms_and_alignments
        from raypipe.scores.per_sample import norms_and_alignments
        from raypipe.vision import output_statistics
        from raypipe.vision.precision import computing

        measure, adversary = self._config.measure, self._config.proxy.adversary
        model = _load(self._config, self._run, self._folders, self._part, file, self._device)
        gradient: dict[str, Any] | None = None
        if "moso" in measure.scores:
            read = load(storage.read_bytes(self._run.path(self._folders.gradients, file)))
            gradient = {name: value.to(self._device) for name, value in read.items()}
        moso_rule = measure.moso.gradient if gradient is not None else None
        grand_rule = measure.grand.gradient if "grand" in measure.scores else None
        outputs = [OUTPUTS[score] for score in measure.at_checkpoints if score in OUTPUTS]
        aligner = None
        if (
            gradient is not None
            and moso_rule == "all"
            and not self._self_term
            and grand_rule != "all"
        ):
            aligner = Aligner(
                model, gradient, channels_last=measure.channels_last, compiled=measure.compile
            )
            if grand_rule is None and not outputs and aligner.traced and adversary is None:
                model, gradient = None, None  # it has what it needs of them

        @computing(measure.precision, self._device)
        def numbers(pixels: Any, target: Any) -> dict[str, Any]:
            pixels = _worst(model, pixels, target, adversary)
            result = {} if aligner is None else {"alignments": aligner(pixels, target)}
            for rule, function in (
                ("head", head_norms_and_alignments),
                ("all", norms_and_alignments),
            ):
                of_moso, of_grand = moso_rule == rule and aligner is None, grand_rule == rule
                if of_moso or of_grand:
                    square, aligned = function(model, pixels, target, gradient if of_moso else None)
                    if of_moso:
                        result["alignments"] = aligned
                        result.update({"squares": square} if self._self_term else {})
                    if of_grand:
                        result["lengths"] = square.sqrt()
            if outputs:
                with torch.no_grad():
                    said = output_statistics.numbers(model(pixels).float(), target)
                result |= {name: said[name] for name in outputs}
            return result

        return numbers

    def __call__(self, batch: Batch) -> Batch:
        import torch

        from raypipe.vision.devices import to_device

        started = time.monotonic()
        keep = batch["label"] >= 0
        ids, labels, images = batch["sample_id"][keep], batch["label"][keep], batch["image"][keep]
        size = self._at_once.size
        found: list[list[dict[str, Any]]] = [
            [] for _ in self._checkpoints
        ]  # a GPU is waited for once, at the end
        for start in range(0, max(1, len(ids)), size):
            part = slice(start, start + size)
            pixels, target = (
                to_device(images[part], self._device),
                to_device(labels[part], self._device),
            )
            for numbers, parts in zip(self._checkpoints, found, strict=True):
                parts += self._at_once(numbers, pixels, target)
        columns = {
            name: torch.stack(
                [torch.cat([part[name] for part in parts]).float() for parts in found], 1
            )
            .cpu()
            .numpy()
            for name in found[0][0]
        }
        shard = str(batch["shard"][0])
        data: dict[str, Any] = {
            "sample_id": pa.array(ids.tolist(), pa.string()),
            "label": pa.array(labels, pa.int32()),
        }
        for name, column in columns.items():
            data[name] = pa.FixedSizeListArray.from_arrays(
                pa.array(column.reshape(-1)), column.shape[1]
            )
        storage.write_table(
            self._run.path(self._folders.checkpoints, f"{shard}.parquet"), pa.table(data)
        )
        gpu_seconds = time.monotonic() - started if self._device == "cuda" else 0.0
        row = {
            "unit": shard,
            "samples": len(ids),
            "cpu_seconds": self._watch.lap(),
            "gpu_seconds": gpu_seconds,
        }
        return {key: np.array([value]) for key, value in row.items()}
