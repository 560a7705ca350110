"""Progress a person can follow: one live line a stage in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

log = logging.getLogger("raypipe")

PLAIN_SECONDS = 10.0
"""Time between two lines of one stage where the output is not a terminal."""


class Meter:
    """Counts what one stage has done."""

    def __init__(self, name: str, total: int, unit: str, stream: TextIO) -> None:
        self.name, self.total, self.unit, self.count = name, total, unit, 0
        self._stream = stream
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

    def add(self, count: int) -> None:
        self.count += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            self._stream.write(self.line() + "\n")
            self._stream.flush()

    def line(self) -> str:
        seconds = time.monotonic() - self._started
        rate = (self.count - self._first) / seconds if seconds > 0 else 0.0
        text = f"{self.name:<11} {self.count:,}/{self.total:,} {self.unit}, {rate:,.{0 if rate >= 10 else 2}f}/s"
        if rate > 0 and self.count < self.total:
            text += f", {tqdm.format_interval((self.total - self.count) / rate)} left"
        return text

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Progress:
    """Makes a meter for each stage and keeps the lines printed outside of it whole."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._quiet = quiet

    @contextmanager
    def meter(self, name: str, total: int, unit: str = "samples") -> Iterator[Meter]:
        meter = Meter(name, total, unit, _Nowhere() if self._quiet else self._stream)
        try:
            yield meter
        finally:
            meter.close()

    def say(self, text: str) -> None:
        """A line for the user and for the log file."""
        log.info(text)
        if not self._quiet:
            tqdm.write(text, file=self._stream)
            self._stream.flush()


class _Nowhere(io.StringIO):
    def write(self, text: str) -> int:
        return len(text)
