"""Where networks compute: threads and memory of a process, and bringing samples there, as many at a time as it has room for."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""


def set_threads(threads: int) -> None:
    """This process computes on so many threads from now on, and keeps the memory that it frees.

    A batch asks for the same large tensors as the one before; given back to the system and cleared anew each time, they take up to a third of
    the time (benchmarks/results/pipeline-cpu.txt). Only glibc does that, and only there something changes.
    """
    torch.set_num_threads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def to_device(values: Any, device: str | torch.device) -> Tensor:
    """Values (an array or a tensor) as a tensor on a device.

    To a GPU they go from page-locked memory, so that neither side waits: the next batch is made ready while the GPU has the one before.
    """
    tensor = torch.as_tensor(values)
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class AdaptiveBatch:
    """Runs functions over samples, so many at a time; half as many from then on, where the memory of the GPU does not do.

    size  samples at a time: what one sample takes depends on the network, the function and whatever else is on the GPU
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, function: Callable[..., Any], *values: Any) -> list[Any]:
        """What the function gives for consecutive parts of arrays or tensors with as many rows; of no rows, for the one empty part.

        Raises torch.OutOfMemoryError where there is no room for a single sample.
        """
        results: list[Any] = []
        start, rows = 0, len(values[0])
        while start < rows or not results:
            try:
                results.append(function(*(value[start : start + self.size] for value in values)))
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
            else:
                start += self.size
                continue
            # here, and not where it is caught: the error holds on to what the function had
            self.size = -(-min(self.size, rows) // 2)
            torch.cuda.empty_cache()
        return results
