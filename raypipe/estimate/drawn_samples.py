"""What a run would make of the drawn samples: those it would reject, and duplicates."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from raypipe.config import SourceSettings
from raypipe.estimate.facts import RejectFacts, upper_bound
from raypipe.sources import ClassMap, RawSample
from raypipe.vision.decode import BadImage, decode
from raypipe.vision.own_code import Transform, transform_to_show

DECODE_THREADS = 4


@dataclass(frozen=True)
class DrawnSample:
    """A drawn sample.

    Attributes
    ----------
    sample
        As the source has it.
    reason
        Why a run would reject it; empty if it would not.
    class_name
        None without a label.
    """

    sample: RawSample
    reason: str
    class_name: str | None


@dataclass(frozen=True)
class DecodedSamples:
    """Samples as a run would judge them, and the processor seconds to decode one."""

    samples: list[DrawnSample]
    seconds: float


def decode_samples(
    chosen: Sequence[RawSample], classes: ClassMap, settings: SourceSettings, size: int
) -> DecodedSamples:
    """Decode samples to `size` pixels, and judge them as a run would."""
    transform = transform_to_show(settings)
    attempt = functools.partial(_try_decoding, size=size, settings=settings, transform=transform)
    threads = min(DECODE_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="raypipe-decode") as pool:
        attempts = list(pool.map(attempt, chosen))
    samples = []
    for sample, (reason, _) in zip(chosen, attempts, strict=True):
        index, label_error = classes.index(sample.label)
        class_name = classes.names[index] if index >= 0 else None
        samples.append(DrawnSample(sample, reason or label_error, class_name))
    seconds = [seconds for reason, seconds in attempts if not reason]
    return DecodedSamples(samples, statistics.fmean(seconds) if seconds else 0.0)


def _try_decoding(
    sample: RawSample, size: int, settings: SourceSettings, transform: Transform | None
) -> tuple[str, float]:
    """Return why the sample cannot be decoded ("" if it can), and processor seconds."""
    started = time.thread_time()
    reason = sample.reason or ("" if sample.image is not None else "no image")
    if not reason and sample.image is not None:
        try:
            decode(sample.image, size, settings.max_pixels, settings.bit_depth, transform, None)
        except BadImage as error:
            reason = str(error)
    return reason, time.thread_time() - started


def reject_facts(drawn: Sequence[DrawnSample], total: int) -> RejectFacts:
    """Return what the rejects among the drawn samples say of the whole source."""
    bad = [item for item in drawn if item.reason]
    share = len(bad) / max(1, len(drawn))
    if len(drawn) >= total:
        bound = share
    else:
        bound = upper_bound(len(bad), len(drawn)) if drawn else 1.0
    return RejectFacts(
        drawn=len(drawn),
        count=len(bad),
        share=share,
        upper_bound=bound,
        reasons=dict(Counter(re.sub(r"\d+", "N", item.reason) for item in bad).most_common(10)),
        first=tuple((item.sample.sample_id, item.reason) for item in bad[:5]),
    )


def count_duplicates(samples: Sequence[RawSample]) -> tuple[int, int]:
    """Return how many samples have the bytes of another, and how many of these another label."""
    labels: dict[bytes, list[int | str | None]] = {}
    for sample in samples:
        image = sample.image
        if image is not None:
            content = image if isinstance(image, bytes) else image.tobytes()
            shape = b"" if isinstance(image, bytes) else str(image.shape).encode()
            labels.setdefault(hashlib.blake2b(content + shape).digest(), []).append(sample.label)
    return (
        sum(len(alike) - 1 for alike in labels.values()),
        sum(len(alike) - Counter(alike).most_common(1)[0][1] for alike in labels.values()),
    )
