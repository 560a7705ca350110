"""Show progress: a live line per stage in a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

log = logging.getLogger("raypipe")

PLAIN_SECONDS = 10.0
"""Seconds between two lines of a stage if the output is not a terminal."""


ProgressCallback = Callable[[int, int], None]
"""Called with (finished steps, total steps) during a fit."""


class Meter:
    """Counts the finished samples (or other units), fragments and rejects of one stage.

    Attributes
    ----------
    name, unit : str
        Name of the stage, and of what it counts.
    count, total : int
        Finished units, and all units.
    fragments : int
        Fragments that this attempt has finished.
    queued : int
        Fragments of this attempt that are not finished, if known.
    rejects : int
        Rejected samples.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        stream: TextIO,
        on_add: Callable[[Meter, int, int, str], None] | None = None,
    ) -> None:
        self.name, self.total, self.unit, self.count = name, total, unit, 0
        self.fragments = self.queued = self.rejects = 0
        self._stream, self._on_add = stream, on_add
        self._started = self._printed = time.monotonic()
        self._first = 0
        self._bar: tqdm | None = None
        if stream.isatty():
            self._bar = tqdm(
                total=total,
                desc=f"{name:<11}",
                unit=f" {unit}",
                file=stream,
                dynamic_ncols=True,
                leave=False,
                bar_format="{desc} {n:,}/{total:,} {bar:20} {rate_fmt}, {remaining} left",
            )

    def already(self, count: int) -> None:
        """Count what an earlier attempt finished. It does not enter the rate."""
        self.count += count
        self._first += count
        if self._bar is not None:
            self._bar.initial = self.count
            self._bar.n = self.count
            self._bar.refresh()

    def expect(self, total: int) -> None:
        """Set the total, if it becomes known during the stage."""
        self.total = total
        if self._bar is not None:
            self._bar.total = total

    def queue(self, fragments: int) -> None:
        """Set the number of fragments that are about to be processed."""
        self.queued = fragments

    def add(self, count: int, fragment: str = "", rejects: int = 0) -> None:
        """Count finished work and show it.

        Parameters
        ----------
        count : int
            Finished samples or other units, including rejects.
        fragment : str
            Name of the fragment they belong to, if it is finished.
        rejects : int
            Rejected samples among them.
        """
        self.count += count
        self.rejects += rejects
        if fragment:
            self.fragments += 1
            self.queued = max(0, self.queued - 1)
        if self._on_add is not None:
            self._on_add(self, count, rejects, fragment)
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            self._stream.write(self.line() + "\n")
            self._stream.flush()

    @property
    def rate(self) -> float:
        """Units per second in this attempt."""
        seconds = time.monotonic() - self._started
        return (self.count - self._first) / seconds if seconds > 0 else 0.0

    def line(self) -> str:
        """Return name and progress of the stage as one line."""
        return f"{self.name:<11} {describe_progress(self.about())}"

    def about(self) -> dict[str, Any]:
        """Return the progress as JSON-compatible values; see `describe_progress`."""
        names = ("count", "total", "unit", "fragments", "queued", "rejects")
        return {
            "stage": self.name,
            "rate": round(self.rate, 3),
            **{name: getattr(self, name) for name in names},
        }

    def close(self) -> None:
        """Remove the live line."""
        if self._bar is not None:
            self._bar.close()


class Progress:
    """Prints the progress of a run: a meter per stage, and messages between them.

    Parameters
    ----------
    stream : text file, optional
        Where to print. Default: standard error.
    quiet : bool
        Print nothing. Messages still go to the log.
    verbose : bool
        Print a line for every finished fragment.

    Attributes
    ----------
    listeners : list of callable
        Each is called with the meter, samples and rejects whenever a unit of work (a fragment or a
        task, never a single sample) is finished.
    """

    def __init__(
        self, stream: TextIO | None = None, quiet: bool = False, verbose: bool = False
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._quiet, self._verbose = quiet, verbose
        self._meter: Meter | None = None
        self.listeners: list[Callable[[Meter, int, int], None]] = []

    @contextmanager
    def meter(self, name: str, total: int, unit: str = "samples") -> Iterator[Meter]:
        """Show a meter for one stage during the `with` block."""
        meter = self._meter = Meter(
            name, total, unit, _Nowhere() if self._quiet else self._stream, self._on_add
        )
        try:
            yield meter
        finally:
            self._meter = None
            meter.close()

    def about(self) -> dict[str, Any]:
        """Return the progress of the current stage; empty between two stages."""
        meter = self._meter
        return meter.about() if meter is not None else {}

    def _on_add(self, meter: Meter, count: int, rejects: int, fragment: str) -> None:
        for listener in self.listeners:
            listener(meter, count, rejects)
        if self._verbose and fragment:
            text = f"{meter.name:<11} {fragment}: {count:,} {meter.unit}" + (
                f", {rejects:,} rejects" if rejects else ""
            )
            log.debug(text)
            if not self._quiet:
                tqdm.write(text, file=self._stream)

    def say(self, text: str) -> None:
        """Print a line, and write it to the log file."""
        log.info(text)
        if not self._quiet:
            tqdm.write(text, file=self._stream)
            self._stream.flush()


def describe_progress(about: Mapping[str, Any]) -> str:
    """Describe the progress of a stage: done and total, rate, time left, rejects, fragments.

    Values that are missing or not numbers are left out: they can come from an untrusted run folder.
    """

    def number(name: str) -> float:
        value = about.get(name)
        valid = (
            isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e15
        )
        return float(value) if valid else 0.0  # type: ignore[arg-type]

    count, total, rate = number("count"), number("total"), number("rate")
    unit = str(about.get("unit", ""))[:20]
    text = f"{count:,.0f}/{total:,.0f} {unit}, {rate:,.{0 if rate >= 10 else 2}f}/s"
    if rate > 0 and count < total:
        text += f", {tqdm.format_interval((total - count) / rate)} left"
    if number("rejects"):
        text += f", {number('rejects'):,.0f} rejects"
    if number("fragments"):
        plural = "s" * (number("fragments") != 1)
        text += f", {number('fragments'):,.0f} fragment{plural} done"
        text += f", {number('queued'):,.0f} queued" if number("queued") else ""
    return text


class _Nowhere(io.StringIO):
    """Discards all text."""

    def write(self, text: str) -> int:
        return len(text)
