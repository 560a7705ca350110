"""A source without labels in the whole pipeline, in this process except for one run on Ray."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers import QUIET, by_id, digit_pngs, small_config, stamps
from nights import in_process
from safetensors.numpy import load
from serial import run_tasks

import raypipe
from raypipe import storage
from raypipe.api import load_scores
from raypipe.config import Config, SourceSettings, apply_overrides, parse_config
from raypipe.config.evaluate import EvaluateSettings
from raypipe.distributed.context import Context
from raypipe.errors import RunError, SourceError
from raypipe.evaluation.driver import evaluate
from raypipe.nightly import run_night
from raypipe.pipeline import execute
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.pseudo_labels import load_labeller
from raypipe.runs.rehearsal import inner_run
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import read_images, read_shard, shard_labels
from raypipe.runs.status import describe_result, describe_run
from raypipe.sources import ClassMap, RawSample
from raypipe.stages.rehearse import _write_half
from raypipe.vision.decode import decode_batch

SETTINGS: dict[str, Any] = {
    "source": {"format": "parquet", "fragment_samples": 75, "label_column": None},
    "seed": {"fraction": 0.4},
    "pseudo_labels": {"clusters": 6, "epochs": 2, "batch_size": 64, "restarts": 3},
    "proxy": {
        "model": "small",
        "image_size": 8,
        "epochs": 1,
        "checkpoints": 1,
        "parts": 1,
        "flip": False,
    },
    "measure": {"scores": ["loss"], "loss": {"at": "checkpoints"}, "recalibrate": False},
    "extrapolate": {"method": "knn-published", "folds": 1, "judge_published": False},
    "trust": {"min_spearman": -1, "min_accuracy_over_chance": -1},
    "select": {"keep": [0.5], "strategy": "balanced"},
    "nightly": {"audit": 40, "drift_samples": 100},
}


def config_of(folder: Path, *overrides: str) -> Config:
    data = {
        "run": f"{folder}/run",
        **SETTINGS,
        "source": {**SETTINGS["source"], "uri": f"{folder}/data"},
    }
    return parse_config(apply_overrides(data, overrides))


def add(folder: Path, number: int, rows: int = 150) -> None:
    images = digit_pngs(1797)[0][number * rows : (number + 1) * rows]
    storage.write_table(
        f"{folder}/data/part-{number}.parquet", pa.table({"image": images}), row_group_size=75
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over Parquet files without a column of labels."""
    folder = tmp_path_factory.mktemp("unlabelled")
    for number in range(3):
        add(folder, number)
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch)
        execute(config_of(folder), progress=QUIET)
    return folder


def own_labels(run: Run, images: list[bytes]) -> list[int]:
    """Return pseudo-labels of encoded images by the network and the clusters of a run."""
    pixels, _ = decode_batch([RawSample("x", image, None) for image in images], 8, 1 << 20)
    return load_labeller(run, "cpu")(pixels).tolist()


def test_every_sample_has_the_label_of_its_cluster(whole: Path) -> None:
    run, rows = Run(f"{whole}/run"), by_id(f"{whole}/run")
    names = [f"part-{number // 150}.parquet#{number % 150}" for number in range(450)]
    assert [rows[name]["label"] for name in names] == own_labels(run, digit_pngs(450)[0])
    assert run.classes().names == tuple(f"cluster-{number}" for number in range(6))
    seed = SeedManifest.read(run)
    drawn = [read_shard(run, shard) for shard in (*seed.shards, *seed.audit_shards)]
    told = {
        name: label
        for ids, _, labels in drawn
        for name, label in zip(ids, labels.tolist(), strict=True)
    }
    assert len(told) > seed.samples and all(
        rows[name]["label"] == label for name, label in told.items()
    )
    assert (
        list(seed.per_class)
        == np.bincount(
            [told[name] for shard in seed.shards for name in read_images(run, shard)[0]],
            minlength=6,
        ).tolist()
    )
    assert all((read_images(run, shard)[2] == -1).all() for shard in seed.shards), (
        "the seed set itself has none"
    )
    for shard, (ids, _, labels) in zip(seed.shards, drawn):
        table = shard_labels(run, shard)  # the labels that trajectories are scored with
        assert (table["sample_id"].to_pylist(), table["label"].to_pylist()) == (
            ids,
            labels.tolist(),
        )


def test_half_of_the_seed_set_keeps_its_pseudo_labels(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole / "run", tmp_path / "run")
    in_process(monkeypatch)
    monkeypatch.setattr("raypipe.distributed.tasks.run_tasks", run_tasks)
    run = Run(f"{tmp_path}/run")
    inner, seed = inner_run(run), SeedManifest.read(run)
    _write_half(Context(config_of(whole), run, QUIET), StageRecord(), seed, inner)
    assert inner.classes() == ClassMap(run.classes().names, numeric=False), (
        "there they are labels like any other"
    )
    told = {
        name: label
        for ids, _, labels in map(run_shard(run), seed.shards)
        for name, label in zip(ids, labels.tolist())
    }
    half = {
        name: label
        for ids, _, labels in map(run_shard(inner), seed.shards)
        for name, label in zip(ids, labels.tolist())
    }
    assert 0 < len(half) < len(told) and half.items() <= told.items()
    assert (
        list(SeedManifest.read(inner).per_class)
        == np.bincount(list(half.values()), minlength=6).tolist()
    )


def run_shard(run: Run) -> Any:
    return functools.partial(read_shard, run)


