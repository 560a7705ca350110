"""Embeddings by `embed.model` and from `embed.from`, next to or instead of those by the proxy."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.distributed.usage import Stopwatch
from raypipe.runs.checkpoints import load_checkpoint
from raypipe.runs.embedding_table import EmbeddingTable, index_file, table_files
from raypipe.runs.features import (
    SPREAD_SAMPLES,
    image_size_of_features,
    load_features,
    read_scale,
    write_scale,
)
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.partition import proxy_parts
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import read_shard
from raypipe.runs.unit_result import UnitResult

if TYPE_CHECKING:
    from torch import Tensor


class FeatureEmbedder:
    """Puts the embeddings of a sample together: of proxy or network, then of the table."""

    def __init__(self, config: Config, run: Run, gpu: bool) -> None:
        from raypipe.vision.devices import AdaptiveBatch

        self._device, self._amp = "cuda" if gpu else "cpu", gpu and config.proxy.amp
        self._uses_proxy, self._scale = config.embed.uses_proxy, read_scale(run)
        self._network = load_features(config, self._device) if config.embed.network else None
        size = image_size_of_features(config) or config.proxy.image_size
        self._at_once = AdaptiveBatch(config.embed.images_at_once(gpu, size))

    def __call__(
        self, by_proxy: np.ndarray, images: np.ndarray | Tensor, given: np.ndarray | None
    ) -> np.ndarray:
        """Return the embeddings of n samples, float32 [n, d].

        Parameters
        ----------
        by_proxy
            Embeddings by proxy 0, float32 [n, p].
        images
            Pixels for the network, uint8 [n, channels, size, size].
        given
            Embeddings of the table, float32 [n, t].
        """
        from raypipe.vision.forward import embed

        parts = [by_proxy] if self._uses_proxy else []
        if self._network is not None:
            parts.append(embed(self._network, images, self._at_once, self._device, self._amp))
        if given is not None:
            parts.append(given * np.float32(self._scale))
        return np.concatenate(parts, 1)


def prepare_features(context: Context, config: Config, record: StageRecord) -> None:
    """Write the index of `embed.from`, and the scale of its embeddings next to others."""
    run = context.run
    if config.embed.table is None:
        return
    present = storage.names(run.path("features"))
    files = range(len(table_files(config.embed.table)))
    missing = [number for number in files if storage.name(run.feature_index(number)) not in present]
    context.run_tasks(
        missing, functools.partial(_index, run.uri, config.embed.table), record.add_cost
    )
    together = config.embed.uses_proxy or config.embed.network is not None
    if together and not storage.exists(run.feature_scale):
        context.run_tasks(["scale"], functools.partial(_scale, config, run.uri), record.add_cost)


def _index(run_uri: str, table: str, number: int) -> UnitResult:
    """Write the index of a file of the table. Runs in a task."""
    watch, run = Stopwatch(), Run(run_uri)
    index = index_file(table_files(table)[number][0], number)
    storage.write_table(run.feature_index(number), index)
    return UnitResult(str(number), len(index), cpu_seconds=watch.lap())


def _scale(config: Config, run_uri: str, name: str) -> UnitResult:
    """Compare the spread of both kinds of embeddings on seed samples. Runs in a task."""
    from raypipe.vision.devices import AdaptiveBatch, set_threads
    from raypipe.vision.forward import embed

    set_threads(1)
    watch, run = Stopwatch(), Run(run_uri)
    assert config.embed.table is not None
    table = EmbeddingTable.of(run, config.embed.table)
    if config.embed.uses_proxy:
        part = proxy_parts(run)[0]
        network = load_checkpoint(run, part.trained.final, "cpu", part.checkpoints).embed
    else:
        network = load_features(config)
    first, second, count = [], [], 0
    for shard in SeedManifest.read(run).shards:
        if count >= SPREAD_SAMPLES:
            break
        ids, images, _ = read_shard(run, shard)
        ids, images = ids[: SPREAD_SAMPLES - count], images[: SPREAD_SAMPLES - count]
        given, usable = table.read(ids)
        images = _resized(images[usable], config)
        if len(images):
            first.append(embed(network, images, AdaptiveBatch(64), "cpu", False))
            second.append(given[usable])
        count += len(ids)
    if first:
        write_scale(run, np.concatenate(first), np.concatenate(second))
    return UnitResult(name, count, cpu_seconds=watch.lap())


def _resized(images: np.ndarray, config: Config) -> np.ndarray:
    """Return seed images in the size of the network; only a spread is measured on them."""
    import torch

    size = image_size_of_features(config)
    if size in (None, images.shape[-1]) or not len(images):
        return images
    scaled = torch.nn.functional.interpolate(
        torch.from_numpy(images.copy()).float(), (size, size), mode="bilinear", antialias=True
    )
    return scaled.round().clamp(0, 255).to(torch.uint8).numpy()
