"""Practical limits of a planned run: what breaks first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from raypipe.estimate import rates as constants
from raypipe.estimate.plan_rates import Rates
from raypipe.estimate.workload import Workload

START_MB = 300
"""Memory of the driver before it holds any fragment: Ray and Arrow, imported and connected."""
# Beyond these limits, something stops working or is not worth the wait.
WORKER_GB = 2.0
"""Memory of a worker: what a CPU of the machines in cluster.yaml has."""
DRIVER_GB = 1.0
"""Memory of the driver."""
DECISION_SECONDS = 30.0
"""Processor seconds until a resumed run knows what is left to do."""
LISTING_MINUTES = 10.0
"""Processor minutes to list the source."""
TRAINING_HOURS = 48.0
"""Hours to train the proxy."""
FIT_HOURS = 6.0
"""Hours of one fit of the extrapolator, in one process."""
EMBED_HOURS = 168.0
"""Hours to embed the source."""
ALONE_HOURS = 6.0
"""Hours of the stages that are one process: keep-lists and report."""


@dataclass(frozen=True)
class Bound:
    """A practical limit, and how close the run comes to it.

    Attributes
    ----------
    what
        A description.
    figure, limit
        In `unit`.
    remedy
        What helps if `figure` exceeds `limit`.
    """

    what: str
    figure: float
    limit: float
    unit: str
    remedy: str

    @property
    def share(self) -> float:
        """`figure` as a share of the limit; above 1 it is exceeded."""
        return self.figure / self.limit


def bounds_of(
    work: Workload, rates: Rates, driver_gb: float, hours: Mapping[str, float]
) -> tuple[Bound, ...]:
    """Return the practical limits, the tightest first."""
    bounds = [*_seed_set_bounds(work, hours), *_fragment_bounds(work, rates, driver_gb)]
    bounds += [
        Bound(
            "listing of the source: files",
            work.listed * rates.list_seconds / 60,
            LISTING_MINUTES,
            "min",
            "tars or Parquet files instead of single images, larger files",
        ),
        Bound(
            "embedding of the source",
            hours["embed"],
            EMBED_HOURS,
            "h",
            "more GPUs or CPUs, a smaller proxy",
        ),
        Bound(
            "keep-lists and report, one process",
            hours["select"] + hours["report"],
            ALONE_HOURS,
            "h",
            "a run for each part of the source (source.include)",
        ),
    ]
    return tuple(sorted(bounds, key=lambda bound: -bound.share))


def _seed_set_bounds(work: Workload, hours: Mapping[str, float]) -> list[Bound]:
    """Return the limits of the number of measured samples."""
    config, method = work.config, work.config.extrapolate.method
    worker_gb = 4.0 * work.embedding_values * work.seed / 1e9
    training = hours["proxy"]
    fit = constants.fit_seconds(method, work.seed, work.samples, None, work.embedding_values) / 3600

    def smaller_seed_set(figure: float, limit: float) -> str:
        fraction = config.seed.fraction * min(1.0, limit / max(figure, 1e-9))
        return f"seed.fraction {_rounded_down(fraction)}"

    of_training = Bound(
        "training of the proxy",
        training,
        TRAINING_HOURS,
        "h",
        f"proxy.workers, fewer proxy.epochs, or {smaller_seed_set(training, TRAINING_HOURS)}",
    )
    if config.scores_embeddings:  # nothing is fitted to measured samples
        return [of_training]
    return [
        Bound(
            "memory of a worker: measured samples",
            worker_gb,
            WORKER_GB,
            "GB",
            smaller_seed_set(worker_gb, WORKER_GB),
        ),
        of_training,
        Bound(
            "one fit of the extrapolator, one process",
            fit,
            FIT_HOURS,
            "h",
            f"extrapolate.method knn, or {smaller_seed_set(fit, FIT_HOURS)}",
        ),
    ]


def _fragment_bounds(work: Workload, rates: Rates, driver_gb: float) -> list[Bound]:
    """Return the limits of the number of fragments."""
    decision, start_gb = work.fragments * rates.decision_seconds, START_MB / 1e3
    times = math.ceil(
        max((driver_gb - start_gb) / (DRIVER_GB - start_gb), decision / DECISION_SECONDS)
    )
    fragment_samples = work.config.source.fragment_samples * times
    remedy = f"larger files, and source.fragment_samples {fragment_samples}"
    return [
        Bound("memory of the driver: fragments", driver_gb, DRIVER_GB, "GB", remedy),
        Bound("start of a resumed run: fragments", decision, DECISION_SECONDS, "s", remedy),
    ]


def _rounded_down(fraction: float) -> str:
    """Round to one digit, down, so that the remedy suffices."""
    digits = -math.floor(math.log10(fraction)) if fraction < 1 else 0
    return f"{math.floor(fraction * 10**digits) / 10**digits:g}"
