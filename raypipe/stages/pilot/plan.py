"""Which trainings a budget allows.

The cost of a training is counted by network, pixels, images and steps, not by the clock. So the
plan, and with it the choice of strategies, does not depend on the machine.
"""

from __future__ import annotations

import math
from dataclasses import replace

from raypipe.assessment.pilot_trend import MIN_CELLS, MIN_REPEATS
from raypipe.config import Config, PilotSettings
from raypipe.runs.pilot import PilotCell, PilotPlan
from raypipe.text import counted
from raypipe.vision.network_costs import training_seconds

MIN_PER_CLASS = 3.0
"""Samples of each class that a list must keep, on average; a smaller list shows nothing."""
MIN_KEPT = 20
"""Samples that a list must keep."""
MIN_TESTED = 40
"""Samples to test on: with fewer, the error of any difference exceeds ten points."""


def make_plan(
    config: Config, seed: int, samples: int, tested: int, classes: int, image_size: int
) -> PilotPlan:
    """Return the trainings that `pilot.budget` allows.

    All candidates are trained in all cells, equally often. If the budget does not allow
    `MIN_REPEATS` of each, the last candidates are left out; if not of a single one, nothing is
    trained.

    Parameters
    ----------
    config
        The settings.
    seed
        Samples of the seed set.
    samples, tested
        Samples that lists are cut from, and samples to test on.
    classes
        Classes that occur among the samples.
    image_size
        Side of the pilot's images in pixels.
    """
    settings = config.pilot
    candidates = tuple(settings.named_candidates())
    cells = _cells(settings, samples, classes)
    empty = PilotPlan((), (), 0, samples, tested, classes, image_size)
    if tested < MIN_TESTED:
        return replace(
            empty,
            note=f"{tested} audit samples are too few to test on; set seed.audit to "
            f"{MIN_TESTED} or more",
        )
    # a list of everything gains nothing, so a line through gains needs two sizes of other lists
    below_all = {cell.samples for cell in cells if cell.keep < 1}
    if min(settings.keep) == 1:
        return replace(
            empty, note="pilot.keep has no fraction below 1, and all lists of everything are equal"
        )
    if len({cell.samples for cell in cells}) < MIN_CELLS or len(below_all) < 2:
        return replace(
            empty,
            note=f"{samples:,} seed samples in {classes} classes are too few to try lists on "
            "(seed.fraction)",
        )
    budget = settings.budget * _proxy_seconds(config, seed)
    each = sum(_seconds(settings, cell.samples, image_size) for cell in cells)
    for count in range(len(candidates), 0, -1):
        repeats = min(settings.max_repeats, int(budget / (each * (count + 1))))
        if repeats >= MIN_REPEATS:
            left_out = [name for name, _ in candidates[count:]]
            note = f"pilot.budget does not suffice for {'; '.join(left_out)}" if left_out else ""
            return replace(
                empty, candidates=candidates[:count], cells=tuple(cells), repeats=repeats, note=note
            )
    needed = _rounded_up(settings.budget * 2 * MIN_REPEATS * each / budget)
    trainings = counted(2 * MIN_REPEATS * len(cells), "training")
    return replace(
        empty,
        note=f"the budget allows too few trainings; set pilot.budget to {needed:g} for the "
        f"{trainings} that it takes",
    )


def plan_seconds(settings: PilotSettings, plan: PilotPlan) -> float:
    """Return what the trainings of a plan cost, in processor seconds of `network_costs`."""
    each = sum(_seconds(settings, cell.samples, plan.image_size) for cell in plan.cells)
    return plan.repeats * len(plan.lists) * each


def _cells(settings: PilotSettings, samples: int, classes: int) -> list[PilotCell]:
    """Return the fractions and sizes whose lists are long enough, the largest sets first."""
    least = max(MIN_KEPT, MIN_PER_CLASS * classes)
    cells = [
        PilotCell(keep, size, round(keep * round(size * samples)))
        for size in reversed(settings.sizes)
        for keep in settings.keep
    ]
    return [cell for cell in cells if cell.samples >= least]


def _seconds(settings: PilotSettings, samples: int, image_size: int) -> float:
    """Return what a training on some samples costs."""
    steps = settings.epochs * math.ceil(samples / settings.batch_size)
    return training_seconds(settings.model, image_size, settings.epochs * samples, steps)


def _proxy_seconds(config: Config, seed: int) -> float:
    """Return what the training of all proxies costs, if all images have their full size."""
    proxy = config.proxy.for_seed_set(seed)
    images = float(proxy.repeats * proxy.passes * seed)
    steps = math.ceil(images / proxy.batch_size)
    return training_seconds(proxy.model, proxy.image_size, images, steps)


def _rounded_up(value: float) -> float:
    """Return a number of two digits that is not smaller."""
    digits = 1 - math.floor(math.log10(value))
    return math.ceil(value * 10**digits) / 10**digits
