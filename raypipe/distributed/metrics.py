"""What the driver counts, as metrics of Ray: its dashboard shows them, and Prometheus collects them from the nodes.

Counted when a unit of work is done, which the driver knows anyway: nothing is added to the path of a sample.
"""

from __future__ import annotations

from raypipe.progress import Meter


class RayMetrics:
    """A listener of `raypipe.progress.Progress`. Needs Ray to be running; metrics of one name are shared within a process.

    raypipe_samples, raypipe_rejects                    counters by stage
    raypipe_fragments_done, raypipe_fragments_queued    gauges by stage, of this attempt
    """

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge

        stage = ("stage",)
        self._samples = Counter(
            "raypipe_samples", "samples (of index: files) that a stage has done", stage
        )
        self._rejects = Counter("raypipe_rejects", "samples that could not be read", stage)
        self._done = Gauge(
            "raypipe_fragments_done", "fragments that this attempt of a stage has done", stage
        )
        self._queued = Gauge(
            "raypipe_fragments_queued", "fragments that wait or are being worked on", stage
        )

    def __call__(self, meter: Meter, samples: int, rejects: int) -> None:
        tags = {"stage": meter.name}
        if samples > 0:  # Ray refuses 0
            self._samples.inc(samples, tags)
        if rejects > 0:
            self._rejects.inc(rejects, tags)
        self._done.set(meter.fragments, tags)
        self._queued.set(meter.queued, tags)
