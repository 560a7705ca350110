"""Divide the seed set at random among several proxies, as in MoSo (arXiv 2310.14664, Algorithm 1).

A hash of the id decides which part a sample belongs to. Parts are therefore disjoint and about
equally large, and the part of a sample never changes, whatever else is in the seed set. The
published code divides ranges of indices instead; in files sorted by class, each part then has few
classes. We do not follow it.

Each part can have several proxies (`proxy.repeats`), trained on the same samples from other initial
weights and with other draws. Proxies are numbered by repeat, then by part: with P parts, proxy
r P + p is the one of part p in repeat r.

With a single part, nothing is hashed. With a single proxy, no folder is named after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.errors import StageError
from raypipe.runs.manifests import ProxyManifest, SeedManifest, TrainedProxy, proxy_folder
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import read_shard, shard_labels
from raypipe.runs.sizes import MIN_SEED_SAMPLES
from raypipe.sources.id_sampling import part_rule


@dataclass(frozen=True)
class SeedPart:
    """One part of the seed set, and one of the proxies trained on it.

    Attributes
    ----------
    number, of : int
        Its number, from 0, and the number of parts.
    seed : int
        Seed of the division, see `part_rule`.
    samples, shard_samples : int, tuple of int
        Its samples, in total and in each shard of the seed set.
    proxy : TrainedProxy, optional
        The proxy trained on it; None until it is trained.
    repeat, repeats : int
        Number of the proxy among those of the part, from 0, and how many these are.
    """

    number: int
    of: int
    seed: int
    samples: int
    shard_samples: tuple[int, ...]
    proxy: TrainedProxy | None = None
    repeat: int = 0
    repeats: int = 1

    @property
    def trained(self) -> TrainedProxy:
        """The proxy trained on the part, which must exist."""
        assert self.proxy is not None, "the proxy is not trained yet"
        return self.proxy

    @property
    def name(self) -> str:
        """Name of the folders of its proxy; empty for the only proxy."""
        return proxy_folder(self.number, self.of, self.repeat, self.repeats)

    @property
    def training_seed(self) -> int:
        """Seed of the order of batches and of augmentation.

        Initial weights have this seed plus the number of the part.
        """
        if self.repeat == 0:
            return self.seed
        return int(np.random.SeedSequence([self.seed, self.repeat]).generate_state(1)[0])

    def below(self, folder: str) -> str:
        """Return the folder of its proxy in one that all share; the only proxy uses that one."""
        return storage.join(folder, self.name) if self.name else folder

    @property
    def folder(self) -> str:
        """Folder of its proxy, inside the run."""
        return self.below("proxy")

    @property
    def checkpoints(self) -> str:
        """Folder of the checkpoints of its proxy, inside the run."""
        return storage.join(self.folder, "checkpoints")

    @property
    def state(self) -> str:
        """File from which its training resumes after the last finished epoch, inside the run."""
        return storage.join(self.folder, "state.safetensors")

    @property
    def resume(self) -> str:
        """Folder of the states from which its training resumes within an epoch, inside the run."""
        return storage.join(self.folder, "resume")

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """Return the positions of the samples that belong to the part, ascending."""
        if self.of == 1:
            return np.arange(len(ids))
        rule = part_rule(self.of, self.seed)
        return np.flatnonzero([rule(sample_id) == self.number for sample_id in ids])

    def other_rows(self, ids: Sequence[str]) -> np.ndarray:
        """Return the positions of the samples that belong to other parts, ascending."""
        return np.setdiff1d(np.arange(len(ids)), self.rows(ids), assume_unique=True)

    def read(self, run: Run, shard: str) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Read the samples of a seed or audit shard that the hash assigns to the part.

        Returns ids, images and labels, as `read_shard` does.
        """
        return self._read(run, shard, self.rows)

    def read_others(self, run: Run, shard: str) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Read the samples of a seed or audit shard that belong to other parts, like `read`."""
        return self._read(run, shard, self.other_rows)

    def _read(
        self, run: Run, shard: str, choose: Callable[[Sequence[str]], np.ndarray]
    ) -> tuple[list[str], np.ndarray, np.ndarray]:
        ids, images, labels = read_shard(run, shard)
        rows = choose(ids)
        if len(rows) == len(ids):
            return ids, images, labels
        return [ids[row] for row in rows], images[rows], labels[rows]


def partition_seed_set(run: Run, parts: int, seed: int, repeats: int = 1) -> list[SeedPart]:
    """Divide the seed set among the proxies.

    Raises StageError if a part has too few samples or classes.
    """
    once = _divide(run, parts, seed)
    return [
        replace(part, repeat=repeat, repeats=repeats) for repeat in range(repeats) for part in once
    ]


def _divide(run: Run, parts: int, seed: int) -> list[SeedPart]:
    manifest = SeedManifest.read(run)
    if parts == 1:
        return [SeedPart(0, 1, seed, manifest.samples, manifest.shard_samples)]
    rule, classes = part_rule(parts, seed), len(manifest.per_class)

    def count(shard: str) -> np.ndarray:
        table = shard_labels(run, shard)
        owner = np.array(
            [rule(sample_id) for sample_id in table["sample_id"].to_pylist()], np.int64
        )
        return np.bincount(
            owner * classes + table["label"].to_numpy(), minlength=parts * classes
        ).reshape(parts, classes)

    with ThreadPoolExecutor(16) as threads:
        counts = np.stack(list(threads.map(count, manifest.shards)))  # [shards, parts, classes]
    samples, present = counts.sum((0, 2)), (counts.sum(0) > 0).sum(1)
    for number in range(parts):
        if samples[number] < MIN_SEED_SAMPLES or present[number] < 2:
            raise StageError(
                f"part {number} of {parts} would have {samples[number]} seed samples of "
                f"{present[number]} classes; each needs at least {MIN_SEED_SAMPLES} samples of 2 "
                "classes. Lower proxy.parts or raise seed.fraction"
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
    """Join the tables of all parts of a seed shard, with the rows in the order of the shard."""
    if len(parts) == 1:
        return tables[0]
    ids = shard_labels(run, shard)["sample_id"].to_pylist()
    rows = np.concatenate([part.rows(ids) for part in parts])
    return pa.concat_tables(tables).take(pa.array(np.argsort(rows)))


def proxy_parts(run: Run) -> list[SeedPart]:
    """Return every trained proxy with its part of the seed set, by the number of the proxy."""
    manifest = ProxyManifest.read(run)
    parts = len(manifest.parts) // manifest.repeats
    return [
        SeedPart(
            number % parts,
            parts,
            manifest.seed,
            part.samples,
            part.shard_samples,
            part.trained,
            repeat=number // parts,
            repeats=manifest.repeats,
        )
        for number, part in enumerate(manifest.parts)
    ]


def trajectory_files(run: Run, repeat: int = 0) -> list[list[str]]:
    """Return the trajectory files of all parts in one repeat, per epoch, as paths inside the run.

    Together, the files of an epoch have one row per seed sample.
    """
    parts = [part for part in proxy_parts(run) if part.repeat == repeat]
    return [
        [
            storage.join(part.folder, "trajectory", file)
            for part, files in zip(parts, epoch, strict=True)
            for file in files
        ]
        for epoch in zip(*(part.trained.trajectory for part in parts), strict=True)
    ]
