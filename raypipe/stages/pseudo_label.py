"""Label: pseudo-labels for a source without labels, from clusters of embeddings of the seed set. Only with `pseudo_labels.clusters`.

One task has the seed set's images, trains a network on them without labels (`raypipe.pseudo_labels.simclr`) or takes one that is there,
and finds clusters in what it embeds them as; `raypipe.runs.pseudo_labels` says what it writes. Contrastive training compares the samples
of a whole batch with one another, which data-parallel workers would have to exchange at every step; the seed set is small, so one worker
(with a GPU where the proxy has one) is enough. It goes on after the last finished epoch when it is interrupted.

The label of every other sample is that of the cluster its embedding by the same network is in, found in the stage `embed`: what is
extrapolated from (the class, loss and margin under it), audit sets and strategies by class then mean the same inside the seed set and
outside.
"""

from __future__ import annotations

import functools
import tempfile
import time
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config
from raypipe.config.pseudo_labels import TORCHVISION, PseudoLabelSettings
from raypipe.distributed.context import Context
from raypipe.errors import ConfigError, StageError
from raypipe.progress import ProgressCallback
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.pseudo_labels import CLUSTERS, FOLDER, MANIFEST, NETWORK
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import read_images
from raypipe.stages.base import Stage

STATE = "state.safetensors"
"""All that the self-supervised training needs to go on."""


class LabelStage(Stage):
    name = "label"
    needs = ("seed",)

    def applies_to(self, config: Config) -> bool:
        return config.unsupervised

    def settings(self, config: Config) -> dict[str, Any]:
        used = (
            {"model", "flip", "normalize"}
            if config.pseudo_labels.features == "self-supervised"
            else set()
        )
        return {
            **config.pseudo_labels.model_dump(mode="json"),
            "proxy": config.proxy.model_dump(mode="json", include=used),
        }

    def complete(self, context: Context, record: StageRecord) -> bool:
        seed = SeedManifest.read(context.run)
        shards = {*seed.shards, *seed.audit_shards}
        return MANIFEST in storage.names(context.run.path(FOLDER)) and shards <= context.run.done(
            FOLDER
        )

    def execute(self, context: Context, record: StageRecord) -> None:
        from raypipe.distributed.step_tasks import run_step_functions

        config, run, seed = context.config, context.run, SeedManifest.read(context.run)
        alone = config.proxy.model_copy(update={"workers": 1, "parts": 1})
        resources = context.cluster.training_resources(alone)
        gpu = resources.gpu
        started = time.monotonic()
        part = functools.partial(write_labels, gpu)
        record.cpu_seconds += run_step_functions(
            context, {self.name: part}, seed.samples, resources.cpus, int(gpu)
        )
        record.gpu_seconds += time.monotonic() - started if gpu else 0.0
        storage.delete(run.path(FOLDER, STATE))
        about = storage.read_json(run.path(FOLDER, MANIFEST))
        sizes = about["per_class"]
        context.progress.say(
            f"{self.name:<11} {len(sizes)} clusters of {min(sizes):,} to {max(sizes):,} seed samples stand for classes; no label of the "
            "source was read"
        )
        record.samples = seed.samples
        record.detail = {
            name: about[name] for name in ("clusters", "features", "method", "per_class")
        }


