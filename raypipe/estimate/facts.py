"""What an inspection finds out, as plain values; `raypipe.estimate.inspect_text` prints them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from raypipe.sources.formats import LeftOut

CONFIDENCE = 0.95
"""Of the upper bound of the share of rejects."""


@dataclasses.dataclass(frozen=True)
class ClassBalance:
    """How the samples are spread over the classes.

    Attributes
    ----------
    exact
        Every label was counted; otherwise `counted` labels represent all of them.
    counted
        Labels that were counted.
    per_class
        Class name -> samples, largest class first; scaled up to the whole source if not exact.
    unlabelled
        Share of the counted samples without a label.
    fewer_than_10
        Classes with fewer than ten samples; None if too few labels were counted to tell.
    margin
        Half the width of the 95 % interval of the largest class, in samples; None if every label
        was counted, or the labels are from one file only, which says nothing about the others.
    even
        Whether classes of equal size would explain the counted labels; None as for `margin`.
    """

    exact: bool
    counted: int
    per_class: dict[str, int]
    unlabelled: float
    fewer_than_10: int | None
    margin: int | None = None
    even: bool | None = None

    @property
    def smallest(self) -> int:
        """Samples of the smallest class."""
        return min(self.per_class.values(), default=0)

    @property
    def median(self) -> float:
        """Median number of samples in a class."""
        sizes = sorted(self.per_class.values())
        if not sizes:
            return 0
        middle = len(sizes) // 2
        return sizes[middle] if len(sizes) % 2 else (sizes[middle - 1] + sizes[middle]) / 2

    @property
    def largest(self) -> int:
        """Samples of the largest class."""
        return max(self.per_class.values(), default=0)


@dataclasses.dataclass(frozen=True)
class ImageFacts:
    """The images among the drawn samples, as stored.

    Attributes
    ----------
    read
        Images whose header could be read.
    bytes_median, bytes_p95
        Bytes of an encoded image; None if pixels are stored without encoding.
    smallest, largest
        Width and height of the image with the fewest and with the most pixels.
    median
        Median width and median height.
    formats, modes
        Name -> share of the images that were read, most frequent first.
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
class RejectFacts:
    """Drawn samples that a run would reject.

    Attributes
    ----------
    drawn, count
        Drawn samples, and those of them that would be rejected.
    share
        `count` / `drawn`.
    upper_bound
        The share in the whole source is below this with a confidence of 95 % (Clopper and Pearson
        1934), provided that samples were drawn one by one; defects that occur in runs make it less
        certain. Equal to `share` if every sample was drawn.
    reasons
        Reason, without what is specific to a sample -> how often.
    first
        (sample_id, reason) of a few.
    """

    drawn: int
    count: int
    share: float
    upper_bound: float
    reasons: dict[str, int]
    first: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class StageEstimate:
    """What one stage is estimated to take; `low` and `high` are seconds on the clock."""

    stage: str
    cpu_seconds: float
    gpu_seconds: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class CostEstimate:
    """What a run is estimated to cost.

    Attributes
    ----------
    machine, settings
        Descriptions of where it would run, and with which settings.
    samples, seed_samples
        Samples that would be scored, and those of them that would be measured.
    stages
        The estimate of every stage.
    low, high
        Seconds from start to end.
    cpu_hours, gpu_hours
        All stages together, middle of the estimate.
    bytes_read
        By stage.
    bytes_written
        By folder of the run.
    basis
        Sentences on what the estimate is based on.
    warnings
        Sentences on what would go wrong with these settings.
    network
        The proxy's network, and the images that it is made for.
    features
        What is used next to the embeddings of the proxy, or instead; "" for nothing.
    """

    machine: str
    settings: str
    samples: int
    seed_samples: int
    stages: tuple[StageEstimate, ...]
    low: float
    high: float
    cpu_hours: float
    gpu_hours: float
    bytes_read: dict[str, int]
    bytes_written: dict[str, int]
    basis: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    network: str = ""
    features: str = ""


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a source contains.

    Attributes
    ----------
    uri, format
        The source.
    files, bytes
        From the listing; bytes are estimated if the listing has no sizes.
    empty_files
        Files without content.
    opened
        Files that were opened.
    samples
        Number of samples; an estimate if `counted` is false.
    fragments
        Estimated number of fragments.
    limit
        `source.limit`: a run takes this many samples from the start.
    scan_reads, reads_singly
        How the format is read; see `scan_reads` and `random_access` of `raypipe.sources.Source`.
    class_names
        All classes; if `classes_known` is false, those that were seen.
    unreadable_files
        (path, reason) of opened files that cannot be read.
    unreadable_problem
        Why a run stops because of them; empty if it does not.
    reads_labels
        Whether `source.label_column` is not null.
    columns
        What is read -> the column that has it, where `source.image_column` and
        `source.label_column` are names, or stand for names that were found.
    balance, pictures, rejects
        Classes, images and rejects.
    duplicates
        Drawn samples with the same bytes as an earlier one.
    conflicting
        Those of them with another label.
    decode_seconds
        Processor seconds to decode one image to the proxy's input size, on this machine.
    seconds
        Duration of the inspection.
    cost
        Estimate of a run.
    left_out
        Files that belong to another format, by ending ("" without one).
    bit_depth
        `source.bit_depth`.
    depth_note
        What is lost of 16-bit images, and what to do; empty if nothing is.
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
    balance: ClassBalance | None
    pictures: ImageFacts | None
    rejects: RejectFacts
    duplicates: int
    decode_seconds: float
    seconds: float
    cost: CostEstimate | None = None
    code: tuple[str, ...] = ()
    left_out: Mapping[str, LeftOut] = dataclasses.field(default_factory=dict)
    bit_depth: int = 16
    depth_note: str = ""
    unreadable_problem: str = ""
    reads_labels: bool = True
    conflicting: int = 0
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        result = dataclasses.asdict(self)
        if self.balance is not None:
            result["balance"] |= {
                name: getattr(self.balance, name) for name in ("smallest", "median", "largest")
            }
        result["left_out"] = {ending: item._asdict() for ending, item in self.left_out.items()}
        return result


def upper_bound(count: int, drawn: int, confidence: float = CONFIDENCE) -> float:
    """Return the upper confidence bound of a share of which `count` in `drawn` were observed.

    It is the share p with P(X <= count | p) = 1 - confidence for a binomial X (Clopper and Pearson
    1934).
    """
    if count >= drawn:
        return 1.0

    def probability(share: float) -> float:
        """P(X <= count | share)."""
        log_binomials = (
            (math.lgamma(drawn + 1) - math.lgamma(k + 1) - math.lgamma(drawn - k + 1), k)
            for k in range(count + 1)
        )
        return math.fsum(
            math.exp(log_binomial + k * math.log(share) + (drawn - k) * math.log1p(-share))
            for log_binomial, k in log_binomials
        )

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) > 1 - confidence else (low, middle)
    return high
