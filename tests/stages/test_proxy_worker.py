"""The proxy's training loop in this process, as the only worker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from helpers import small_config
from safetensors.torch import load

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.actor_pool import WorkerContext
from raypipe.distributed.cluster import TrainingResources
from raypipe.distributed.preemption import DrainWatch
from raypipe.errors import StageError
from raypipe.proxies.networks import new_proxy
from raypipe.runs.checkpoints import load_checkpoint
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import EpochRecord, ProxyManifest, SeedManifest
from raypipe.runs.partition import SeedPart, proxy_parts
from raypipe.runs.run import Run
from raypipe.scores import forward_mode, moso, per_sample
from raypipe.scores.calibration import recalibrate
from raypipe.stages.measure import mean_gradient, recalibration
from raypipe.stages.measure.gradient_job import GradientFolders, GradientJob, needs_self_term
from raypipe.stages.measure.gradients import GradientActor, read_shard
from raypipe.stages.proxy import stage as proxy_stage
from raypipe.stages.proxy import worker
from raypipe.stages.proxy.resume import ResumeFolder
from raypipe.stages.proxy.save_clock import SAVE_SECONDS, Pause, SaveClock, SoloSaveClock
from raypipe.vision.adversarial import attack
from raypipe.vision.output_statistics import output_statistics

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
    manifest = {
        "samples": SAMPLES,
        "per_class": [16] * CLASSES,
        "shards": ["seed-0"],
        "shard_samples": [SAMPLES],
        **statistics,
    }
    storage.write_json(run.path("seed", "manifest.json"), manifest)
    storage.write_json(
        run.path("index", "classes.json"), {"names": ["a", "b", "c"], "numeric": False}
    )
    context = SimpleNamespace(
        get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_rank=lambda: 0
    )
    monkeypatch.setattr("ray.train.get_context", lambda: context)
    monkeypatch.setattr("ray.train.report", lambda metrics: None)
    monkeypatch.setattr(worker, "prepare_model", lambda model, device: model)
    monkeypatch.setattr(worker, "get_device", lambda: torch.device("cpu"))
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    yield run
    distributed.destroy_process_group()


def _train(run: Run, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `proxy._train` with the loop in this process instead of Ray Train."""

    class Trainer:
        def __init__(self, loop: Any, train_loop_config: dict[str, Any], **_: object) -> None:
            self.fit = lambda: SimpleNamespace(return_value=loop(train_loop_config))

    monkeypatch.setattr("raypipe.distributed.worker_group.InterruptibleTrainer", Trainer)
    part = SeedPart(0, 1, 0, SAMPLES, (SAMPLES,))
    # with 1 worker, Ray Train's local mode would run
    resources = TrainingResources(workers=2, gpu=False, cpus=1, side_by_side=1)
    proxy_stage._train(config, run, part, "key", resources)


def test_a_training_that_diverges_is_not_repeated(
    alone: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        StageError, match=r"loss is (nan|inf) in epoch \d with small; lower proxy.lr \(now 1e\+12\)"
    ):
        _train(alone, small_config(alone.uri, "proxy.lr=1e12"), monkeypatch)
    assert len(EpochRecord.read_all(alone)) < 4
    storage.delete(alone.path("proxy", "state.safetensors"))
    _train(
        alone, small_config(alone.uri, "proxy.epochs=2"), monkeypatch
    )  # fixed: the earlier divergence is forgotten
    assert [epoch.epoch for epoch in EpochRecord.read_all(alone)] == [0, 1]


