"""Seconds and memory of a function in this process; imported by the scripts that run one way."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def measure(prepare: Callable[[], Callable[[], Any]], repeats: int) -> tuple[dict[str, Any], Any]:
    """Return what a function took as JSON data, and its result.

    `prepare` returns the function, ready to run, and is not measured. Times are the least of the
    runs. Memory is the peak of the first run above what the process had before it.
    """
    wall, processor, memory = [], [], []
    for _ in range(repeats):
        function = prepare()
        before = _before()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        started, used = time.perf_counter(), time.process_time()
        result = function()
        wall.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
        memory.append(_resident("VmHWM") - before)
    return {"wall": min(wall), "processor": min(processor), "memory": memory[0]}, result


def _before() -> int:
    """Give freed memory back to the system; return what this process holds, in bytes."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _resident("VmRSS")


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
