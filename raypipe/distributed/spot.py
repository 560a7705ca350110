"""Recognise spot machines by Ray's label for them, and keep tasks off them."""

from __future__ import annotations

from collections.abc import Mapping

from raypipe.config import ClusterSettings

MARKET_TYPE, SPOT = "ray.io/market-type", "spot"
"""Ray's label for how a machine was bought, and its value for a spot machine."""


def is_spot(labels: Mapping[str, str]) -> bool:
    """Whether the labels of a node are those of a spot machine."""
    return labels.get(MARKET_TYPE) == SPOT


def training_labels(settings: ClusterSettings) -> dict[str, str]:
    """Return Ray's label selector for long trainings; nodes without the label match it."""
    return {MARKET_TYPE: f"!{SPOT}"} if settings.keep_off_spot else {}
