"""In which arithmetic gradients are taken on a GPU. A CPU computes in float32 whatever is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def computing(precision: str, device: str) -> Iterator[None]:
    """Sets torch's arithmetic for the time being.

    precision  float32: exact, without the TF32 that PyTorch otherwise allows itself in convolutions;
               tf32: products of 10-bit mantissas, summed in float32;
               bfloat16: autocast, weights stay float32
    device     cuda or cpu
    """
    if precision not in ("float32", "tf32", "bfloat16"):
        raise ValueError(f"precision {precision!r} is not float32, tf32 or bfloat16")
    if device != "cuda":
        yield
        return
    convolution, product = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolution.allow_tf32, product.allow_tf32
    convolution.allow_tf32 = product.allow_tf32 = precision != "float32"
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
            yield
    finally:
        convolution.allow_tf32, product.allow_tf32 = before
