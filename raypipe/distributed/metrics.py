"""Export the driver's counts as Ray metrics, for its dashboard and for Prometheus.

Metrics change when a unit of work is finished, which the driver learns anyway. Samples cost nothing
extra.
"""

from __future__ import annotations

from raypipe.progress import Meter


class RayMetrics:
    """Listener of `raypipe.progress.Progress`. Requires that Ray is running.

    Counters by stage: raypipe_samples and raypipe_rejects. Gauges by stage, of the current attempt:
    raypipe_fragments_done and raypipe_fragments_queued. Metrics of the same name are shared within
    a process.
    """

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge

        stage = ("stage",)
        self._samples = Counter(
            "raypipe_samples", "samples (for index: files) that a stage has finished", stage
        )
        self._rejects = Counter("raypipe_rejects", "samples that could not be read", stage)
        self._done = Gauge(
            "raypipe_fragments_done", "fragments that this attempt of a stage has finished", stage
        )
        self._queued = Gauge(
            "raypipe_fragments_queued", "fragments that are waiting or being processed", stage
        )

    def __call__(self, meter: Meter, samples: int, rejects: int) -> None:
        tags = {"stage": meter.name}
        if samples > 0:  # Ray refuses 0
            self._samples.inc(samples, tags)
        if rejects > 0:
            self._rejects.inc(rejects, tags)
        self._done.set(meter.fragments, tags)
        self._queued.set(meter.queued, tags)
