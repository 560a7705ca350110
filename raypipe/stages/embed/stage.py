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
its part; without it, all samples pass through the proxies of part 0, one of each repeat
(`raypipe.runs.proxy_roles`). Its statistics are means over these. The embedding is that of proxy 0.
Those by other viewers are in `views/<fragment>.parquet`: sample_id, proxy (its number), embedding;
a row group for each proxy.

With `embed.model` or `embed.from`, the embedding is that of the other network, that of the table,
or both, or it follows that of proxy 0; and `views/` also has the embeddings by proxy 0.

Without cross-fitting, the proxies of the other parts embed nothing, since distances between
embeddings mean something in one space only. Of the seed set, those of part 0 were trained on their
own part and not on the others.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.actor_pool import Batch, WorkerContext, stream
from raypipe.distributed.cluster import ActorPool
from raypipe.distributed.context import Context
from raypipe.distributed.usage import Stopwatch
from raypipe.errors import ResourceError, StageError
from raypipe.runs.duplicates import reject_duplicates
from raypipe.runs.embedding_table import NO_EMBEDDING, EmbeddingTable
from raypipe.runs.features import (
    bound_features,
    identity_of_features,
    image_size_of_features,
    load_features,
)
from raypipe.runs.ledger import StageRecord
from raypipe.runs.proxy_roles import ProxyRoles
from raypipe.runs.rejects import RejectCounter, hash_order, summarize_rejects, write_rejects
from raypipe.runs.run import Run
from raypipe.runs.shards import count_rows, remove_stale
from raypipe.runs.sizes import probe_samples
from raypipe.runs.unit_result import UnitResult
from raypipe.sources import Fragment, RawSample, open_source
from raypipe.stages.base import Stage
from raypipe.stages.embed.actor import EmbedActor
from raypipe.stages.embed.features import prepare_features
from raypipe.stages.embed.table_check import check_embeddings
from raypipe.vision.decode import decode_sizes
from raypipe.vision.own_code import transform_of

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
            **config.embed.of_features(),
            **identity_of_features(config),
        }

    def check(self, context: Context) -> None:
        if context.config.embed.network is not None:
            load_features(context.config)
        if context.config.embed.table is not None:
            check_embeddings(context)

    def complete(self, context: Context, record: StageRecord) -> bool:
        fragments = context.run.fragments()
        # a fragment without a readable sample still has a table of embeddings, an empty one
        readable = {fragment.fragment_id for fragment in fragments if not fragment.error}
        broken = {fragment.fragment_id for fragment in fragments if fragment.error}
        views = set() if ProxyRoles.of(context.config).single else readable
        return (
            readable == context.run.done("embeddings")
            and views <= context.run.done("views")
            and broken <= context.run.done("rejects")
        )

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = bound_features(context.config), context.run
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
        prepare_features(context, config, record)
        _embed_missing(context, config, record, readable, pool)
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
            **({"features": config.embed.features_text()} if config.embed.has_features else {}),
        }


def _embed_missing(
    context: Context,
    config: Config,
    record: StageRecord,
    fragments: Sequence[Fragment],
    pool: ActorPool,
) -> None:
    """Embed the fragments that have no embeddings, and tally the rejects of all."""
    run, worker = context.run, replace(WorkerContext.of(context, pool), config=config)
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
    plain = config.source.transform is None and config.proxy.channels == 3
    plain = plain and config.embed.network is None
    gpu_decoding = pool.num_gpus > 0 and config.embed.decode != "cpu" and plain
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
            functools.partial(EmbedActor, worker, gpu_decoding, probe_fraction),
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
    size, max_pixels = config.proxy.image_size, config.source.max_pixels
    depth, transform = config.source.bit_depth, transform_of(config.source)
    columns: Batch = {}

    def samples() -> Iterator[RawSample]:
        for sample in reject_duplicates(
            run, fragment, source.read(run.with_members(fragment)), source.ids_can_repeat
        ):
            ids.append(sample.sample_id)
            labels.append(classes.label_of(sample))
            if len(ids) <= count:
                yield sample

    if gpu_decoding:
        from raypipe.vision.gpu_decode import split_off_jpegs

        images, pixels, unreadable = split_off_jpegs(samples(), size, max_pixels, depth)
        columns["image"] = np.empty(len(images), object)
        columns["image"][:] = images
        columns["jpeg_pixels"] = np.array(pixels, np.int64)
    else:
        of_features = image_size_of_features(config)
        sizes = {"image": size}
        if of_features not in (None, size):
            sizes["feature_image"] = of_features
        pixels_of, unreadable = decode_sizes(
            samples(),
            list(sizes.values()),
            max_pixels,
            count,
            depth,
            transform,
            config.proxy.channels,
        )
        columns |= dict(zip(sizes, pixels_of, strict=True))
    if len(ids) != count:
        raise StageError(
            f"{fragment.path}: {len(ids)} samples where the index counted {count}; "
            "the file changed. Run again"
        )
    reasons = [
        reason or bad_label for reason, (_, bad_label) in zip(unreadable, labels, strict=True)
    ]
    if config.embed.table is not None:
        given, usable = EmbeddingTable.of(run, config.embed.table).read(ids)
        columns["given"] = given
        reasons = [
            reason or ("" if good else NO_EMBEDDING)
            for reason, good in zip(reasons, usable.tolist(), strict=True)
        ]
    return {
        "sample_id": np.array(ids),
        "label": np.array([label for label, _ in labels], np.int32),
        "reason": np.array(reasons),
        **columns,
        "cpu_seconds": np.full(count, watch.lap() / count),
    }
