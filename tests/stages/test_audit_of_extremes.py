"""The audit of extreme predictions, in runs in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers import QUIET, score_files
from nights import Place, in_process

from raypipe import storage
from raypipe.assessment.intervals import Intervals
from raypipe.distributed.context import Context
from raypipe.pipeline import execute
from raypipe.runs.ledger import StageRecord
from raypipe.runs.measured_scores import measured_scores
from raypipe.runs.partition import proxy_parts
from raypipe.runs.run import Run
from raypipe.stages.extrapolate.predictions import read_extremes, read_predictions
from raypipe.stages.measure.extra_samples import can_measure, measure_samples

ONE_PROXY = ("extrapolate.method=knn", "seed.audit=60")
CROSS_FIT = (
    "proxy.parts=3",
    "measure.scores=[moso]",
    "extrapolate.method=knn",
    "trust.min_stability=-1",
)
COUNT = 8  # few enough to be found wherever floats round otherwise


@pytest.fixture(scope="module", params=[ONE_PROXY, CROSS_FIT], ids=["one proxy", "cross-fitting"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A finished run with an audit of `COUNT` extremes. Tests must not change it."""
    place = Place(tmp_path_factory.mktemp("extremes"))
    for number in range(4):
        place.add(number)
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch)
        execute(_config(place, request.param), until="extrapolate", progress=QUIET)
    return place


@pytest.fixture
def overrides(finished: Place) -> tuple[str, ...]:
    """The settings of the run."""
    return CROSS_FIT if finished.run.config().proxy.cross_fits else ONE_PROXY


