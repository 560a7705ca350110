"""Parts: the seed set divided at random among several proxies, as MoSo does (arXiv 2310.14664, Algorithm 1).

A hash of its id says which part a sample is in, so that parts are disjoint, about equally large, and the same everywhere and for
ever, whatever else is in the seed set. The published code takes ranges of indices instead, which on files sorted by class
leaves each part a few classes; that is not copied here.
With one part, which is all of the seed set, nothing is hashed and no folder is named after it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.errors import StageError
from raypipe.rundir import Run
from raypipe.stages.seed import read_shard, seed_manifest, shard_labels

LEAST_SAMPLES = 20
"""Seed samples that a part needs, as the seed set does."""


def part_rule(parts: int, seed: int) -> Callable[[str], int]:
    """The rule of the division: a function sample_id -> number of its part, 0..parts-1. It does not depend on the rule that
    draws the seed set, also where both have the same `seed`."""
    key = seed.to_bytes(16, "little")

    def rule(sample_id: str) -> int:
        text = sample_id.encode("utf-8", "surrogateescape")
        digest = hashlib.blake2b(text, digest_size=8, key=key, person=b"raypipe-part").digest()
        return int.from_bytes(digest, "little") * parts >> 64

    return rule


@dataclass(frozen=True)
class Part:
    """One part of the seed set.

    number, of     which of how many; seed as for `part_rule`
    samples        how many it has, and in each shard of the seed set
    trained        what `proxy.json` says of the proxy trained on it: steps, trajectory, checkpoints, final; empty before
    """

    number: int
    of: int
    seed: int
    samples: int
    shard_samples: tuple[int, ...]
    trained: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of its folders; empty for a part that is the whole."""
        return f"part-{self.number}" if self.of > 1 else ""

    def below(self, folder: str) -> str:
        """Its own folder below one that all parts share; that one itself for a part that is the whole."""
        return storage.join(folder, self.name) if self.name else folder

    @property
    def folder(self) -> str:
        """Where its proxy is, below the run."""
        return self.below("proxy")

    @property
    def checkpoints(self) -> str:
        """Where its proxy's checkpoints are, below the run."""
        return storage.join(self.folder, "checkpoints")

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """Which of some samples are in the part, rising."""
        if self.of == 1:
            return np.arange(len(ids))
        rule = part_rule(self.of, self.seed)
        return np.flatnonzero([rule(sample_id) == self.number for sample_id in ids])

    def count(self, run: Run, shard: str) -> int:
        """Samples of a seed or audit shard that are in the part, or would be."""
        return len(self.rows(shard_labels(run, shard)["sample_id"].to_pylist()))

    def read(self, run: Run, shard: str) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Its samples of a seed shard, as `read_shard` gives them; of an audit shard those that would be in it."""
        ids, images, labels = read_shard(run, shard)
        if self.of == 1:
            return ids, images, labels
        rows = self.rows(ids)
        return [ids[row] for row in rows], images[rows], labels[rows]


def divide(run: Run, parts: int, seed: int) -> list[Part]:
    """The parts of the seed set. Raises StageError when one has too few samples or classes to train on."""
    manifest = seed_manifest(run)
    if parts == 1:
        return [Part(0, 1, seed, manifest["samples"], tuple(manifest["shard_samples"]))]
    rule, classes = part_rule(parts, seed), len(manifest["per_class"])

    def count(shard: str) -> np.ndarray:
        table = shard_labels(run, shard)
        owner = np.array([rule(sample_id) for sample_id in table["sample_id"].to_pylist()], np.int64)
        return np.bincount(owner * classes + table["label"].to_numpy(), minlength=parts * classes).reshape(parts, classes)

    with ThreadPoolExecutor(16) as threads:
        counts = np.stack(list(threads.map(count, manifest["shards"])))  # [shards, parts, classes]
    samples, present = counts.sum((0, 2)), (counts.sum(0) > 0).sum(1)
    for number in range(parts):
        if samples[number] < LEAST_SAMPLES or present[number] < 2:
            raise StageError(
                f"part {number} of {parts} would have {samples[number]} seed samples of {present[number]} classes; at least "
                f"{LEAST_SAMPLES} samples of 2 classes are needed in each. Lower proxy.parts or raise seed.fraction"
            )
    return [Part(number, parts, seed, int(samples[number]), tuple(counts[:, number].sum(1).tolist())) for number in range(parts)]


def joined(run: Run, parts: Sequence[Part], shard: str, tables: Sequence[pa.Table]) -> pa.Table:
    """One table of a seed shard from the table of each part, its rows in the order of the shard."""
    if len(parts) == 1:
        return tables[0]
    ids = shard_labels(run, shard)["sample_id"].to_pylist()
    rows = np.concatenate([part.rows(ids) for part in parts])
    return pa.concat_tables(tables).take(pa.array(np.argsort(rows)))
