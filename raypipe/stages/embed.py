"""Embed: streams every fragment of the source once: decoding in tasks, the proxy's forward pass in actors beside them.

With `embed.decode` the actors decode JPEGs as well, on their GPU (`raypipe.vision.gpu_decode`); only they differ then, by a stated tolerance.
Writes, per fragment, `embeddings/<fragment>.parquet` (sample_id, label, embedding, and what the proxy says of the sample:
prediction, confidence, loss, margin, entropy) and, where a sample could not be read, `rejects/<fragment>.parquet`. Where the source has
no labels, the label is the pseudo-label that the network and the clusters of the stage `label` give.
The logits themselves are not kept: for many classes they would be larger than the embedding.
With several proxies (`proxy.parts`) all samples pass through that of part 0, since distances between embeddings mean something
in one space only; of the seed set it was trained on its own part and not on the others.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.actor_pool import Batch, WorkerContext, stream
from raypipe.distributed.context import Context
from raypipe.distributed.usage import Stopwatch
from raypipe.errors import ResourceError, StageError
from raypipe.runs.checkpoints import load_checkpoint
from raypipe.runs.duplicates import reject_duplicates
from raypipe.runs.embeddings import SPECIAL_ROWS
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.partition import proxy_parts
from raypipe.runs.pseudo_labels import load_labeller
from raypipe.runs.rejects import RejectCounter, hash_order, summarize_rejects, write_rejects
from raypipe.runs.run import Run
from raypipe.runs.shards import count_rows, remove_stale
from raypipe.runs.unit_result import UnitResult
from raypipe.sources import Fragment, RawSample, open_source
from raypipe.sources.id_sampling import audit_rule, in_sample
from raypipe.stages.base import Stage
from raypipe.vision.decode import decode_batch

READERS = 16
"""Files of the run that the driver reads at a time; it holds no more of them, however many there are."""


class EmbedStage(Stage):
    name = "embed"
    needs = ("proxy",)

    def settings(self, config: Config) -> dict[str, Any]:
        pixels = {} if config.embed.decode == "cpu" else {"decode": config.embed.decode}
        return {"dtype": config.embed.dtype, "max_pixels": config.source.max_pixels, **pixels}

    def complete(self, context: Context, record: StageRecord) -> bool:
        fragments = context.run.fragments()
        readable = {fragment.fragment_id for fragment in fragments if not fragment.error}
        # a fragment none of whose samples can be read has rejects and an empty table of embeddings
        broken = {fragment.fragment_id for fragment in fragments if fragment.error}
        return readable == context.run.done("embeddings") and broken <= context.run.done("rejects")

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = context.config, context.run
        fragments = run.fragments()
        remove_stale(run, fragments, ("embeddings", "rejects"))
        done = run.done("embeddings")
        readable = [fragment for fragment in fragments if not fragment.error]
        missing = [fragment for fragment in readable if fragment.fragment_id not in done]
        pool = context.cluster.pool(config.embed)
        gpu = pool.num_gpus > 0
        if config.embed.decode == "gpu" and not gpu:
            raise ResourceError(
                f"embed.decode is gpu, but embed has no GPU ({context.cluster}); set it to auto or cpu"
            )
        gpu_decoding = gpu and config.embed.decode != "cpu"
        for fragment in fragments:
            if fragment.error:
                write_rejects(
                    run,
                    fragment.fragment_id,
                    [(fragment.path, f"file cannot be read: {fragment.error}")],
                )
        expected = sum(fragment.samples for fragment in readable)
        tally = RejectCounter(config.source.max_reject_fraction, expected)
        _count_earlier(
            run, [fragment for fragment in readable if fragment.fragment_id in done], tally
        )
        tally.check()
        with context.progress.meter("embed", expected) as meter:
            meter.already(
                sum(fragment.samples for fragment in readable if fragment.fragment_id in done)
            )
            meter.queue(len(missing))

            def collect(result: UnitResult) -> None:
                read = result.samples + result.rejects
                meter.add(read, result.unit, result.rejects)
                tally.add(read, result.reasons)
                tally.check()
                record.add_cost(result, pool.num_gpus)

            stream(
                hash_order(missing, lambda fragment: fragment.fragment_id),
                functools.partial(_read, config, run.uri, gpu_decoding),
                functools.partial(EmbedActor, WorkerContext.of(context, pool), gpu_decoding),
                pool,
                config.cluster.patience_seconds,
                collect,
                name=attrgetter("fragment_id"),
            )
        embedded, rejected = count_rows(run, "embeddings"), count_rows(run, "rejects")
        unreadable = len(fragments) - len(readable)
        if embedded + rejected - unreadable != expected:
            raise StageError(
                f"{expected} samples in the source, but {embedded} embedded and {rejected - unreadable} rejected; "
                "a file of the source changed while it was read. Run again"
            )
        if not embedded:
            raise StageError("every sample was rejected; see rejects/ for the reasons")
        record.samples = embedded
        record.detail = {
            "rejects": rejected,
            "unreadable_files": unreadable,
            "dtype": config.embed.dtype,
        }


def _count_earlier(run: Run, fragments: list[Fragment], tally: RejectCounter) -> None:
    """Count the rejects of fragments that an earlier attempt finished."""
    with_rejects = run.done("rejects")

    def rejects(fragment: Fragment) -> str:
        table = storage.read_table(run.reject_shard(fragment.fragment_id), ["sample_id", "reason"])
        return summarize_rejects((row["sample_id"], row["reason"]) for row in table.to_pylist())

    for fragment in fragments:
        if fragment.fragment_id not in with_rejects:
            tally.add(fragment.samples, "[]")
    for fragment, found in storage.ahead(
        rejects, (item for item in fragments if item.fragment_id in with_rejects), run.uri, READERS
    ):
        tally.add(fragment.samples, found)


def _read(config: Config, run_uri: str, gpu_decoding: bool, fragment: Fragment) -> Batch:
    """Read and decode a fragment. Runs in a task.

    With GPU decoding, JPEGs are left to the actor; see `raypipe.vision.gpu_decode.split_off_jpegs`.
    """
    watch, run = Stopwatch(), Run(run_uri)
    classes, count, source = run.classes(), fragment.samples, open_source(config.source)
    ids: list[str] = []
    index: list[tuple[int, str]] = []

    def samples() -> Iterator[RawSample]:
        for sample in reject_duplicates(
            run, fragment, source.read(run.with_members(fragment)), source.ids_can_repeat
        ):
            ids.append(sample.sample_id)
            index.append(classes.label_of(sample))
            if len(ids) <= count:
                yield sample

    size, max_pixels = config.proxy.image_size, config.source.max_pixels
    columns: Batch = {}
    if gpu_decoding:
        from raypipe.vision.gpu_decode import split_off_jpegs

        images, pixels, reasons = split_off_jpegs(samples(), size, max_pixels)
        columns["image"] = np.empty(len(images), object)
        columns["image"][:] = images
        columns["jpeg_pixels"] = np.array(pixels, np.int64)
    else:
        columns["image"], reasons = decode_batch(samples(), size, max_pixels, count)
    if len(ids) != count:
        raise StageError(
            f"{fragment.path}: {len(ids)} samples where the index counted {count}; the file changed. Run again"
        )
    return {
        "sample_id": np.array(ids),
        "label": np.array([label for label, _ in index], np.int32),
        "reason": np.array(
            [reason or wrong for reason, (_, wrong) in zip(reasons, index, strict=True)]
        ),
        **columns,
        "cpu_seconds": np.full(count, watch.lap() / count),
    }


class EmbedActor:
    """Runs the last checkpoint of the proxy over whole fragments and writes one file per fragment.

    With several proxies (`proxy.parts`) it is that of part 0.
    """

    def __init__(self, worker: WorkerContext, gpu_decoding: bool = False) -> None:
        from raypipe.vision.devices import AdaptiveBatch, set_threads

        set_threads(worker.threads)
        config, gpu = worker.config, worker.gpu
        self._config, self._run, self._gpu, self._watch = config, worker.run, gpu, Stopwatch()
        self._device = worker.device
        self._at_once = AdaptiveBatch(config.embed.images_at_once(gpu, config.proxy.image_size))
        part = proxy_parts(self._run)[0]
        self._model = load_checkpoint(self._run, part.trained.final, self._device, part.checkpoints)
        seed = config.seed
        self._rules = {
            "seed": in_sample(seed.fraction, seed.seed),
            "audit": audit_rule(seed, SeedManifest.read(self._run).audit_fraction),
        }
        self._labeller = load_labeller(self._run, self._device) if config.unsupervised else None
        if gpu_decoding:
            from raypipe.vision.gpu_decode import check_gpu_decoding

            check_gpu_decoding(self._device)

    def __call__(self, fragment: str, batch: Batch) -> UnitResult:
        import time

        from raypipe.vision.forward import forward

        started = time.monotonic()
        images, reason = self._images(batch)
        good = reason == ""
        ids, labels = batch["sample_id"][good], batch["label"][good]
        images = images[good]
        if self._labeller is not None:
            labels = self._labeller(images).astype(np.int32)
        columns = forward(
            self._model,
            images,
            labels,
            self._at_once,
            self._device,
            self._gpu and self._config.proxy.amp,
        )
        finite = np.isfinite(columns["embedding"]).all(1)
        rejects = list(zip(batch["sample_id"][~good].tolist(), reason[~good].tolist(), strict=True))
        rejects += [
            (str(sample_id), "the proxy's embedding of it is not finite")
            for sample_id in ids[~finite]
        ]
        if rejects:
            write_rejects(self._run, fragment, rejects)
        self._write(
            fragment,
            ids[finite],
            labels[finite],
            {name: value[finite] for name, value in columns.items()},
        )
        return UnitResult(
            fragment,
            int(finite.sum()),
            len(rejects),
            summarize_rejects(rejects),
            self._watch.lap() + float(batch["cpu_seconds"].sum()),
            time.monotonic() - started if self._gpu else 0.0,
        )

    def _images(self, batch: Batch) -> tuple[Any, np.ndarray]:
        """Pixels uint8 [n, 3, size, size], an array or a tensor on the device, and for each "" or why it is rejected."""
        if "jpeg_pixels" not in batch:
            return batch["image"], batch["reason"]
        from raypipe.vision.gpu_decode import decode_jpegs

        pixels, failed = decode_jpegs(
            batch["image"].tolist(),
            batch["jpeg_pixels"].tolist(),
            self._config.proxy.image_size,
            self._config.source.max_pixels,
            self._device,
            self._at_once.size,
        )
        reasons = [
            new or known for new, known in zip(failed, batch["reason"].tolist(), strict=True)
        ]
        return pixels, np.array(reasons)

    def _write(
        self, fragment: str, ids: np.ndarray, labels: np.ndarray, columns: dict[str, np.ndarray]
    ) -> None:
        embedding = columns.pop("embedding")
        with np.errstate(over="ignore"):
            values = embedding.astype(self._config.embed.dtype).reshape(-1)
        if not np.isfinite(values).all():
            raise StageError("embeddings do not fit into float16; set embed.dtype to float32")
        # so that the fit reads seed and audit samples without the rest
        groups = {
            name: np.array([self._rules[name](sample_id) for sample_id in ids], bool)
            for name in SPECIAL_ROWS
        }
        others = ~np.logical_or.reduce(list(groups.values()))
        data: dict[str, Any] = {
            "sample_id": pa.array(ids.tolist(), pa.string()),
            "label": pa.array(labels, pa.int32(), mask=labels < 0),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(values), embedding.shape[1]),
            **{name: pa.array(value) for name, value in columns.items()},
        }
        table = pa.table(data).replace_schema_metadata(
            {key: str(int(groups[name].sum())) for name, key in SPECIAL_ROWS.items()}
        )
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, table.schema, compression="zstd") as writer:
            for part in (table.filter(pa.array(rows)) for rows in (*groups.values(), others)):
                if len(part):
                    writer.write_table(part, row_group_size=len(part))
        storage.write_bytes(self._run.embedding_shard(fragment), buffer.getvalue())
