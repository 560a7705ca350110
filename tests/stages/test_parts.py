"""Parts of the seed set: which samples are in which, and what several proxies measure."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import QUIET, measured_with, small_config, stamps

import raypipe
from raypipe import storage
from raypipe.config import ProxySettings
from raypipe.distributed.actor_pool import WorkerContext
from raypipe.distributed.cluster import Cluster, TrainingResources
from raypipe.distributed.context import Context
from raypipe.errors import ResourceError, StageError
from raypipe.runs.layout import STAGE_FOLDERS
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.partition import SeedPart, merge_parts, partition_seed_set, trajectory_files
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import read_shard
from raypipe.sources.id_sampling import in_sample, part_rule
from raypipe.stages.measure.trajectories import probabilities_of
from raypipe.stages.proxy.stage import ProxyStage, side_by_side

IDS = [f"train/{number % 7}/{number:05d}.png" for number in range(6000)]


def test_parts_are_random_disjoint_and_about_even() -> None:
    for seed in (0, 5):
        rule = part_rule(4, seed)
        owner = np.array([rule(sample_id) for sample_id in IDS])
        assert set(owner) == {0, 1, 2, 3}  # every sample is in exactly one
        # 5 standard deviations of a binomial count
        assert np.abs(np.bincount(owner) - 1500).max() < 5 * math.sqrt(6000 * 0.25 * 0.75)
        # the draw of the seed set, with the same seed, says nothing about the part
        drawn = np.array([in_sample(0.3, seed)(sample_id) for sample_id in IDS])
        assert np.abs(np.bincount(owner[drawn]) - drawn.sum() / 4).max() < 5 * math.sqrt(
            drawn.sum() * 0.25 * 0.75
        )
    assert (
        0.2
        < np.mean([part_rule(4, 0)(sample_id) == part_rule(4, 5)(sample_id) for sample_id in IDS])
        < 0.3
    )


def test_a_sample_stays_in_its_part_whatever_is_around_it() -> None:
    """The rule from its definition; it depends on no order and no number of samples."""
    for sample_id in (IDS[3], "ünïcode\udc80/x"):
        text = sample_id.encode("utf-8", "surrogateescape")
        digest = hashlib.blake2b(
            text, digest_size=8, key=(7).to_bytes(16, "little"), person=b"raypipe-part"
        ).digest()
        assert part_rule(3, 7)(sample_id) == math.floor(
            int.from_bytes(digest, "little") / 2**64 * 3
        )
    part = SeedPart(1, 3, 7, 0, ())
    own = {IDS[row] for row in part.rows(IDS[:200])}
    assert own == {IDS[row] for row in 199 - part.rows(IDS[199::-1])}
    assert own & set(IDS[:50]) == {IDS[row] for row in part.rows(IDS[:50])}


def _seed_set(run: Run, shards: list[int], classes: int) -> tuple[list[str], np.ndarray]:
    """Write a seed set with shards of these sizes.

    The label of a sample is its row modulo `classes`; its image is its row.
    """
    rows = np.arange(sum(shards))
    labels = (rows % classes).astype(np.int32)
    ids, start, names = IDS[: len(rows)], 0, [f"seed-{number}" for number in range(len(shards))]
    for name, count in zip(names, shards, strict=True):
        part = slice(start, start + count)
        images = pa.array([bytes([row % 256]) * 3 for row in rows[part]], pa.binary(3))
        table = pa.table({"sample_id": ids[part], "label": labels[part], "image": images})
        table = table.replace_schema_metadata({"raypipe": json.dumps({"image_size": 1})})
        storage.write_table(run.path("seed", f"{name}.parquet"), table)
        start += count
    manifest = {
        "samples": len(rows),
        "per_class": np.bincount(labels, minlength=3).tolist(),
        "shards": names,
        "shard_samples": shards,
    }
    storage.write_json(run.path("seed", "manifest.json"), manifest)
    return ids, labels


def test_divided_shards_come_together_again(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    shards = [80, 1, 60]
    ids, labels = _seed_set(run, shards, classes=3)
    parts = partition_seed_set(run, 3, seed=1)
    assert [part.folder for part in parts] == ["proxy/part-0", "proxy/part-1", "proxy/part-2"]
    assert np.sum([part.shard_samples for part in parts], 0).tolist() == shards
    assert all(part.samples == sum(part.shard_samples) for part in parts)
    first = 0
    for number, count in enumerate(shards):
        tables = []
        for part in parts:
            own, images, target = part.read(run, f"seed-{number}")
            assert len(own) == part.shard_samples[number]
            rows = [ids.index(sample_id) for sample_id in own]
            assert images.reshape(len(own), 3)[:, 0].tolist() == [row % 256 for row in rows]
            assert target.tolist() == labels[rows].tolist()
            numbers = pa.FixedSizeListArray.from_arrays(
                pa.array(np.repeat(rows, 2).astype(np.float32)), 2
            )
            tables.append(pa.table({"sample_id": pa.array(own, pa.string()), "numbers": numbers}))
        whole = merge_parts(run, parts, f"seed-{number}", tables)
        assert whole["sample_id"].to_pylist() == ids[first : first + count]
        assert whole["numbers"].to_pylist() == [[row, row] for row in range(first, first + count)]
        first += count


def test_one_part_is_the_whole(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    ids, _ = _seed_set(run, [25], classes=2)
    (part,) = partition_seed_set(run, 1, seed=0)
    assert (part.folder, part.checkpoints, part.samples) == ("proxy", "proxy/checkpoints", 25)
    assert part.read(run, "seed-0")[0] == ids


@pytest.mark.parametrize(
    ("shards", "classes", "parts", "message"),
    [
        (
            [60],
            2,
            4,
            r"part \d of 4 would have 1\d seed samples of 2 classes; each needs at least 20.*Lower proxy\.parts",
        ),
        ([200], 1, 2, r"part 0 of 2 would have \d+ seed samples of 1 classes"),
        ([50], 2, 200, r"part 0 of 200 would have 0 seed samples of 0 classes"),
    ],
)
def test_parts_too_small_to_train_on_are_refused(
    tmp_path: Path, shards: list[int], classes: int, parts: int, message: str
) -> None:
    run = Run(str(tmp_path))
    _seed_set(run, shards, classes)
    with pytest.raises(StageError, match=message):
        partition_seed_set(run, parts, seed=0)


@pytest.mark.parametrize(
    ("cluster", "settings", "expected"),
    [
        # (CPUs, GPUs, nodes, CPUs of the largest, grows), settings -> workers, GPU, CPUs of each, trainings side by side
        ((2, 0, 1, 2, False), {"parts": 1}, (1, False, 2, 1)),
        ((2, 0, 1, 2, False), {"parts": 2}, (1, False, 1, 2)),
        ((2, 0, 1, 2, False), {"parts": 8}, (1, False, 1, 2)),
        ((2, 0, 1, 2, False), {"parts": 8, "cpus_per_worker": 2}, (1, False, 2, 1)),
        ((2, 0, 1, 2, False), {"parts": 2, "workers": 2}, (2, False, 1, 1)),
        ((64, 0, 1, 64, False), {"parts": 8, "workers": 2}, (2, False, 4, 8)),
        ((32, 0, 4, 8, False), {"parts": 8}, (1, False, 4, 8)),
        ((16, 4, 1, 16, False), {"parts": 8, "workers": 2}, (2, True, 4, 2)),
        ((4, 8, 1, 4, False), {"parts": 8}, (1, True, 1, 4)),
        ((16, 4, 1, 16, False), {"parts": 8, "workers": 2, "cpus_per_worker": 8}, (2, True, 8, 1)),
        (
            (4, 0, 1, 4, True),
            {"parts": 8, "workers": 2, "use_gpu": True, "cpus_per_worker": 4},
            (2, True, 4, 8),
        ),
    ],
)
def test_trainings_share_the_cluster(
    cluster: tuple, settings: dict[str, Any], expected: tuple
) -> None:
    resources = Cluster(*cluster).training_resources(ProxySettings(**settings))
    assert resources == TrainingResources(*expected)


def test_a_training_that_does_not_fit_at_all_is_refused() -> None:
    for settings in ({"workers": 3, "parts": 2}, {"workers": 2, "cpus_per_worker": 2, "parts": 2}):
        with pytest.raises(ResourceError, match="lower one of them"):
            Cluster(2, 0, 1, 2, False).training_resources(ProxySettings(**settings))
    with pytest.raises(
        ResourceError, match=r"cpus_per_worker is 4, but the largest node .* has 2; lower it"
    ):
        Cluster(8, 0, 4, 2, False).training_resources(ProxySettings(cpus_per_worker=4))


def test_jobs_run_side_by_side_and_no_other_is_begun_after_a_failure() -> None:
    together, ran, threads = threading.Barrier(2, timeout=10), [], []

    def fails() -> None:
        threads.append(threading.current_thread())
        together.wait()  # returns only while the other job runs
        raise StageError("the first")

    def goes_on() -> None:
        together.wait()
        threads[0].join()
        ran.append("goes on")

    with pytest.raises(StageError, match="the first"):
        side_by_side([fails, goes_on, lambda: ran.append("never")], 2)
    assert ran == ["goes on"]
    side_by_side([lambda: ran.append(threading.current_thread().name)] * 2, 1)
    assert ran[1:] == [threading.current_thread().name] * 2, "one at a time needs no thread"


def test_a_part_that_is_trained_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage with a fake training that writes the files of Ray Train's workers."""
    run = Run(str(tmp_path))
    _seed_set(run, [100], classes=3)
    replace(SeedManifest.read(run), image_size=8, mean=(0.5,), std=(0.2,)).write(run)
    storage.write_json(
        run.path("index", "classes.json"), {"names": ["a", "b", "c"], "numeric": False}
    )
    config = small_config(run.uri, "proxy.parts=3", "proxy.epochs=2")
    context, stage, trained = Context(config, run, QUIET), ProxyStage(), []
    context.__dict__["cluster"] = Cluster(2, 0, 1, 2, False)
    broken = {1}

    def train(config: Any, run: Run, part: SeedPart, *_: object) -> None:
        trained.append(part.number)
        for epoch in range(2):
            if part.number in broken and epoch == 1:
                raise StageError("a worker died too often")
            checkpoint = f"epoch-{epoch:04d}.safetensors"
            storage.write_bytes(run.path(part.checkpoints, checkpoint), b"weights")
            figures = {
                "loss": 1.0 + part.number,
                "accuracy": 0.5,
                "lr": 0.1,
                "steps": 2 * (epoch + 1),
                "cpu_seconds": 1.0,
            }
            record = {
                "epoch": epoch,
                "checkpoint": checkpoint,
                "scored": True,
                "trajectory": [f"{epoch}.parquet"],
                **figures,
            }
            storage.write_json(run.path(part.folder, "epochs", f"epoch-{epoch:04d}.json"), record)
        storage.write_bytes(run.path(part.folder, "state.safetensors"), b"state")

    monkeypatch.setattr("raypipe.stages.proxy.stage._train", train)
    with pytest.raises(StageError, match="died too often"):
        stage.execute(context, StageRecord())
    assert 1 in trained and not stage.complete(context, StageRecord())
    begun = set(trained) - broken
    broken.clear()
    trained.clear()
    record = StageRecord()
    stage.execute(context, record)
    assert set(trained) == {0, 1, 2} - begun
    assert stage.complete(context, record)
    assert record.cpu_seconds == 6, "of every epoch once"
    assert record.detail["loss"] == 2 and [part["loss"] for part in record.detail["parts"]] == [
        1,
        2,
        3,
    ]
    assert storage.names(run.path("proxy", "part-0")) == {"epochs", "checkpoints"}, (
        "no state is left"
    )
    assert trajectory_files(run)[1] == [
        f"proxy/part-{number}/trajectory/1.parquet" for number in range(3)
    ]
    trained.clear()
    storage.delete(run.path("proxy", "part-2", "checkpoints", "epoch-0000.safetensors"))
    assert not stage.complete(context, record)
    stage.execute(context, record)
    assert trained == [2] and stage.complete(context, record)
    assert record.cpu_seconds == 8


