"""Scores of linear probes on the embeddings, for every sample: nothing is extrapolated.

A probe is fitted to the embeddings by each viewer (`raypipe.runs.proxy_roles`), from samples that
the viewer was not trained on. A sample's score is the mean over its viewers: two of each repeat.
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
from raypipe.runs.embeddings import as_seen_by, nodes_of, read_probe_rows, read_views
from raypipe.runs.proxy_roles import ProxyRoles
from raypipe.runs.run import Run
from raypipe.runs.score_shards import write_scores
from raypipe.runs.unit_result import UnitResult
from raypipe.selection.hashing import canonical_order
from raypipe.stages.extrapolate.fidelity_file import NO_SEARCH, FidelityFile
from raypipe.stages.extrapolate.measured import READERS, in_canonical_order
from raypipe.stages.measure.outputs import OUTPUTS

if TYPE_CHECKING:
    from raypipe.scores.linear_probe import LinearProbe

NOTE = "every sample was scored directly"


def fit_probes(config: Config, run: Run, samples: int, step: ProgressCallback) -> None:
    """Write the probes, and how well the scores of the viewers agree."""
    from safetensors.numpy import save

    from raypipe.assessment.held_out import proxy_is_right
    from raypipe.scores.linear_probe import LinearProbe

    roles, classes = ProxyRoles.of(config), len(run.classes().names)
    tensors: dict[str, np.ndarray] = {}
    by_proxy: dict[str, np.ndarray] = {}
    labels: dict[str, int] = {}
    correct: dict[str, bool] = {}
    for done, proxy in enumerate(roles.embedders):
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
            by_proxy.setdefault(sample_id, np.full(roles.proxies, np.nan))[proxy] = value
        step(done + 1, len(roles.embedders) + 1)
    _write_assessment(config, run, samples, by_proxy, labels, correct)
    storage.write_bytes(run.probe_weights, save(tensors))
    step(len(roles.embedders) + 1, len(roles.embedders) + 1)


def _read_view(config: Config, run: Run, proxy: int) -> pa.Table:
    """Read the samples of the probe of one viewer, in the canonical order."""
    roles = ProxyRoles.of(config)

    def read(name: str) -> pa.Table:
        table = read_probe_rows(run, name, config.seed)
        part = roles.part_of(table["sample_id"].to_pylist())
        viewed = table.filter(pa.array(roles.is_viewed(part, proxy), pa.bool_()))
        return as_seen_by(viewed, read_views(run, name, roles.in_views([proxy])), [proxy])

    with ThreadPoolExecutor(READERS) as threads:
        tables = list(threads.map(read, sorted(run.done("embeddings"))))
    return in_canonical_order(pa.concat_tables(tables))


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
        config.proxy.parts,
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
        search=dict(NO_SEARCH),
        stability=stable.as_dict(),
    ).write(run)


def load_probes(run: Run) -> dict[int, LinearProbe]:
    """Load the probes by viewer."""
    from safetensors.numpy import load

    from raypipe.scores.linear_probe import LinearProbe

    by_viewer: dict[int, dict[str, np.ndarray]] = {}
    for name, values in load(storage.read_bytes(run.probe_weights)).items():
        viewer, _, tensor = name.partition(".")
        by_viewer.setdefault(int(viewer), {})[tensor] = values
    return {
        viewer: LinearProbe.from_tensors(tensors) for viewer, tensors in sorted(by_viewer.items())
    }


def read_viewed(config: Config, run_uri: str, fragment: str) -> Batch:
    """Read what the viewers see of a fragment; no rows when all were rejected. Runs in a task.

    Returns
    -------
    Batch
        sample_id, label, viewer [n, v] and embedding [n, v, d], with v viewers of each sample.
    """
    run, roles = Run(run_uri), ProxyRoles.of(config)
    table = storage.read_table(run.embedding_shard(fragment), ["sample_id", "label", "embedding"])
    ids = table["sample_id"].to_pylist()
    part = roles.part_of(ids)
    viewers = np.array([roles.viewers(number) for number in range(roles.parts)])[part]
    nodes, views = nodes_of(table), read_views(run, fragment, roles.in_views(roles.embedders))
    by_proxy = next(iter(views.values()), table)["embedding"]
    embedding = np.zeros((*viewers.shape, by_proxy.type.list_size), np.float32)
    for proxy in roles.embedders:
        rows, position = np.nonzero(viewers == proxy)
        if len(rows):
            viewed = as_seen_by(table.take(pa.array(rows)), views, [proxy])
            embedding[rows, position] = nodes_of(viewed).embedding
    return {
        "sample_id": np.array(ids),
        "label": nodes.label.astype(np.int32),
        "viewer": viewers,
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
        score = np.zeros(batch["viewer"].shape, np.float64)
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
