"""Inspect a source: its listing, its labels, and samples from places spread over it."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from raypipe.config import SourceSettings
from raypipe.config.choices import AUTO
from raypipe.estimate.class_balance import class_balance
from raypipe.estimate.drawn_samples import (
    DrawnSample,
    count_duplicates,
    decode_samples,
    reject_facts,
)
from raypipe.estimate.facts import Survey
from raypipe.estimate.image_facts import image_facts
from raypipe.estimate.listing import Listing
from raypipe.estimate.sampling import choose_samples
from raypipe.sources import RawSample, SourceFile, class_map
from raypipe.sources.classes import refuse_missing_labels
from raypipe.vision.bit_depth import BitsInUse, bits_in_use

SAMPLES = 256
"""Samples that are drawn by default."""


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
    listing = Listing.read(settings, samples, seed)
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
    chosen = choose_samples([preview for _, preview in sorted(previews.items())], samples, draw)
    duplicates, conflicting = count_duplicates(chosen)
    decoded = decode_samples(chosen, classes, settings, image_size)
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
        balance=class_balance(classes, listing.labels_by_file(), total, exact),
        pictures=image_facts([sample for sample in chosen if sample.image is not None]),
        rejects=reject_facts(decoded.samples, total),
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


def _unlisted_bytes(files: Sequence[SourceFile], drawn: Sequence[RawSample], total: int) -> int:
    """Estimate the bytes of a source of small files whose listing has no sizes (lists of paths).

    Return 0 if the listing has them.
    """
    sizes = [len(sample.image) for sample in drawn if isinstance(sample.image, bytes)]
    if not sizes or not any(file.members for file in files):
        return 0
    estimate = round(statistics.fmean(sizes) * total)
    return estimate if estimate > 2 * sum(file.size for file in files) else 0


def _bits_in_use(chosen: Sequence[RawSample], settings: SourceSettings) -> BitsInUse:
    return sum((bits_in_use(sample.image, settings.max_pixels) for sample in chosen), BitsInUse())


def _columns(settings: SourceSettings) -> dict[str, str]:
    columns = {"images": settings.image_column, "labels": settings.label_column}
    return {what: name for what, name in columns.items() if name not in (AUTO, None)}
