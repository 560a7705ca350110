"""Replaced labels: which ones, by what, and that a run sees the same label."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import serial
from helpers import QUIET, small_config
from scored import scored_run
from serial import no_ray  # noqa: F401

import raypipe
from raypipe import storage
from raypipe.cli import main
from raypipe.config import Config
from raypipe.errors import RunError, SourceError
from raypipe.pipeline import execute
from raypipe.runs.keep_files import keep_metadata
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import read_shard
from raypipe.sources.digits import read_digits
from raypipe.sources.noise import LabelNoise
from raypipe.stages.embed import stage as embed
from raypipe.stages.index.stage import IndexStage
from raypipe.stages.measure import extra_samples

IDS = [f"folder/{number}.jpg" for number in range(30_000)]
NOISE = "source.inject_noise=0.2"


def test_the_share_that_is_wanted_is_replaced_by_all_other_classes_alike() -> None:
    noise = LabelNoise(0.2)
    given = np.array([noise.wrong(sample_id, 3, 5) for sample_id in IDS])
    replaced = np.array([noise.replaced(sample_id) for sample_id in IDS])
    assert abs(replaced.mean() - 0.2) < 0.01
    assert ((given != 3) == replaced).all()
    assert (
        np.abs(np.bincount(given, minlength=5)[[0, 1, 2, 4]] / replaced.sum() - 0.25) < 0.02
    ).all()
    assert noise.wrong(IDS[0], -1, 5) == -1


def test_the_true_label_follows_from_the_wrong_one() -> None:
    noise = LabelNoise(0.5, seed=3)
    for label, sample_id in enumerate(IDS[:200]):
        assert noise.true(sample_id, noise.wrong(sample_id, label % 7, 7), 7) == label % 7


def test_another_seed_replaces_others_and_a_larger_share_more() -> None:
    first, second, more = ({name for name in IDS if noise.replaced(name)}
                           for noise in (LabelNoise(0.2), LabelNoise(0.2, 1),
                                         LabelNoise(0.3)))  # fmt: skip
    assert abs(len(first & second) / len(first) - 0.2) < 0.03  # as if they were independent
    assert first < more


def _seen(config: Config) -> dict[str, int]:
    """Labels by id as the seed stage, the embed stage and a nightly audit read them."""
    run, labels = Run(config.run), dict[str, int]()
    serial.index(config)
    serial.seed(config)
    for shard in [*SeedManifest.read(run).shards, *SeedManifest.read(run).audit_shards]:
        ids, _, label = read_shard(run, shard)
        labels.update(zip(ids, label.tolist(), strict=True))
    drawn = dict(labels)
    for fragment in run.fragments():
        block = embed._read(config, run.uri, False, fragment)
        labels.update(zip(block["sample_id"].tolist(), block["label"].tolist(), strict=True))
        night = extra_samples._read(config, run.uri, (fragment, block["sample_id"].tolist())).images
        assert {name: label for name, (label, _) in night.items()} == {
            name: labels[name] for name in block["sample_id"]
        }
    assert drawn and drawn.items() <= labels.items()
    return labels


@pytest.mark.usefixtures("no_ray")
def test_everything_sees_the_same_wrong_labels_however_the_source_is_cut(tmp_path: Path) -> None:
    config = small_config(f"{tmp_path}/a", NOISE, "source.limit=300")
    labels = _seen(config)
    noise, true = LabelNoise(0.2), read_digits()[1]
    assert labels == {
        f"digits/{row:04d}": noise.wrong(f"digits/{row:04d}", int(true[row]), 10)
        for row in range(300)
    }
    assert 30 < sum(label != true[int(name[-4:])] for name, label in labels.items()) < 90
    other = small_config(f"{tmp_path}/b", NOISE, "source.limit=300", "source.fragment_samples=77")
    assert _seen(other) == labels
    assert storage.read_json(f"{tmp_path}/a/index/classes.json")["inject_noise"] == {
        "share": 0.2,
        "seed": 0,
    }


@pytest.mark.usefixtures("no_ray")
def test_a_run_without_has_the_fingerprint_it_always_had(tmp_path: Path) -> None:
    plain = IndexStage().settings(small_config(str(tmp_path)))
    assert not {"inject_noise", "noise_seed"} & set(plain)
    noisy = IndexStage().settings(small_config(str(tmp_path), NOISE, "source.noise_seed=2"))
    assert (noisy["inject_noise"], noisy["noise_seed"]) == (0.2, 2)


@pytest.mark.usefixtures("no_ray")
def test_a_source_without_labels_is_refused(tmp_path: Path) -> None:
    config = small_config(
        str(tmp_path),
        NOISE,
        "source.uri=synthetic://?samples=30&classes=1&size=8",
        "source.format=synthetic",
    )
    with pytest.raises(
        SourceError, match=r"inject_noise: .* has 1 classes, so no label can be replaced"
    ):
        serial.index(config)


def test_what_came_of_it_says_so_wherever_it_is_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = scored_run(f"{tmp_path}/run", "digits://", limit=120, inject_noise=0.2)
    warning = (
        "20 % of the labels were replaced to test the detection of label noise: "
        "do not train on this run's lists"
    )
    assert keep_metadata(run.path("keep", "keep-0.50.parquet"))["inject_noise"] == "0.2"
    with pytest.warns(UserWarning, match=warning):
        assert raypipe.KeepList(run.uri).metadata["inject_noise"] == 0.2
    with pytest.raises(SystemExit):
        main(["status", run.uri])
    assert f"WARNING     {warning}" in capsys.readouterr().out
    with pytest.raises(RunError, match=warning):
        raypipe.export(run.uri, None, "parquet", f"{tmp_path}/out", progress=QUIET)


def test_a_real_run_is_not_made_anew_with_wrong_labels(tmp_path: Path) -> None:
    real = scored_run(f"{tmp_path}/real", "digits://", limit=120)
    noisy = scored_run(f"{tmp_path}/noisy", "digits://", limit=120, inject_noise=0.1, noise_seed=4)
    for run, changes, words in (
        (real, [NOISE], "written with source.inject_noise 0;"),
        (noisy, [], "written with source.inject_noise 0.1 with noise_seed 4;"),
        (noisy, ["source.inject_noise=0.1"], "0.1 with noise_seed 4;"),
    ):
        before = storage.read_bytes(run.path("config.yaml"))
        with pytest.raises(
            RunError, match=f"{words} give a run with other label noise its own run folder"
        ):
            execute(small_config(run.uri, *changes), progress=QUIET)
        assert storage.read_bytes(run.path("config.yaml")) == before
