"""Print a plan in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from raypipe.estimate.plan import RunPlan
from raypipe.text import counted, duration, hours, large_count, size, table

COLUMNS = ("stage", "GPU hours", "CPU hours", "clock", "requests", "reads", "files")


def describe_plan(plan: RunPlan) -> Iterator[str]:
    """Yield lines about what a run would cost, and what breaks first."""
    yield (
        f"images      {plan.samples:,}, {size(plan.source_bytes)} in "
        f"{counted(plan.files, 'file')} ({plan.format}), {counted(plan.fragments, 'fragment')}"
    )
    extremes = f", {plan.extremes:,} extreme predictions" if plan.extremes else ""
    yield f"measured    {plan.measured:,} seed samples, {plan.audit:,} audit samples{extremes}"
    yield f"on          {plan.gpus:g} GPUs, {plan.cpus:g} CPUs"
    yield ""
    yield from _stages(plan)
    yield ""
    yield from _output(plan)
    yield ""
    yield from _bounds(plan)
    yield ""
    yield f"rates       {plan.rates.machine}"
    for name, source in plan.rates.sources.items():
        yield f"            {name} {_rate(getattr(plan.rates, name))}: {source}"
    for note in plan.notes:
        yield f"note        {note}"


def _stages(plan: RunPlan) -> Iterator[str]:
    rows = [
        (
            stage.stage,
            _hours(stage.gpu_hours),
            _hours(stage.cpu_hours),
            duration(3600 * stage.hours),
            large_count(stage.requests),
            size(stage.bytes_read) if stage.bytes_read else "-",
            large_count(stage.files),
        )
        for stage in plan.stages
    ]
    total = (
        "all",
        _hours(plan.total("gpu_hours")),
        _hours(plan.total("cpu_hours")),
        duration(3600 * plan.total("hours")),
        large_count(plan.total("requests")),
        size(plan.total("bytes_read")),
        large_count(plan.written_files),
    )
    yield from table([COLUMNS, *rows, total])


def _output(plan: RunPlan) -> Iterator[str]:
    written = sorted(plan.written.items(), key=lambda item: -item[1])
    folders = ", ".join(f"{folder} {size(count)}" for folder, count in written if count)
    yield f"writes      {size(sum(plan.written.values()))}: {folders}"
    yield f"ledger      {size(plan.ledger_bytes)}; driver about {plan.driver_bytes / 1e6:,.0f} MB"
    if plan.dollars:
        parts = ", ".join(f"{name} {_dollars(amount)}" for name, amount in plan.dollars.items())
        month = " a month" if "storage" in plan.dollars else ""
        yield f"dollars     {_dollars(sum(plan.dollars.values()))}: {parts}{month}"
    else:
        yield (
            "dollars     give list prices: --gpu-price, --cpu-price (an hour), "
            "--request-price (a million), --storage-price (a GB and month)"
        )


def _bounds(plan: RunPlan) -> Iterator[str]:
    rows = [
        (
            bound.what,
            f"{_significant(bound.figure)} {bound.unit}",
            f"{bound.limit:g} {bound.unit}",
            bound.remedy if bound.share > 1 else "",
        )
        for bound in plan.bounds
    ]
    yield from table([("bound", "here", "limit", "remedy"), *rows], left=(0, 3))
    tightest = plan.bounds[0]
    if tightest.share > 1:
        yield f"breaks      {tightest.what} ({_significant(tightest.share)} times the limit)"
    else:
        yield "breaks      nothing"


def _hours(value: float) -> str:
    return hours(value) if value else "-"


def _significant(number: float) -> str:
    """Return two significant digits, or a whole number from ten on."""
    return f"{number:,.2g}" if number < 10 else f"{number:,.0f}"


def _dollars(amount: float) -> str:
    return f"{amount:,.2f}" if amount < 100 else f"{amount:,.0f}"


def _rate(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{rate:g}/s at {side} px" for side, rate in value.items())
    return f"{value:g}"
