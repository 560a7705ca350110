"""The arithmetic of gradients on a GPU. A CPU always computes in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def use_precision(precision: str, device: str) -> Iterator[None]:
    """Set torch's arithmetic inside a `with` block.

    Parameters
    ----------
    precision : {"float32", "tf32", "bfloat16"}
        float32: exact, without the TF32 that PyTorch allows in convolutions by default.
        tf32: products with 10-bit mantissas, summed in float32.
        bfloat16: autocast; weights stay float32.
    device : {"cuda", "cpu"}
        Nothing changes on a CPU.

    Raises
    ------
    ValueError
        If the precision is unknown.
    """
    if precision not in ("float32", "tf32", "bfloat16"):
        raise ValueError(f"precision {precision!r} is not one of float32, tf32, bfloat16")
    if device != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = precision != "float32"
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
