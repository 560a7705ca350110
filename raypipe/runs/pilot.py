"""The pilot's plan, `pilot/plan.json`, and its result, `pilot/pilot.json`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from raypipe import storage
from raypipe.assessment.gains import Gain
from raypipe.assessment.pilot_trend import PilotTrend
from raypipe.errors import RaypipeError, RunError
from raypipe.runs.packed_bits import pack, unpack
from raypipe.runs.run import Run

FORMAT = 1
"""Version of `pilot/pilot.json`."""
RANDOM = "random"
"""Name of the random lists that everything is compared with."""


@dataclass(frozen=True)
class PilotCell:
    """A keep fraction at a size of the set.

    Attributes
    ----------
    keep, size
        The fraction, and the share of the pilot's samples that the list is cut from.
    samples
        Samples in each list.
    """

    keep: float
    size: float
    samples: int


@dataclass(frozen=True)
class PilotPlan:
    """Which trainings the pilot makes. It is written once, so that a resumed pilot has the same.

    Attributes
    ----------
    candidates
        Name, and settings of `select`, of every strategy that is tried.
    cells
        Keep fractions at sizes.
    repeats
        Trainings of each list in each cell; 0 for none at all.
    samples, tested, classes
        Samples that lists are cut from, samples that models are tested on, and classes.
    image_size
        Side of the images in pixels.
    note
        Why there are no trainings, or which candidates are left out.
    """

    candidates: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    cells: tuple[PilotCell, ...] = ()
    repeats: int = 0
    samples: int = 0
    tested: int = 0
    classes: int = 0
    image_size: int = 0
    note: str = ""

    @property
    def lists(self) -> tuple[str, ...]:
        """Names of the lists: random, then the candidates."""
        return (RANDOM, *(name for name, _ in self.candidates))

    def trials(self) -> list[PilotTrial]:
        """Return every training; repeats are complete one after the other."""
        return [
            PilotTrial(number, cell, repeat)
            for repeat in range(self.repeats)
            for cell in range(len(self.cells))
            for number in range(len(self.lists))
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the content of `plan.json`."""
        named = [{"name": name, "settings": settings} for name, settings in self.candidates]
        return {**asdict(self), "candidates": named}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PilotPlan:
        """Restore what `as_json` returned."""
        return cls(
            **{
                **data,
                "candidates": tuple(
                    (item["name"], item["settings"]) for item in data["candidates"]
                ),
                "cells": tuple(PilotCell(**cell) for cell in data["cells"]),
            }
        )


@dataclass(frozen=True)
class PilotTrial:
    """One training: number of the list, number of the cell, number of the repeat."""

    list: int
    cell: int
    repeat: int

    @property
    def name(self) -> str:
        """Stem of its file."""
        return f"{self.repeat:03d}-{self.cell:03d}-{self.list:03d}"


@dataclass(frozen=True, eq=False)
class Pilot:
    """The result of a pilot.

    Attributes
    ----------
    plan
        What was trained.
    correct
        By list, which test samples each model got right: bool [cells, repeats, test samples].
    """

    plan: PilotPlan
    correct: Mapping[str, np.ndarray]

    @functools.cached_property
    def trend(self) -> PilotTrend:
        """The lines through the results. Raises ValueError if nothing was trained."""
        plan = self.plan
        if not plan.repeats:
            raise ValueError("the pilot trained nothing")
        keep = np.array([cell.keep for cell in plan.cells])
        per_class = np.array([cell.samples for cell in plan.cells]) / plan.classes
        lists = {name: self.correct[name] for name, _ in plan.candidates}
        return PilotTrend.fit(self.correct[RANDOM].astype(np.int8), lists, keep, per_class)

    def gains(self, fraction: float, samples: int) -> dict[str, Gain]:
        """Return the gains of the candidates' lists of a fraction of `samples` samples."""
        return self.trend.gains(fraction, fraction * samples / self.plan.classes)

    def loss_of_pruning(self, fraction: float, samples: int) -> tuple[float, float, float]:
        """Return what random lists of a fraction lose to everything; see `PilotTrend`."""
        everything = samples / self.plan.classes
        return self.trend.loss_of_pruning(fraction * everything, everything)

    def write(self, run: Run) -> None:
        """Write `pilot/pilot.json`."""
        correct = {name: pack(bits) for name, bits in self.correct.items()}
        storage.write_json(
            run.pilot_result, {"format": FORMAT, "plan": self.plan.as_json(), "correct": correct}
        )

    @classmethod
    def read(cls, run: Run) -> Pilot | None:
        """Read the result of a run; None if it has none.

        Raises
        ------
        RunError
            If it is damaged.
        """
        try:
            data = storage.read_json(run.pilot_result)
        except FileNotFoundError:
            return None
        try:
            if data["format"] != FORMAT:
                return None
            plan = PilotPlan.from_json(data["plan"])
            shape = (len(plan.cells), plan.repeats, plan.tested)
            lists = plan.lists if plan.repeats else ()
            pilot = cls(plan, {name: unpack(data["correct"][name], shape) for name in lists})
            if plan.repeats:
                _ = pilot.trend  # raises if the plan makes no sense
            return pilot
        except (ArithmeticError, KeyError, TypeError, ValueError, RaypipeError) as error:
            raise RunError(
                f"{run.pilot_result}: damaged ({error}); delete it and run `raypipe run` again"
            ) from None
