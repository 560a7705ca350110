"""Embed: stream every fragment of the source once through the proxy.

Tasks read and decode; actors next to them run the forward pass. With `embed.decode` the actors
decode JPEGs as well, on their GPU (`raypipe.vision.gpu_decode`); only these pixels differ then, by
a stated tolerance.

Writes, for each fragment, `embeddings/<fragment>.parquet`: sample_id, label, embedding and the
proxy statistics of the sample (prediction, confidence, loss, margin, entropy). Where samples cannot
be used, it writes `rejects/<fragment>.parquet`. Where the source has no labels, the label is the
pseudo-label from the network and the clusters of the stage `label`. The logits are not kept: for
many classes they would be larger than the embedding.

With cross-fitting (`proxy.cross_fit`), a sample passes through all proxies that were not trained on
its part, and its statistics are means over these (`raypipe.runs.cross_fit`). The embedding is that
of proxy 0. Those by other viewers are in `views/<fragment>.parquet`: sample_id, proxy (its number),
embedding; a row group for each proxy.

With several proxies but no cross-fitting, all samples pass through the proxy of part 0, since
distances between embeddings mean something in one space only. Of the seed set, that proxy was
trained on its own part and not on the others.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.actor_pool import Batch, WorkerContext, stream
from raypipe.distributed.cluster import ActorPool
from raypipe.distributed.context import Context
from raypipe.distributed.usage import Stopwatch
from raypipe.errors import ResourceError, StageError
from raypipe.runs.checkpoints import load_checkpoint
from raypipe.runs.cross_fit import VIEWERS, CrossFit
from raypipe.runs.duplicates import reject_duplicates
from raypipe.runs.embeddings import PROBE_FRACTION, SPECIAL_ROWS, probe_rule
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.partition import proxy_parts
from raypipe.runs.pseudo_labels import load_labeller
from raypipe.runs.rejects import RejectCounter, hash_order, summarize_rejects, write_rejects
from raypipe.runs.run import Run
from raypipe.runs.shards import count_rows, remove_stale
from raypipe.runs.sizes import probe_samples
from raypipe.runs.unit_result import UnitResult
from raypipe.sources import Fragment, RawSample, open_source
from raypipe.sources.id_sampling import audit_rule, in_sample
from raypipe.stages.base import Stage
from raypipe.vision.cross_fit_forward import CrossFitOutputs, View, cross_fit_forward
from raypipe.vision.decode import decode_batch

if TYPE_CHECKING:
    from torch import Tensor

READERS = 16
"""Files of rejects that the driver reads at a time; it holds no more of them."""


class EmbedStage(Stage):
    """Embed all samples with the proxy."""

    name = "embed"
    needs = ("proxy",)

    def settings(self, config: Config) -> dict[str, Any]:
        pixels = {} if config.embed.decode == "cpu" else {"decode": config.embed.decode}
        cross_fit = {"cross_fit": True} if config.proxy.cross_fits else {}
        return {
            "dtype": config.embed.dtype,
            "max_pixels": config.source.max_pixels,
            **({"bit_depth": config.source.bit_depth} if config.source.bit_depth != 16 else {}),
            **pixels,
            **cross_fit,
        }

    def complete(self, context: Context, record: StageRecord) -> bool:
        fragments = context.run.fragments()
        # a fragment without a readable sample still has a table of embeddings, an empty one
        readable = {fragment.fragment_id for fragment in fragments if not fragment.error}
        broken = {fragment.fragment_id for fragment in fragments if fragment.error}
        views = readable if context.config.proxy.cross_fits else set()
        return (
            readable == context.run.done("embeddings")
            and views <= context.run.done("views")
            and broken <= context.run.done("rejects")
        )

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = context.config, context.run
        fragments = run.fragments()
        remove_stale(run, fragments, ("embeddings", "views", "rejects"))
        readable = [fragment for fragment in fragments if not fragment.error]
        broken = [fragment for fragment in fragments if fragment.error]
        pool = context.cluster.pool(config.embed)
        if config.embed.decode == "gpu" and not pool.num_gpus:
            raise ResourceError(
                f"embed.decode is gpu, but embed has no GPU ({context.cluster}); "
                "set it to auto or cpu"
            )
        for fragment in broken:
            reason = f"file cannot be read: {fragment.error}"
            write_rejects(run, fragment.fragment_id, [(fragment.path, reason)])
        _embed_missing(context, record, readable, pool)
        expected = sum(fragment.samples for fragment in readable)
        embedded, rejects = count_rows(run, "embeddings"), count_rows(run, "rejects")
        rejected = rejects - len(broken)
        if embedded + rejected != expected:
            raise StageError(
                f"{expected} samples in the source, but {embedded} embedded and {rejected} "
                "rejected; a file of the source changed while it was read. Run again"
            )
        if not embedded:
            raise StageError("every sample was rejected; see rejects/ for the reasons")
        record.samples = embedded
        record.detail = {
            "rejects": rejects,
            "unreadable_files": len(broken),
            "dtype": config.embed.dtype,
        }


def _embed_missing(
    context: Context, record: StageRecord, fragments: Sequence[Fragment], pool: ActorPool
) -> None:
    """Embed the fragments that have no embeddings, and tally the rejects of all."""
    config, run = context.config, context.run
    embedded = run.done("embeddings")
    done = [fragment for fragment in fragments if fragment.fragment_id in embedded]
    missing = [fragment for fragment in fragments if fragment.fragment_id not in embedded]
    samples = sum(fragment.samples for fragment in fragments)
    tally = RejectCounter(config.source.max_reject_fraction, samples)
    _tally_done(run, done, tally)
    tally.check()
    probe_fraction = 0.0
    if config.proxy.cross_fits:
        probe_fraction = min(1.0, probe_samples(len(run.classes().names)) / max(1, samples))
    gpu_decoding = pool.num_gpus > 0 and config.embed.decode != "cpu"
    with context.progress.meter("embed", samples) as meter:
        meter.already(sum(fragment.samples for fragment in done))
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
            functools.partial(
                EmbedActor, WorkerContext.of(context, pool), gpu_decoding, probe_fraction
            ),
            pool,
            config.cluster.patience_seconds,
            collect,
            name=attrgetter("fragment_id"),
        )


def _tally_done(run: Run, fragments: Sequence[Fragment], tally: RejectCounter) -> None:
    """Tally the rejects of fragments that an earlier attempt finished."""
    with_rejects = run.done("rejects")

    def reasons(fragment: Fragment) -> str:
        table = storage.read_table(run.reject_shard(fragment.fragment_id), ["sample_id", "reason"])
        return summarize_rejects((row["sample_id"], row["reason"]) for row in table.to_pylist())

    for fragment in fragments:
        if fragment.fragment_id not in with_rejects:
            tally.add(fragment.samples, "[]")
    rejecting = (fragment for fragment in fragments if fragment.fragment_id in with_rejects)
    for fragment, summary in storage.ahead(reasons, rejecting, run.uri, READERS):
        tally.add(fragment.samples, summary)


def _read(config: Config, run_uri: str, gpu_decoding: bool, fragment: Fragment) -> Batch:
    """Read and decode a fragment. Runs in a task.

    With GPU decoding, JPEGs are left to the actor; see `raypipe.vision.gpu_decode.split_off_jpegs`.
    """
    watch, run = Stopwatch(), Run(run_uri)
    classes, count, source = run.classes(), fragment.samples, open_source(config.source)
    ids: list[str] = []
    labels: list[tuple[int, str]] = []

    def samples() -> Iterator[RawSample]:
        for sample in reject_duplicates(
            run, fragment, source.read(run.with_members(fragment)), source.ids_can_repeat
        ):
            ids.append(sample.sample_id)
            labels.append(classes.label_of(sample))
            if len(ids) <= count:
                yield sample

    size, max_pixels = config.proxy.image_size, config.source.max_pixels
    depth = config.source.bit_depth
    columns: Batch = {}
    if gpu_decoding:
        from raypipe.vision.gpu_decode import split_off_jpegs

        images, pixels, unreadable = split_off_jpegs(samples(), size, max_pixels, depth)
        columns["image"] = np.empty(len(images), object)
        columns["image"][:] = images
        columns["jpeg_pixels"] = np.array(pixels, np.int64)
    else:
        columns["image"], unreadable = decode_batch(samples(), size, max_pixels, count, depth)
    if len(ids) != count:
        raise StageError(
            f"{fragment.path}: {len(ids)} samples where the index counted {count}; "
            "the file changed. Run again"
        )
    reasons = [
        reason or bad_label for reason, (_, bad_label) in zip(unreadable, labels, strict=True)
    ]
    return {
        "sample_id": np.array(ids),
        "label": np.array([label for label, _ in labels], np.int32),
        "reason": np.array(reasons),
        **columns,
        "cpu_seconds": np.full(count, watch.lap() / count),
    }


class EmbedActor:
    """Runs the last checkpoints of the proxies over whole fragments; writes their files."""

    def __init__(
        self, worker: WorkerContext, gpu_decoding: bool = False, probe_fraction: float = 0.0
    ) -> None:
        from raypipe.vision.devices import AdaptiveBatch, set_threads

        set_threads(worker.threads)
        config, gpu = worker.config, worker.gpu
        self._config, self._run, self._gpu, self._watch = config, worker.run, gpu, Stopwatch()
        self._device = worker.device
        self._at_once = AdaptiveBatch(config.embed.images_at_once(gpu, config.proxy.image_size))
        self._cross_fit = CrossFit.of(config)
        parts = proxy_parts(self._run)
        self._models = [
            load_checkpoint(self._run, part.trained.final, self._device, part.checkpoints)
            for part in (parts if self._cross_fit else parts[:1])
        ]
        seed = config.seed
        self._rules = {
            "seed": in_sample(seed.fraction, seed.seed),
            "audit": audit_rule(seed, SeedManifest.read(self._run).audit_fraction),
            "probe": probe_rule(seed, probe_fraction),
        }
        self._probe_fraction = probe_fraction
        self._labeller = load_labeller(self._run, self._device) if config.unsupervised else None
        if gpu_decoding:
            from raypipe.vision.gpu_decode import check_gpu_decoding

            check_gpu_decoding(self._device)

    def __call__(self, fragment: str, batch: Batch) -> UnitResult:
        started = time.monotonic()
        images, reason = self._images(batch)
        good = reason == ""
        ids, labels = batch["sample_id"][good], batch["label"][good]
        images = images[good]
        if self._labeller is not None:
            labels = self._labeller(images).astype(np.int32)
        views: Mapping[int, View] | None = None
        if self._cross_fit is None:
            columns = self._forward(0, images, labels)
            finite = np.isfinite(columns["embedding"]).all(1)
        else:
            outputs = self._forward_all(self._cross_fit, ids, images, labels)
            columns, views, finite = outputs.columns, outputs.views, outputs.finite
        rejects = list(zip(batch["sample_id"][~good].tolist(), reason[~good].tolist(), strict=True))
        rejects += [
            (str(sample_id), "the proxy's embedding of it is not finite")
            for sample_id in ids[~finite]
        ]
        if rejects:
            write_rejects(self._run, fragment, rejects)
        if views is not None:
            self._write_views(fragment, ids, finite, views)
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

    def _forward(
        self,
        proxy: int,
        images: np.ndarray | Tensor,
        labels: np.ndarray,
        probabilities: bool = False,
    ) -> dict[str, np.ndarray]:
        """Return what one proxy says of images; see `raypipe.vision.forward.forward`."""
        from raypipe.vision.forward import forward

        return forward(
            self._models[proxy],
            images,
            labels,
            self._at_once,
            self._device,
            self._gpu and self._config.proxy.amp,
            probabilities,
        )

    def _forward_all(
        self,
        cross_fit: CrossFit,
        ids: np.ndarray,
        images: np.ndarray | Tensor,
        labels: np.ndarray,
    ) -> CrossFitOutputs:
        """Return what the proxies say of images that they were not trained on."""
        part = cross_fit.part_of(ids.tolist())
        return cross_fit_forward(
            lambda proxy, rows: self._forward(proxy, images[rows], labels[rows], True),
            part,
            {proxy: cross_fit.is_viewed(part, proxy) for proxy in VIEWERS[1:]},
            cross_fit.parts,
        )

    def _write_views(
        self, fragment: str, ids: np.ndarray, finite: np.ndarray, views: Mapping[int, View]
    ) -> None:
        """Write the embeddings by other proxies: a row group for each of them."""
        tables = []
        for proxy, view in views.items():
            rows = view.rows[finite[view.rows]]
            embedding = view.embedding[finite[view.rows]]
            proxies = np.full(len(rows), proxy, np.int8)
            tables.append(
                pa.table(
                    {
                        "sample_id": pa.array(ids[rows].tolist(), pa.string()),
                        "proxy": pa.array(proxies),
                        "embedding": self._embedding_column(embedding),
                    }
                )
            )
        storage.write_table_groups(self._run.view_shard(fragment), tables)

    def _images(self, batch: Batch) -> tuple[np.ndarray | Tensor, np.ndarray]:
        """Return n images, and for each "" or the reason of its rejection.

        The images are uint8 [n, 3, size, size], an array or a tensor on the device.
        """
        if "jpeg_pixels" not in batch:
            return batch["image"], batch["reason"]
        from raypipe.vision.gpu_decode import decode_jpegs

        pixels, failures = decode_jpegs(
            batch["image"].tolist(),
            batch["jpeg_pixels"].tolist(),
            self._config.proxy.image_size,
            self._config.source.max_pixels,
            self._device,
            self._at_once.size,
        )
        earlier = batch["reason"].tolist()
        reasons = [failure or reason for failure, reason in zip(failures, earlier, strict=True)]
        return pixels, np.array(reasons)

    def _write(
        self, fragment: str, ids: np.ndarray, labels: np.ndarray, columns: dict[str, np.ndarray]
    ) -> None:
        """Write the embeddings of a fragment.

        Seed and audit samples, and those of linear probes, are in row groups of their own, so that
        fits read them without the rest.
        """
        table = self._table(ids, labels, columns.pop("embedding"), columns)
        groups, metadata = [], {PROBE_FRACTION: str(self._probe_fraction)}
        left = np.ones(len(ids), bool)
        for name, key in SPECIAL_ROWS.items():
            rule = self._rules[name]
            special = left & np.array([rule(sample_id) for sample_id in ids], bool)
            groups.append(table.filter(pa.array(special)))
            metadata[key] = str(int(special.sum()))
            left &= ~special
        groups.append(table.filter(pa.array(left)))
        groups[0] = groups[0].replace_schema_metadata(metadata)
        storage.write_table_groups(self._run.embedding_shard(fragment), groups)

    def _table(
        self,
        ids: np.ndarray,
        labels: np.ndarray,
        embedding: np.ndarray,
        columns: dict[str, np.ndarray],
    ) -> pa.Table:
        """Return sample_id, label, embedding in the type of the settings, and the columns."""
        data = {
            "sample_id": pa.array(ids.tolist(), pa.string()),
            "label": pa.array(labels, pa.int32(), mask=labels < 0),
            "embedding": self._embedding_column(embedding),
            **{name: pa.array(value) for name, value in columns.items()},
        }
        return pa.table(data)

    def _embedding_column(self, embedding: np.ndarray) -> pa.FixedSizeListArray:
        """Return embeddings in the type of the settings."""
        with np.errstate(over="ignore"):
            values = embedding.astype(self._config.embed.dtype).reshape(-1)
        if not np.isfinite(values).all():
            raise StageError("embeddings do not fit into float16; set embed.dtype to float32")
        return pa.FixedSizeListArray.from_arrays(pa.array(values), embedding.shape[1])
