"""Inspect a source: draw samples from places spread over it, and read its listing and labels."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import random
import re
import statistics
import time
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from raypipe.config import SourceSettings
from raypipe.config.choices import AUTO
from raypipe.errors import SourceError
from raypipe.estimate.facts import ClassBalance, ImageFacts, RejectFacts, Survey, upper_bound
from raypipe.runs.rejects import UnreadableFiles
from raypipe.sources import (
    ClassMap,
    RawSample,
    Source,
    SourceFile,
    StatedNames,
    class_map,
    open_source,
)
from raypipe.sources.classes import LabelSpellings, refuse_missing_labels
from raypipe.sources.splits import SplitOfFiles
from raypipe.sources.types import Preview
from raypipe.sources.used_settings import refuse_unused_settings
from raypipe.vision.bit_depth import BitsInUse, bits_in_use
from raypipe.vision.decode import BadImage, decode, open_image
from raypipe.vision.own_code import Transform, transform_to_show

SAMPLES = 256
"""Samples that are drawn by default."""
NEIGHBOURS = 4
"""Samples taken at one place: a place costs one or two requests, a neighbour hardly any."""
WHOLE_BYTES = 32 << 20
"""A source of at most this size and WHOLE_FILES files is read completely."""
WHOLE_FILES = 256
MIN_LABELS_PER_CLASS = 20
"""Labels per class from which the sizes of small classes are estimated."""
THREADS = 16
DECODE_THREADS = 4
_MODES = {
    "1": "black and white",
    "L": "greyscale",
    "P": "palette",
    "LA": "greyscale with transparency",
    "RGBA": "RGB with transparency",
}

LabelCounts = Counter[int | str | None]
"""Label (None without one) -> number of samples."""


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
class Inspection:
    """What a source contains, and the samples that were drawn, in random order."""

    survey: Survey
    drawn: tuple[DrawnSample, ...]


def inspect_source(
    settings: SourceSettings, *, samples: int = SAMPLES, seed: int = 0, image_size: int = 64
) -> Inspection:
    """Inspect a source.

    Parameters
    ----------
    settings
        The source.
    samples
        How many samples to draw, about.
    seed
        The same source and seed give the same samples.
    image_size
        Pixels to which images are decoded, to find undecodable ones and to time decoding.

    Raises
    ------
    ConfigError
        If a setting has no effect on the format.
    SourceError
        If nothing can be listed, the format is unknown, or the labels contradict one another.
    """
    started = time.monotonic()
    listing = _Listing.read(settings, samples, seed)
    source, files, previews = listing.source, listing.files, listing.previews
    total, counted = listing.total()
    labels = listing.labels()
    exact = counted and labels.total() >= total
    names = listing.class_names()
    if exact and source.fields_in_samples and total:
        refuse_missing_labels(settings, labels.keys() - {None})
    classes = class_map(
        names, frozenset(label for label in labels if label is not None), settings.num_classes
    )
    draw = random.Random(f"{seed}-choice")
    chosen = _choose([preview for _, preview in sorted(previews.items())], samples, draw)
    duplicates, conflicting = _duplicates(chosen)
    decoded = _decode(chosen, classes, settings, image_size)
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
        fragments=listing.fragments(total, settings.fragment_samples),
        limit=settings.limit,
        scan_reads=source.scan_reads,
        reads_singly=source.random_access,
        class_names=classes.names,
        classes_known=exact or names is not None or settings.num_classes is not None,
        unreadable_files=listing.unreadable(),
        unreadable_problem=listing.unreadable_problem(settings.max_reject_fraction),
        balance=_balance(classes, listing.labels_by_file(), total, exact),
        pictures=_image_facts([sample for sample in chosen if sample.image is not None]),
        rejects=_reject_facts(decoded.samples, total),
        duplicates=duplicates,
        conflicting=conflicting,
        decode_seconds=decoded.seconds,
        seconds=round(time.monotonic() - started, 3),
        left_out=source.left_out,
        bit_depth=settings.bit_depth,
        reads_labels=settings.label_column is not None,
        depth_note=_bits_in_use(chosen, settings).note(settings.bit_depth),
        columns=_columns(source.resolved_settings(image_size)),
    )
    return Inspection(survey, tuple(decoded.samples))


def _columns(settings: SourceSettings) -> dict[str, str]:
    columns = {"images": settings.image_column, "labels": settings.label_column}
    return {what: name for what, name in columns.items() if name not in (AUTO, None)}


# -- files ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Listing:
    """The files of a source, and previews of some of them.

    Attributes
    ----------
    source, files
        The source and all of its files.
    previews
        Row in `files` -> preview.
    listed
        Labels of each file as its name or the listing states them; None if they do not.
    """

    source: Source
    files: Sequence[SourceFile]
    previews: dict[int, Preview]
    listed: Sequence[LabelCounts | None]

    @classmethod
    def read(cls, settings: SourceSettings, samples: int, seed: int) -> _Listing:
        source = open_source(settings)
        refuse_unused_settings(settings, source.format)
        files = list(source.files())
        places = _places(source, files, samples, seed)
        previews = _previews(source, files, places, seed)
        return cls(source, files, previews, [source.listed_labels(file) for file in files])

    def labels(self) -> LabelCounts:
        """Return all labels that are known."""
        return sum(self.labels_by_file(), Counter())

    def labels_by_file(self) -> list[LabelCounts]:
        """Return the labels that are known of each file, if any are."""
        counts = [
            listed if listed is not None else self.previews[row].labels
            for row, listed in enumerate(self.listed)
            if listed is not None or row in self.previews
        ]
        return [labels for labels in counts if labels.total()]

    def class_names(self) -> tuple[str, ...] | None:
        """Return the class names that the opened files state.

        Raises
        ------
        SourceError
            If these or the splits of the files contradict one another, as a run would.
        """
        stated, split = StatedNames(self.source.labels_by_name), SplitOfFiles()
        spellings = LabelSpellings()
        for row, preview in sorted(self.previews.items()):
            path = self.files[row].path
            stated.add(path, preview.class_names, preview.labels)
            split.add(path, preview.split)
            labels = {label for label in preview.labels if label is not None}
            spellings.add(path, labels, preview.padded)
        if spellings.mixed and stated.names is None:
            raise SourceError(spellings.mixed)
        return stated.names

    def total(self) -> tuple[int, bool]:
        """Return the number of samples, and whether it was counted rather than estimated.

        Files that were not opened are assumed to have as many samples per byte as the others.
        """
        samples = {
            row: float(labels.total())
            for row, labels in enumerate(self.listed)
            if labels is not None
        }
        opened = {row: preview for row, preview in self.previews.items() if row not in samples}
        samples |= {row: preview.samples for row, preview in opened.items()}
        unseen = [row for row, file in enumerate(self.files) if row not in samples and file.size]
        opened_bytes = sum(self.files[row].size for row in opened)
        rest = (
            sum(self.files[row].size for row in unseen)
            * sum(preview.samples for preview in opened.values())
            / opened_bytes
            if opened_bytes
            else 0.0
        )
        counted = not unseen and all(preview.counted for preview in opened.values())
        return round(sum(samples.values()) + rest), counted

    def fragments(self, total: int, fragment_samples: int) -> int:
        """Return the estimated number of fragments."""
        known = [labels.total() for labels in self.listed if labels is not None]
        known += [
            round(preview.samples)
            for row, preview in self.previews.items()
            if self.listed[row] is None
        ]
        per_file = sum(math.ceil(samples / fragment_samples) for samples in known)
        estimate = round(per_file / max(1, len(known)) * len(self.files))
        return max(estimate, math.ceil(total / fragment_samples))

    def unreadable(self) -> tuple[tuple[str, str], ...]:
        """Return path and error of every opened file that cannot be read."""
        return tuple(
            (self.files[row].path, preview.error)
            for row, preview in sorted(self.previews.items())
            if preview.error
        )

    def unreadable_problem(self, fraction: float) -> str:
        """Return why a run stops because of the opened files that cannot be read; "" if not."""
        tally = UnreadableFiles()
        for row, preview in sorted(self.previews.items()):
            file = self.files[row]
            tally.add(
                file.size,
                [{"path": file.path, "error": preview.error, "start": 0, "stop": preview.samples}],
            )
        return tally.problem(fraction)


def _places(source: Source, files: Sequence[SourceFile], samples: int, seed: int) -> dict[int, int]:
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


def _is_small(source: Source, files: Sequence[SourceFile]) -> bool:
    """Tell whether the source is read completely."""
    return (
        not source.random_access
        and len(files) <= WHOLE_FILES
        and sum(file.size for file in files) <= WHOLE_BYTES
    )


def _previews(
    source: Source, files: Sequence[SourceFile], places: dict[int, int], seed: int
) -> dict[int, Preview]:
    """Return a preview of each file that has places."""
    whole = _is_small(source, files)

    def preview(row: int) -> Preview:
        draw = random.Random(f"{seed}-{files[row].path}")
        return source.preview(files[row], places[row], 1 if whole else NEIGHBOURS, draw, whole)

    with ThreadPoolExecutor(THREADS, thread_name_prefix="raypipe-look") as pool:
        return dict(zip(places, pool.map(preview, places), strict=True))


def _unlisted_bytes(files: Sequence[SourceFile], drawn: Sequence[RawSample], total: int) -> int:
    """Estimate the bytes of a source of small files whose listing has no sizes (lists of paths).

    Return 0 if the listing has them.
    """
    sizes = [len(sample.image) for sample in drawn if isinstance(sample.image, bytes)]
    if not sizes or not any(file.members for file in files):
        return 0
    estimate = round(statistics.fmean(sizes) * total)
    return estimate if estimate > 2 * sum(file.size for file in files) else 0


# -- samples -------------------------------------------------------------------------------------


def _choose(previews: Sequence[Preview], samples: int, draw: random.Random) -> list[RawSample]:
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


@dataclass(frozen=True)
class _Decoded:
    """Samples as a run would judge them, and the processor seconds to decode one."""

    samples: list[DrawnSample]
    seconds: float


def _decode(
    chosen: Sequence[RawSample], classes: ClassMap, settings: SourceSettings, size: int
) -> _Decoded:
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
    return _Decoded(samples, statistics.fmean(seconds) if seconds else 0.0)


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


def _bits_in_use(chosen: Sequence[RawSample], settings: SourceSettings) -> BitsInUse:
    return sum((bits_in_use(sample.image, settings.max_pixels) for sample in chosen), BitsInUse())


def _balance(
    classes: ClassMap, by_file: Sequence[LabelCounts], total: int, exact: bool
) -> ClassBalance | None:
    labels: LabelCounts = sum(by_file, Counter())
    counted = labels.total()
    if not counted or not classes.names:
        return None
    sizes = dict.fromkeys(classes.names, 0)
    for label, count in labels.items():
        index, _ = classes.index(label)
        if index >= 0:
            sizes[classes.names[index]] += count
    scale = 1.0 if exact else total / counted
    scaled = {
        name: round(count * scale)
        for name, count in sorted(sizes.items(), key=lambda item: -item[1])
    }
    enough = exact or counted >= MIN_LABELS_PER_CLASS * len(sizes)
    small = sum(count < 10 for count in scaled.values()) if enough else None
    balance = ClassBalance(exact, counted, scaled, labels[None] / counted, small)
    if exact or len(by_file) < 2:
        return balance
    margins = _margins(classes, by_file, len(scaled))
    largest = next(iter(scaled))
    mean = statistics.fmean(scaled.values()) / total
    even = all(abs(count / total - mean) <= margins[name] for name, count in scaled.items())
    return replace(balance, margin=round(margins[largest] * total), even=even)


def _margins(classes: ClassMap, by_file: Sequence[LabelCounts], count: int) -> dict[str, float]:
    """Return half the width of the interval of each class's share, 95 % for all together.

    Samples of one file resemble one another, for example where files are sorted by class. The
    variance is therefore that between files (ratio estimator for clusters; Cochran, *Sampling
    Techniques*, 1977, equation 6.13), and at least that of independent draws.
    """
    files, sizes = len(by_file), [labels.total() for labels in by_file]
    total = sum(sizes)
    width = statistics.NormalDist().inv_cdf(1 - 0.025 / count)
    margins = {}
    for index, name in enumerate(classes.names):
        in_file = [
            sum(number for label, number in labels.items() if classes.index(label)[0] == index)
            for labels in by_file
        ]
        share = sum(in_file) / total
        spread = sum((inside - share * size) ** 2 for inside, size in zip(in_file, sizes))
        clustered = files / (files - 1) * spread / total**2
        margins[name] = width * math.sqrt(max(clustered, share * (1 - share) / total))
    return margins


class _ImageHeader(NamedTuple):
    """What an image states before it is decoded; no bytes if pixels are stored without encoding."""

    width: int
    height: int
    format: str
    mode: str
    bytes: int | None


def _header(sample: RawSample) -> _ImageHeader | None:
    image = sample.image
    if image is None:
        return None
    if not isinstance(image, bytes):
        mode = "RGB" if image.ndim == 3 and image.shape[2] == 3 else "greyscale"
        return _ImageHeader(image.shape[1], image.shape[0], "pixels", mode, None)
    try:
        with open_image(image) as opened:
            mode = (
                "16-bit greyscale"
                if opened.mode.startswith("I")
                else _MODES.get(opened.mode, opened.mode)
            )
            return _ImageHeader(*opened.size, opened.format or "unknown", mode, len(image))
    except Exception:  # Pillow raises nearly anything; decoding reports what is wrong
        return None


def _image_facts(samples: Sequence[RawSample]) -> ImageFacts | None:
    headers = [header for header in map(_header, samples) if header is not None]
    if not headers:
        return None
    stored = sorted(header.bytes for header in headers if header.bytes is not None)
    by_area = sorted(headers, key=lambda header: (header.width * header.height, header.width))
    return ImageFacts(
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


def _shares(values: Iterable[str]) -> dict[str, float]:
    counts = Counter(values)
    return {name: count / counts.total() for name, count in counts.most_common()}


def _reject_facts(drawn: Sequence[DrawnSample], total: int) -> RejectFacts:
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


def _duplicates(samples: Sequence[RawSample]) -> tuple[int, int]:
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
