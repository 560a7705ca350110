"""Attention in a form that can be differentiated forward.

PyTorch's fused attention kernels, and the fast path of `nn.MultiheadAttention` and
`nn.TransformerEncoderLayer` in eval mode, have no forward-mode derivative. The mathematical kernel
computes the same function and has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def mathematical_attention() -> Iterator[None]:
    """Use the mathematical kernel of attention inside a `with` block."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
