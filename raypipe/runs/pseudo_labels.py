"""What the stage `label` leaves in `labels/` for those that give samples pseudo-labels.

labels.json           features, model and image size of the network, mean and std; clusters, per_class (of the seed set); written last
classes.json          names of the clusters
network.safetensors   the network's weights, without a last layer
clusters.safetensors  centre, weight and bias, as in raypipe.pseudo_labels.clusters.Clusters
<shard>.parquet       sample_id and label of a seed or audit shard
"""

from __future__ import annotations

from typing import Any

from raypipe import storage
from raypipe.runs.run import Run

FOLDER, MANIFEST = "labels", "labels.json"
NETWORK, CLUSTERS = "network.safetensors", "clusters.safetensors"


def load_labeller(run: Run, device: str) -> Any:
    """The network and the clusters of a run; a `raypipe.pseudo_labels.labeller.Labeller`."""
    import torch
    from safetensors.numpy import load as load_arrays
    from safetensors.torch import load

    from raypipe.pseudo_labels.clusters import Clusters
    from raypipe.pseudo_labels.labeller import Labeller

    about = storage.read_json(run.path(FOLDER, MANIFEST))
    with torch.random.fork_rng(devices=[]):
        network = empty_network(about)
    network.load_state_dict(load(storage.read_bytes(run.path(FOLDER, NETWORK))))
    found = load_arrays(storage.read_bytes(run.path(FOLDER, CLUSTERS)))
    clusters = Clusters(found["centre"], found["weight"], found["bias"])
    return Labeller(network.to(device).eval(), clusters, device)


def empty_network(about: dict[str, Any]) -> Any:
    """The network that the manifest describes, with weights that mean nothing."""
    from torch import nn

    from raypipe.pseudo_labels.backbone import Backbone
    from raypipe.vision.networks import build_network

    if about["features"] == "backbone":
        return Backbone(about["model"], about["image_size"])
    network = build_network(about["model"], 1, about["image_size"], about["mean"], about["std"])
    network.head = nn.Identity()  # type: ignore[assignment]
    return network