@pytest.fixture
def copy(finished: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A copy of the run that a test can change."""
    in_process(monkeypatch)
    return finished.copy(tmp_path / "run")


def _config(place: Place, overrides: tuple[str, ...], count: int = COUNT) -> Any:
    return place.config(*overrides, f"extrapolate.audit_extremes={count}")


def _rows(run: Run) -> dict[str, dict[str, Any]]:
    tables = [table for _, table in storage.iter_tables(run.scores_folder)]
    return {row["sample_id"]: row for table in tables for row in table.to_pylist()}


def _fidelity(run: Run) -> dict[str, Any]:
    return dict(run.ledger()["extrapolate"].detail["fidelity"])


def test_without_checkpoints_nothing_can_be_measured(copy: Place) -> None:
    run = copy.run
    assert can_measure(run.config(), run)
    for part in proxy_parts(run):
        storage.delete(run.path(part.checkpoints, part.trained.files[0]))
    assert not can_measure(run.config(), run)


def test_audited_samples_are_extreme_and_keep_their_predicted_scores(finished: Place) -> None:
    run, scores = finished.run, _rows(finished.run)
    found, extremes = read_predictions(run, "extremes"), read_extremes(run)
    assert extremes is not None and len(found.ids) == COUNT
    zone = extremes.zone
    others = [row for row in scores.values() if not row["measured"]]
    extreme = {
        row["sample_id"] for row in others if abs(row["score"] - zone.middle) > zone.distance
    }
    assert set(found.ids) < extreme
    assert (zone.inside, zone.outside) == (len(extreme), len(others) - len(extreme))
    for sample_id, predicted in zip(found.ids, found.predictions.predicted, strict=True):
        assert scores[sample_id]["score"] == np.float32(predicted)
    assert not set(measured_scores(run, run.config().score, "audit")) & set(found.ids)
    assert not [shard for shard in run.done("seed") if shard.startswith("extra-")]


def test_any_samples_are_measured_as_the_audit_set_was(copy: Place) -> None:
    run, config = copy.run, copy.run.config()
    expected = measured_scores(run, config.score, "audit")
    fragment_of = {
        sample_id: name.removesuffix(".parquet")
        for name, table in storage.iter_tables(run.scores_folder)
        for sample_id in table["sample_id"].to_pylist()
    }
    ids = sorted(expected, reverse=True)
    samples = pa.table(
        {
            "sample_id": ids,
            "label": [0] * len(ids),  # the source has the labels
            "fragment": [fragment_of[sample_id] for sample_id in ids],
        }
    )
    context = Context(config, run, QUIET)
    found = measure_samples(context, StageRecord(), run.fragments(), samples)
    scores = dict(zip(found["sample_id"].to_pylist(), found[config.score].to_pylist(), strict=True))
    assert set(scores) == set(expected) and len(scores) > 30
    for sample_id, score in expected.items():
        assert scores[sample_id] == pytest.approx(score, rel=1e-4, abs=1e-7)
    assert not [shard for shard in run.done("seed") if shard.startswith("extra-")]


def test_the_audit_changes_figures_and_nothing_else(
    copy: Place, overrides: tuple[str, ...]
) -> None:
    with_audit, before = _fidelity(copy.run), score_files(copy.run.uri)
    states = [storage.read_json(copy.run.fidelity_file)["intervals"]]
    execute(_config(copy, overrides, 0), until="extrapolate", progress=QUIET)
    states.append(storage.read_json(copy.run.fidelity_file)["intervals"])
    without = _fidelity(copy.run)
    assert score_files(copy.run.uri) == before
    assert Intervals.from_state(states[0]) == Intervals.from_state(states[1])
    assert read_extremes(copy.run) is None
    assert (with_audit["n_extremes"], without["n_extremes"]) == (COUNT, 0)
    assert with_audit["n_held"] == without["n_held"]
    assert with_audit["baselines"] == without["baselines"]
    for name in ("rmse", "pearson", "spearman", "coverage"):
        assert with_audit[name] != without[name], name
    assert with_audit["coverage"]["n"] == without["coverage"]["n"] + COUNT
    # and back: the same samples are drawn
    execute(_config(copy, overrides), until="extrapolate", progress=QUIET)
    assert _fidelity(copy.run) == with_audit


def test_an_interrupted_audit_is_resumed(
    copy: Place, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, calls = _fidelity(copy.run), []

    def stop(*arguments: Any) -> None:
        calls.append(arguments)
        raise RuntimeError("stopped")

    execute(_config(copy, overrides, 0), until="extrapolate", progress=QUIET)
    # killed before the samples are predicted, and after, before the figures
    for function in ("_write", "write_fidelity"):
        with monkeypatch.context() as patch:
            patch.setattr(f"raypipe.stages.extrapolate.extremes.{function}", stop)
            with pytest.raises(RuntimeError, match="stopped"):
                execute(_config(copy, overrides), until="extrapolate", progress=QUIET)
        assert copy.run.ledger()["extrapolate"].state == "failed"
    assert len(calls) == 2
    execute(_config(copy, overrides), until="extrapolate", progress=QUIET)
    assert _fidelity(copy.run) == expected
    assert copy.run.ledger()["extrapolate"].state == "done"


def test_a_finished_run_of_an_older_version_stays_as_it_is(
    copy: Place, overrides: tuple[str, ...]
) -> None:
    execute(_config(copy, overrides, 0), until="extrapolate", progress=QUIET)
    records = copy.run.ledger()
    del records["extrapolate"].detail["audit_extremes"]
    copy.run.write_ledger(records)
    execute(copy.config(*overrides), until="extrapolate", progress=QUIET)
    assert read_extremes(copy.run) is None


def test_scores_that_cannot_be_measured_have_no_audit(finished: Place) -> None:
    assert _config(finished, CROSS_FIT).extreme_samples(600) == COUNT
    assert finished.config(*CROSS_FIT).extreme_samples(600) == 50
    assert finished.config(*CROSS_FIT, "seed.audit=70").extreme_samples(600) == 70
    assert finished.config(*CROSS_FIT, "seed.audit=0").extreme_samples(600) == 0
    for settings in (
        (*ONE_PROXY, "seed.audit=0"),
        ("extrapolate.method=gnn-published",),
        ("measure.scores=[tdds]", "proxy.epochs=12"),
        ("proxy.parts=3", "measure.loss.at=embeddings"),
    ):
        assert _config(finished, settings).extreme_samples(600) == 0, settings
