"""What the pilot predicts for the keep-lists of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from raypipe.assessment.gains import Gain
from raypipe.report.schema import (
    Difference,
    Expected,
    KeepListFigures,
    PilotList,
    PilotSection,
)
from raypipe.runs.pilot import RANDOM, Pilot

STEPS = 24
"""Points of a curve."""


def pilot_figures(
    pilot: Pilot | None, model: str, keep: Sequence[KeepListFigures], samples: int
) -> PilotSection | None:
    """Return the section `pilot` of `summary.json`; None without a pilot.

    Parameters
    ----------
    pilot
        Its result.
    model
        Name of its network.
    keep
        The keep-lists.
    samples
        All scored samples.
    """
    if pilot is None:
        return None
    plan = pilot.plan
    lists = [_list(pilot, model, item, samples) for item in keep] if plan.repeats else []
    return {
        "note": plan.note,
        "trainings": len(plan.trials()),
        "model": model,
        "samples": plan.samples,
        "tested": plan.tested,
        "lists": lists,
    }


def _list(pilot: Pilot, model: str, item: KeepListFigures, samples: int) -> PilotList:
    gains = pilot.gains(item["fraction"], samples)
    return {
        "fraction": item["fraction"],
        "gains": {name: gain.as_dict() for name, gain in gains.items()},
        "expected": _expected(pilot, model, item, samples, gains.get(item["candidate"])),
    }


def _expected(
    pilot: Pilot, model: str, item: KeepListFigures, samples: int, gain: Gain | None
) -> Expected | None:
    """Return what to expect of a list; None for one that is neither random nor a candidate."""
    if gain is None and item["strategy"] != "random":
        return None
    mean, low, high = pilot.loss_of_pruning(item["fraction"], samples)
    everything: Difference = {"mean": mean, "low": low, "high": high}
    against_random: Difference | None = None
    if gain is not None:
        lower, upper = gain.interval
        against_random = {"mean": gain.mean, "low": lower, "high": upper}
        # two errors that have little to do with each other
        everything = {
            "mean": mean + gain.mean,
            "low": mean + gain.mean - math.hypot(mean - low, gain.mean - lower),
            "high": mean + gain.mean + math.hypot(high - mean, upper - gain.mean),
        }
    return {
        "model": model,
        "tried": pilot.plan.samples,
        "against_random": against_random,
        "against_everything": everything,
    }


GainPoint = tuple[float, float, float, float]
"""Samples kept of each class; gain and both ends of its 95 % interval, as shares."""
Line = list[tuple[float, float]]
"""Samples kept of each class, and gain."""


def gain_curves(
    pilot: Pilot, fraction: float, samples: int, candidate: str
) -> tuple[str, list[GainPoint], Line, list[tuple[str, Line]]]:
    """Return the gains of lists of a keep fraction, from the smallest size tried to the source.

    Parameters
    ----------
    pilot
        A pilot with trainings.
    fraction, samples
        Keep fraction, and samples of the source.
    candidate
        The one to show with its interval; if empty, that of the highest gain.

    Returns
    -------
    tuple
        Name of the candidate, its curve, the gains of its cells (as if they had this fraction), and
        the curves of the others by name.
    """
    plan = pilot.plan
    kept = [cell.samples / plan.classes for cell in plan.cells]
    last = fraction * samples / plan.classes
    at_source = pilot.gains(fraction, samples)
    if candidate not in at_source:
        candidate = max(at_source, key=lambda name: at_source[name].mean)
    positions = np.geomspace(min(*kept, last), last, STEPS).tolist()
    along = [pilot.trend.gains(fraction, position) for position in positions]
    line = [
        (position, gains[candidate].mean, *gains[candidate].interval)
        for position, gains in zip(positions, along, strict=True)
    ]
    others = [
        (name, [(at, gains[name].mean) for at, gains in zip(positions, along, strict=True)])
        for name in at_source
        if name != candidate
    ]
    accuracy = {name: pilot.correct[name].mean((1, 2)) for name in (RANDOM, candidate)}
    cells = [
        (position, float(gain) * (1 - fraction) / (1 - cell.keep))
        for position, gain, cell in zip(
            kept, accuracy[candidate] - accuracy[RANDOM], plan.cells, strict=True
        )
        if cell.keep < 1
    ]
    return candidate, line, cells, others
