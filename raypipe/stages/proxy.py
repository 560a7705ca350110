"""Proxy: the small network trained on the seed set with Ray Train, data-parallel over its workers.

Writes, under `proxy/`:

    epochs/epoch-0007.json            loss, accuracy, learning rate, files of the trajectory: an epoch with this file is finished
    trajectory/epoch-0007-*.parquet   row (of the seed set), probabilities float16 [classes]
    checkpoints/epoch-0007.safetensors
    state.safetensors                 all that is needed to go on after the last finished epoch
    proxy.json                        what the later stages need; written last

A worker that dies is replaced and the training goes on after the last finished epoch; so it does when the driver dies.
Batches are defined over the whole seed set, so the number of workers changes their sum's rounding and nothing else
(except BatchNorm, whose statistics are those of one worker's part of a batch).
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import threading
import time
import uuid
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config, ProxySettings
from raypipe.errors import StageError
from raypipe.progress import Meter
from raypipe.rundir import Run, StageRecord, fingerprint
from raypipe.stages.base import Context, Stage
from raypipe.stages.seed import read_shard, seed_manifest

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
        return {item["file"] for item in manifest["checkpoints"]} <= storage.names(context.run.path("proxy", "checkpoints"))

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
                    {"epoch": item["epoch"], "lr": item["lr"], "file": item["checkpoint"]}
                    for item in epochs
                    if item["checkpoint"]
                ],
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


def load_checkpoint(run: Run, file: str, device: str = "cpu") -> Any:
    """The proxy with the weights of a checkpoint, in eval mode."""
    import torch
    from safetensors.torch import load

    from raypipe.models import build

    manifest = proxy_manifest(run)
    with torch.random.fork_rng(devices=[]):
        model = build(manifest["model"], manifest["classes"], manifest["image_size"], manifest["mean"], manifest["std"])
    model.load_state_dict(load(storage.read_bytes(run.path("proxy", "checkpoints", file))))
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


def train_worker(arguments: dict[str, Any]) -> None:
    """The training loop of one worker; Ray Train calls it with torch.distributed ready."""
    import ray.train
    import torch
    import torch.distributed as distributed
    import torch.nn.functional as F
    from ray.train.torch import get_device, prepare_model
    from safetensors.torch import load, save

    from raypipe import training
    from raypipe.models import build

    settings, run = ProxySettings.model_validate(arguments["config"]["proxy"]), Run(arguments["run"])
    context = ray.train.get_context()
    rank, world, device = context.get_world_rank(), context.get_world_size(), get_device()
    gpu = device.type == "cuda"
    if not gpu:
        torch.set_num_threads(arguments["threads"])
    seed, classes = seed_manifest(run), len(run.classes().names)
    cache = _LocalSeed(run, seed, arguments["key"])
    if context.get_local_rank() == 0:
        cache.fill()
    distributed.barrier()
    images, labels = cache.open()

    torch.manual_seed(settings.seed)
    model = prepare_model(build(settings.model, classes, seed["image_size"], seed["mean"], seed["std"]))
    plain = model.module if hasattr(model, "module") else model
    if gpu:
        plain.to(memory_format=torch.channels_last)
    optimizer = training.make_optimizer(settings, model)
    first = 0
    try:
        data = storage.read_bytes(run.path("proxy", "state.safetensors"))
    except FileNotFoundError:
        pass
    else:
        state = load(data)
        first = int(state.pop("epoch")) + 1
        training.restore_training(state, plain, optimizer)

    per_epoch = training.steps_per_epoch(len(labels), settings.batch_size)
    steps, kept = per_epoch * settings.epochs, set(training.checkpoint_epochs(settings.epochs, settings.checkpoints))
    for epoch in range(first, settings.epochs):
        cpu_started = time.process_time()
        model.train()
        sums = torch.zeros(2, device=device)
        rows_seen, probabilities = [], []
        for step, rows in enumerate(training.epoch_batches(len(labels), settings.batch_size, settings.seed, epoch)):
            lr = training.learning_rate(settings, epoch * per_epoch + step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            part = slice(rank, None, world)
            batch = training.augment(images[rows], settings, epoch, step, part)
            pixels = torch.from_numpy(batch).to(device, non_blocking=True)
            target = torch.from_numpy(labels[rows[part]]).to(device, non_blocking=True)
            with torch.autocast("cuda", torch.bfloat16, enabled=gpu and settings.amp):
                logits = model(pixels).float()
            # DDP averages over workers; scaled so, the sum is the mean over the whole batch even when its parts are unequal
            loss = F.cross_entropy(logits, target, reduction="sum", label_smoothing=settings.label_smoothing) * (
                world / len(rows)
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                sums += torch.stack([F.cross_entropy(logits, target, reduction="sum"), (logits.argmax(1) == target).sum()])
                if settings.trajectory == "train":
                    rows_seen.append(rows[part])
                    probabilities.append(logits.softmax(1).half().cpu().numpy())
        if settings.trajectory == "eval":
            model.eval()
            with torch.no_grad():
                for rows in np.array_split(
                    np.arange(rank, len(labels), world), max(1, len(labels) // world // settings.batch_size)
                ):
                    rows_seen.append(rows)
                    probabilities.append(plain(torch.from_numpy(images[rows]).to(device)).float().softmax(1).half().cpu().numpy())
        distributed.all_reduce(sums)
        loss_mean, accuracy = (sums / len(labels)).tolist()
        if not np.isfinite(loss_mean):
            raise StageError(f"the proxy's loss is {loss_mean} in epoch {epoch + 1}; lower proxy.lr (now {settings.lr:g})")
        file = ""
        if rows_seen:
            file = f"epoch-{epoch:04d}-{rank}-of-{world}.parquet"
            _write_trajectory(run.path("proxy", "trajectory", file), np.concatenate(rows_seen), np.concatenate(probabilities))
        cpu = torch.tensor([time.process_time() - cpu_started], device=device)
        distributed.all_reduce(cpu)  # every worker's trajectory is written when this returns
        if rank == 0:
            checkpoint = f"epoch-{epoch:04d}.safetensors" if epoch in kept else ""
            if checkpoint:
                weights = {name: value.detach().cpu().contiguous() for name, value in plain.state_dict().items()}
                storage.write_bytes(run.path("proxy", "checkpoints", checkpoint), save(weights))
            storage.write_json(
                run.path("proxy", "epochs", f"epoch-{epoch:04d}.json"),
                {
                    "epoch": epoch,
                    "lr": lr,
                    "steps": (epoch + 1) * per_epoch,
                    "loss": loss_mean,
                    "accuracy": accuracy,
                    "checkpoint": checkpoint,
                    "trajectory": [f"epoch-{epoch:04d}-{other}-of-{world}.parquet" for other in range(world)] if file else [],
                    "cpu_seconds": cpu.item(),
                },
            )
            state = training.training_state(plain, optimizer) | {"epoch": torch.tensor(epoch)}
            storage.write_bytes(run.path("proxy", "state.safetensors"), save(state))
        ray.train.report({"epoch": epoch, "loss": loss_mean, "accuracy": accuracy, "lr": lr})
    distributed.barrier()
    if context.get_local_rank() == 0:
        cache.remove()


def _write_trajectory(uri: str, rows: np.ndarray, probabilities: np.ndarray) -> None:
    order = np.argsort(rows)
    values = pa.array(np.ascontiguousarray(probabilities[order]).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, probabilities.shape[1])
    storage.write_table(uri, pa.table({"row": pa.array(rows[order], pa.int64()), "probabilities": column}))


class _LocalSeed:
    """The decoded seed set as memory-mapped arrays on this node's disk, one copy for all its workers.

    Rows are in the order of the manifest's shards. The page cache makes it as fast as memory, and no larger than fits.
    """

    def __init__(self, run: Run, manifest: dict[str, Any], key: str) -> None:
        self._run, self._manifest = run, manifest
        self._prefix = os.path.join(tempfile.gettempdir(), f"raypipe-seed-{fingerprint(run.uri)}-")
        self._folder = self._prefix + key

    def fill(self) -> None:
        if os.path.exists(os.path.join(self._folder, "complete")):
            return  # a worker was replaced; its node has the copy
        for left in glob.glob(glob.escape(self._prefix) + "*"):
            shutil.rmtree(left, ignore_errors=True)  # of drivers that were killed
        os.makedirs(self._folder)
        count, size = self._manifest["samples"], self._manifest["image_size"]
        images = np.lib.format.open_memmap(self._file("images"), "w+", np.uint8, (count, 3, size, size))
        labels = np.lib.format.open_memmap(self._file("labels"), "w+", np.int64, (count,))
        start = 0
        for shard in self._manifest["shards"]:
            _, pixels, target = read_shard(self._run, shard)
            images[start : start + len(target)], labels[start : start + len(target)] = pixels, target
            start += len(target)
        images.flush()
        labels.flush()
        with open(os.path.join(self._folder, "complete"), "w"):
            pass

    def open(self) -> tuple[np.ndarray, np.ndarray]:
        return np.load(self._file("images"), mmap_mode="r"), np.load(self._file("labels"))

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, name: str) -> str:
        return os.path.join(self._folder, f"{name}.npy")
