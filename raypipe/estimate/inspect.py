"""Looking into a source: a few samples from places spread over all of it, and what its listing and its label columns tell."""

from __future__ import annotations

import hashlib
import io
import math
import os
import random
import re
import statistics
import time
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from PIL import Image

from raypipe.config import SourceSettings
from raypipe.estimate.facts import Balance, Pictures, Rejects, Survey, upper_bound
from raypipe.sources import ClassMap, RawSample, Source, SourceFile, class_map, open_source
from raypipe.sources.base import Preview
from raypipe.vision.decode import FORMATS, BadImage, decode

SAMPLES = 256
"""Samples that are drawn."""
RUN = 4
"""Neighbouring samples taken at one place: a place costs a request or two, the sample beside it next to nothing."""
WHOLE_BYTES, WHOLE_FILES = 32 << 20, 256
"""A source of no more than this is read from end to end, and everything in it is counted."""
ENOUGH_LABELS = 20
"""Labels per class below which nothing is said of the smallest class."""
THREADS = 16
_MODES = {
    "1": "black and white",
    "L": "greyscale",
    "P": "palette",
    "LA": "greyscale with transparency",
    "RGBA": "RGB with transparency",
}


class Header(NamedTuple):
    """What an image says of itself before it is decoded; no bytes where pixels are stored as they are."""

    width: int
    height: int
    format: str
    mode: str
    bytes: int | None


@dataclass(frozen=True)
class DrawnSamples:
    """A drawn sample; `reason` says why a run would reject it, "" if it would not; no class where it has no label."""

    sample: RawSample
    reason: str
    class_name: str | None


@dataclass(frozen=True)
class Inspection:
    """What a survey found, and the samples it drew, in random order."""

    survey: Survey
    drawn: tuple[DrawnSamples, ...]


def inspect_source(
    settings: SourceSettings, *, samples: int = SAMPLES, seed: int = 0, image_size: int = 64
) -> Inspection:
    """Look into a source. The same source and seed give the same samples.

    samples     how many to draw, about
    image_size  what images are decoded to, pixels, to find those that cannot be and the time it takes
    Raises SourceError where nothing can be listed, the format cannot be told, or the labels do not fit together.
    """
    started = time.monotonic()
    source = open_source(settings)
    files = list(source.files())
    wanted = _places(source, files, samples, seed)
    previews = _previews(source, files, wanted, samples, seed)
    listed = [source.listed_labels(file) for file in files]
    labels = [
        found if found is not None else previews[row].labels if row in previews else Counter()
        for row, found in enumerate(listed)
    ]
    total, counted = _total(files, previews, listed)
    exact = counted and sum(found.total() for found in labels) >= total
    names = next(
        (preview.class_names for preview in previews.values() if preview.class_names is not None),
        None,
    )
    occurring: Counter[int | str | None] = sum(labels, Counter())
    classes = class_map(
        names, frozenset(label for label in occurring if label is not None), settings.num_classes
    )
    draw = random.Random(f"{seed}-choice")
    chosen = _choice([preview for _, preview in sorted(previews.items())], samples, draw)
    drawn, decode_seconds = _decoded(chosen, classes, settings, image_size)
    errors = tuple(
        (files[row].path, preview.error)
        for row, preview in sorted(previews.items())
        if preview.error
    )
    survey = Survey(
        uri=settings.uri,
        format=source.format,
        files=sum(max(1, len(file.members)) for file in files),
        bytes=max(sum(file.size for file in files), _unlisted_bytes(files, chosen, total)),
        empty_files=sum(not file.size for file in files),
        opened=sum(
            len(preview.drawn) if files[row].members else 1 for row, preview in previews.items()
        ),
        samples=total,
        counted=counted,
        fragments=_fragments(files, previews, listed, total, settings.fragment_samples),
        limit=settings.limit,
        scan_reads=source.scan_reads,
        reads_singly=source.random_access,
        class_names=classes.names,
        classes_known=exact or names is not None or settings.num_classes is not None,
        unreadable_files=errors,
        balance=_balance(classes, occurring, total, exact),
        pictures=_pictures([sample for sample in chosen if sample.image is not None]),
        rejects=_rejects(drawn, total),
        duplicates=_duplicates(chosen),
        decode_seconds=decode_seconds,
        seconds=round(time.monotonic() - started, 3),
    )
    return Inspection(survey, tuple(drawn))


