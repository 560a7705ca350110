"""Arrays of bools as text in JSON."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np


def pack(bits: np.ndarray) -> str:
    """Return bools of any shape as base64."""
    return base64.b64encode(np.packbits(bits.astype(bool)).tobytes()).decode()


def unpack(text: str, shape: Sequence[int]) -> np.ndarray:
    """Restore what `pack` returned, bool [shape]. Raises ValueError if it has another length."""
    packed = np.frombuffer(base64.b64decode(text), np.uint8)
    count = int(np.prod(shape))
    if len(packed) != -(-count // 8):
        raise ValueError(f"{len(packed)} bytes for {count} values")
    return np.unpackbits(packed, count=count).astype(bool).reshape(tuple(shape))
