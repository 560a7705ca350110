"""A plan in the words and columns a person reads in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from raypipe.estimate.plan import Plan
from raypipe.text import duration, size

COLUMNS = ("stage", "GPU hours", "CPU hours", "clock", "requests", "reads", "files")


def describe_plan(plan: Plan) -> Iterator[str]:
    """Lines about what a run would cost, and what breaks first."""
    yield f"images      {plan.samples:,}, {size(plan.source_bytes)} in {plan.files:,} files ({plan.format}), {plan.fragments:,} fragments"
    yield f"measured    {plan.measured:,}, and {plan.audit:,} to judge by"
    yield f"on          {plan.gpus:g} GPUs, {plan.cpus:g} CPUs"
    yield ""
    rows = [
        (
            stage.stage,
            _hours(stage.gpu_hours),
            _hours(stage.cpu_hours),
            duration(3600 * stage.hours),
            _many(stage.requests),
            size(stage.bytes_read) if stage.bytes_read else "-",
            _many(stage.files),
        )
        for stage in plan.stages
    ]
    total = (
        "all",
        _hours(plan.total("gpu_hours")),
        _hours(plan.total("cpu_hours")),
        duration(3600 * plan.total("hours")),
        _many(plan.total("requests")),
        size(plan.total("bytes_read")),
        _many(plan.written_files),
    )
    yield from _table([COLUMNS, *rows, total])
    yield ""
    written = sorted(
        ((folder, count) for folder, count in plan.written.items() if count),
        key=lambda item: -item[1],
    )
    yield f"writes      {size(sum(plan.written.values()))}: " + ", ".join(
        f"{folder} {size(count)}" for folder, count in written
    )
    yield f"ledger      {size(plan.ledger_bytes)}; driver about {plan.driver_bytes / 1e6:,.0f} MB"
    if plan.dollars:
        parts = ", ".join(f"{name} {_dollars(amount)}" for name, amount in plan.dollars.items())
        yield f"dollars     {_dollars(sum(plan.dollars.values()))}: {parts}{' a month' if 'storage' in plan.dollars else ''}"
    else:
        yield "dollars     give list prices: --gpu-price, --cpu-price (an hour), --request-price (a million), --storage-price (a GB and month)"
    yield ""
    yield from _table(
        [
            ("bound", "here", "most", "then"),
            *(
                (
                    bound.what,
                    f"{_short(bound.figure)} {bound.unit}",
                    f"{bound.limit:g} {bound.unit}",
                    bound.remedy if bound.share > 1 else "",
                )
                for bound in plan.bounds
            ),
        ],
        left=(0, 3),
    )
    first = plan.bounds[0]
    yield (
        f"breaks      {first.what}, at {_short(first.share)} times what it may be"
        if first.share > 1
        else "breaks      nothing"
    )
    yield ""
    yield f"rates       {plan.rates.machine}"
    for name, source in plan.rates.sources.items():
        yield f"            {name} {_rate(getattr(plan.rates, name))}: {source}"
    for note in plan.notes:
        yield f"note        {note}"


def _table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        )
        yield "  ".join(cells).rstrip()


def _hours(hours: float) -> str:
    return "-" if not hours else f"{hours:,.2f}" if hours < 10 else f"{hours:,.0f}"


def _many(count: float) -> str:
    """Whole numbers up to a million, then in millions."""
    return f"{count:,.0f}" if count < 1e6 else f"{count / 1e6:,.1f} M"


def _short(number: float) -> str:
    return f"{number:,.2g}" if number < 10 else f"{number:,.0f}"


def _dollars(amount: float) -> str:
    return f"{amount:,.2f}" if amount < 100 else f"{amount:,.0f}"


def _rate(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{rate:g}/s at {side} px" for side, rate in value.items())
    return f"{value:g}"
