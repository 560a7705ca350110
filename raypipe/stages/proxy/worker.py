"""What one worker of the proxy's training does; Ray Train starts it with torch.distributed ready. See `raypipe.stages.proxy.stage`."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import time
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import torch
import torch.distributed as distributed
import torch.nn.functional as F
from ray.train.torch import get_device, prepare_model
from safetensors.torch import load, save
from torch import Tensor

from raypipe import storage
from raypipe.config import ProxySettings
from raypipe.runs.ledger import fingerprint
from raypipe.runs.manifests import EpochRecord, SeedManifest
from raypipe.runs.partition import SeedPart
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import read_shard
from raypipe.scores.trajectory import STATISTICS
from raypipe.vision import training
from raypipe.vision.adversarial import attack, starting_points
from raypipe.vision.devices import set_threads, to_device
from raypipe.vision.networks import build_network
from raypipe.vision.output_statistics import output_statistics
from raypipe.vision.sync_batchnorm import synchronize_batchnorm

DIVERGED = "diverged.json"
"""Written, with the reason, by a training that is over although epochs are missing."""
GROUP_BYTES = 64 << 20
"""Size of one row group of every trajectory file together, uncompressed: what the measure stage holds at once."""


def train_worker(arguments: dict[str, Any]) -> None:
    """The training loop of one worker; Ray Train calls it with torch.distributed ready."""
    settings, run = (
        ProxySettings.model_validate(arguments["config"]["proxy"]),
        Run(arguments["run"]),
    )
    own_part = SeedPart(**arguments["part"])
    folder = own_part.folder
    context = ray.train.get_context()
    rank, world, gpu = context.get_world_rank(), context.get_world_size(), arguments["gpu"]
    device = get_device() if gpu else torch.device("cpu")
    if not gpu:
        set_threads(arguments["threads"])
    seed, classes = SeedManifest.read(run), len(run.classes().names)
    cache = _LocalSeed(run, seed, own_part, arguments["key"])
    if context.get_local_rank() == 0:
        cache.fill()
    distributed.barrier()
    images, labels, seed_rows = cache.open()

    torch.manual_seed(settings.seed)
    statistics = settings.statistics(seed.mean, seed.std)
    network = build_network(settings.model, classes, seed.image_size, *statistics).to(
        memory_format=torch.channels_last
    )
    model = prepare_model(synchronize_batchnorm(network, gpu), device)
    plain = model.module if hasattr(model, "module") else model
    optimizer = training.make_optimizer(settings, model)
    first = 0
    try:
        data = storage.read_bytes(run.path(folder, "state.safetensors"))
    except FileNotFoundError:
        pass
    else:
        state = load(data)
        first = int(state.pop("epoch")) + 1
        training.restore_training(state, plain, optimizer)

    per_epoch = training.steps_per_epoch(len(labels), settings.batch_size)
    steps = per_epoch * settings.epochs
    scored = settings.checkpoint_epochs()
    kept = {*scored, settings.epochs - 1}
    for epoch in range(first, settings.epochs):
        cpu_started = time.process_time()
        model.train()
        sums = torch.zeros(2, device=device)
        seen: list[tuple[np.ndarray, EpochPredictions]] = []
        for step, rows in enumerate(
            training.epoch_batches(len(labels), settings.batch_size, settings.seed, epoch)
        ):
            lr = training.learning_rate(settings, epoch * per_epoch + step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            part = slice(rank, None, world)
            batch = training.augment(images[rows], settings, epoch, step, part)
            pixels, target = to_device(batch, device), to_device(labels[rows[part]], device)
            if settings.adversary is not None:
                # drawn for the whole batch, as augmentation is
                start = starting_points(images[rows].shape, settings.seed, epoch, 1 + step, 1)[part]
                pixels = attack(
                    plain, pixels, target, settings.adversary, start, bfloat16=gpu and settings.amp
                )
            with torch.autocast("cuda", torch.bfloat16, enabled=gpu and settings.amp):
                logits = model(pixels).float()
            # DDP averages over workers; scaled so, the sum is the mean over the whole batch even when its parts are unequal
            loss = F.cross_entropy(
                logits, target, reduction="sum", label_smoothing=settings.label_smoothing
            ) * (world / len(rows))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                sums += torch.stack(
                    [
                        F.cross_entropy(logits, target, reduction="sum"),
                        (logits.argmax(1) == target).sum(),
                    ]
                )
                if settings.trajectory == "train":
                    seen.append((rows[part], predictions(logits, target)))
        if settings.trajectory == "eval":
            model.eval()
            with torch.no_grad():
                own = np.arange(rank, len(labels), world)
                for rows in np.array_split(own, max(1, len(own) // settings.batch_size)):
                    pixels, target = (to_device(array[rows], device) for array in (images, labels))
                    if settings.adversary is not None:
                        pixels = attack(plain, pixels, target, settings.adversary)
                    seen.append((rows, predictions(plain(pixels).float(), target)))
        distributed.all_reduce(sums)
        loss_mean, accuracy = (sums / len(labels)).tolist()
        if not np.isfinite(
            loss_mean
        ):  # on every worker alike; an error would only make Ray Train repeat what cannot end otherwise
            reason = f"the proxy's loss is {loss_mean} in epoch {epoch + 1}; lower proxy.lr (now {settings.lr:g})"
            if rank == 0:
                storage.write_json(run.path(folder, DIVERGED), {"reason": reason})
            break
        file = ""
        if seen:
            file = f"epoch-{epoch:04d}-{rank}-of-{world}.parquet"
            written = [(seed_rows[rows], values) for rows, values in seen]
            most = group_rows(classes, settings.epochs, world * own_part.of)
            write_trajectory(run.path(folder, "trajectory", file), written, most)
        cpu = torch.tensor([time.process_time() - cpu_started], device=device)
        distributed.all_reduce(cpu)  # every worker's trajectory is written when this returns
        if rank == 0:
            checkpoint = f"epoch-{epoch:04d}.safetensors" if epoch in kept else ""
            if checkpoint:
                weights = {
                    name: value.detach().cpu().contiguous()
                    for name, value in plain.state_dict().items()
                }
                storage.write_bytes(run.path(folder, "checkpoints", checkpoint), save(weights))
            EpochRecord(
                epoch=epoch,
                lr=lr,
                steps=(epoch + 1) * per_epoch,
                loss=loss_mean,
                accuracy=accuracy,
                checkpoint=checkpoint,
                scored=epoch in scored,
                trajectory=tuple(
                    f"epoch-{epoch:04d}-{other}-of-{world}.parquet"
                    for other in range(world if file else 0)
                ),
                cpu_seconds=cpu.item(),
            ).write(run, folder)
            state = training.training_state(plain, optimizer) | {"epoch": torch.tensor(epoch)}
            storage.write_bytes(run.path(folder, "state.safetensors"), save(state))
        ray.train.report({"epoch": epoch, "loss": loss_mean, "accuracy": accuracy, "lr": lr})
    distributed.barrier()
    if context.get_local_rank() == 0:
        cache.remove()


EpochPredictions = tuple[np.ndarray, np.ndarray]
"""Of n samples: the numbers of `raypipe.scores.trajectory.STATISTICS`, float32 [n, 4], and probabilities, float16 [n, classes]."""


def predictions(logits: Tensor, target: Tensor) -> EpochPredictions:
    """What the trajectory keeps of a batch. The numbers are those of the logits, before float16 rounds the probabilities."""
    found = output_statistics(logits, target)
    return torch.stack([found[name] for name in STATISTICS], 1).cpu().numpy(), logits.softmax(
        1
    ).half().cpu().numpy()


def group_rows(classes: int, epochs: int, workers: int) -> int:
    """Rows in a row group of a trajectory file."""
    return max(64, GROUP_BYTES // (2 * classes * epochs * workers))


def write_trajectory(uri: str, seen: list[tuple[np.ndarray, EpochPredictions]], group: int) -> None:
    """Write one worker's predictions in one epoch, by row of the seed set, with so many rows in a row group."""
    rows = np.concatenate([rows for rows, _ in seen])
    order = np.argsort(rows)
    values = np.concatenate([part for _, (part, _) in seen])[order]
    probabilities = np.concatenate([part for _, (_, part) in seen])[order]
    columns: dict[str, Any] = {"row": pa.array(rows[order], pa.int64())}
    columns |= {
        name: pa.array(values[:, index], pa.float32()) for index, name in enumerate(STATISTICS)
    }
    # bytes instead of a list of numbers: Parquet writes and reads a list one number at a time, 10 times slower
    columns["probabilities"] = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(2 * probabilities.shape[1]), len(rows), [None, pa.py_buffer(probabilities)]
    )
    storage.write_table(uri, pa.table(columns), row_group_size=group, dictionary=False)


