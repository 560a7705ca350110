"""Progress a person can follow: one live line a stage in a terminal, a plain line now and then elsewhere."""

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
"""Time between two lines of one stage where the output is not a terminal."""


ProgressCallback = Callable[[int, int], None]
"""Called with (steps done, steps in total) while something is fitted."""


class Meter:
    """Counts what one stage has done: samples (or other units), fragments and rejects.

    queued  fragments of this attempt that are not done yet, where their number is known
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        stream: TextIO,
        heard: Callable[[Meter, int, int, str], None] | None = None,
    ) -> None:
        self.name, self.total, self.unit, self.count = name, total, unit, 0
        self.fragments = self.queued = self.rejects = 0
        self._stream, self._heard = stream, heard
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
        """Count what an earlier attempt finished; it does not enter the rate."""
        self.count += count
        self._first += count
        if self._bar is not None:
            self._bar.initial = self.count
            self._bar.n = self.count
            self._bar.refresh()

    def expect(self, total: int) -> None:
        """Set the total, where it is known only on the way."""
        self.total = total
        if self._bar is not None:
            self._bar.total = total

    def queue(self, fragments: int) -> None:
        """Say how many fragments are about to be worked on."""
        self.queued = fragments

    def add(self, count: int, fragment: str = "", rejects: int = 0) -> None:
        """Count what is done: so many samples, those of a fragment with its name, and rejects among them."""
        self.count += count
        self.rejects += rejects
        if fragment:
            self.fragments += 1
            self.queued = max(0, self.queued - 1)
        if self._heard is not None:
            self._heard(self, count, rejects, fragment)
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            self._stream.write(self.line() + "\n")
            self._stream.flush()

    @property
    def rate(self) -> float:
        """Units per second of this attempt."""
        seconds = time.monotonic() - self._started
        return (self.count - self._first) / seconds if seconds > 0 else 0.0

    def line(self) -> str:
        return f"{self.name:<11} {describe_progress(self.about())}"

    def about(self) -> dict[str, Any]:
        """How far it is, as JSON can hold it; see `far`."""
        names = ("count", "total", "unit", "fragments", "queued", "rejects")
        return {
            "stage": self.name,
            "rate": round(self.rate, 3),
            **{name: getattr(self, name) for name in names},
        }

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Progress:
    """Makes a meter for each stage and keeps the lines printed outside of it whole."""

    def __init__(
        self, stream: TextIO | None = None, quiet: bool = False, verbose: bool = False
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._quiet, self._verbose = quiet, verbose
        self._meter: Meter | None = None
        self.listeners: list[Callable[[Meter, int, int], None]] = []
        """Called with the meter, samples and rejects whenever a unit of work is done: a fragment, a task, never a sample."""

    @contextmanager
    def meter(self, name: str, total: int, unit: str = "samples") -> Iterator[Meter]:
        meter = self._meter = Meter(
            name, total, unit, _Nowhere() if self._quiet else self._stream, self._heard
        )
        try:
            yield meter
        finally:
            self._meter = None
            meter.close()

    def about(self) -> dict[str, Any]:
        """How far the stage under way is; empty between two of them."""
        meter = self._meter
        return meter.about() if meter is not None else {}

    def _heard(self, meter: Meter, count: int, rejects: int, fragment: str) -> None:
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
        """A line for the user and for the log file."""
        log.info(text)
        if not self._quiet:
            tqdm.write(text, file=self._stream)
            self._stream.flush()


def describe_progress(about: Mapping[str, Any]) -> str:
    """How far a stage is, in words: done and total, rate, time left, rejects, fragments. What is missing or no number is left out."""

    def number(name: str) -> float:
        value = about.get(name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e15
        return float(value) if good else 0.0  # type: ignore[arg-type]

    count, total, rate = number("count"), number("total"), number("rate")
    text = f"{count:,.0f}/{total:,.0f} {str(about.get('unit', ''))[:20]}, {rate:,.{0 if rate >= 10 else 2}f}/s"
    if rate > 0 and count < total:
        text += f", {tqdm.format_interval((total - count) / rate)} left"
    if number("rejects"):
        text += f", {number('rejects'):,.0f} rejects"
    if number("fragments"):
        text += f", {number('fragments'):,.0f} fragments done"
        text += f", {number('queued'):,.0f} queued" if number("queued") else ""
    return text


class _Nowhere(io.StringIO):
    def write(self, text: str) -> int:
        return len(text)
