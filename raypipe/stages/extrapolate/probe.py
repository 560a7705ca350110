"""Scores of linear probes on the embeddings, for every sample: nothing is extrapolated.

A probe is fitted to the embeddings by each viewer (`raypipe.runs.cross_fit`), from samples that the
viewer was not trained on. A sample's score is the mean over its two viewers.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.actor_pool import Batch, WorkerContext
from raypipe.distributed.usage import Stopwatch
from raypipe.progress import ProgressCallback
from raypipe.runs.cross_fit import VIEWERS, CrossFit
from raypipe.runs.embeddings import as_seen_by, nodes_of, read_probe_rows
from raypipe.runs.run import Run
from raypipe.runs.score_shards import write_scores
from raypipe.runs.unit_result import UnitResult
from raypipe.selection.hashing import canonical_order
from raypipe.stages.extrapolate.fidelity_file import FidelityFile
from raypipe.stages.measure.outputs import OUTPUTS

if TYPE_CHECKING:
    from raypipe.scores.linear_probe import LinearProbe

READERS = 16
"""Embedding files that are read at a time."""
NOTE = "every sample was scored directly"


def fit_probes(config: Config, run: Run, samples: int, step: ProgressCallback) -> None:
    """Write the probes, and how well the scores of the viewers agree."""
    from safetensors.numpy import save

    from raypipe.assessment.fidelity import proxy_is_right
    from raypipe.scores.linear_probe import LinearProbe

    cross_fit, classes = _cross_fit(config), len(run.classes().names)
    tensors: dict[str, np.ndarray] = {}
    by_proxy: dict[str, np.ndarray] = {}
    labels: dict[str, int] = {}
    correct: dict[str, bool] = {}
    for done, proxy in enumerate(VIEWERS):
        table = _read_view(config, run, proxy)
        nodes = nodes_of(table)
        probe = LinearProbe.fit(nodes.embedding, nodes.label, classes)
        tensors |= {f"{proxy}.{name}": value for name, value in probe.tensors().items()}
        statistics = probe.statistics(nodes.embedding, nodes.label)
        score = statistics[OUTPUTS[config.score]]
        ids = table["sample_id"].to_pylist()
        # that of the proxies: none was trained on the sample, but the probe is fitted to it
        right = proxy_is_right(nodes)
        assert right is not None, "the proxies' statistics are in every file of embeddings"
        correct |= zip(ids, right.tolist(), strict=True)
        labels |= zip(ids, nodes.label.tolist(), strict=True)
        for sample_id, value in zip(ids, score, strict=True):
            by_proxy.setdefault(sample_id, np.full(cross_fit.parts, np.nan))[proxy] = value
        step(done + 1, len(VIEWERS) + 1)
    _write_assessment(config, run, samples, by_proxy, labels, correct)
    storage.write_bytes(run.probe_weights, save(tensors))
    step(len(VIEWERS) + 1, len(VIEWERS) + 1)


def _read_view(config: Config, run: Run, proxy: int) -> pa.Table:
    """Read the samples of the probe of one viewer, in the canonical order."""
    cross_fit = _cross_fit(config)

    def read(name: str) -> pa.Table:
        table = read_probe_rows(run, name, config.seed)
        part = cross_fit.part_of(table["sample_id"].to_pylist())
        viewed = table.filter(pa.array(cross_fit.is_viewed(part, proxy)))
        return as_seen_by(run, name, viewed, proxy)

    with ThreadPoolExecutor(READERS) as threads:
        tables = list(threads.map(read, sorted(run.done("embeddings"))))
    table = pa.concat_tables(tables)
    return table.take(pa.array(canonical_order(table["sample_id"].to_pylist()), pa.int64()))


def _write_assessment(
    config: Config,
    run: Run,
    samples: int,
    by_proxy: dict[str, np.ndarray],
    labels: dict[str, int],
    correct: dict[str, bool],
) -> None:
    """Write the stability of the scores, and the accuracy of the proxies on unseen samples.

    There is no fidelity, learning curve or interval to assess.
    """
    from raypipe.assessment.fidelity import accuracy_figures
    from raypipe.assessment.intervals import Intervals
    from raypipe.assessment.learning_curve import LearningCurve
    from raypipe.assessment.rank_agreement import NO_AGREEMENT
    from raypipe.assessment.stability import stability

    every = list(by_proxy)
    ids = [every[row] for row in canonical_order(every)]
    label = np.array([labels[sample_id] for sample_id in ids])
    stable = stability(
        np.stack([by_proxy[sample_id] for sample_id in ids]),
        label,
        config.extrapolate.seed,
        config.select.cuts_within_classes,
    )
    figures = NO_AGREEMENT.as_dict() | {
        "baselines": {},
        "n_fit": 0,
        "n_held": len(ids),
        **accuracy_figures(label, np.array([correct[sample_id] for sample_id in ids])),
        "note": NOTE,
        "judged_on": "direct",
    }
    curve = LearningCurve((), (), (), 0, note=NOTE)
    storage.write_json(run.learning_curve_file, curve.as_dict() | {"judged_on": "direct"})
    FidelityFile(
        measured=samples,
        keep=tuple(sorted(set(config.select.keep))),
        fidelity=figures,
        fidelity_seed=figures,
        intervals=Intervals(None, config.extrapolate.confidence, 0, 0, (1.0,), 0.0).state(),
        search={"kind": "none", "recall": None, "note": ""},
        stability=stable.as_dict(),
    ).write(run)


def _cross_fit(config: Config) -> CrossFit:
    cross_fit = CrossFit.of(config)
    assert cross_fit is not None, "the configuration requires it for scores from embeddings"
    return cross_fit


def load_probes(run: Run) -> dict[int, LinearProbe]:
    """Load the probes by viewer."""
    from safetensors.numpy import load

    from raypipe.scores.linear_probe import LinearProbe

    tensors = load(storage.read_bytes(run.probe_weights))
    return {
        proxy: LinearProbe.from_tensors(
            {
                name.removeprefix(f"{proxy}."): value
                for name, value in tensors.items()
                if name.startswith(f"{proxy}.")
            }
        )
        for proxy in VIEWERS
    }


def read_views(config: Config, run_uri: str, fragment: str) -> Batch:
    """Read what the viewers see of a fragment; no rows when all were rejected. Runs in a task.

    Returns
    -------
    Batch
        sample_id, label, viewer [n, 2] and embedding [n, 2, d].
    """
    run, cross_fit = Run(run_uri), _cross_fit(config)
    table = storage.read_table(run.embedding_shard(fragment), ["sample_id", "label", "embedding"])
    ids = table["sample_id"].to_pylist()
    part = cross_fit.part_of(ids)
    viewers = np.array([cross_fit.viewers(number) for number in range(cross_fit.parts)])[part]
    nodes = nodes_of(table)
    embedding = np.zeros((len(ids), 2, nodes.embedding.shape[1]), np.float32)
    for proxy in VIEWERS:
        rows, position = np.nonzero(viewers == proxy)
        if len(rows):
            viewed = as_seen_by(run, fragment, table.take(pa.array(rows)), proxy)
            embedding[rows, position] = nodes_of(viewed).embedding
    return {
        "sample_id": np.array(ids),
        "label": nodes.label.astype(np.int32),
        "viewer": viewers.reshape(-1, 2),
        "embedding": embedding,
    }


class ProbeActor:
    """Scores whole fragments by the probes; writes one score shard per fragment."""

    def __init__(self, worker: WorkerContext) -> None:
        from raypipe.vision.devices import set_threads

        set_threads(worker.threads)
        self._run, self._watch = worker.run, Stopwatch()
        self._statistic = OUTPUTS[worker.config.score]
        self._probes = load_probes(self._run)

    def __call__(self, fragment: str, batch: Batch) -> UnitResult:
        label, ids = batch["label"], batch["sample_id"].tolist()
        score = np.zeros((len(ids), 2), np.float64)
        for proxy, probe in self._probes.items():
            rows, position = np.nonzero(batch["viewer"] == proxy)
            if len(rows):
                embedding = batch["embedding"][rows, position]
                values = probe.statistics(embedding, label[rows].astype(np.int64))
                score[rows, position] = values[self._statistic]
        mean = score.mean(1).astype(np.float32)
        table = pa.table(
            {
                "sample_id": pa.array(ids, pa.string()),
                "label": pa.array(label, pa.int32(), mask=label < 0),
            }
        )
        scores = dict(zip(ids, mean.tolist(), strict=True))
        write_scores(self._run, fragment, table, mean, np.zeros_like(mean), scores)
        return UnitResult(fragment, len(ids), cpu_seconds=self._watch.lap())
