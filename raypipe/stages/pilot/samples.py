"""The samples of a pilot: seed samples with their scores, audit samples to test on.

Pixels come from the seed and audit shards, scores and statistics of the proxies are those that
keep-lists are cut from. They are in one file, which every training reads.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.run import Run
from raypipe.runs.score_stream import ScoreStream
from raypipe.runs.seed_shards import image_array, image_column, read_shard, shard_labels
from raypipe.selection import (
    Chunk,
    IdSet,
    SelectionOptions,
    needs_embeddings,
    needs_loss,
    needs_margin,
)
from raypipe.selection.hashing import canonical_hashes, canonical_order, string_array


@dataclass(frozen=True)
class ListRule:
    """How a list is cut: name of the strategy and its options."""

    strategy: str
    options: SelectionOptions


@dataclass(frozen=True, eq=False)
class PilotSamples:
    """Labelled samples in the canonical order.

    Attributes
    ----------
    ids
        n ids.
    images
        uint8 [n, 3, size, size].
    labels
        int64 [n].
    score, loss, margin
        float32 [n]; NaN where no strategy needs it, and for samples to test on.
    embedding
        float32 [n, d]; d is 0 if no strategy needs it.
    test
        Whether a sample is tested on, bool [n]; else lists are cut from it.
    """

    ids: pa.Array
    images: np.ndarray
    labels: np.ndarray
    score: np.ndarray
    loss: np.ndarray
    margin: np.ndarray
    embedding: np.ndarray
    test: np.ndarray

    def take(self, rows: np.ndarray) -> PilotSamples:
        """Return the samples at `rows`."""
        arrays = {item.name: getattr(self, item.name)[rows] for item in fields(self)[1:]}
        return PilotSamples(self.ids.take(pa.array(rows)), **arrays)

    def chunk(self) -> Chunk:
        """Return the samples as a stream of scores has them."""
        loss, margin = (
            None if np.isnan(values).any() else values for values in (self.loss, self.margin)
        )
        label = self.labels.astype(np.int32)
        return Chunk(self.score, label, self.ids, loss, position=0, margin=margin)

    def write(self, run: Run) -> None:
        """Write `pilot/samples.parquet`."""
        width = self.embedding.shape[1]
        vectors = pa.array(self.embedding.reshape(-1), pa.float32())
        columns = {
            "sample_id": self.ids,
            "label": pa.array(self.labels, pa.int32()),
            "score": pa.array(self.score),
            "loss": pa.array(self.loss),
            "margin": pa.array(self.margin),
            "test": pa.array(self.test),
            "image": image_column(self.images),
            **({"embedding": pa.FixedSizeListArray.from_arrays(vectors, width)} if width else {}),
        }
        metadata = {"raypipe": json.dumps({"image_size": self.images.shape[-1]})}
        table = pa.table(columns).replace_schema_metadata(metadata)
        storage.write_table(run.pilot_samples, table, dictionary=False)

    @classmethod
    def read(cls, run: Run) -> PilotSamples:
        """Read what `write` wrote."""
        table = storage.read_table(run.pilot_samples)
        size = json.loads(table.schema.metadata[b"raypipe"])["image_size"]
        embedding = np.zeros((len(table), 0), np.float32)
        if "embedding" in table.column_names:
            embedding = storage.matrix_of(table["embedding"])
        return cls(
            string_array(table["sample_id"]),
            image_array(table["image"], size),
            table["label"].to_numpy().astype(np.int64),
            table["score"].to_numpy(),
            table["loss"].to_numpy(),
            table["margin"].to_numpy(),
            embedding,
            table["test"].to_numpy(),
        )


def collect_samples(config: Config, run: Run, rules: Iterable[ListRule]) -> PilotSamples:
    """Return the samples of the pilot, with what the rules need to cut lists.

    Of the seed set these are at most `pilot.max_samples`, by a hash of the id. Samples without a
    label or a score are left out, as are test samples of classes that no seed sample has.
    """
    seed = SeedManifest.read(run)
    chosen = _chosen_ids(run, seed.shards, config.pilot.max_samples)
    ids, values = _scores_of(run, chosen, list(rules))
    train = _read_images(run, seed.shards, config.pilot.image_size, IdSet(ids))
    place = {name: row for row, name in enumerate(ids.to_pylist())}
    rows = np.array([place[name] for name in train.ids.to_pylist()], np.int64)
    train = replace(train, **{name: column[rows] for name, column in values.items()})
    test = _read_images(run, seed.audit_shards, config.pilot.image_size, None)
    test = test.take(np.flatnonzero(np.isin(test.labels, train.labels)))
    unknown = np.zeros((len(test.ids), train.embedding.shape[1]), np.float32)
    test = replace(test, embedding=unknown, test=np.ones(len(test.ids), bool))
    together = PilotSamples(
        pa.concat_arrays([train.ids, test.ids]),
        **{
            item.name: np.concatenate([getattr(train, item.name), getattr(test, item.name)])
            for item in fields(PilotSamples)[1:]
        },
    )
    return together.take(canonical_order(together.ids))


def _chosen_ids(run: Run, shards: Sequence[str], limit: int) -> pa.Array:
    """Return the ids of the labelled seed samples, of more than `limit` those of lowest hash."""
    tables = [shard_labels(run, shard).select(["sample_id", "label"]) for shard in shards]
    labelled = [table.filter(pa.array(table["label"].to_numpy() >= 0)) for table in tables]
    ids = string_array(pa.concat_tables(labelled)["sample_id"])
    if len(ids) <= limit:
        return ids
    return ids.take(pa.array(np.argsort(canonical_hashes(ids), kind="stable")[:limit]))


def _scores_of(
    run: Run, wanted: pa.Array, rules: Sequence[ListRule]
) -> tuple[pa.Array, Mapping[str, np.ndarray]]:
    """Return ids and columns of `PilotSamples`, of those samples that have a score."""
    scores = ScoreStream(
        run,
        any(needs_loss(rule.strategy, rule.options) for rule in rules),
        any(needs_margin(rule.strategy, rule.options) for rule in rules),
    )
    empty = np.zeros((0, 0), np.float32)
    stream: Iterable[tuple[Chunk, np.ndarray]]
    if any(needs_embeddings(rule.strategy) for rule in rules):
        stream = scores.embedded()
    else:
        stream = ((chunk, empty) for chunk in scores.chunks(True))
    lookup, ids = IdSet(wanted), list[pa.Array]()
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("score", "loss", "margin", "embedding")
    }
    for chunk, vectors in stream:
        rows = lookup.find(chunk.sample_id)
        unknown = np.full(len(rows), np.nan, np.float32)
        ids.append(string_array(chunk.sample_id).take(pa.array(rows)))
        columns["score"].append(chunk.score[rows])
        columns["loss"].append(unknown if chunk.loss is None else chunk.loss[rows])
        columns["margin"].append(unknown if chunk.margin is None else chunk.margin[rows])
        found = vectors[rows] if vectors.shape[1] else np.zeros((len(rows), 0))
        columns["embedding"].append(found.astype(np.float32))
    return pa.concat_arrays(ids), {name: np.concatenate(values) for name, values in columns.items()}


def _read_images(run: Run, shards: Sequence[str], limit: int, wanted: IdSet | None) -> PilotSamples:
    """Read labelled samples, with images of at most `limit` pixels and without scores."""
    manifest = SeedManifest.read(run)
    nothing = np.zeros((0, len(manifest.mean), *[manifest.image_size] * 2), np.uint8)
    names, images, labels = list[str](), [], []
    for shard in shards:
        ids, pixels, label = read_shard(run, shard)
        rows = np.arange(len(ids)) if wanted is None else np.sort(wanted.find(ids))
        rows = rows[label[rows] >= 0]
        names += [ids[row] for row in rows.tolist()]
        images.append(halved(pixels[rows], limit))
        labels.append(label[rows])
    count = len(names)
    unknown = np.full(count, np.nan, np.float32)
    return PilotSamples(
        pa.array(names, pa.string()),
        np.concatenate([*images, halved(nothing, limit)]),
        np.concatenate([*labels, np.zeros(0, np.int64)]),
        score=unknown,
        loss=unknown,
        margin=unknown,
        embedding=np.zeros((count, 0), np.float32),
        test=np.zeros(count, bool),
    )


def halved(images: np.ndarray, limit: int) -> np.ndarray:
    """Return images whose side is halved until it is at most `limit`, or odd.

    Four pixels become their mean, rounded to nearest. `images` is uint8 [n, 3, size, size].
    """
    size = images.shape[-1]
    while size > limit and size % 2 == 0:
        size //= 2
        blocks = images.reshape(*images.shape[:2], size, 2, size, 2)
        images = ((blocks.sum((3, 5), dtype=np.uint16) + 2) // 4).astype(np.uint8)
    return images


@functools.lru_cache(maxsize=1)
def cached_samples(run_uri: str, version: str) -> PilotSamples:
    """Return the samples, which a worker reads once; `version` names their content."""
    return PilotSamples.read(Run(run_uri))