@pytest.mark.ray
def test_each_part_is_scored_by_its_own_proxy(of_folders: str) -> None:
    """Two proxies: the scores against one process with everything in memory; and a rerun."""
    from raypipe.runs.checkpoints import load_checkpoint
    from raypipe.scores.moso import combine, gradient_sum, leave_one_out
    from raypipe.scores.per_sample import norms_and_alignments
    from raypipe.stages.embed.actor import EmbedActor
    from raypipe.vision.devices import AdaptiveBatch
    from raypipe.vision.forward import forward

    run = Run(of_folders)
    config = run.config()
    seed = SeedManifest.read(run)
    shards = [read_shard(run, shard) for shard in seed.shards]
    ids = [sample_id for shard in shards for sample_id in shard[0]]
    images = torch.from_numpy(np.concatenate([shard[1] for shard in shards]))
    labels = torch.from_numpy(np.concatenate([shard[2] for shard in shards]))
    owner = np.array([part_rule(2, 0)(sample_id) for sample_id in ids])
    manifest = storage.read_json(run.path("proxy", "proxy.json"))
    expected: dict[str, np.ndarray] = {
        score: np.zeros(len(ids)) for score in ("moso", "grand", "el2n")
    }
    for number, part in enumerate(manifest["parts"]):
        own = owner == number
        assert part["samples"] == own.sum() and part["steps"] == 2 * math.ceil(own.sum() / 64)
        aligned, lengths = [], []
        for item in part["checkpoints"]:
            model = measured_with(run, item["file"], number)
            mean = {
                name: value / own.sum()
                for name, value in gradient_sum(model, images[own], labels[own]).items()
            }
            squares, dots = norms_and_alignments(model, images[own], labels[own], mean)
            aligned.append(
                leave_one_out(dots.double().numpy(), squares.double().numpy(), own.sum())
            )
            lengths.append(squares.sqrt().numpy())
        rates = np.array([item["lr"] for item in part["checkpoints"]])
        expected["moso"][own] = combine(
            np.stack(aligned, 1), rates, "lr", steps=part["steps"], samples=own.sum()
        )
        expected["grand"][own] = np.mean(lengths, 0)
        for files in part["trajectory"]:
            (table,) = (
                storage.read_table(run.path("proxy", f"part-{number}", "trajectory", file))
                for file in files
            )
            assert table["row"].to_pylist() == np.flatnonzero(own).tolist()
            distance = probabilities_of(table) - np.eye(10)[labels[own]]
            expected["el2n"][own] += np.linalg.norm(distance, axis=1) / len(part["trajectory"])
    measured = pa.concat_tables(
        [storage.read_table(run.path("measured", f"{shard}.parquet")) for shard in seed.shards]
    )
    assert measured["sample_id"].to_pylist() == ids
    for score, values in expected.items():
        np.testing.assert_allclose(
            measured[score].to_numpy(),
            values,
            rtol=2e-3,
            atol=1e-4 * np.abs(values).max(),
            err_msg=score,
        )
    record = run.ledger()["proxy"]
    assert record.detail["accuracy"] == pytest.approx(
        np.mean([part["accuracy"] for part in record.detail["parts"]])
    )

    # all embeddings are in the space of part 0
    first = load_checkpoint(run, manifest["parts"][0]["final"], folder="proxy/part-0/checkpoints")
    actor = EmbedActor(WorkerContext(config, run.uri, threads=1, gpu=False))
    embedded = forward(
        actor._models[0],
        images.numpy(),
        labels.numpy().astype(np.int32),
        AdaptiveBatch(64),
        "cpu",
        amp=False,
    )
    with torch.no_grad():
        np.testing.assert_allclose(embedded["embedding"], first.embed(images), rtol=1e-4, atol=1e-5)

    folders = [folder for stage in ("proxy", "measure") for folder in STAGE_FOLDERS[stage]]
    before = {folder: stamps(run.uri, folder) for folder in folders}
    raypipe.run(config, until="measure", progress=QUIET)
    assert {folder: stamps(run.uri, folder) for folder in folders} == before, "a rerun does nothing"
