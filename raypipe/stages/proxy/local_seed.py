"""The decoded seed set on the local disk of each node that trains the proxy."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from typing import NamedTuple

import numpy as np

from raypipe.runs.ledger import fingerprint
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.partition import SeedPart
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import read_shard
from raypipe.selection.hashing import canonical_hashes


class SeedArrays(NamedTuple):
    """The n samples of one part of the seed set.

    Attributes
    ----------
    images : np.ndarray
        uint8 [n, channels, size, size], mapped from the file.
    labels : np.ndarray
        int64 [n].
    seed_rows : np.ndarray
        Row of each sample in the whole seed set, int64 [n].
    hashes : np.ndarray
        Hash of the id of each sample, uint64 [n].
    """

    images: np.ndarray
    labels: np.ndarray
    seed_rows: np.ndarray
    hashes: np.ndarray


class LocalSeedSet:
    """One part of the seed set as memory-mapped arrays.

    All workers of a training on the same node share one copy.

    Rows are in the order of the manifest's shards, which depends on the ids alone; so batches and
    augmentation, drawn by row, do too. The page cache makes the arrays as fast as
    memory, and they use no more of it than is free.
    """

    def __init__(self, run: Run, manifest: SeedManifest, part: SeedPart, key: str) -> None:
        self._run, self._manifest, self._part = run, manifest, part
        self._run_prefix = os.path.join(
            tempfile.gettempdir(), f"raypipe-seed-{fingerprint(run.uri)}-"
        )
        self._attempt_prefix = self._run_prefix + key
        self._folder = f"{self._attempt_prefix}-{part.number}-{part.repeat}"

    def fill(self) -> None:
        """Write the arrays, unless an earlier worker of this node has done so."""
        if os.path.exists(self._file("complete")):
            return
        self._remove_leftovers()
        os.makedirs(self._folder)
        count, size = self._part.samples, self._manifest.image_size
        channels = len(self._manifest.mean)
        images = self._create("images", np.uint8, (count, channels, size, size))
        hashes = self._create("hashes", np.uint64, (count,))
        labels = self._create("labels", np.int64, (count,))
        seed_rows = self._create("rows", np.int64, (count,))
        start = first = 0
        for shard, samples in zip(self._manifest.shards, self._manifest.shard_samples, strict=True):
            ids, pixels, target = read_shard(self._run, shard)
            own = self._part.rows(ids)
            stop = start + len(own)
            images[start:stop], labels[start:stop] = pixels[own], target[own]
            seed_rows[start:stop] = first + own
            hashes[start:stop] = canonical_hashes([ids[row] for row in own.tolist()])
            start, first = stop, first + samples
        for array in (images, labels, seed_rows, hashes):
            array.flush()
        with open(self._file("complete"), "w"):
            pass

    def open(self) -> SeedArrays:
        """Map the images and load the rest."""
        return SeedArrays(
            np.load(self._file("images.npy"), mmap_mode="r"),
            np.load(self._file("labels.npy")),
            np.load(self._file("rows.npy")),
            np.load(self._file("hashes.npy")),
        )

    def remove(self) -> None:
        """Delete the arrays."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        """Delete copies of killed drivers, but not those of parts that are training now."""
        for folder in glob.glob(glob.escape(self._run_prefix) + "*"):
            if folder == self._folder or not folder.startswith(self._attempt_prefix):
                shutil.rmtree(folder, ignore_errors=True)

    def _create(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.memmap:
        return np.lib.format.open_memmap(self._file(f"{name}.npy"), "w+", dtype, shape)

    def _file(self, name: str) -> str:
        return os.path.join(self._folder, name)