def write_labels(gpu: bool, config: Config, run: Run, samples: int, step: ProgressCallback) -> None:
    """Write all that `raypipe.runs.pseudo_labels` names, the manifest last. Runs in a task."""
    from safetensors.numpy import save as save_arrays
    from safetensors.torch import save

    from raypipe.pseudo_labels.clusters import kmeans
    from raypipe.pseudo_labels.labeller import BATCH_SIZE, Labeller, features
    from raypipe.pseudo_labels.turtle import turtle
    from raypipe.vision.devices import AdaptiveBatch

    settings, seed, device = config.pseudo_labels, SeedManifest.read(run), "cuda" if gpu else "cpu"
    count = settings.clusters or 0
    images = seed_images(run, seed)
    if settings.features == "backbone":
        network, about = (
            _backbone(settings, device),
            {"model": settings.model, "image_size": settings.image_size},
        )
    else:
        network, about = _self_supervised(config, run, seed, images, device, step)
    found = features(network, images, AdaptiveBatch(BATCH_SIZE), device)
    if settings.method == "turtle":
        clusters = turtle(
            found, count, steps=settings.rounds, gamma=settings.gamma, seed=settings.seed, step=step
        )
    else:
        clusters = kmeans(
            found, count, restarts=settings.restarts, iterations=settings.rounds, seed=settings.seed
        )
    per_class = np.bincount(clusters(found), minlength=count)
    if (per_class > 0).sum() < 2:
        raise StageError(
            f"all {len(found)} seed samples are in one cluster; raise pseudo_labels.gamma, or set method to kmeans"
        )
    weights = {
        name: value.detach().cpu()
        for name, value in network.state_dict().items()
        if not name.startswith("head.")
    }
    storage.write_bytes(
        run.path(FOLDER, NETWORK),
        save({name: value.contiguous() for name, value in weights.items()}),
    )
    arrays = {"centre": clusters.centre, "weight": clusters.weight, "bias": clusters.bias}
    storage.write_bytes(
        run.path(FOLDER, CLUSTERS),
        save_arrays({name: np.ascontiguousarray(value) for name, value in arrays.items()}),
    )
    labeller = Labeller(network, clusters, device)
    for shard in (*seed.shards, *seed.audit_shards):
        ids, pixels, _ = read_images(run, shard)
        label = labeller(pixels) if ids else np.zeros(0, np.int64)
        table = pa.table(
            {"sample_id": pa.array(ids, pa.string()), "label": pa.array(label, pa.int32())}
        )
        storage.write_table(run.path(FOLDER, f"{shard}.parquet"), table)
    names = [f"cluster-{number}" for number in range(count)]
    storage.write_json(run.path(FOLDER, "classes.json"), {"names": names, "numeric": False})
    about |= {
        "features": settings.features,
        "clusters": count,
        "method": settings.method,
        "per_class": per_class.tolist(),
    }
    storage.write_json(run.path(FOLDER, MANIFEST), about)


def seed_images(run: Run, seed: SeedManifest) -> np.ndarray:
    """The decoded seed set in the order of its shards, uint8 [n, 3, size, size], in a file of this machine that goes with the array."""
    with tempfile.TemporaryFile() as file:
        images = np.memmap(
            file, np.uint8, "w+", shape=(seed.samples, 3, seed.image_size, seed.image_size)
        )
    start = 0
    for shard, samples in zip(seed.shards, seed.shard_samples, strict=True):
        images[start : start + samples] = read_images(run, shard)[1]
        start += samples
    return np.asarray(images)


def _self_supervised(
    config: Config,
    run: Run,
    seed: SeedManifest,
    images: np.ndarray,
    device: str,
    step: ProgressCallback,
) -> tuple[Any, dict[str, Any]]:
    """A network trained on the images alone, from the last finished epoch on, and what the manifest says of it."""
    from safetensors.torch import load, save

    from raypipe.pseudo_labels.simclr import pretext_network, pretrain

    proxy, settings, uri = config.proxy, config.pseudo_labels, run.path(FOLDER, STATE)
    mean, std = proxy.statistics(seed.mean, seed.std)
    network = pretext_network(proxy.model, seed.image_size, mean, std, settings.seed)
    try:
        state = load(storage.read_bytes(uri))
    except FileNotFoundError:
        state = None
    pretrain(
        network,
        images,
        settings,
        flip=proxy.flip,
        device=device,
        state=state,
        save=lambda state: storage.write_bytes(uri, save(state)),
        step=step,
    )
    return network, {
        "model": proxy.model,
        "image_size": seed.image_size,
        "mean": mean,
        "std": std,
    }


def _backbone(settings: PseudoLabelSettings, device: str) -> Any:
    """The network that the settings name, with its weights. Raises ConfigError where these cannot be had."""
    import torch

    from raypipe.pseudo_labels.backbone import Backbone

    with torch.random.fork_rng(devices=[]):
        network = Backbone(settings.model, settings.image_size)
    network.load_weights(_weights(settings), settings.weights or "")
    return network.to(device).eval()


def _weights(settings: PseudoLabelSettings) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    uri = settings.weights or ""
    if uri == TORCHVISION:
        import torchvision

        try:
            known = torchvision.models.get_model_weights(settings.model).DEFAULT
            return dict(known.get_state_dict(progress=False, check_hash=True))
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"pseudo_labels.weights: those of {settings.model} are not in torchvision's cache and cannot be downloaded ({error}); set it "
                "to a safetensors file with them"
            ) from None
    try:
        return dict(load(storage.read_bytes(uri)))
    except FileNotFoundError:
        raise ConfigError(f"pseudo_labels.weights: {uri}: no such file") from None
    except SafetensorError as error:
        raise ConfigError(
            f"pseudo_labels.weights: {uri} is not a safetensors file ({error})"
        ) from None
