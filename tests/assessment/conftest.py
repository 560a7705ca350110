"""Fixtures of these tests."""

from __future__ import annotations

from synthetic_scores import few_trees, one_thread, problem, settings

__all__ = ["few_trees", "one_thread", "problem", "settings"]
