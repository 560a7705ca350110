"""Parts: the seed set divided at random among several proxies, as MoSo does (arXiv 2310.14664, Algorithm 1).

A hash of its id says which part a sample is in, so that parts are disjoint, about equally large, and the same everywhere and for
ever, whatever else is in the seed set. The published code takes ranges of indices instead, which on files sorted by class
leaves each part a few classes; that is not copied here.
With one part, which is all of the seed set, nothing is hashed and no folder is named after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.errors import StageError
from raypipe.runs.layout import Run
from raypipe.runs.manifests import proxy_manifest, seed_manifest
from raypipe.runs.seed_shards import read_shard, shard_labels
from raypipe.sources.id_sampling import part_rule

MIN_PART_SAMPLES = 20
"""Seed samples that a part needs, as the seed set does."""


@dataclass(frozen=True)
class SeedPart:
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


def partition_seed_set(run: Run, parts: int, seed: int) -> list[SeedPart]:
    """The parts of the seed set. Raises StageError when one has too few samples or classes to train on."""
    manifest = seed_manifest(run)
    if parts == 1:
        return [SeedPart(0, 1, seed, manifest["samples"], tuple(manifest["shard_samples"]))]
    rule, classes = part_rule(parts, seed), len(manifest["per_class"])

    def count(shard: str) -> np.ndarray:
        table = shard_labels(run, shard)
        owner = np.array(
            [rule(sample_id) for sample_id in table["sample_id"].to_pylist()], np.int64
        )
        return np.bincount(
            owner * classes + table["label"].to_numpy(), minlength=parts * classes
        ).reshape(parts, classes)

    with ThreadPoolExecutor(16) as threads:
        counts = np.stack(list(threads.map(count, manifest["shards"])))  # [shards, parts, classes]
    samples, present = counts.sum((0, 2)), (counts.sum(0) > 0).sum(1)
    for number in range(parts):
        if samples[number] < MIN_PART_SAMPLES or present[number] < 2:
            raise StageError(
                f"part {number} of {parts} would have {samples[number]} seed samples of {present[number]} classes; at least "
                f"{MIN_PART_SAMPLES} samples of 2 classes are needed in each. Lower proxy.parts or raise seed.fraction"
            )
    return [
        SeedPart(
            number, parts, seed, int(samples[number]), tuple(counts[:, number].sum(1).tolist())
        )
        for number in range(parts)
    ]


def merge_parts(
    run: Run, parts: Sequence[SeedPart], shard: str, tables: Sequence[pa.Table]
) -> pa.Table:
    """One table of a seed shard from the table of each part, its rows in the order of the shard."""
    if len(parts) == 1:
        return tables[0]
    ids = shard_labels(run, shard)["sample_id"].to_pylist()
    rows = np.concatenate([part.rows(ids) for part in parts])
    return pa.concat_tables(tables).take(pa.array(np.argsort(rows)))


def proxy_parts(run: Run) -> list[SeedPart]:
    """The parts of the seed set with what was trained on each; a single one that is the whole where `proxy.parts` is 1."""
    manifest = proxy_manifest(run)
    if "parts" not in manifest:
        return [
            SeedPart(
                0, 1, 0, manifest["samples"], tuple(seed_manifest(run)["shard_samples"]), manifest
            )
        ]
    listed = manifest["parts"]
    return [
        SeedPart(
            number,
            len(listed),
            manifest["seed"],
            entry["samples"],
            tuple(entry["shard_samples"]),
            entry,
        )
        for number, entry in enumerate(listed)
    ]


def trajectory_files(run: Run) -> list[list[str]]:
    """Per epoch the files, as paths below the run, that have a row for every seed sample: those of all parts."""
    parts = proxy_parts(run)
    return [
        [
            storage.join(part.folder, "trajectory", file)
            for part, files in zip(parts, epoch, strict=True)
            for file in files
        ]
        for epoch in zip(*(part.trained["trajectory"] for part in parts), strict=True)
    ]
