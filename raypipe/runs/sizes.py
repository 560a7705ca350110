"""Sizes shared by the stages and the estimates, without Ray."""

from __future__ import annotations

SEED_SHARD_SAMPLES = 512
"""Approximate number of seed samples in a shard: fragments are read in groups to yield it."""

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
