"""Label: pseudo-labels for a source without labels, from clusters of embeddings of the seed set.

The stage runs only with `pseudo_labels.clusters`. One task holds the images of the seed set, trains
a network on them without labels (`raypipe.pseudo_labels.simclr`) or loads an existing one, and
clusters its embeddings; `raypipe.runs.pseudo_labels` lists the files. Contrastive training compares
the samples of a whole batch with one another, which data-parallel workers would have to exchange at
every step. The seed set is small, so one worker is enough; it has a GPU where the proxy has one.
It saves its state after every epoch, every 25 s, and when its node is announced to go. After an
interruption it resumes from there.

The label of every other sample is the cluster of its embedding by the same network; the stage
`embed` computes it. So what the extrapolation uses (the class, and loss and margin under it), audit
sets and strategies by class mean the same inside and outside the seed set.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config
from raypipe.config.pseudo_labels import TORCHVISION, PseudoLabelSettings
from raypipe.distributed.code_identity import network_code
from raypipe.distributed.context import Context
from raypipe.errors import ConfigError, StageError
from raypipe.progress import ProgressCallback
from raypipe.proxies.normalisation import input_statistics
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.pseudo_labels import CLUSTERS, FOLDER, MANIFEST, NETWORK
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import read_images
from raypipe.stages.base import Stage

if TYPE_CHECKING:
    from torch import Tensor, nn

    from raypipe.proxies.networks import ProxyNet
    from raypipe.pseudo_labels.backbone import Backbone
    from raypipe.pseudo_labels.clusters import Clusters
    from raypipe.pseudo_labels.labeller import Labeller

STATE = "state.safetensors"
"""Everything needed to resume the self-supervised training."""


class LabelStage(Stage):
    """Give every seed and audit sample a pseudo-label."""

    name = "label"
    needs = ("seed",)

    def applies_to(self, config: Config) -> bool:
        return config.unsupervised

    def settings(self, config: Config) -> dict[str, Any]:
        trains = config.pseudo_labels.features == "self-supervised"
        used = {"model", "flip", "normalize"} if trains else set()
        return {
            **config.pseudo_labels.model_dump(mode="json"),
            "proxy": config.proxy.model_dump(mode="json", include=used),
            **(network_code(config.proxy.model) if trains else {}),
        }

    def complete(self, context: Context, record: StageRecord) -> bool:
        shards = set(SeedManifest.read(context.run).all_shards)
        files = storage.names(context.run.path(FOLDER))
        return MANIFEST in files and shards <= context.run.done(FOLDER)

    def execute(self, context: Context, record: StageRecord) -> None:
        from raypipe.distributed.step_tasks import run_step_functions

        config, run, seed = context.config, context.run, SeedManifest.read(context.run)
        one_worker = config.proxy.model_copy(update={"workers": 1, "parts": 1, "repeats": 1})
        cluster = context.cluster.for_trainings(config.cluster)
        resources = cluster.training_resources(one_worker)
        gpu = resources.gpu
        started = time.monotonic()
        step = functools.partial(write_labels, gpu)
        record.cpu_seconds += run_step_functions(
            context, {self.name: step}, seed.samples, resources.cpus, int(gpu)
        )
        record.gpu_seconds += time.monotonic() - started if gpu else 0.0
        storage.delete(run.path(FOLDER, STATE))
        manifest = storage.read_json(run.path(FOLDER, MANIFEST))
        sizes = manifest["per_class"]
        context.progress.say(
            f"{self.name:<11} {len(sizes)} clusters of {min(sizes):,} to {max(sizes):,} seed "
            "samples are used as classes; the labels of the source were not read"
        )
        record.samples = seed.samples
        names = ("clusters", "features", "method", "per_class")
        record.detail = {name: manifest[name] for name in names}


def write_labels(gpu: bool, config: Config, run: Run, samples: int, step: ProgressCallback) -> None:
    """Write the files of `raypipe.runs.pseudo_labels`, the manifest last. Runs in a task."""
    from raypipe.pseudo_labels.labeller import BATCH_SIZE, Labeller, features
    from raypipe.vision.devices import AdaptiveBatch

    settings, seed, device = config.pseudo_labels, SeedManifest.read(run), "cuda" if gpu else "cpu"
    count = settings.clusters or 0
    images = seed_images(run, seed)
    network: Backbone | ProxyNet
    description: dict[str, Any]
    if settings.features == "backbone":
        network = _backbone(settings, device)
        description = {"model": settings.model, "image_size": settings.image_size}
    else:
        network = _self_supervised(config, run, seed, images, device, step)
        mean, std = input_statistics(config.proxy, seed.mean, seed.std)
        description = {
            "model": config.proxy.model,
            "image_size": seed.image_size,
            "mean": mean,
            "std": std,
        }
    embeddings = features(network, images, AdaptiveBatch(BATCH_SIZE), device)
    clusters = _cluster(settings, embeddings, count, step)
    per_class = np.bincount(clusters(embeddings), minlength=count)
    if (per_class > 0).sum() < 2:
        raise StageError(
            f"all {len(embeddings)} seed samples are in one cluster; raise pseudo_labels.gamma, or "
            "set method to kmeans"
        )
    _write_model(run, network, clusters)
    _write_shards(run, seed.all_shards, Labeller(network, clusters, device))
    names = [f"cluster-{number}" for number in range(count)]
    storage.write_json(run.pseudo_classes_file, {"names": names, "numeric": False})
    manifest = description | {
        "features": settings.features,
        "clusters": count,
        "method": settings.method,
        "per_class": per_class.tolist(),
    }
    storage.write_json(run.path(FOLDER, MANIFEST), manifest)


def _cluster(
    settings: PseudoLabelSettings, embeddings: np.ndarray, count: int, step: ProgressCallback
) -> Clusters:
    """Cluster the embeddings of the seed set, [n, d]."""
    from raypipe.pseudo_labels.clusters import kmeans
    from raypipe.pseudo_labels.turtle import turtle

    if settings.method == "turtle":
        return turtle(
            embeddings,
            count,
            steps=settings.rounds,
            gamma=settings.gamma,
            seed=settings.seed,
            step=step,
        )
    return kmeans(
        embeddings,
        count,
        restarts=settings.restarts,
        iterations=settings.rounds,
        seed=settings.seed,
    )


def _write_model(run: Run, network: nn.Module, clusters: Clusters) -> None:
    """Write the network, without its last layer, and the clusters."""
    from safetensors.numpy import save as save_arrays
    from safetensors.torch import save

    weights = {
        name: value.detach().cpu().contiguous()
        for name, value in network.state_dict().items()
        if not name.startswith("head.")
    }
    storage.write_bytes(run.path(FOLDER, NETWORK), save(weights))
    arrays = {"centre": clusters.centre, "weight": clusters.weight, "bias": clusters.bias}
    contiguous = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    storage.write_bytes(run.path(FOLDER, CLUSTERS), save_arrays(contiguous))


def _write_shards(run: Run, shards: Sequence[str], labeller: Labeller) -> None:
    """Write the pseudo-labels of seed and audit shards."""
    for shard in shards:
        ids, pixels, _ = read_images(run, shard)
        label = labeller(pixels) if ids else np.zeros(0, np.int64)
        table = pa.table(
            {"sample_id": pa.array(ids, pa.string()), "label": pa.array(label, pa.int32())}
        )
        storage.write_table(run.label_shard(shard), table)


def seed_images(run: Run, seed: SeedManifest) -> np.ndarray:
    """Return the decoded seed set in the order of its shards, uint8 [n, 3, size, size].

    It is in a file of this machine that disappears with the array.
    """
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
) -> ProxyNet:
    """Train a network on the images alone, from the last saved state on."""
    from safetensors.torch import load, save

    from raypipe.distributed.preemption import DrainWatch
    from raypipe.pseudo_labels.simclr import pretext_network, pretrain
    from raypipe.stages.proxy.save_clock import SoloSaveClock

    proxy, settings, uri = config.proxy, config.pseudo_labels, run.path(FOLDER, STATE)
    mean, std = input_statistics(proxy, seed.mean, seed.std)
    network = pretext_network(proxy.model, seed.image_size, mean, std, settings.seed)
    state: dict[str, Tensor] | None
    try:
        state = load(storage.read_bytes(uri))
    except FileNotFoundError:
        state = None
    if state is not None and "batches" not in state:  # an earlier version counted epochs
        state = None
    with DrainWatch() as drain:
        pretrain(
            network,
            images,
            settings,
            flip=proxy.flip,
            device=device,
            state=state,
            save=lambda state: storage.write_bytes(uri, save(state)),
            is_due=SoloSaveClock(drain).is_due,
            step=step,
        )
    return network


def _backbone(settings: PseudoLabelSettings, device: str) -> Backbone:
    """Load the network of the settings. Raises ConfigError when its weights are unavailable."""
    import torch

    from raypipe.pseudo_labels.backbone import Backbone

    with torch.random.fork_rng(devices=[]):
        network = Backbone(settings.model, settings.image_size)
    network.load_weights(_weights(settings), settings.weights or "")
    return network.to(device).eval()


def _weights(settings: PseudoLabelSettings) -> dict[str, Tensor]:
    """Load the weights of the settings, from torchvision's cache or from a file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    uri = settings.weights or ""
    if uri == TORCHVISION:
        import torchvision

        try:
            weights = torchvision.models.get_model_weights(settings.model).DEFAULT
            return dict(weights.get_state_dict(progress=False, check_hash=True))
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"pseudo_labels.weights: those of {settings.model} are not in torchvision's cache "
                f"and cannot be downloaded ({error}); set it to a safetensors file with them"
            ) from None
    try:
        return dict(load(storage.read_bytes(uri)))
    except FileNotFoundError:
        raise ConfigError(f"pseudo_labels.weights: {uri}: no such file") from None
    except SafetensorError as error:
        raise ConfigError(
            f"pseudo_labels.weights: {uri} is not a safetensors file ({error})"
        ) from None
