"""Scheduled pruning: a night that scores what is new with what was learnt once, judges it, and leaves a snapshot. See docs/nightly.md."""

from raypipe.nightly.night import Night, run_night

__all__ = ["Night", "run_night"]
