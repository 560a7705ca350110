from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from raypipe import storage
from raypipe.config import ExtrapolateSettings
from raypipe.distributed.actor_pool import WorkerContext
from raypipe.distributed.cluster import Cluster
from raypipe.errors import ResourceError
from raypipe.extrapolators.base import Extrapolator
from raypipe.extrapolators.neighbours import NeighbourIndex
from raypipe.runs.run import Run
from raypipe.stages.extrapolate.fidelity_file import NO_SEARCH, search_notes, search_of
from raypipe.stages.extrapolate.measured import read_samples
from raypipe.stages.extrapolate.stage import ScoreActor, _pool


def test_what_is_said_of_the_neighbour_search() -> None:
    classes = {"1": {"note": "raised"}, "0": {"note": ""}}
    assert search_notes({"note": "exact", "classes": classes}, ("", "dog")) == [
        "exact",
        "raised (class dog)",
    ]
    assert search_notes({"note": ""}, ()) == []


def test_a_gpu_is_asked_for_where_the_settings_say_so() -> None:
    with_gpus, without = Cluster(32, 2, 2, 16, False), Cluster(32, 0, 2, 16, False)
    pool = _pool(with_gpus, ExtrapolateSettings(use_gpu=True))
    assert (pool.num_gpus, pool.max_actors, pool.tasks) == (0.125, 16, False)
    assert _pool(with_gpus, ExtrapolateSettings(use_gpu=True, max_actors=3)).max_actors == 3
    assert _pool(with_gpus, ExtrapolateSettings()) == with_gpus.cpu_pool("auto")
    assert _pool(with_gpus, ExtrapolateSettings(use_gpu=True), exact=False) == with_gpus.cpu_pool(
        "auto"
    )
    with pytest.raises(ResourceError, match="has no GPU"):
        _pool(without, ExtrapolateSettings(use_gpu=True))


@pytest.mark.ray
def test_scores_are_the_same_with_neighbours_from_a_gpu(
    finished: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    run = Run(str(tmp_path / "run"))
    fragment = sorted(run.done("scores"))[0]
    file = run.path("scores", f"{fragment}.parquet")
    expected = storage.read_table(file)
    storage.delete(file)
    searched: list[int] = []

    def on_a_cpu(self: Extrapolator, device: str) -> None:
        assert device == "cuda"
        self._scored.device = "cpu:0"

    by_product = NeighbourIndex._product_candidates

    def counted(self: NeighbourIndex, queries: np.ndarray, wanted: int) -> np.ndarray:
        searched.append(len(queries))
        return by_product(self, queries, wanted)

    monkeypatch.setattr(Extrapolator, "search_on", on_a_cpu)
    monkeypatch.setattr(NeighbourIndex, "_product_candidates", counted)
    worker = WorkerContext(run.config(), run.uri, 1, gpu=True)
    result = ScoreActor(worker)(fragment, read_samples(run.config(), run.uri, fragment))
    assert storage.read_table(file).equals(expected)
    assert len(expected) == result.samples and result.gpu_seconds > 0
    assert sum(searched) == 2 * len(expected), "for the predictions and for their doubt"


def test_an_extrapolator_without_neighbours_has_no_search(tmp_path: Path) -> None:
    file = f"{tmp_path}/model.json"
    cases: list[dict[str, object]] = [{}, {"search": "none"}, {"search": {"kind": "exact"}}]
    for stored in cases:
        storage.write_json(file, stored)
        assert search_notes(search_of(file), []) == [] and search_of(file) == NO_SEARCH
    search = {"kind": "exact", "recall": 1.0, "note": "slow"}
    storage.write_json(file, {"search": search})
    assert search_of(file) == search
