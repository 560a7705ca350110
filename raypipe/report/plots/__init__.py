"""Plots as inline SVG with the page's colours, so they are legible in light, dark and print."""

from raypipe.report.plots.balance import class_shares, kept_shares
from raypipe.report.plots.maps import kept_map, score_map
from raypipe.report.plots.pilot import gain_curve
from raypipe.report.plots.scores import (
    class_bands,
    class_spread,
    score_histogram,
    small_histogram,
)
from raypipe.report.plots.trust import evaluation_curves, fidelity_chart, learning_curve

__all__ = [
    "class_bands",
    "class_shares",
    "class_spread",
    "evaluation_curves",
    "fidelity_chart",
    "gain_curve",
    "kept_map",
    "kept_shares",
    "learning_curve",
    "score_histogram",
    "score_map",
    "small_histogram",
]
