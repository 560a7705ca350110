"""Ray Data datasets as sources, and keep-lists applied to them."""

from __future__ import annotations

from ray.data import Dataset

__all__ = ["Dataset"]