class _LocalSeed:
    """One part of the decoded seed set as memory-mapped arrays on this node's disk, one copy for all its workers.

    Rows are in the order of the manifest's shards. The page cache makes it as fast as memory, and no larger than fits.
    """

    def __init__(self, run: Run, manifest: SeedManifest, part: SeedPart, key: str) -> None:
        self._run, self._manifest, self._part = run, manifest, part
        self._prefix = os.path.join(tempfile.gettempdir(), f"raypipe-seed-{fingerprint(run.uri)}-")
        self._driver = self._prefix + key
        self._folder = f"{self._driver}-{part.number}"

    def fill(self) -> None:
        if os.path.exists(os.path.join(self._folder, "complete")):
            return  # a worker was replaced; its node has the copy
        for left in glob.glob(glob.escape(self._prefix) + "*"):
            if left == self._folder or not left.startswith(self._driver):
                shutil.rmtree(
                    left, ignore_errors=True
                )  # of drivers that were killed, not of the parts trained beside this one
        os.makedirs(self._folder)
        count, size = self._part.samples, self._manifest.image_size
        images = np.lib.format.open_memmap(
            self._file("images"), "w+", np.uint8, (count, 3, size, size)
        )
        labels = np.lib.format.open_memmap(self._file("labels"), "w+", np.int64, (count,))
        rows = np.lib.format.open_memmap(self._file("rows"), "w+", np.int64, (count,))
        start = first = 0
        for shard, samples in zip(self._manifest.shards, self._manifest.shard_samples, strict=True):
            ids, pixels, target = read_shard(self._run, shard)
            own = self._part.rows(ids)
            stop = start + len(own)
            images[start:stop], labels[start:stop], rows[start:stop] = (
                pixels[own],
                target[own],
                first + own,
            )
            start, first = stop, first + samples
        for array in (images, labels, rows):
            array.flush()
        with open(os.path.join(self._folder, "complete"), "w"):
            pass

    def open(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images, labels, and the row of each in the whole seed set."""
        return (
            np.load(self._file("images"), mmap_mode="r"),
            np.load(self._file("labels")),
            np.load(self._file("rows")),
        )

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, name: str) -> str:
        return os.path.join(self._folder, f"{name}.npy")
