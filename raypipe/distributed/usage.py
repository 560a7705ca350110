"""Measure the processor time of a worker."""

from __future__ import annotations

import time


class Stopwatch:
    """Processor seconds of this process since the last look."""

    def __init__(self) -> None:
        self._last = time.process_time()

    def lap(self) -> float:
        now = time.process_time()
        spent, self._last = now - self._last, now
        return spent
