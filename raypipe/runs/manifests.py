"""What the stages hand to one another: typed manifests."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from raypipe import storage
from raypipe.errors import RunError
from raypipe.runs.layout import VALID_NAME, Run
from raypipe.runs.seed_shards import audit_name, distinguished_classes, shard_statistics


def proxy_manifest(run: Run) -> dict[str, Any]:
    """What `proxy.json` holds."""
    return storage.read_json(run.path("proxy", "proxy.json"))


def finished_epochs(run: Run, folder: str = "proxy") -> list[dict[str, Any]]:
    """The records of the finished epochs of a proxy, in order."""
    epochs = run.path(folder, "epochs")
    return [storage.read_json(storage.join(epochs, file)) for file in sorted(storage.names(epochs))]


def seed_manifest(run: Run) -> dict[str, Any]:
    """What the seed set is: samples, per_class, mean and std per channel (0..1), image_size, names of its shards in order.

    `unlabelled` where the source has no labels; then per_class is of pseudo-labels, and empty before there are any.
    And what the audit set is: audit_fraction of the samples outside the seed set, audit_samples, audit_shards (those with any), audit_shard_samples.
    """
    manifest = storage.read_json(run.path("seed", "manifest.json"))
    if manifest.get("unlabelled"):
        with contextlib.suppress(FileNotFoundError):  # before there are pseudo-labels
            manifest["per_class"] = storage.read_json(run.path("labels", "labels.json"))[
                "per_class"
            ]
    if not all(map(VALID_NAME, (*manifest.get("shards", ()), *manifest.get("audit_shards", ())))):
        raise RunError(
            f"{run.uri}: seed/manifest.json is damaged: a shard of it has no name of a shard"
        )
    return manifest


def make_manifest(run: Run, shards: list[str], audit: float) -> dict[str, Any]:
    """What `seed_manifest` gives, from the shards; audit: the share of the samples outside the seed set that is in the audit set."""
    known = run.classes()
    totals, sizes, per_class, sums, squares = (
        0,
        [],
        np.zeros(distinguished_classes(known), int),
        np.zeros(3),
        np.zeros(3),
    )
    size = 0
    for shard in shards:
        found = shard_statistics(run, shard)
        size = found["image_size"]
        totals += found["samples"]
        sizes.append(found["samples"])
        per_class += np.array(found["per_class"], int)
        sums += found["sum"]
        squares += found["square"]
    pixels = max(1, totals * size * size)
    mean = sums / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 1e-6))
    audited = (
        {audit_name(shard): shard_statistics(run, audit_name(shard))["samples"] for shard in shards}
        if audit
        else {}
    )
    return {
        "samples": totals,
        "image_size": size,
        "per_class": per_class.tolist(),
        "mean": mean.round(6).tolist(),
        "std": std.round(6).tolist(),
        "shards": shards,
        "shard_samples": sizes,
        "audit_fraction": audit,
        "audit_samples": sum(audited.values()),
        "audit_shards": [shard for shard, count in audited.items() if count],
        "audit_shard_samples": [count for count in audited.values() if count],
        **({"unlabelled": True} if known.clusters else {}),
    }
