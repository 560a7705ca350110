"""Draw samples from places spread over a source."""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

from raypipe.sources import RawSample, Source, SourceFile
from raypipe.sources.types import Preview

NEIGHBOURS = 4
"""Samples taken at one place: a place costs one or two requests, a neighbour hardly any."""
WHOLE_BYTES = 32 << 20
"""A source of at most this size and WHOLE_FILES files is read completely."""
WHOLE_FILES = 256
THREADS = 16


def spread_places(
    source: Source, files: Sequence[SourceFile], samples: int, seed: int
) -> dict[int, int]:
    """Return how many places to look at in which file.

    Places are spread evenly over the source, each at a random distance from the one before.
    """
    if _is_small(source, files):
        return dict.fromkeys(range(len(files)), samples)
    weights = [len(file.members) or file.size for file in files]
    bounds, draw = list(accumulate(weights)), random.Random(f"{seed}-places")
    count = max(1, math.ceil(samples / NEIGHBOURS))
    at = [bisect(bounds, (place + draw.random()) * bounds[-1] / count) for place in range(count)]
    return dict(sorted(Counter(min(row, len(files) - 1) for row in at).items()))


def read_previews(
    source: Source, files: Sequence[SourceFile], places: dict[int, int], seed: int
) -> dict[int, Preview]:
    """Return a preview of each file that has places."""
    whole = _is_small(source, files)

    def preview(row: int) -> Preview:
        draw = random.Random(f"{seed}-{files[row].path}")
        return source.preview(files[row], places[row], 1 if whole else NEIGHBOURS, draw, whole)

    with ThreadPoolExecutor(THREADS, thread_name_prefix="raypipe-look") as pool:
        return dict(zip(places, pool.map(preview, places), strict=True))


def choose_samples(
    previews: Sequence[Preview], samples: int, draw: random.Random
) -> list[RawSample]:
    """Choose about `samples` of the drawn samples, in random order.

    Each file contributes in proportion to what it holds.
    """
    chosen = [sample for preview in previews for sample in preview.drawn]
    if len(chosen) > samples:
        chosen, total = [], sum(preview.samples for preview in previews)
        # marks at every whole number, shifted by a random offset, so that the counts add up
        reached, offset = 0.0, draw.random()
        for preview in previews:
            before, reached = reached, reached + samples * preview.samples / total
            count = math.floor(reached + offset) - math.floor(before + offset)
            chosen += draw.sample(preview.drawn, min(count, len(preview.drawn)))
    draw.shuffle(chosen)
    return chosen


def _is_small(source: Source, files: Sequence[SourceFile]) -> bool:
    """Tell whether the source is read completely."""
    return (
        not source.random_access
        and len(files) <= WHOLE_FILES
        and sum(file.size for file in files) <= WHOLE_BYTES
    )
