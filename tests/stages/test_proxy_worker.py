"""The proxy's training loop in this process, as the one worker of its group."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as distributed
from helpers import small_config
from safetensors.torch import load

from raypipe import storage
from raypipe.config import Config
from raypipe.errors import StageError
from raypipe.rundir import Run
from raypipe.stages import proxy, proxy_worker
from raypipe.stages.parts import Part

SAMPLES, CLASSES = 48, 3


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A run with a drawn seed set, and this process as Ray Train's only worker."""
    run = Run(str(tmp_path / "run"))
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, 3 * 8 * 8, np.uint8).tobytes() for _ in range(SAMPLES)]
    columns = {
        "sample_id": [str(row) for row in range(SAMPLES)],
        "label": pa.array(np.arange(SAMPLES) % CLASSES, pa.int32()),
        "image": pa.array(images, pa.binary(3 * 8 * 8)),
    }
    table = pa.table(columns).replace_schema_metadata({"raypipe": json.dumps({"image_size": 8})})
    storage.write_table(run.path("seed", "seed-0.parquet"), table)
    statistics = {"image_size": 8, "mean": [0.5] * 3, "std": [0.3] * 3}
    manifest = {"samples": SAMPLES, "per_class": [16] * CLASSES, "shards": ["seed-0"], "shard_samples": [SAMPLES], **statistics}
    storage.write_json(run.path("seed", "manifest.json"), manifest)
    storage.write_json(run.path("index", "classes.json"), {"names": ["a", "b", "c"], "numeric": False})
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_rank=lambda: 0)
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr("ray.train.report", lambda metrics: None)
    monkeypatch.setattr(proxy_worker, "prepare_model", lambda model: model)
    monkeypatch.setattr(proxy_worker, "get_device", lambda: torch.device("cpu"))
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield run
    distributed.destroy_process_group()


def _train(run: Run, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """`proxy._train` with the loop called here instead of by Ray Train."""

    class Trainer:
        def __init__(self, loop: Any, train_loop_config: dict[str, Any], **_: object) -> None:
            self.fit = lambda: loop(train_loop_config)

    monkeypatch.setattr("raypipe.stages.trainer.Trainer", Trainer)
    proxy._train(config, run, Part(0, 1, 0, SAMPLES, (SAMPLES,)), "key", 1, False, 1)


def test_a_training_that_diverges_is_not_repeated(alone: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StageError, match=r"loss is (nan|inf) in epoch \d; lower proxy.lr \(now 1e\+12\)"):
        _train(alone, small_config(alone.uri, "proxy.lr=1e12"), monkeypatch)
    assert len(proxy.finished_epochs(alone)) < 4
    storage.delete(alone.path("proxy", "state.safetensors"))
    _train(alone, small_config(alone.uri, "proxy.epochs=2"), monkeypatch)  # mended: what was said before is forgotten
    assert [epoch["epoch"] for epoch in proxy.finished_epochs(alone)] == [0, 1]


@pytest.mark.parametrize(
    ("normalize", "mean", "std"),
    [("measured", [0.5] * 3, [0.3] * 3), ("imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])],
)
def test_pixels_are_normalised_as_asked(
    alone: Run, monkeypatch: pytest.MonkeyPatch, normalize: str, mean: list[float], std: list[float]
) -> None:
    config = small_config(alone.uri, "proxy.epochs=1", "proxy.checkpoints=1", f"proxy.normalize={normalize}")
    _train(alone, config, monkeypatch)
    weights = load(storage.read_bytes(alone.path("proxy", "checkpoints", "epoch-0000.safetensors")))
    epochs, whole = proxy.finished_epochs(alone), Part(0, 1, 0, SAMPLES, (SAMPLES,))
    manifest = proxy._manifest(config, alone, proxy.seed_manifest(alone), [whole], [epochs])
    for name, expected in (("mean", mean), ("std", std)):
        np.testing.assert_allclose(weights[name].flatten(), expected, rtol=1e-6)
        assert manifest[name] == expected


def test_a_training_that_was_stopped_goes_on_as_if_nothing_had_been(alone: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(alone.uri, "proxy.epochs=3", "proxy.checkpoints=3")
    _train(alone, config, monkeypatch)
    folder = alone.path("proxy", "checkpoints")
    whole = {file: storage.read_bytes(storage.join(folder, file)) for file in sorted(storage.names(folder))}
    assert len(whole) == 3
    storage.delete(alone.path("proxy"))

    class Killed(Exception):
        pass

    def killed(metrics: dict[str, Any]) -> None:
        if metrics["epoch"] == 1:
            raise Killed

    monkeypatch.setattr("ray.train.report", killed)
    with pytest.raises(StageError):
        _train(alone, config, monkeypatch)
    monkeypatch.setattr("ray.train.report", lambda metrics: None)
    _train(alone, config, monkeypatch)
    assert {file: storage.read_bytes(storage.join(folder, file)) for file in sorted(storage.names(folder))} == whole
