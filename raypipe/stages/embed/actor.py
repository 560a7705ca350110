"""The actor that runs the proxies over fragments and writes their embeddings."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.distributed.actor_pool import Batch, WorkerContext
from raypipe.distributed.usage import Stopwatch
from raypipe.errors import StageError
from raypipe.runs.checkpoints import load_checkpoint
from raypipe.runs.embeddings import PROBE_FRACTION, SPECIAL_ROWS, probe_rule
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.partition import proxy_parts
from raypipe.runs.proxy_roles import ProxyRoles
from raypipe.runs.pseudo_labels import load_labeller
from raypipe.runs.rejects import summarize_rejects, write_rejects
from raypipe.runs.unit_result import UnitResult
from raypipe.sources.id_sampling import audit_rule, in_sample
from raypipe.stages.embed.features import FeatureEmbedder
from raypipe.vision.forward_by_proxies import ProxyOutputs, View, forward_by_proxies

if TYPE_CHECKING:
    from torch import Tensor


NOT_FINITE = "its embedding is not finite"
NOT_FINITE_FEATURES = "its embedding by embed.model is not finite"
"""Reject reasons of a sample whose embedding by the proxy, or only that by the other network, has
NaN or infinite values."""


class EmbedActor:
    """Runs the last checkpoints of the proxies over whole fragments; writes their files."""

    def __init__(
        self, worker: WorkerContext, gpu_decoding: bool = False, probe_fraction: float = 0.0
    ) -> None:
        from raypipe.vision.devices import AdaptiveBatch, set_threads

        set_threads(worker.threads)
        config, gpu = worker.config, worker.gpu
        self._config, self._run, self._gpu, self._watch = config, worker.run, gpu, Stopwatch()
        self._device = worker.device
        self._at_once = AdaptiveBatch(config.embed.images_at_once(gpu, config.proxy.image_size))
        self._roles = ProxyRoles.of(config)
        self._models = {
            proxy: load_checkpoint(self._run, part.trained.final, self._device, part.checkpoints)
            for proxy, part in enumerate(proxy_parts(self._run))
            if part.number == 0 or self._roles.cross_fits
        }
        seed = config.seed
        self._rules = {
            "seed": in_sample(seed.fraction, seed.seed),
            "audit": audit_rule(seed, SeedManifest.read(self._run).audit_fraction),
            "probe": probe_rule(seed, probe_fraction),
        }
        self._probe_fraction = probe_fraction
        self._labeller = load_labeller(self._run, self._device) if config.unsupervised else None
        self._features: FeatureEmbedder | None = None
        if config.embed.has_features:
            self._features = FeatureEmbedder(config, self._run, gpu)
        if gpu_decoding:
            from raypipe.vision.gpu_decode import check_gpu_decoding

            check_gpu_decoding(self._device)

    def __call__(self, fragment: str, batch: Batch) -> UnitResult:
        started = time.monotonic()
        images, reason = self._images(batch)
        good = reason == ""
        ids, labels = batch["sample_id"][good], batch["label"][good]
        images = images[good]
        if self._labeller is not None:
            labels = self._labeller(images).astype(np.int32)
        views: Mapping[int, View] | None = None
        if self._roles.single:
            columns = self._forward(0, images, labels)
            finite = np.isfinite(columns["embedding"]).all(1)
        else:
            outputs = self._forward_all(ids, images, labels)
            columns, views, finite = outputs.columns, outputs.views, outputs.finite
        by_proxy = finite
        if self._features is not None:
            own = batch["feature_image"][good] if "feature_image" in batch else images
            given = batch["given"][good] if "given" in batch else None
            columns["embedding"] = self._features(columns["embedding"], own, given)
            finite = by_proxy & np.isfinite(columns["embedding"]).all(1)
        rejects = list(zip(batch["sample_id"][~good].tolist(), reason[~good].tolist(), strict=True))
        rejects += [
            (str(sample_id), NOT_FINITE_FEATURES if good_proxy else NOT_FINITE)
            for sample_id, good_proxy in zip(ids[~finite], by_proxy[~finite], strict=True)
        ]
        if rejects:
            write_rejects(self._run, fragment, rejects)
        if views is not None:
            self._write_views(fragment, ids, finite, views)
        self._write(
            fragment,
            ids[finite],
            labels[finite],
            {name: value[finite] for name, value in columns.items()},
        )
        return UnitResult(
            fragment,
            int(finite.sum()),
            len(rejects),
            summarize_rejects(rejects),
            self._watch.lap() + float(batch["cpu_seconds"].sum()),
            time.monotonic() - started if self._gpu else 0.0,
        )

    def _forward(
        self,
        proxy: int,
        images: np.ndarray | Tensor,
        labels: np.ndarray,
        probabilities: bool = False,
    ) -> dict[str, np.ndarray]:
        """Return what one proxy says of images; see `raypipe.vision.forward.forward`."""
        from raypipe.vision.forward import forward

        return forward(
            self._models[proxy],
            images,
            labels,
            self._at_once,
            self._device,
            self._gpu and self._config.proxy.amp,
            probabilities,
        )

    def _forward_all(
        self, ids: np.ndarray, images: np.ndarray | Tensor, labels: np.ndarray
    ) -> ProxyOutputs:
        """Return the outputs of the proxies that see each image."""
        roles = self._roles
        part = roles.part_of(ids.tolist())
        return forward_by_proxies(
            lambda proxy, rows: self._forward(proxy, images[rows], labels[rows], True),
            {proxy: roles.sees(part, proxy) for proxy in self._models},
            {proxy: roles.is_viewed(part, proxy) for proxy in roles.in_views(roles.embedders)},
            len(roles.seen_by(0)),
        )

    def _write_views(
        self, fragment: str, ids: np.ndarray, finite: np.ndarray, views: Mapping[int, View]
    ) -> None:
        """Write the embeddings by other proxies: a row group for each of them."""
        number_type = np.int8 if self._roles.proxies <= 128 else np.int16
        tables = []
        for proxy, view in views.items():
            rows = view.rows[finite[view.rows]]
            embedding = view.embedding[finite[view.rows]]
            proxies = np.full(len(rows), proxy, number_type)
            tables.append(
                pa.table(
                    {
                        "sample_id": pa.array(ids[rows].tolist(), pa.string()),
                        "proxy": pa.array(proxies),
                        "embedding": self._embedding_column(embedding),
                    }
                )
            )
        storage.write_table_groups(self._run.view_shard(fragment), tables)

    def _images(self, batch: Batch) -> tuple[np.ndarray | Tensor, np.ndarray]:
        """Return n images, and for each "" or the reason of its rejection.

        The images are uint8 [n, 3, size, size], an array or a tensor on the device.
        """
        if "jpeg_pixels" not in batch:
            return batch["image"], batch["reason"]
        from raypipe.vision.gpu_decode import decode_jpegs

        pixels, failures = decode_jpegs(
            batch["image"].tolist(),
            batch["jpeg_pixels"].tolist(),
            self._config.proxy.image_size,
            self._config.source.max_pixels,
            self._device,
            self._at_once.size,
        )
        earlier = batch["reason"].tolist()
        reasons = [failure or reason for failure, reason in zip(failures, earlier, strict=True)]
        return pixels, np.array(reasons)

    def _write(
        self, fragment: str, ids: np.ndarray, labels: np.ndarray, columns: dict[str, np.ndarray]
    ) -> None:
        """Write the embeddings of a fragment.

        Seed and audit samples, and those of linear probes, are in row groups of their own, so that
        fits read them without the rest.
        """
        table = self._table(ids, labels, columns.pop("embedding"), columns)
        groups, metadata = [], {PROBE_FRACTION: str(self._probe_fraction)}
        left = np.ones(len(ids), bool)
        for name, key in SPECIAL_ROWS.items():
            rule = self._rules[name]
            special = left & np.array([rule(sample_id) for sample_id in ids], bool)
            groups.append(table.filter(pa.array(special)))
            metadata[key] = str(int(special.sum()))
            left &= ~special
        groups.append(table.filter(pa.array(left)))
        groups[0] = groups[0].replace_schema_metadata(metadata)
        storage.write_table_groups(self._run.embedding_shard(fragment), groups)

    def _table(
        self,
        ids: np.ndarray,
        labels: np.ndarray,
        embedding: np.ndarray,
        columns: dict[str, np.ndarray],
    ) -> pa.Table:
        """Return sample_id, label, embedding in the type of the settings, and the columns."""
        data = {
            "sample_id": pa.array(ids.tolist(), pa.string()),
            "label": pa.array(labels, pa.int32(), mask=labels < 0),
            "embedding": self._embedding_column(embedding),
            **{name: pa.array(value) for name, value in columns.items()},
        }
        return pa.table(data)

    def _embedding_column(self, embedding: np.ndarray) -> pa.FixedSizeListArray:
        """Return embeddings in the type of the settings."""
        with np.errstate(over="ignore"):
            values = embedding.astype(self._config.embed.dtype).reshape(-1)
        if not np.isfinite(values).all():
            raise StageError("embeddings do not fit into float16; set embed.dtype to float32")
        return pa.FixedSizeListArray.from_arrays(pa.array(values), embedding.shape[1])