def _places(source: Source, files: Sequence[SourceFile], samples: int, seed: int) -> dict[int, int]:
    """How many places to look at in which file: spread evenly over the source, each at a random distance from the one before."""
    weights = [len(file.members) or file.size for file in files]
    if _whole(source, files):
        return dict.fromkeys(range(len(files)), samples)
    bounds, draw = list(accumulate(weights)), random.Random(f"{seed}-places")
    count = max(1, math.ceil(samples / RUN))
    at = [bisect(bounds, (place + draw.random()) * bounds[-1] / count) for place in range(count)]
    return dict(sorted(Counter(min(row, len(files) - 1) for row in at).items()))


def _whole(source: Source, files: Sequence[SourceFile]) -> bool:
    return (
        not source.random_access
        and len(files) <= WHOLE_FILES
        and sum(file.size for file in files) <= WHOLE_BYTES
    )


def _previews(
    source: Source, files: Sequence[SourceFile], wanted: dict[int, int], samples: int, seed: int
) -> dict[int, Preview]:
    whole = _whole(source, files)

    def preview(item: tuple[int, int]) -> Preview:
        row, places = item
        draw = random.Random(f"{seed}-{files[row].path}")
        return source.preview(files[row], places, 1 if whole else RUN, draw, whole)

    with ThreadPoolExecutor(THREADS, thread_name_prefix="raypipe-look") as pool:
        return dict(zip(wanted, pool.map(preview, wanted.items()), strict=True))


def _total(
    files: Sequence[SourceFile],
    previews: dict[int, Preview],
    listed: Sequence[Counter[int | str | None] | None],
) -> tuple[int, bool]:
    """Samples of the source, and whether they were counted; files not looked into have as many for their size as the others."""
    known = {row: float(found.total()) for row, found in enumerate(listed) if found is not None}
    looked = {row: preview for row, preview in previews.items() if row not in known}
    known |= {row: preview.samples for row, preview in looked.items()}
    left = [row for row, file in enumerate(files) if row not in known and file.size]
    size = sum(files[row].size for row in looked)
    rest = (
        sum(files[row].size for row in left)
        * sum(preview.samples for preview in looked.values())
        / size
        if size
        else 0.0
    )
    return round(sum(known.values()) + rest), not left and all(
        preview.counted for preview in looked.values()
    )


def _unlisted_bytes(files: Sequence[SourceFile], drawn: Sequence[RawSample], total: int) -> int:
    """What the samples take, by those drawn, of a source of small files; the listing of some (lists of paths) has no sizes."""
    sizes = [len(sample.image) for sample in drawn if isinstance(sample.image, bytes)]
    estimated = (
        round(statistics.fmean(sizes) * total)
        if sizes and any(file.members for file in files)
        else 0
    )
    return estimated if estimated > 2 * sum(file.size for file in files) else 0


def _fragments(
    files: Sequence[SourceFile],
    previews: dict[int, Preview],
    listed: Sequence[Counter[int | str | None] | None],
    total: int,
    most: int,
) -> int:
    """Units of work, about."""
    known = [found.total() for found in listed if found is not None]
    known += [round(preview.samples) for row, preview in previews.items() if listed[row] is None]
    per_file = sum(math.ceil(samples / most) for samples in known) / max(1, len(known))
    return max(round(per_file * len(files)), math.ceil(total / most))


def _choice(previews: Sequence[Preview], samples: int, draw: random.Random) -> list[RawSample]:
    """About so many of the samples that were drawn, of each file in proportion to what it holds; in random order."""
    result = [sample for preview in previews for sample in preview.drawn]
    if len(result) > samples:
        result, total, reached, at = (
            [],
            sum(preview.samples for preview in previews),
            0.0,
            draw.random(),
        )
        for (
            preview
        ) in previews:  # a mark at every whole number, shifted at random, so that the counts add up
            before, reached = reached, reached + samples * preview.samples / total
            count = math.floor(reached + at) - math.floor(before + at)
            result += draw.sample(preview.drawn, min(count, len(preview.drawn)))
    draw.shuffle(result)
    return result


