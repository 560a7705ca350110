"""Threads and memory of this process, transfers to a device, and the batch size."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt, from glibc's malloc.h."""


def set_threads(threads: int) -> None:
    """Compute with this many threads in this process, and keep freed memory.

    Every batch allocates the same large tensors as the batch before. Returning that memory to the
    system and clearing it again takes up to a third of the time
    (benchmarks/results/pipeline-cpu.txt). Only glibc returns it, so memory is only kept there.
    """
    torch.set_num_threads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def to_device(values: Any, device: str | torch.device) -> Tensor:
    """Return values (an array or a tensor) as a tensor on a device.

    Transfers to a GPU go through page-locked memory, so neither side waits: the next batch is
    prepared while the GPU processes the one before.
    """
    tensor = torch.as_tensor(values)
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def padded(values: Any, rows: int) -> Any:
    """Return the rows of an array or a tensor, followed by zeros up to `rows` rows.

    On a CPU, the last rows of a product of matrices can be summed in another order than the rows
    before, and another number of images can take another algorithm. With batches of a fixed size,
    the result of a row depends neither on its place nor on the rows around it.
    """
    missing = rows - len(values)
    if missing <= 0:
        return values
    tensor = torch.as_tensor(values)
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


class AdaptiveBatch:
    """Apply functions batch by batch, with smaller batches if GPU memory runs out.

    Each time a function runs out of GPU memory the batch size is halved. It stays at the smaller
    value for all later calls.

    Parameters
    ----------
    size : int
        Samples per batch to start with. How much memory a sample takes depends on the network, the
        function and whatever else uses the GPU.

    Attributes
    ----------
    size : int
        Samples per batch now.

    Examples
    --------
    >>> batched = AdaptiveBatch(64)
    >>> parts = batched(lambda rows: network(rows), images)  # doctest: +SKIP
    >>> outputs = torch.cat(parts)  # doctest: +SKIP
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, function: Callable[..., T], *values: Any) -> list[T]:
        """Return the results of the function for consecutive batches.

        Parameters
        ----------
        function : callable
            Called with one slice of each of `values`.
        *values : array or tensor
            Arrays or tensors with the same number of rows.

        Returns
        -------
        list
            One result per batch. Without any rows, the result for one empty batch.

        Raises
        ------
        torch.OutOfMemoryError
            If not even a single sample fits.
        """
        results: list[T] = []
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
            # Not inside `except`: until it ends, the error keeps the function's tensors alive.
            self.size = -(-min(self.size, rows) // 2)
            torch.cuda.empty_cache()
        return results