@pytest.mark.parametrize(
    ("normalize", "mean", "std"),
    [
        ("measured", [0.5] * 3, [0.3] * 3),
        ("imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ],
)
def test_pixels_are_normalised_as_asked(
    alone: Run, monkeypatch: pytest.MonkeyPatch, normalize: str, mean: list[float], std: list[float]
) -> None:
    config = small_config(
        alone.uri, "proxy.epochs=1", "proxy.checkpoints=1", f"proxy.normalize={normalize}"
    )
    _train(alone, config, monkeypatch)
    weights = load(storage.read_bytes(alone.path("proxy", "checkpoints", "epoch-0000.safetensors")))
    manifest = _manifest(alone, config)
    for name, expected in (("mean", mean), ("std", std)):
        np.testing.assert_allclose(weights[name].flatten(), expected, rtol=1e-6)
        assert list(getattr(manifest, name)) == expected


@pytest.mark.parametrize("adversary", ["null", "{iterations: 2}"])
def test_a_training_that_was_stopped_goes_on_as_if_nothing_had_been(
    alone: Run, monkeypatch: pytest.MonkeyPatch, adversary: str
) -> None:
    config = small_config(
        alone.uri, "proxy.epochs=3", "proxy.checkpoints=3", f"proxy.adversary={adversary}"
    )
    _train(alone, config, monkeypatch)
    folder = alone.path("proxy", "checkpoints")
    whole = {
        file: storage.read_bytes(storage.join(folder, file))
        for file in sorted(storage.names(folder))
    }
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
    assert {
        file: storage.read_bytes(storage.join(folder, file))
        for file in sorted(storage.names(folder))
    } == whole


def _written(run: Run) -> tuple[dict[str, bytes], list[EpochRecord]]:
    """Checkpoints and trajectories of a training, and its epochs without their seconds."""
    files = {
        f"{folder}/{file}": storage.read_bytes(run.path("proxy", folder, file))
        for folder in ("checkpoints", "trajectory")
        for file in storage.names(run.path("proxy", folder))
    }
    return files, [replace(epoch, cpu_seconds=0.0) for epoch in EpochRecord.read_all(run)]


@pytest.mark.parametrize("trajectory", ["train", "eval"])
def test_a_training_moves_and_dies_within_epochs_and_every_byte_stays_the_same(
    alone: Run, monkeypatch: pytest.MonkeyPatch, trajectory: str
) -> None:
    """Six batches an epoch, and six more where they are evaluated; the network has dropout."""

    def with_dropout(*arguments: Any) -> torch.nn.Module:
        network = new_proxy(*arguments)
        last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
        last.register_forward_pre_hook(lambda _, x: (F.dropout(x[0], 0.5, network.training),))
        return network

    monkeypatch.setattr(worker, "new_proxy", with_dropout)
    config = small_config(
        alone.uri,
        "proxy.epochs=3",
        "proxy.checkpoints=3",
        "proxy.batch_size=8",
        f"proxy.trajectory={trajectory}",
    )
    _train(alone, config, monkeypatch)
    whole = _written(alone)
    assert len(whole[0]) == 6 and not storage.names(alone.path("proxy", "resume"))
    storage.delete(alone.path("proxy"))
    done: list[int] = []

    class Killed(Exception):
        pass

    def after_round(_: Any) -> Pause:
        done.append(len(done) + 1)
        pause = plan.get(len(done), Pause.NONE)
        if pause is None:
            raise Killed
        return pause

    last = 11 if trajectory == "eval" else 5  # rounds of an epoch after which it can pause
    plan: dict[int, Pause | None] = {
        2: Pause.SAVE,
        3: Pause.MOVE,
        5: None,
        last + 4: Pause.SAVE,
        2 * last + 1: Pause.MOVE,
    }
    monkeypatch.setattr(SaveClock, "after_round", after_round)
    with pytest.raises(StageError):
        _train(alone, config, monkeypatch)
    assert len(storage.names(alone.path("proxy", "resume"))) == 3  # two parts and the last state
    _train(alone, config, monkeypatch)
    assert len(done) == 3 * last + 2, "the two rounds after the last saved state are repeated"
    assert _written(alone) == whole
    assert not storage.names(alone.path("proxy", "resume"))


def test_a_state_is_complete_when_every_worker_has_all_parts_of_it(tmp_path: Path) -> None:
    folder = ResumeFolder(str(tmp_path), 0, 2)
    assert folder.latest(3) == 0
    for name in ("0003-000000-000005-0", "0003-000000-000005-1", "0003-000005-000009-0"):
        (tmp_path / f"{name}-of-2.safetensors").touch()
    assert folder.latest(3) == 0, "parts without a state"
    for name in ("0003-000005", "0003-000009", "0002-000020"):
        (tmp_path / f"{name}-of-2.safetensors").touch()
    assert folder.latest(3) == 5, "the ninth round of worker 1 is missing"
    (tmp_path / "0003-000007-000009-1-of-2.safetensors").touch()
    assert folder.latest(3) == 5, "rounds 6 and 7 of worker 1 are missing"
    (tmp_path / "0003-000005-000007-1-of-2.safetensors").touch()
    assert folder.latest(3) == 9
    assert ResumeFolder(str(tmp_path), 0, 3).latest(3) == 0, "another number of workers"


def test_a_training_saves_after_a_while_and_moves_when_its_node_goes(
    alone: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("raypipe.stages.proxy.save_clock.time.monotonic", lambda: now[0])
    drain = DrainWatch()
    clock = SaveClock(0, torch.device("cpu"), drain)
    saved = []
    for _ in range(600):
        now[0] += 0.1
        if clock.after_round() is Pause.SAVE:
            saved.append(now[0])
            clock.saved()
    assert len(saved) == 2 and SAVE_SECONDS <= saved[0] < SAVE_SECONDS + 1.2
    assert SAVE_SECONDS <= saved[1] - saved[0] < SAVE_SECONDS + 1.2
    drain.announced = True
    pauses = []
    while Pause.MOVE not in pauses:
        now[0] += 0.1
        pauses.append(clock.after_round())
    assert len(pauses) <= 12


def test_a_training_of_one_process_saves_when_its_node_is_announced_to_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("raypipe.stages.proxy.save_clock.time.monotonic", lambda: now[0])
    drain = DrainWatch()
    clock, saved = SoloSaveClock(drain), []
    for second in range(60):
        now[0] = float(second)
        drain.announced = second >= 40
        if clock.is_due():
            saved.append(second)
    assert saved == [25, 40]


@pytest.mark.parametrize("trajectory", ["train", "eval"])
def test_a_proxy_is_trained_and_followed_on_adversarial_examples(
    alone: Run, monkeypatch: pytest.MonkeyPatch, trajectory: str
) -> None:
    seen: list[tuple[tuple[int, ...], float, bool]] = []
    real = worker.attack

    def noted(
        model: Any, pixels: Any, target: Any, settings: Any, start: Any = None, **more: Any
    ) -> Any:
        seen.append((tuple(pixels.shape), settings.eps, start is not None))
        return real(model, pixels, target, settings, start, **more)

    monkeypatch.setattr(worker, "attack", noted)
    given = (
        "proxy.epochs=1",
        "proxy.checkpoints=1",
        f"proxy.trajectory={trajectory}",
        "proxy.batch_size=24",
    )
    losses = {}
    for name, adversary in (("plain", "null"), ("adversarial", "{eps: 16/255, iterations: 3}")):
        _train(alone, small_config(alone.uri, *given, f"proxy.adversary={adversary}"), monkeypatch)
        (table,) = [table for _, table in storage.iter_tables(alone.path("proxy", "trajectory"))]
        losses[name] = table["loss"].to_numpy().mean()
        storage.delete(alone.path("proxy"))
    # two batches, each from random points; the pass of `eval` starts at the images
    assert seen == [((24, 3, 8, 8), 16 / 255, True)] * 2 + [((24, 3, 8, 8), 16 / 255, False)] * (
        2 * (trajectory == "eval")
    )
    assert losses["adversarial"] > losses["plain"]


def _manifest(run: Run, config: Config, sizes: tuple[int, ...] = (SAMPLES,)) -> ProxyManifest:
    """The manifest of a training on the whole seed set, in shards of these sizes."""
    part = SeedPart(0, 1, 0, SAMPLES, sizes)
    progress = proxy_stage.PartProgress.read(config, run, part)
    return proxy_stage._manifest(config, run, SeedManifest.read(run), [progress])


def _proxy(run: Run, config: Config, monkeypatch: pytest.MonkeyPatch) -> GradientJob:
    """The job of a trained proxy; its last checkpoint is recalibrated."""
    _train(run, config, monkeypatch)
    _manifest(run, config).write(run)
    run.write_ledger({"proxy": StageRecord("done", "of-the-proxy")})
    parts, worker_context = proxy_parts(run), WorkerContext(config, run.uri, 1, False)
    folders, self_term = GradientFolders.of(config, run), needs_self_term(config, parts)
    job = GradientJob(worker_context, folders, parts[0], self_term)
    recalibration.recalibrate_checkpoint(job, job.part.trained.final)
    return job


def _measured(job: GradientJob) -> pa.Table:
    """The values of both passes at the last checkpoint."""
    file = job.part.trained.final
    total, _ = mean_gradient._sum_gradients(job, [file], ["seed-0"])
    mean_gradient._store_mean(job, file, total)
    GradientActor(job)("seed-0", read_shard(job, "seed-0"))
    return storage.read_table(job.run.path(job.folders.checkpoints, "seed-0.parquet"))


@pytest.mark.parametrize("self_term", [False, True])
def test_a_gpu_with_little_memory_measures_the_same(
    alone: Run, monkeypatch: pytest.MonkeyPatch, self_term: bool
) -> None:
    config = small_config(
        alone.uri,
        "proxy.epochs=1",
        "proxy.checkpoints=1",
        "measure.scores=[moso, el2n]",
        "measure.el2n.at=checkpoints",
        f"measure.moso.self_term={str(self_term).lower()}",
    )
    job = _proxy(alone, config, monkeypatch)
    tables, sizes = [_measured(job)], []

    def tight(real: Any, images: int) -> Any:
        def call(*given: Any) -> Any:
            sizes.append(len(given[images]))
            if sizes[-1] > 10:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(*given)

        return call

    monkeypatch.setattr(moso, "gradient_sum", tight(moso.gradient_sum, 1))
    monkeypatch.setattr(forward_mode.Aligner, "__call__", tight(forward_mode.Aligner.__call__, 1))
    monkeypatch.setattr(
        per_sample, "norms_and_alignments", tight(per_sample.norms_and_alignments, 1)
    )
    tables.append(_measured(job))
    assert sizes == [48, 24, 12, 6, 6, 6, 6, 6, 6, 6, 6] * 2
    names = ["alignments", *["squares"] * self_term, "distance"]
    assert tables[0].column_names == tables[1].column_names == ["sample_id", "label", *names]
    for name in names:
        whole, parts = (np.array(table[name].to_pylist()) for table in tables)
        np.testing.assert_allclose(
            parts, whole, rtol=1e-3, atol=1e-4 * np.abs(whole).max(), err_msg=name
        )


def test_scores_of_an_adversarial_proxy_are_those_at_adversarial_examples(
    alone: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MoSo's alignments and EL2N by definition, at adversarial examples against the checkpoint."""
    given = (
        "proxy.epochs=1",
        "proxy.checkpoints=1",
        "proxy.adversary={eps: 16/255, iterations: 2}",
        "measure.batch_size=20",
    )
    config = small_config(
        alone.uri,
        *given,
        "measure.scores=[moso, el2n]",
        "measure.el2n.at=checkpoints",
        "measure.moso.self_term=false",
    )
    job = _proxy(alone, config, monkeypatch)
    table = _measured(job)

    part, file = job.part, job.part.trained.final
    trained = load_checkpoint(alone, file)
    model = load_checkpoint(alone, file, folder=job.folders.calibrated)
    assert not torch.equal(trained.backbone[1].running_mean, model.backbone[1].running_mean)
    _, images, labels = part.read(alone, "seed-0")
    target = torch.from_numpy(labels)
    expected = recalibrate(
        load_checkpoint(alone, file),
        [attack(trained, torch.from_numpy(images.copy()), target, config.proxy.adversary)],
    )
    torch.testing.assert_close(
        model.backbone[1].running_mean, expected.backbone[1].running_mean, rtol=1e-3, atol=1e-3
    )
    worst = attack(model, torch.from_numpy(images.copy()), target, config.proxy.adversary)
    weights = list(model.parameters())
    each = [
        torch.cat(
            [
                slope.flatten()
                for slope in torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), weights)
            ]
        )
        for x, y in zip(worst, target, strict=True)
    ]
    direct = (torch.stack(each) @ torch.stack(each).mean(0)).numpy()
    found = np.array(table["alignments"].to_pylist())[:, 0]
    np.testing.assert_allclose(found, direct, rtol=0.02, atol=0.02 * np.abs(direct).max())
    distance = output_statistics(model(worst).detach(), target)["distance"].numpy()
    np.testing.assert_allclose(np.array(table["distance"].to_pylist())[:, 0], distance, atol=0.01)
    clean = output_statistics(model(torch.from_numpy(images.copy())).detach(), target)[
        "distance"
    ].numpy()
    assert distance.mean() > clean.mean() + 0.05


def test_of_a_large_seed_set_every_so_many_samples_recalibrate(
    alone: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(alone.uri, "proxy.epochs=1", "proxy.checkpoints=1")
    _train(alone, config, monkeypatch)
    whole = storage.read_table(alone.path("seed", "seed-0.parquet"))
    for shard, rows in (("seed-0", whole.slice(0, 18)), ("seed-1", whole.slice(18))):
        storage.write_table(alone.path("seed", f"{shard}.parquet"), rows)
    seed = replace(SeedManifest.read(alone), shards=("seed-0", "seed-1"), shard_samples=(18, 30))
    seed.write(alone)
    part, file = SeedPart(0, 1, 0, SAMPLES, (18, 30)), "epoch-0000.safetensors"
    _manifest(alone, config, part.shard_samples).write(alone)
    monkeypatch.setattr(recalibration, "RECALIBRATED", 12)
    folders = GradientFolders("measured/calibrated", "", "")
    job = GradientJob(WorkerContext(config, alone.uri, 1, False), folders, part, False)
    recalibration.recalibrate_checkpoint(job, file)
    found = load_checkpoint(alone, file, folder="measured/calibrated")
    images = np.concatenate([part.read(alone, shard)[1] for shard in seed.shards])
    expected = recalibrate(load_checkpoint(alone, file), [torch.from_numpy(images[::4].copy())])
    torch.testing.assert_close(
        found.backbone[1].running_mean, expected.backbone[1].running_mean, rtol=1e-6, atol=1e-7
    )
