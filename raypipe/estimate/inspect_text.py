"""Print an inspection in a terminal, in words and bars."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from raypipe.estimate.facts import ClassBalance, CostEstimate, ImageFacts, RejectFacts, Survey
from raypipe.sources.classes import lone_classes_note, names_note
from raypipe.sources.formats import LABEL_PLACES, describe_left_out
from raypipe.text import (
    counted,
    duration,
    duration_range,
    hours,
    percent,
    plural,
    rough_percent,
    size,
)

TOO_FEW_CLASSES = (
    "a run needs 2 classes: check where the labels are, or set source.label_column to null and "
    "pseudo_labels.clusters to a number"
)
BAR = 32
"""Characters of the longest bar."""
MAX_CLASSES = 20
"""Up to this many classes have a bar each; of more, classes of similar size share one."""
MAX_NAME = 24
"""Characters of a class name."""
SIZE_RANGES = 8
"""Bars for classes of similar size, if their sizes differ little."""


def describe_survey(survey: Survey, block: str = "█") -> Iterator[str]:
    """Yield lines about a source and, if it was estimated, what a run over it would cost.

    Bars are made of `block`.
    """
    about = "" if survey.counted else "about "
    empty = f"; {survey.empty_files:,} of them empty" if survey.empty_files else ""
    yield f"source      {survey.uri}"
    files = counted(survey.files, "file")
    yield f"format      {survey.format}: {files}, {size(survey.bytes)}{empty}"
    if survey.columns:
        read = ", ".join(f"{what} from {name}" for what, name in survey.columns.items())
        yield f"columns     {read}"
    limit = (
        f"; a run takes the first {survey.limit:,} (source.limit)"
        if survey.limit and survey.limit < survey.samples
        else ""
    )
    fragments = counted(survey.fragments, "fragment")
    yield f"samples     {about}{survey.samples:,}, in {about}{fragments}{limit}"
    if survey.left_out:
        yield f"left out    {describe_left_out(survey.format, survey.left_out)}"
    for path, error in survey.unreadable_files[:5]:
        yield f"unreadable  {path}: {error}"
    if len(survey.unreadable_files) > 5:
        more = len(survey.unreadable_files) - 5
        yield f"unreadable  and {more} more of the {survey.opened:,} files opened"
    yield from _classes(survey)
    if survey.balance is not None:
        yield from _balance(survey, survey.balance, block)
    if survey.pictures is not None:
        yield from _images(survey.pictures)
    if survey.depth_note:
        yield f"            {survey.depth_note}"
    yield from _rejects(survey.rejects, survey.samples)
    for number, line in enumerate(survey.code):
        yield f"{'' if number else 'code':<12}{line}"
    drawn = survey.rejects.drawn
    other = f", and {survey.conflicting} of them another label" if survey.conflicting else ""
    equal = f"{survey.duplicates} of {drawn:,} drawn have the same bytes as another{other}"
    yield f"duplicates  {equal}"
    opened = counted(survey.opened, "file")
    yield f"inspected   {drawn:,} samples of {opened}, in {survey.seconds:.1f} s"
    if survey.cost is not None:
        yield ""
        yield from describe_cost(survey.cost)


def describe_cost(cost: CostEstimate) -> Iterator[str]:
    """Yield lines about what a run would cost."""
    yield (
        f"cost        of a run with {cost.settings}: {cost.samples:,} samples, "
        f"{cost.seed_samples:,} of them measured"
    )
    for sentence in cost.warnings:
        yield f"WARNING     {sentence}"
    if cost.network:
        yield f"proxy       {cost.network}"
    if cost.features:
        yield f"features    {cost.features}"
    yield f"on          {cost.machine}"
    work = f"{_hours(cost.cpu_hours, 'CPU')}, {_hours(cost.gpu_hours, 'GPU')}"
    yield f"time        {duration_range(cost.low, cost.high)}; {work}"
    for stage in cost.stages:
        if stage.high < 5 and stage.cpu_seconds < 5:
            continue
        gpu = f", {duration(stage.gpu_seconds)} GPU" if stage.gpu_seconds else ""
        clock = duration_range(stage.low, stage.high)
        yield f"            {stage.stage:<12}{clock:<22}({duration(stage.cpu_seconds)} CPU{gpu})"
    read = ", ".join(f"{stage} {size(count)}" for stage, count in cost.bytes_read.items() if count)
    yield f"reads       {size(sum(cost.bytes_read.values()))} of the source: {read}"
    largest = sorted(cost.bytes_written.items(), key=lambda item: -item[1])[:4]
    written = ", ".join(f"{folder} {size(count)}" for folder, count in largest)
    yield f"writes      {size(sum(cost.bytes_written.values()))}: {written}"
    for number, sentence in enumerate(cost.basis):
        yield f"{'' if number else 'basis':<12}{sentence}"
    yield (
        "            a rough estimate: storage, other work and other hardware can double or "
        "halve it"
    )


def _classes(survey: Survey) -> Iterator[str]:
    names = survey.class_names
    if not survey.reads_labels:
        yield "classes     none: source.label_column is null, so labels are not read"
        return
    if not names:
        yield "classes     none: the samples have no labels"
        if place := LABEL_PLACES.get(survey.format):
            yield f"            labels are read from {place}"
        yield f"            {TOO_FEW_CLASSES}"
        return
    least = "" if survey.classes_known else "at least "
    shown = ", ".join(name[:MAX_NAME] for name in names[:8]) + (", ..." if len(names) > 8 else "")
    yield f"classes     {least}{len(names):,}: {shown}"
    if len(names) == 1 and survey.classes_known:
        yield f"            {TOO_FEW_CLASSES}"
    if note := names_note(names):
        yield f"            {note}"


def _balance(survey: Survey, balance: ClassBalance, block: str) -> Iterator[str]:
    about = "" if balance.exact else "about "
    basis = (
        f"all {balance.counted:,} labels"
        if balance.exact
        else f"estimated from {balance.counted:,} labels spread over the source"
    )
    margin = "" if balance.margin is None else f" ± {balance.margin:,}"
    if balance.fewer_than_10 is None:
        share = balance.largest / max(1, survey.samples)
        yield (
            f"balance     largest class {about}{balance.largest:,} ({share:.1%}), {basis}: "
            f"too few to judge the balance of {len(balance.per_class):,} classes"
        )
    else:
        yield (
            f"balance     smallest {about}{balance.smallest:,}, median {balance.median:,.0f}, "
            f"largest {balance.largest:,}{margin}; {basis}"
        )
    notes = _balance_notes(balance)
    if notes:
        yield f"            {', '.join(notes)}"
    if lone := lone_classes_note(balance.counted, sum(map(bool, balance.per_class.values()))):
        yield f"            {lone}"
    if balance.even:
        yield "            no more uneven than chance and the order of the samples explain"
    elif not balance.exact and balance.margin is None:
        yield "            all from one file: if it is sorted by class, the balance is another one"
    if balance.fewer_than_10 is not None:
        yield from _bars(balance, block)


def _balance_notes(balance: ClassBalance) -> list[str]:
    notes = []
    if balance.fewer_than_10 is not None:
        empty = sum(not count for count in balance.per_class.values())
        if empty:
            seen = "" if balance.exact else " seen"
            notes.append(f"{counted(empty, 'class', 'classes')} without a sample{seen}")
        if balance.fewer_than_10 > empty:
            few = balance.fewer_than_10 - empty
            notes.append(f"{counted(few, 'class', 'classes')} with fewer than 10")
    if balance.unlabelled:
        notes.append(f"{balance.unlabelled:.1%} without a label")
    return notes


class _Bar(NamedTuple):
    name: str
    length: int
    unit: str


def _bars(balance: ClassBalance, block: str) -> Iterator[str]:
    """Yield a bar for each class or, if there are many, for classes of similar size."""
    sizes = list(balance.per_class.values())
    if len(sizes) <= MAX_CLASSES:
        width = max(len(name[:MAX_NAME]) for name in balance.per_class)
        bars = [
            _Bar(name[:MAX_NAME].ljust(width), count, "")
            for name, count in balance.per_class.items()
        ]
    else:
        names = [(_range(low, high), count) for low, high, count in size_classes(sizes)]
        width = max(len(name) for name, _ in names)
        bars = [
            _Bar(name.rjust(width), count, f" {plural(count, 'class', 'classes')}")
            for name, count in names
        ]
        yield "            samples in a class"
    largest = max(bar.length for bar in bars)
    for name, count, unit in bars:
        bar = block * (math.ceil(BAR * count / largest) if largest else 0)
        yield f"            {name}  {bar}{' ' if bar else ''}{count:,}{unit}"


def _range(low: int, high: int) -> str:
    return f"{low:,} to {high:,}" if high > low else f"{low:,}" if low else "none"


def size_classes(sizes: list[int]) -> list[tuple[int, int, int]]:
    """Return ranges of class sizes as (from, to, number of classes), largest sizes first.

    The edges are 1, 2 or 5 times a power of ten if sizes differ much, otherwise evenly spaced.
    """
    low, high = min(sizes), max(sizes)
    if high > 8 * max(1, low):
        edges = [
            0,
            *(step * 10**power for power in range(len(str(high)) + 1) for step in (1, 2, 5)),
        ]
        edges = edges[max(i for i, edge in enumerate(edges) if edge <= low) :]
    else:
        step = max(1, math.ceil((high - low + 1) / SIZE_RANGES))
        edges = list(range(low, high + step + 1, step))
    ranges = [
        (start, stop - 1, sum(start <= count < stop for count in sizes))
        for start, stop in pairwise(edges)
    ]
    while ranges and not ranges[-1][2]:
        ranges.pop()
    return ranges[::-1]


def _images(images: ImageFacts) -> Iterator[str]:
    formats = ", ".join(f"{name} {rough_percent(share)}" for name, share in images.formats.items())
    modes = ", ".join(f"{name} {rough_percent(share)}" for name, share in images.modes.items())
    yield f"images      {formats}; {modes}"
    if images.bytes_median is not None and images.bytes_p95 is not None:
        median, p95 = size(images.bytes_median), size(images.bytes_p95)
        yield f"            {median} each (median), 95 % of them up to {p95}"
    smallest, median, largest = (
        "x".join(map(str, pair)) for pair in (images.smallest, images.median, images.largest)
    )
    if smallest == largest:
        yield f"            all {smallest} pixels"
    else:
        yield f"            {smallest} to {largest} pixels, median {median}"


def _rejects(rejects: RejectFacts, samples: int) -> Iterator[str]:
    if not rejects.drawn:
        return
    everything = rejects.drawn >= samples
    drawn = f"{rejects.drawn:,}{'' if everything else ' drawn'}"
    bound = (
        ""
        if everything
        else f"; fewer than {percent(rejects.upper_bound)} of the source, with 95 % confidence"
    )
    if not rejects.count:
        yield f"rejects     0 of {drawn}{bound}"
        return
    yield f"rejects     {rejects.count:,} of {drawn} ({percent(rejects.share)}){bound}"
    for sample_id, reason in rejects.first:
        yield f"            {sample_id}: {reason}"


def _hours(value: float, what: str) -> str:
    return f"{hours(value)} {what} hours" if value else f"no {what}"
