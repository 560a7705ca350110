"""Nights of runs with several proxies: new samples are scored as those of the run were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import score_files, stamps
from nights import Place, in_process
from test_night import by_id

from raypipe import storage
from raypipe.pipeline import execute
from raypipe.progress import Progress
from raypipe.runs.embeddings import as_seen_by, nodes_of, read_views
from raypipe.runs.proxy_roles import ProxyRoles
from raypipe.stages.extrapolate.probe import load_probes

CROSS_FIT = ("proxy.parts=3", "measure.loss.at=auto", "trust.min_stability=-1")
EXTRAPOLATED = (
    "proxy.parts=3",
    "measure.scores=[moso]",
    "extrapolate.method=knn",
    "trust.min_stability=-1",
)


class CrossFitPlace(Place):
    """A run of three proxies whose score comes from embeddings, or from MoSo."""

    def __init__(self, folder: Path, overrides: tuple[str, ...]) -> None:
        super().__init__(folder)
        self.overrides = overrides
        for number in range(4):
            self.add(number)
        execute(self.config(*overrides), progress=Progress(quiet=True))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Place:
    in_process(monkeypatch)
    return CrossFitPlace(tmp_path / "place", request.param)


@pytest.mark.parametrize("place", [CROSS_FIT], indirect=True, ids=["loss"])
def test_new_samples_are_scored_by_the_probes_of_the_run(place: CrossFitPlace) -> None:
    assert place.run.ledger()["proxy"].detail["removed"] == ["checkpoints", "trajectory"]
    written = {folder: stamps(place.run.uri, folder) for folder in ("proxy", "scores", "keep")}
    execute(place.config(*place.overrides), progress=Progress(quiet=True))  # nothing is missing
    assert {folder: stamps(place.run.uri, folder) for folder in written} == written
    place.night(0, *place.overrides)
    before = score_files(place.run.uri)
    place.add(4)
    night = place.night(1, *place.overrides)
    assert night.wrote_snapshot and night.exit_code == 0, night.advice
    assert "computed for every sample directly" in night.manifest["fidelity"]["note"]
    after, rows = score_files(place.run.uri), by_id(place.run.uri)
    assert all(after[name] == content for name, content in before.items())
    assert len(rows) == 750 and all(row["measured"] for row in rows.values())
    roles, probes = ProxyRoles.of(place.config(*place.overrides)), load_probes(place.run)
    fragment = next(name for name in place.run.done("views") if name not in _names(before))
    table = storage.read_table(place.run.embedding_shard(fragment))
    part = roles.part_of(table["sample_id"].to_pylist())
    total = np.zeros(len(table))
    for proxy, probe in probes.items():
        viewed = roles.is_viewed(part, proxy)
        nodes = nodes_of(
            as_seen_by(
                table.filter(viewed),
                read_views(place.run, fragment, roles.in_views([proxy])),
                [proxy],
            )
        )
        total[viewed] += probe.statistics(nodes.embedding, nodes.label)["loss"] / 2
    written = [rows[sample_id]["score"] for sample_id in table["sample_id"].to_pylist()]
    assert written == pytest.approx(total, rel=1e-4, abs=1e-6)


def _names(files: dict[str, bytes]) -> set[str]:
    return {Path(file).name.removesuffix(".parquet") for file in files}


@pytest.mark.parametrize("place", [EXTRAPOLATED], indirect=True, ids=["moso"])
def test_new_samples_are_predicted_by_the_extrapolator_of_their_part(place: CrossFitPlace) -> None:
    assert place.run.ledger()["extrapolate"].detail["fidelity"]["judged_on"] == "cross-fit"
    place.night(0, *place.overrides)
    before = score_files(place.run.uri)
    place.add(4)
    night = place.night(1, *place.overrides)
    assert night.wrote_snapshot, night.advice
    assert night.manifest["fidelity"]["n"] == 40
    after, rows = score_files(place.run.uri), by_id(place.run.uri)
    assert all(after[name] == content for name, content in before.items())
    assert len(rows) == 750
    assert all(row["lower"] < row["score"] < row["upper"] for row in rows.values())
