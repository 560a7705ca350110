"""jobs/cluster-gcp.yaml and jobs/cluster-azure.yaml: Ray accepts them, and they match cluster.yaml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
AWS = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
CLIENTS = {"gcp": {"gcsfs"}, "azure": {"adlfs", "azure-storage-blob"}}
"""Cloud -> packages of its store that cluster.yaml does not install."""


def text(cloud: str) -> str:
    return (ROOT / f"jobs/cluster-{cloud}.yaml").read_text(encoding="utf-8")


@pytest.fixture(params=CLIENTS)
def cloud(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cluster(cloud: str) -> dict[str, Any]:
    return yaml.safe_load(text(cloud))


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(cluster))


def test_machines_play_the_same_roles_as_on_aws(cloud: str, cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"]
    for name, aws in AWS["available_node_types"].items():
        for key in ("resources", "labels", "min_workers", "max_workers"):
            assert kinds[name].get(key) == aws.get(key), (name, key)
        spot = re.search("SPOT|Spot", str(kinds[name]["node_config"])) is not None
        assert spot == (name != cluster["head_node_type"])
    same = ("cluster_name", "max_workers", "idle_timeout_minutes", "file_mounts")
    same += ("head_start_ray_commands", "worker_start_ray_commands", "head_node_type")
    assert [cluster[key] for key in same] == [AWS[key] for key in same]
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_machines_install_what_those_on_aws_do_and_the_client_of_the_store(
    cloud: str, cluster: dict[str, Any]
) -> None:
    pins, aws = (
        set(re.findall(r"[\w-]+(?:\[[a-z,]+\])?==[\w.]+", " ".join(commands)))
        for commands in (cluster["setup_commands"], AWS["setup_commands"])
    )
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    extra = pins - aws
    assert aws <= pins and extra <= set(constraints)
    assert {pin.partition("==")[0] for pin in extra} == CLIENTS[cloud]


def test_no_credentials(cloud: str) -> None:
    forbidden = r"AccountKey|SAS_TOKEN|BEGIN [A-Z ]*PRIVATE KEY|password|\.json|client_secret"
    assert not re.search(forbidden, text(cloud), re.IGNORECASE)
