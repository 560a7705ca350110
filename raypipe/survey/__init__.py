"""A look at a source before anything is run: what is in it, what would be rejected, what a run would cost. No Ray, no torch."""

from __future__ import annotations

from raypipe.survey.facts import Survey
from raypipe.survey.looking import Look, look

__all__ = ["Look", "Survey", "look"]
