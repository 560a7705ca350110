"""Scheduled pruning: score what is new with the existing models, assess it, write a snapshot.

See docs/guides/nightly.md.
"""

from raypipe.nightly.night import Night, run_night

__all__ = ["Night", "run_night"]