def _decoded(
    chosen: Sequence[RawSample], classes: ClassMap, settings: SourceSettings, size: int
) -> tuple[list[DrawnSamples], float]:
    """What a run would say of each sample, and the processor seconds of decoding one."""

    def attempt(sample: RawSample) -> tuple[str, float]:
        started = time.thread_time()
        reason = sample.reason or ("" if sample.image is not None else "no image")
        if not reason and sample.image is not None:
            try:
                decode(sample.image, size, settings.max_pixels)
            except BadImage as error:
                reason = str(error)
        return reason, time.thread_time() - started

    with ThreadPoolExecutor(
        min(4, os.cpu_count() or 1), thread_name_prefix="raypipe-decode"
    ) as pool:
        found = list(pool.map(attempt, chosen))
    drawn = []
    for sample, (reason, _) in zip(chosen, found, strict=True):
        index, wrong = classes.index(sample.label)
        drawn.append(
            DrawnSamples(sample, reason or wrong, classes.names[index] if index >= 0 else None)
        )
    times = [seconds for reason, seconds in found if not reason]
    return drawn, statistics.fmean(times) if times else 0.0


def _balance(
    classes: ClassMap, occurring: Counter[int | str | None], total: int, exact: bool
) -> Balance | None:
    counted = occurring.total()
    if not counted or not classes.names:
        return None
    sizes = dict.fromkeys(classes.names, 0)
    for label, count in occurring.items():
        index, _ = classes.index(label)
        if index >= 0:
            sizes[classes.names[index]] += count
    scale = 1.0 if exact else total / counted
    scaled = {
        name: round(count * scale)
        for name, count in sorted(sizes.items(), key=lambda item: -item[1])
    }
    enough = exact or counted >= ENOUGH_LABELS * len(sizes)
    fewer = sum(count < 10 for count in scaled.values()) if enough else None
    return Balance(exact, counted, scaled, occurring[None] / counted, fewer)


def _header(sample: RawSample) -> Header | None:
    image = sample.image
    if image is None:
        return None
    if not isinstance(image, bytes):
        return Header(
            image.shape[1],
            image.shape[0],
            "pixels",
            "RGB" if image.ndim == 3 and image.shape[2] == 3 else "greyscale",
            None,
        )
    try:
        with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
            mode = (
                "16-bit greyscale"
                if opened.mode.startswith("I")
                else _MODES.get(opened.mode, opened.mode)
            )
            return Header(*opened.size, opened.format or "unknown", mode, len(image))
    except Exception:  # Pillow raises nearly anything; decoding says what is wrong
        return None


def _pictures(samples: Sequence[RawSample]) -> Pictures | None:
    headers = [header for header in map(_header, samples) if header is not None]
    if not headers:
        return None
    stored = sorted(header.bytes for header in headers if header.bytes is not None)
    by_area = sorted(headers, key=lambda header: (header.width * header.height, header.width))
    return Pictures(
        read=len(headers),
        bytes_median=stored[len(stored) // 2] if stored else None,
        bytes_p95=stored[math.ceil(0.95 * len(stored)) - 1] if stored else None,
        smallest=by_area[0][:2],
        median=(
            round(statistics.median(header.width for header in headers)),
            round(statistics.median(header.height for header in headers)),
        ),
        largest=by_area[-1][:2],
        formats=_shares(header.format for header in headers),
        modes=_shares(header.mode for header in headers),
    )


def _shares(values: object) -> dict[str, float]:
    counts = Counter(values)  # type: ignore[call-overload]
    return {name: count / counts.total() for name, count in counts.most_common()}


def _rejects(drawn: Sequence[DrawnSamples], total: int) -> Rejects:
    bad = [item for item in drawn if item.reason]
    share = len(bad) / max(1, len(drawn))
    return Rejects(
        drawn=len(drawn),
        count=len(bad),
        share=share,
        upper_bound=share
        if len(drawn) >= total
        else upper_bound(len(bad), len(drawn))
        if drawn
        else 1.0,
        reasons=dict(Counter(re.sub(r"\d+", "N", item.reason) for item in bad).most_common(10)),
        first=tuple((item.sample.sample_id, item.reason) for item in bad[:5]),
    )


def _duplicates(samples: Sequence[RawSample]) -> int:
    images = [sample.image for sample in samples if sample.image is not None]
    contents = {
        hashlib.blake2b(
            image if isinstance(image, bytes) else image.tobytes() + str(image.shape).encode()
        ).digest()
        for image in images
    }
    return len(images) - len(contents)
