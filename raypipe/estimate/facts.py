"""What a survey finds out, as plain values; `raypipe.estimate.inspect_text` says them in a terminal."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

CONFIDENCE = 0.95
"""Of the upper bound of the share of rejects."""


@dataclasses.dataclass(frozen=True)
class Balance:
    """How the samples are spread over the classes.

    exact         every label was counted; else `counted` labels stand for all of them
    per_class     class name -> samples, largest class first; scaled up to the whole source where not exact
    unlabelled    share of the counted samples without a label
    fewer_than_10 classes with fewer than ten samples; None where too few labels were counted to tell
    """

    exact: bool
    counted: int
    per_class: dict[str, int]
    unlabelled: float
    fewer_than_10: int | None

    @property
    def smallest(self) -> int:
        return min(self.per_class.values(), default=0)

    @property
    def median(self) -> float:
        sizes = sorted(self.per_class.values())
        middle = len(sizes) // 2
        return (
            0
            if not sizes
            else sizes[middle]
            if len(sizes) % 2
            else (sizes[middle - 1] + sizes[middle]) / 2
        )

    @property
    def largest(self) -> int:
        return max(self.per_class.values(), default=0)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The images among the drawn samples, as stored.

    read               images whose header could be read
    bytes_median, _p95 of an encoded image; None where pixels are stored as they are
    smallest, largest  width and height of the image with the fewest and the most pixels; median of width and of height
    formats, modes     name -> share of those read, most frequent first
    """

    read: int
    bytes_median: int | None
    bytes_p95: int | None
    smallest: tuple[int, int]
    median: tuple[int, int]
    largest: tuple[int, int]
    formats: dict[str, float]
    modes: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Rejects:
    """Samples among those drawn that a run would reject.

    share        of those drawn
    upper_bound  what the share in the source stays below with a confidence of 95 % (Clopper and Pearson 1934), had the samples been
                 drawn one by one; defects that come in runs make it less sure. Equal to the share where every sample was drawn
    reasons      reason, without what is particular to a sample -> how often
    first        (sample_id, reason) of a few
    """

    drawn: int
    count: int
    share: float
    upper_bound: float
    reasons: dict[str, int]
    first: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class StageCost:
    """What one stage is estimated to take; seconds are those of the clock, from `low` to `high`."""

    stage: str
    cpu_seconds: float
    gpu_seconds: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run is estimated to cost.

    machine         where it would run, in words
    settings        with which settings, in words
    seed_samples    samples that would be measured
    low, high       seconds from start to end
    cpu_hours, gpu_hours   of all stages together, middle of the estimate
    bytes_read, bytes_written   by stage, and by folder of the run
    basis           sentences: what the estimate rests on
    """

    machine: str
    settings: str
    samples: int
    seed_samples: int
    stages: tuple[StageCost, ...]
    low: float
    high: float
    cpu_hours: float
    gpu_hours: float
    bytes_read: dict[str, int]
    bytes_written: dict[str, int]
    basis: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Survey:
    """What is in a source.

    files, bytes      of the listing, or where that has no sizes estimated; opened: how many files were looked into
    samples           counted, or an estimate where `counted` is false
    class_names       all of them, or with `classes_known` false those that were seen
    unreadable_files  (path, reason) of files among the opened that cannot be read
    limit             `source.limit`: a run takes the first so many samples
    scan_reads, reads_singly   how the format is read; see `raypipe.sources.Source`
    duplicates        drawn samples with the same bytes as an earlier one of them
    decode_seconds    processor seconds to decode one image to the proxy's input size, on this machine
    seconds           what the look took
    """

    uri: str
    format: str
    files: int
    bytes: int
    empty_files: int
    opened: int
    samples: int
    counted: bool
    fragments: int
    limit: int | None
    scan_reads: str
    reads_singly: bool
    class_names: tuple[str, ...]
    classes_known: bool
    unreadable_files: tuple[tuple[str, str], ...]
    balance: Balance | None
    pictures: Pictures | None
    rejects: Rejects
    duplicates: int
    decode_seconds: float
    seconds: float
    cost: Cost | None = None

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        result = dataclasses.asdict(self)
        if self.balance is not None:
            result["balance"] |= {
                name: getattr(self.balance, name) for name in ("smallest", "median", "largest")
            }
        return result


def upper_bound(count: int, drawn: int, confidence: float = CONFIDENCE) -> float:
    """The largest share p for which `count` or fewer of `drawn` are not too few to be believed: P(X <= count | p) = 1 - confidence."""
    if count >= drawn:
        return 1.0

    def tail(share: float) -> float:
        ways = (
            (math.lgamma(drawn + 1) - math.lgamma(k + 1) - math.lgamma(drawn - k + 1), k)
            for k in range(count + 1)
        )
        return math.fsum(
            math.exp(w + k * math.log(share) + (drawn - k) * math.log1p(-share)) for w, k in ways
        )

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle) > 1 - confidence else (low, middle)
    return high
