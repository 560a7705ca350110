"""Proxy: the small network trained on the seed set with Ray Train, data-parallel over its workers.

Writes, under `proxy/`:

    epochs/epoch-0007.json            loss, accuracy, learning rate, files of the trajectory: an epoch with this file is finished
    trajectory/epoch-0007-*.parquet   row (of the seed set); float32 loss, margin, distance, entropy, as in scores.base.Trajectory;
                                      probabilities, the bytes of little-endian float16 [classes]
    checkpoints/epoch-0007.safetensors
    state.safetensors                 all that is needed to go on after the last finished epoch
    proxy.json                        what the later stages need; written last

A worker that dies is replaced and the training goes on after the last finished epoch; so it does when the driver dies.
Batches are defined over the whole seed set, so the number of workers changes their sum's rounding and nothing else
(except BatchNorm, whose statistics are those of one worker's part of a batch).
"""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

from raypipe import storage
from raypipe.config import Config
from raypipe.errors import StageError
from raypipe.progress import Meter
from raypipe.rundir import Run, StageRecord
from raypipe.stages.base import Context, Stage
from raypipe.stages.seed import seed_manifest

SPEED_ONLY = {"workers", "use_gpu", "cpus_per_worker", "max_failures"}


class ProxyStage(Stage):
    name = "proxy"
    needs = ("seed",)

    def settings(self, config: Config) -> dict[str, Any]:
        return config.proxy.model_dump(mode="json", exclude=SPEED_ONLY)

    def complete(self, context: Context, record: StageRecord) -> bool:
        try:
            manifest = proxy_manifest(context.run)
        except FileNotFoundError:
            return False
        return {manifest["final"], *(item["file"] for item in manifest["checkpoints"])} <= storage.names(
            context.run.path("proxy", "checkpoints")
        )

    def execute(self, context: Context, record: StageRecord) -> None:
        config, run = context.config, context.run
        seed = seed_manifest(run)
        workers, gpu, cpus = context.cluster.train_workers(config.proxy)
        if seed["samples"] < 2 * workers:
            raise StageError(
                f"{seed['samples']} seed samples are too few for {workers} workers; lower proxy.workers or raise seed.fraction"
            )
        started = time.monotonic()
        with context.progress.meter("proxy", config.proxy.epochs, "epochs") as meter:
            meter.already(len(finished_epochs(run)))
            watch = _Watch(run, meter)
            try:
                _train(config, run, workers, gpu, cpus)
            finally:
                watch.stop()
        epochs = finished_epochs(run)
        if len(epochs) != config.proxy.epochs:
            raise StageError(f"the proxy has {len(epochs)} finished epochs instead of {config.proxy.epochs}; run again to resume")
        last = epochs[-1]
        storage.write_json(
            run.path("proxy", "proxy.json"),
            {
                "model": config.proxy.model,
                "classes": len(run.classes().names),
                "image_size": seed["image_size"],
                "mean": seed["mean"],
                "std": seed["std"],
                "samples": seed["samples"],
                "steps": last["steps"],
                "epochs": config.proxy.epochs,
                "trajectory": [item["trajectory"] for item in epochs],
                "checkpoints": [
                    {"epoch": item["epoch"], "lr": item["lr"], "file": item["checkpoint"]} for item in epochs if item["scored"]
                ],
                "final": last["checkpoint"],
            },
        )
        storage.delete(run.path("proxy", "state.safetensors"))
        record.samples = seed["samples"]
        record.cpu_seconds += sum(item["cpu_seconds"] for item in epochs)
        record.gpu_seconds += (time.monotonic() - started) * workers if gpu else 0.0
        record.detail = {
            "accuracy": last["accuracy"],
            "loss": last["loss"],
            "epochs": len(epochs),
            "workers": workers,
            "gpu": gpu,
        }


def proxy_manifest(run: Run) -> dict[str, Any]:
    """What `proxy.json` holds."""
    return storage.read_json(run.path("proxy", "proxy.json"))


def finished_epochs(run: Run) -> list[dict[str, Any]]:
    """The records of the finished epochs, in order."""
    folder = run.path("proxy", "epochs")
    return [storage.read_json(storage.join(folder, file)) for file in sorted(storage.names(folder))]


def load_checkpoint(run: Run, file: str, device: str = "cpu", folder: str = "proxy/checkpoints") -> Any:
    """The proxy with the weights of a checkpoint, in eval mode."""
    import torch
    from safetensors.torch import load

    from raypipe.models import build

    manifest = proxy_manifest(run)
    with torch.random.fork_rng(devices=[]):
        model = build(manifest["model"], manifest["classes"], manifest["image_size"], manifest["mean"], manifest["std"])
    model.load_state_dict(load(storage.read_bytes(run.path(folder, file))))
    return model.to(device).eval()


class _Watch:
    """Shows finished epochs while Ray Train holds the driver."""

    def __init__(self, run: Run, meter: Meter) -> None:
        self._folder, self._meter, self._over = run.path("proxy", "epochs"), meter, threading.Event()
        self._pause = 0.5 if storage.is_local(run.uri) else 5.0
        self._thread = threading.Thread(target=self._look, daemon=True, name="raypipe-epochs")
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(self._pause):
            try:
                self._meter.add(max(0, len(storage.names(self._folder)) - self._meter.count))
            except OSError:
                continue  # only the display is late; the workers report what matters

    def stop(self) -> None:
        self._over.set()
        self._thread.join(timeout=10)


def _train(config: Config, run: Run, workers: int, gpu: bool, cpus: int) -> None:
    from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from raypipe.stages.proxy_worker import train_worker
    from raypipe.stages.streaming import failure

    scratch = run.path("proxy", "train")
    fs, path = storage.filesystem(scratch)
    resources: dict[str, float] = {"CPU": cpus, **({"GPU": 1} if gpu else {})}
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "run": run.uri, "threads": cpus, "key": uuid.uuid4().hex},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker=resources),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=RunConfig(
            name=uuid.uuid4().hex,
            storage_path=path,
            storage_filesystem=LocalFileSystem() if storage.is_local(scratch) else PyFileSystem(FSSpecHandler(fs)),
            failure_config=FailureConfig(max_failures=config.proxy.max_failures),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise failure(error) from error
    finally:
        storage.delete(scratch)
