"""A survey in the words and bars a person reads in a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from raypipe.estimate.facts import Balance, Cost, Pictures, Rejects, Survey
from raypipe.text import duration, size

BAR = 32
"""Characters of the longest bar."""
SHOWN_CLASSES = 20
"""Up to so many classes have a bar each; of more, classes of about the same size share one."""
NAME = 24
"""Characters of a class name."""
ROWS = 8
LEAST_SEED = 20
"""Seed samples without which the stage `seed` ends a run."""


def describe_survey(survey: Survey, block: str = "█") -> Iterator[str]:
    """Lines about a source and, where it was estimated, what a run over it would cost. `block` is what bars are made of."""
    about = "" if survey.counted else "about "
    empty = f"; {survey.empty_files:,} of them without content" if survey.empty_files else ""
    yield f"source      {survey.uri}"
    yield f"format      {survey.format}: {_count(survey.files, 'file')}, {size(survey.bytes)}{empty}"
    limit = (
        f"; a run takes the first {survey.limit:,} (source.limit)"
        if survey.limit and survey.limit < survey.samples
        else ""
    )
    yield f"samples     {about}{survey.samples:,}, in {about}{_count(survey.fragments, 'fragment')}{limit}"
    for path, error in survey.unreadable_files[:5]:
        yield f"unreadable  {path}: {error}"
    if len(survey.unreadable_files) > 5:
        yield f"unreadable  and {len(survey.unreadable_files) - 5} more of the {survey.opened:,} files looked into"
    yield from _classes(survey)
    if survey.balance is not None:
        yield from _balance(survey, survey.balance, block)
    if survey.pictures is not None:
        yield from _pictures(survey.pictures)
    yield from _rejects(survey.rejects, survey.samples)
    same = (
        f"{survey.duplicates} of {survey.rejects.drawn:,} drawn have the same bytes as another"
        if survey.duplicates
        else "none"
    )
    yield f"duplicates  {same}" + (
        "" if survey.duplicates else f" with the same bytes among {survey.rejects.drawn:,} drawn"
    )
    yield f"looked at   {survey.rejects.drawn:,} samples of {_count(survey.opened, 'file')}, in {survey.seconds:.1f} s"
    if survey.cost is not None:
        yield ""
        yield from describe_cost(survey.cost)


def describe_cost(cost: Cost) -> Iterator[str]:
    """Lines about what a run would cost."""
    yield f"cost        of a run with {cost.settings}: {cost.samples:,} samples, {cost.seed_samples:,} of them measured"
    if cost.seed_samples < LEAST_SEED:
        enough = math.ceil(100 * LEAST_SEED / max(1, cost.samples))
        advice = (
            f"raise seed.fraction to {enough / 100:g} or more"
            if enough <= 100
            else "there are too few samples"
        )
        yield f"            a run stops where the seed set has fewer than {LEAST_SEED} samples: {advice}"
    yield f"on          {cost.machine}"
    yield f"time        {between(cost.low, cost.high)}; {_hours(cost.cpu_hours, 'CPU')}, {_hours(cost.gpu_hours, 'GPU')}"
    for stage in cost.stages:
        if stage.high < 5 and stage.cpu_seconds < 5:
            continue
        gpu = f", {duration(stage.gpu_seconds)} GPU" if stage.gpu_seconds else ""
        yield f"            {stage.stage:<12}{between(stage.low, stage.high):<22}({duration(stage.cpu_seconds)} CPU{gpu})"
    read = ", ".join(f"{stage} {size(count)}" for stage, count in cost.bytes_read.items() if count)
    yield f"reads       {size(sum(cost.bytes_read.values()))} of the source: {read}"
    largest = sorted(cost.bytes_written.items(), key=lambda item: -item[1])
    yield f"writes      {size(sum(cost.bytes_written.values()))}: " + ", ".join(
        f"{folder} {size(count)}" for folder, count in largest[:4]
    )
    yield f"basis       {cost.basis[0]}"
    for sentence in cost.basis[1:]:
        yield f"            {sentence}"
    yield "            good for telling minutes from hours; storage, other work and other hardware can double or halve it"


def _classes(survey: Survey) -> Iterator[str]:
    names = survey.class_names
    if not names:
        yield "classes     none found: the samples have no labels"
        return
    least = "" if survey.classes_known else "at least "
    shown = ", ".join(name[:NAME] for name in names[:8]) + (", ..." if len(names) > 8 else "")
    yield f"classes     {least}{len(names):,}: {shown}"


def _balance(survey: Survey, balance: Balance, block: str) -> Iterator[str]:
    sizes, about = list(balance.per_class.values()), "" if balance.exact else "about "
    of = (
        f"all {balance.counted:,} labels"
        if balance.exact
        else f"estimated from {balance.counted:,} labels spread over the source"
    )
    none = sum(not count for count in sizes)
    if balance.fewer_than_10 is None:
        yield (
            f"balance     largest class {about}{balance.largest:,} ({balance.largest / max(1, survey.samples):.1%}), {of}: too few to judge "
            f"{len(sizes):,} classes by"
        )
        none = 0
    else:
        yield f"balance     smallest {about}{balance.smallest:,}, median {balance.median:,.0f}, largest {balance.largest:,}; {of}"
    notes = [f"{none:,} classes without a sample{'' if balance.exact else ' seen'}"] if none else []
    if balance.fewer_than_10:
        few = balance.fewer_than_10 - none
        notes += (
            [f"{few:,} {'classes' if few > 1 else 'class'} with fewer than 10"] if few > 0 else []
        )
    if balance.unlabelled:
        notes.append(f"{balance.unlabelled:.1%} without a label")
    if notes:
        yield f"            {', '.join(notes)}"
    if balance.fewer_than_10 is None:
        return
    if len(sizes) <= SHOWN_CLASSES:
        width = max(len(name[:NAME]) for name in balance.per_class)
        rows = [(name[:NAME].ljust(width), count, "") for name, count in balance.per_class.items()]
    else:
        rows = [(_range(low, high), count, "") for low, high, count in size_classes(sizes)]
        width = max(len(name) for name, _, _ in rows)
        rows = [
            (name.rjust(width), count, " class" if count == 1 else " classes")
            for name, count, _ in rows
        ]
        yield "            samples in a class"
    most = max(count for _, count, _ in rows)
    for name, count, unit in rows:
        bar = block * (math.ceil(BAR * count / most) if most else 0)
        yield f"            {name}  {bar}{' ' if bar else ''}{count:,}{unit}"


def _range(low: int, high: int) -> str:
    return f"{low:,} to {high:,}" if high > low else f"{low:,}" if low else "none"


def size_classes(sizes: list[int]) -> list[tuple[int, int, int]]:
    """Ranges of class sizes and the classes in each: (from, to, classes), from largest to smallest.

    The edges are 1, 2 or 5 times a power of ten where sizes differ much, else evenly spaced.
    """
    low, high = min(sizes), max(sizes)
    if high > 8 * max(1, low):
        edges = [
            0,
            *(step * 10**power for power in range(len(str(high)) + 1) for step in (1, 2, 5)),
        ]
        edges = edges[max(i for i, edge in enumerate(edges) if edge <= low) :]
    else:
        step = max(1, math.ceil((high - low + 1) / ROWS))
        edges = list(range(low, high + step + 1, step))
    found = [
        (start, stop - 1, sum(start <= count < stop for count in sizes))
        for start, stop in pairwise(edges)
    ]
    while found and not found[-1][2]:
        found.pop()
    return found[::-1]


def _pictures(pictures: Pictures) -> Iterator[str]:
    formats = ", ".join(f"{name} {_share(share)}" for name, share in pictures.formats.items())
    modes = ", ".join(f"{name} {_share(share)}" for name, share in pictures.modes.items())
    yield f"images      {formats}; {modes}"
    if pictures.bytes_median is not None and pictures.bytes_p95 is not None:
        yield f"            {size(pictures.bytes_median)} each (median), 95 % of them up to {size(pictures.bytes_p95)}"
    small, middle, large = (
        "x".join(map(str, pair)) for pair in (pictures.smallest, pictures.median, pictures.largest)
    )
    yield (
        f"            all of {small} pixels"
        if small == large
        else f"            {small} to {large} pixels, median {middle}"
    )


def _rejects(rejects: Rejects, samples: int) -> Iterator[str]:
    if not rejects.drawn:
        return
    everything = rejects.drawn >= samples
    bound = (
        ""
        if everything
        else f"; of the source fewer than {_percent(rejects.upper_bound)}, with 95 % confidence"
    )
    if not rejects.count:
        yield f"rejects     none of {'all ' if everything else ''}{rejects.drawn:,}{'' if everything else ' drawn'}{bound}"
        return
    yield f"rejects     {rejects.count:,} of {rejects.drawn:,}{'' if everything else ' drawn'} ({_percent(rejects.share)}){bound}"
    for sample_id, reason in rejects.first:
        yield f"            {sample_id}: {reason}"


def between(low: float, high: float) -> str:
    """Such as "4 to 12 min" for seconds."""
    first, second = duration(low), duration(high)
    if first == second:
        return f"about {first}"
    (number, unit), (_, other) = first.rsplit(" ", 1), second.rsplit(" ", 1)
    return f"{number} to {second}" if unit == other else f"{first} to {second}"


def _hours(hours: float, what: str) -> str:
    return (
        f"no {what}"
        if not hours
        else f"{hours:,.2f} {what} hours"
        if hours < 10
        else f"{hours:,.0f} {what} hours"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _share(share: float) -> str:
    return (
        f"{share:.0%}"
        if 0.005 <= share < 0.995 or share == 1
        else "over 99%"
        if share > 0.5
        else "under 1%"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
