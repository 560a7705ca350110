"""Load the network and clusters that assign pseudo-labels.

The stage `label` writes them to `labels/`::

    labels.json           features, model and image size of the network, mean and std; clusters,
                          per_class (of the seed set); written last
    classes.json          names of the clusters
    network.safetensors   weights of the network, without a last layer
    clusters.safetensors  centre, weight and bias, see raypipe.pseudo_labels.clusters.Clusters
    <shard>.parquet       sample_id and label of a seed or audit shard
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raypipe import storage
from raypipe.runs.run import Run

if TYPE_CHECKING:
    from raypipe.pseudo_labels.labeller import Labeller

FOLDER, MANIFEST = "labels", "labels.json"
NETWORK, CLUSTERS = "network.safetensors", "clusters.safetensors"


def load_labeller(run: Run, device: str) -> Labeller:
    """Load the network and the clusters of a run."""
    import torch
    from safetensors.numpy import load as load_arrays
    from safetensors.torch import load

    from raypipe.pseudo_labels.clusters import Clusters
    from raypipe.pseudo_labels.labeller import Labeller

    manifest = storage.read_json(run.path(FOLDER, MANIFEST))
    with torch.random.fork_rng(devices=[]):
        network = empty_network(manifest)
    network.load_state_dict(load(storage.read_bytes(run.path(FOLDER, NETWORK))))
    arrays = load_arrays(storage.read_bytes(run.path(FOLDER, CLUSTERS)))
    clusters = Clusters(arrays["centre"], arrays["weight"], arrays["bias"])
    return Labeller(network.to(device).eval(), clusters, device)


def empty_network(manifest: dict[str, Any]) -> Any:
    """Return the network that a manifest describes, with arbitrary weights.

    It is a `torch.nn.Module` and a `raypipe.pseudo_labels.labeller.FeatureNetwork`.
    """
    from torch import nn

    from raypipe.proxies.networks import build_network
    from raypipe.pseudo_labels.backbone import Backbone

    if manifest["features"] == "backbone":
        return Backbone(manifest["model"], manifest["image_size"])
    network = build_network(
        manifest["model"], 1, manifest["image_size"], manifest["mean"], manifest["std"]
    )
    network.head = nn.Identity()  # type: ignore[assignment]
    return network
