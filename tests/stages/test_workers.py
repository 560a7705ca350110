"""The proxy on 1, 2 and 3 workers: the same network and seed scores up to rounding."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as distributed
from helpers import digit_images, small_config
from safetensors.torch import load
from torch.nn.parallel import DistributedDataParallel

from raypipe import storage
from raypipe.config import proxy
from raypipe.runs.partition import SeedPart
from raypipe.runs.run import Run
from raypipe.stages.proxy import worker

SAMPLES, EPOCHS, SIZE = 150, 3, 8
"""In batches of 50, the shares of 3 workers are unequal."""
PLAIN, ADVERSARIAL, RESIZING = (
    "proxy.progressive_resizing=false",
    "proxy.adversary={iterations: 2}",
    "proxy.progressive_resizing=true",
)


def _drawn(uri: str) -> None:
    """Write a run with a seed set of digits."""
    run, (images, labels) = Run(uri), digit_images(SAMPLES)
    pixels = [np.repeat(image[None], 3, 0).tobytes() for image in images]
    columns = {
        "sample_id": [str(row) for row in range(SAMPLES)],
        "label": pa.array(labels, pa.int32()),
        "image": pa.array(pixels, pa.binary(3 * SIZE * SIZE)),
    }
    table = pa.table(columns).replace_schema_metadata({"raypipe": json.dumps({"image_size": SIZE})})
    storage.write_table(run.path("seed", "seed-0.parquet"), table)
    manifest = {
        "samples": SAMPLES,
        "shards": ["seed-0"],
        "shard_samples": [SAMPLES],
        "mean": [0.5] * 3,
        "std": [0.3] * 3,
    }
    storage.write_json(run.path("seed", "manifest.json"), manifest | {"image_size": SIZE})
    storage.write_json(
        run.path("index", "classes.json"),
        {"names": [str(digit) for digit in range(10)], "numeric": True},
    )


def _work(rank: int, folder: str, trainings: tuple[tuple[int, str], ...]) -> None:
    """Be Ray Train's worker of this rank in one training after the other."""
    torch.set_num_threads(1)
    for world, change in trainings:
        training = f"{world}-{change}"
        if rank >= world:
            continue
        context = SimpleNamespace(
            get_world_rank=lambda: rank,
            get_world_size=lambda size=world: size,
            get_local_rank=lambda: rank,
        )
        replaced: dict[tuple[Any, str], Any] = {
            (worker.ray.train, "get_context"): lambda context=context: context,
            (worker.ray.train, "report"): lambda metrics: None,
            (proxy, "SMALLEST_SIZE"): 4,
            (worker, "get_device"): lambda: torch.device("cpu"),
            (worker, "prepare_model"): lambda model, _, world=world: (
                DistributedDataParallel(model) if world > 1 else model
            ),
        }
        for (module, name), value in replaced.items():
            setattr(module, name, value)
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meet-{training}", rank=rank, world_size=world
        )
        run = Run(f"{folder}/over-{training}")
        changes = (
            f"proxy.epochs={EPOCHS}",
            "proxy.batch_size=50",
            "proxy.checkpoints=1",
            change,
        )
        config = small_config(run.uri, *changes)
        part = SeedPart(0, 1, 0, SAMPLES, (SAMPLES,))
        job = worker.TrainingJob(config.proxy, run.uri, part, False, 1, "key")
        worker.train(job)
        distributed.destroy_process_group()


def _trained(uri: str, world: int) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Return the last weights, and EL2N of every sample, float [n].

    EL2N is the mean of the trajectory's distance over the epochs.
    """
    run = Run(uri)
    weights = load(
        storage.read_bytes(run.path("proxy", "checkpoints", f"epoch-{EPOCHS - 1:04d}.safetensors"))
    )
    tables = [table for _, table in storage.iter_tables(run.path("proxy", "trajectory"))]
    assert len(tables) == EPOCHS * world
    rows = np.concatenate([table["row"].to_numpy() for table in tables])
    distance = np.concatenate([table["distance"].to_numpy() for table in tables])
    assert (np.bincount(rows) == EPOCHS).all()
    return weights, np.bincount(rows, distance) / EPOCHS


def test_the_number_of_workers_changes_no_more_than_rounding_does(tmp_path: Path) -> None:
    kinds = ((PLAIN, (1, 3)), (ADVERSARIAL, (1, 2)), (RESIZING, (1, 2)))
    trainings = tuple((world, kind) for kind, worlds in kinds for world in worlds)
    for world, change in trainings:
        _drawn(f"{tmp_path}/over-{world}-{change}")
    workers = multiprocessing.get_context("forkserver")  # it imports torch and Ray once for all
    # DistributedDataParallel imports the compiler
    workers.set_forkserver_preload([__name__, "torch._dynamo"])
    processes = [
        workers.Process(target=_work, args=(rank, str(tmp_path), trainings), daemon=True)
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(250)
        assert process.exitcode == 0
    results = {
        (world, kind): _trained(f"{tmp_path}/over-{world}-{kind}", world)
        for world, kind in trainings
    }
    (_, scores), attacked, resized = (results[1, kind] for kind, _ in kinds)
    assert np.abs(resized[1] - scores).max() > 0.1
    attacked_by_two = results[2, ADVERSARIAL]
    assert attacked[1].mean() > scores.mean() + 0.005
    # a gradient near 0 can have another sign, which moves a pixel by a whole step
    np.testing.assert_allclose(attacked_by_two[1], attacked[1], atol=0.01)
    for world, kind in ((3, PLAIN), (2, RESIZING)):
        (expected, expected_scores), (weights, found) = results[1, kind], results[world, kind]
        # single precision: another order of the samples of a batch changes them as much
        for name, value in expected.items():
            torch.testing.assert_close(
                weights[name],
                value,
                rtol=0,
                atol=0.02,
                msg=lambda text, name=name: f"{name}: {text}",
            )
        np.testing.assert_allclose(
            found, expected_scores, atol=0.01
        )  # EL2N lies between 0 and 1.41
    assert scores.std() > 0.05
