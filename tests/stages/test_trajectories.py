"""The trajectory on disk: what the training writes, and scores that no cut of it changes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from raypipe import storage
from raypipe.runs.manifests import ProxyManifest, ProxyOfPart, TrainedProxy
from raypipe.runs.run import Run
from raypipe.scores.registry import SCORES, trajectory_score
from raypipe.scores.trajectory import STATISTICS, ScoreError, Trajectory
from raypipe.stages.measure import trajectories
from raypipe.stages.measure.trajectories import (
    probabilities_of,
    read_groups,
    read_trajectory,
    score_rows,
)
from raypipe.stages.proxy.predictions import predictions, write_trajectory

EPOCHS, SAMPLES, CLASSES = 13, 90, 7
OPTIONS: dict[str, dict] = {name: {} for name, info in SCORES.items() if info.needs == "trajectory"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, np.ndarray, torch.Tensor]:
    """A run with a trajectory of two workers with other rows in every epoch; its labels and logits."""
    run = Run(str(tmp_path_factory.mktemp("run")))
    random = np.random.default_rng(0)
    label = random.integers(0, CLASSES, SAMPLES)
    logits = torch.from_numpy(
        random.normal(0, 0.6, (EPOCHS, SAMPLES, CLASSES)).cumsum(0).astype(np.float32)
    )
    files = []
    for epoch in range(EPOCHS):
        order = random.permutation(SAMPLES)
        if epoch == 4:
            order = order[order != 33]  # missing in this epoch
        files.append([f"epoch-{epoch}-{rank}.parquet" for rank in range(2)])
        for rank, file in enumerate(files[-1]):
            batches = np.array_split(order[rank::2], 3)
            predicted = [
                predictions(rows, logits[epoch, rows], torch.from_numpy(label[rows]))
                for rows in batches
            ]
            write_trajectory(run.path("proxy", "trajectory", file), predicted, 16)
    storage.write_json(run.path("seed", "manifest.json"), {"shard_samples": [SAMPLES]})
    trained = TrainedProxy(EPOCHS, EPOCHS, tuple(map(tuple, files)), (), "")
    parts = (ProxyOfPart(SAMPLES, (SAMPLES,), trained),)
    ProxyManifest("small", CLASSES, 8, (), (), SAMPLES, 0, parts).write(run)
    return run, label, logits


def test_stored_numbers_are_those_of_the_probabilities(
    written: tuple[Run, np.ndarray, torch.Tensor],
) -> None:
    run, label, logits = written
    epoch = 2
    tables = [
        storage.read_table(run.path("proxy", "trajectory", f"epoch-{epoch}-{rank}.parquet"))
        for rank in range(2)
    ]
    table = pa.concat_tables(tables).sort_by("row")
    assert table.column_names == ["row", *STATISTICS, "probabilities"]
    probabilities = logits[epoch].double().softmax(1).numpy()
    np.testing.assert_allclose(probabilities_of(table), probabilities, rtol=1e-3, atol=1e-7)
    own, one_hot = probabilities[np.arange(SAMPLES), label], np.eye(CLASSES)[label]
    np.testing.assert_allclose(table["loss"], -np.log(own), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        table["margin"], np.log(own / (probabilities * (1 - one_hot)).max(1)), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        table["distance"], np.linalg.norm(probabilities - one_hot, axis=1), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        table["entropy"], -(probabilities * np.log(probabilities)).sum(1), rtol=1e-5, atol=1e-6
    )


def test_scores_do_not_depend_on_parts_and_are_those_of_the_whole(
    written: tuple[Run, np.ndarray, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, label, logits = written
    found = score_rows(run, 0, SAMPLES, label, OPTIONS)
    probabilities = logits.softmax(2).numpy()
    probabilities[4, 33] = np.nan
    whole = Trajectory.from_probabilities(probabilities, label)
    for (
        name,
        values,
    ) in found.items():  # float16 moves a probability by up to 1/2048 of it; only TDDS reads them
        np.testing.assert_allclose(
            values, trajectory_score(name)(whole), rtol=5e-3 if name == "tdds" else 1e-4, atol=1e-5
        )
    monkeypatch.setattr(trajectories, "BLOCK_BYTES", 4 * CLASSES * EPOCHS * 7)  # 7 rows
    for start, stop in ((0, SAMPLES), (29, 71)):
        for options in (OPTIONS, *({name: {}} for name in OPTIONS)):
            for name, values in score_rows(run, start, stop, label[start:stop], options).items():
                np.testing.assert_array_equal(values, found[name][start:stop], err_msg=name)


def test_only_what_a_score_declares_is_read_and_each_row_group_once(
    written: tuple[Run, np.ndarray, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, label, _ = written
    read: list[tuple[str, int]] = []
    original = trajectories._TrajectoryFile._read
    monkeypatch.setattr(
        trajectories._TrajectoryFile,
        "_read",
        lambda self, group: read.append((self._uri, group)) or original(self, group),
    )
    rows = [
        part["row"] for _, _, found in read_groups(run, 0, SAMPLES, ["margin"]) for part in found[0]
    ]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(SAMPLES))
    assert len(read) == len(set(read)) == EPOCHS * 2 * 3  # 45 rows of a file in groups of 16
    for first, last, arrays in read_trajectory(run, 30, 40, ["margin"]):
        assert list(arrays) == ["margin"] and arrays["margin"].shape == (EPOCHS, last - first)
        assert np.isnan(arrays["margin"]).sum() == (first <= 33 < last)
        with pytest.raises(ScoreError, match="read without distance; add it to `reads`"):
            trajectory_score("el2n")(Trajectory.from_recorded(label[first:last], arrays))