def test_clusters_stand_for_classes_from_the_proxy_to_the_report(whole: Path) -> None:
    run, scores = Run(f"{whole}/run"), load_scores(f"{whole}/run")
    assert storage.read_json(run.path("proxy", "proxy.json"))["classes"] == 6
    kept = storage.read_table(run.path("keep", "keep-0.50.parquet"))
    sizes, left = (np.bincount(table["label"].to_numpy(), minlength=6) for table in (scores, kept))
    assert np.abs(left - sizes / 2).max() <= 1, "the strategy balanced takes half of every cluster"
    summary = storage.read_json(run.path("report", "summary.json"))
    assert "pseudo-labels from 6 clusters" in summary["source"]["pseudo_labels"]
    assert [entry["name"] for entry in summary["classes"]] == list(run.classes().names)
    page = storage.read_bytes(run.path("report", "index.html")).decode()
    assert "in 6 clusters" in page and "no true labels were used" in page
    assert any(
        "pseudo-labels from 6 clusters; no true labels were used" in line
        for line in describe_result(run)
    )
    assert any(line.startswith("label       done") for line in describe_run(run.uri))


def test_what_a_setting_redoes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole / "run", tmp_path / "run")
    in_process(monkeypatch)
    here = f"run={tmp_path}/run"
    before = {
        folder: stamps(f"{tmp_path}/run", folder)
        for folder in ("index", "seed", "labels", "proxy", "scores")
    }
    execute(config_of(whole, here), progress=QUIET)
    assert all(stamps(f"{tmp_path}/run", folder) == found for folder, found in before.items()), (
        "nothing, where nothing changed"
    )
    run = execute(config_of(whole, here, "pseudo_labels.clusters=4"), progress=QUIET)
    assert all(stamps(run.uri, folder) == before[folder] for folder in ("index", "seed"))
    assert not before["labels"].items() & stamps(run.uri, "labels").items()
    assert storage.read_json(run.path("proxy", "proxy.json"))["classes"] == 4
    assert set(load_scores(run.uri)["label"].to_pylist()) == set(range(4))
    with_labels = config_of(whole, here, "pseudo_labels.clusters=null", "source.label_column=auto")
    with pytest.raises(SourceError, match="no column is clearly the label"):
        execute(with_labels, progress=QUIET)


def test_turtle_finds_the_labels_where_it_is_asked_to(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    overrides = (
        "pseudo_labels.method=turtle",
        "pseudo_labels.iterations=30",
        "pseudo_labels.epochs=1",
    )
    run = execute(
        config_of(whole, f"run={tmp_path}/run", *overrides), until="label", progress=QUIET
    )
    assert run.record("label").detail["method"] == "turtle"
    found = load(storage.read_bytes(run.path("labels", "clusters.safetensors")))
    assert np.abs(found["bias"]).max() > 0, "k-means has no bias"
    assert set(storage.names(run.path("labels"))) >= {"labels.json", "network.safetensors"}
    assert "state.safetensors" not in storage.names(run.path("labels"))


def test_a_source_that_grows_at_night(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    in_process(monkeypatch)
    execute(config_of(folder), overwrite=True, progress=QUIET)  # the data moved with the run
    labels, old = stamps(f"{folder}/run", "labels"), by_id(f"{folder}/run")
    run_night(config_of(folder), progress=QUIET)
    add(folder, 3)
    night = run_night(config_of(folder), progress=QUIET)
    assert night.manifest["samples"]["new"] == 150 and night.manifest["fidelity"]["n"] == 40
    rows = by_id(f"{folder}/run")
    new = [rows[f"part-3.parquet#{number}"]["label"] for number in range(150)]
    assert new == own_labels(Run(f"{folder}/run"), digit_pngs(600)[0][450:])
    assert all(rows[name] == row for name, row in old.items())
    assert stamps(f"{folder}/run", "labels") == labels


def test_no_list_is_compared_by_training_on_pseudo_labels(whole: Path) -> None:
    with pytest.raises(
        RunError, match="the labels are pseudo-labels, but an evaluation trains with true labels"
    ):
        evaluate(Run(f"{whole}/run"), SourceSettings(uri="digits://"), EvaluateSettings())


@pytest.mark.ray
def test_labels_that_are_there_are_not_read(cluster: str, tmp_path: Path) -> None:
    """On Ray, with a trajectory score; the labels of the digits must have no influence."""
    config = small_config(
        f"{tmp_path}/run",
        "source.label_column=null",
        "source.limit=300",
        "pseudo_labels.clusters=5",
        "pseudo_labels.epochs=2",
        "pseudo_labels.restarts=2",
        "proxy.epochs=2",
        "proxy.cpus_per_worker=1",
        "measure.scores=[el2n]",
        "extrapolate.method=knn",
    )
    result = raypipe.run(config, progress=QUIET)
    run, rows = Run(result.uri), by_id(result.uri)
    assert len(rows) == 300 and {row["label"] for row in rows.values()} == set(range(5))
    from raypipe.sources.digits import read_digits

    images = np.repeat(read_digits()[0][:300, None], 3, 1)
    assert [rows[f"digits/{number:04d}"]["label"] for number in range(300)] == load_labeller(
        run, "cpu"
    )(images).tolist()
    ledger = run.ledger()
    assert (
        ledger["label"].cpu_seconds > 0
        and sum(ledger["label"].detail["per_class"]) == ledger["seed"].samples
    )
    assert storage.read_json(run.path("proxy", "proxy.json"))["classes"] == 5
    assert "no true labels were used" in result.summary["source"]["pseudo_labels"]
