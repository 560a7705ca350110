"""Inspect a source before anything runs, and estimate what a run would cost. No Ray, no torch."""

from __future__ import annotations

from raypipe.estimate.facts import Survey
from raypipe.estimate.inspect import Inspection, inspect_source

__all__ = ["Inspection", "Survey", "inspect_source"]
