"""Sizes shared by the stages and the estimates, without Ray."""

from __future__ import annotations

SEED_SHARD_SAMPLES = 512
"""Approximate number of seed samples in a shard, and in the group of fragments that one task reads
to draw them."""

MAX_DRAWN_FILES = 4096
"""Largest number of such groups. A very large seed set has larger ones, because every task that
writes seed shards opens the files of all groups."""

GATHER_BYTES = 128 << 20
"""Bytes of pixels that one task gathers into seed shards, about."""

MAX_GATHER_TASKS = 1024
"""Largest number of such tasks, each of which opens all files of drawn samples. Those of a very
large seed set gather more bytes each."""


def gather_bytes(pixels: float) -> float:
    """Return the bytes of pixels that one task gathers, given those of all samples."""
    return max(GATHER_BYTES, pixels / MAX_GATHER_TASKS)


MIN_SEED_SAMPLES = 20
"""Samples that a seed set, and each part of one, must have; otherwise the run stops."""

INDEX_TASK_FILES = 32
"""Files that one task of the stage `index` opens."""

INDEX_FILE_FRAGMENTS = 10_000
"""Fragments after which the stage `index` starts a new index file."""

INDEX_FILE_MEMBERS = 65_536
"""Names of small files after which the stage `index` starts a new index file.

A worker reads a whole index file to find the members of its fragment.
"""

PUBLISHED_SAMPLES = 10_000
"""Largest source in which `extrapolate.judge_published: auto` also judges gnn-published."""

QUICK_FOLDS_AUDIT = 100
"""With at least this many audit samples, these decide the fidelity, and folds of the seed set are
fitted in less time."""

MIN_PROBE_SAMPLES, MAX_PROBE_SAMPLES = 50_000, 200_000
"""Bounds of `probe_samples`. One task holds the embeddings of these samples by one proxy."""


def probe_samples(classes: int) -> int:
    """Return the number of samples that linear probes are fitted to, of a source that has more."""
    return min(MAX_PROBE_SAMPLES, max(MIN_PROBE_SAMPLES, 200 * classes))
