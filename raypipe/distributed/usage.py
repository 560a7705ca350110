"""Measure the processor time of a worker."""

from __future__ import annotations

import time


class Stopwatch:
    """Measures the processor time of this process between calls of `lap`."""

    def __init__(self) -> None:
        self._last = time.process_time()

    def lap(self) -> float:
        """Return processor seconds since the last call, or since the start."""
        now = time.process_time()
        spent, self._last = now - self._last, now
        return spent
