"""cluster.yaml: Ray accepts it, and its comments are true."""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from raypipe.config import load_config
from raypipe.distributed.spot import is_spot

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


@pytest.fixture
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def tested() -> dict[str, Requirement]:
    """constraints.txt by name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {
        item.name: item
        for item in (_pinned(line) for line in lines if line and not line.startswith("#"))
    }


def _workers(cluster: dict[str, Any]) -> dict[str, Any]:
    return {
        name: kind
        for name, kind in cluster["available_node_types"].items()
        if name != cluster["head_node_type"]
    }


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(cluster))


def test_every_section_is_stated_and_none_left_to_defaults(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config

    missing = set(prepare_config(cluster)) - set(cluster)
    assert missing <= {
        "cluster_synced_files",
        "file_mounts_sync_continuously",
        "rsync_exclude",
        "rsync_filter",
    }


def test_head_runs_no_work_and_stays(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0} and head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]
    start = " ".join(cluster["head_start_ray_commands"])
    assert "--num-cpus=0" in start and "--dashboard-host=127.0.0.1" in start


def test_every_machine_asks_for_the_token(cluster: dict[str, Any]) -> None:
    for name in ("head", "worker"):
        (start,) = (line for line in cluster[f"{name}_start_ray_commands"] if "ray start" in line)
        assert "RAY_AUTH_MODE=token ~/env/bin/ray start" in start
    # the driver of a job inherits the mode from the head; a shell on a machine has it as well
    assert any("RAY_AUTH_MODE=token" in line for line in cluster["setup_commands"])
    steps = [line[1:].strip() for line in TEXT.splitlines() if line.startswith("#   ")]
    commands = [step.split("  ")[0] for step in steps]
    assert commands.index("export RAY_AUTH_MODE=token") < commands.index(
        "ray get-auth-token --generate"
    ) < commands.index("ray up cluster.yaml")  # fmt: skip


def test_workers_are_spot_come_when_asked_for_and_go_when_idle(cluster: dict[str, Any]) -> None:
    workers = _workers(cluster)
    assert any(kind["resources"].get("GPU") for kind in workers.values())
    assert any(not kind["resources"].get("GPU") for kind in workers.values())
    for kind in workers.values():
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert is_spot(kind["labels"])
        assert kind["min_workers"] == 0 < kind["max_workers"] <= cluster["max_workers"]
    assert "labels" not in cluster["available_node_types"][cluster["head_node_type"]]
    assert 0 < cluster["idle_timeout_minutes"] <= 10
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_machines_act_through_instance_profiles_and_the_file_holds_no_credentials(
    cluster: dict[str, Any],
) -> None:
    for kind in cluster["available_node_types"].values():
        assert set(kind["node_config"]["IamInstanceProfile"]) == {"Name"}
        assert kind["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}
    assert set(cluster["auth"]) == {"ssh_user"}
    assert cluster["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "aws_credentials" not in cluster["provider"]
    forbidden = r"AKIA|ASIA|aws_access_key|aws_secret|aws_session_token|BEGIN [A-Z ]*PRIVATE KEY|password|\.pem|\d{12}|RAY_AUTH_TOKEN"
    assert not re.search(forbidden, TEXT, re.IGNORECASE)


def test_machines_install_the_dependencies_of_the_package_in_their_tested_versions(
    cluster: dict[str, Any], project: dict[str, Any], tested: dict[str, Requirement]
) -> None:
    wanted: dict[str, set[str]] = {}
    for line in project["dependencies"] + project["optional-dependencies"]["jobs"]:
        requirement = Requirement(line)
        wanted.setdefault(str(canonicalize_name(requirement.name)), set()).update(
            requirement.extras
        )
    command = next(command for command in cluster["setup_commands"] if "'ray[" in command)
    pins = [_pinned(word) for word in shlex.split(command) if "==" in word]
    assert {pin.name: pin.extras for pin in pins} == wanted
    assert {pin.name: str(pin.specifier) for pin in pins} == {
        name: str(tested[name].specifier) for name in wanted
    }
    assert set(re.findall(r"ray\[[a-z,]+\](==[\d.]+)", TEXT)) == {str(tested["ray"].specifier)}


def _pinned(text: str) -> Requirement:
    requirement = Requirement(text)
    assert len(requirement.specifier) == 1 and str(requirement.specifier).startswith("=="), text
    requirement.name = canonicalize_name(requirement.name)
    return requirement


def test_constraints_satisfy_the_ranges_of_the_package(
    project: dict[str, Any], tested: dict[str, Requirement]
) -> None:
    versions = {
        name: str(requirement.specifier).removeprefix("==") for name, requirement in tested.items()
    }
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(line)
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(
                versions[str(canonicalize_name(requirement.name))]
            ), line
    assert versions["torch"] != "2.13.0"


@pytest.mark.parametrize("name", ["imagenet", "places365"])
def test_configurations_do_not_ask_for_more_than_the_cluster_may_grow_to(
    cluster: dict[str, Any], name: str
) -> None:
    config = load_config(str(ROOT / "jobs" / "configs" / f"{name}.yaml"))
    gpu = next(kind for kind in _workers(cluster).values() if kind["resources"].get("GPU"))
    gpus = gpu["max_workers"] * gpu["resources"]["GPU"]
    assert max(config.proxy.workers, config.measure.max_actors, config.embed.max_actors) <= gpus
    assert config.proxy.cpus_per_worker <= gpu["resources"]["CPU"] // gpu["resources"]["GPU"]


def test_rays_aws_provider_launches_it_on_simulated_ec2(
    cluster: dict[str, Any], s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own code starts instances from the file; boto3 and the server check `node_config`."""
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray keeps the key pair it makes
    import boto3
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    assert os.environ["AWS_ENDPOINT_URL"] == s3_server
    region, kinds = cluster["provider"]["region"], cluster["available_node_types"]
    for name in {kind["node_config"]["IamInstanceProfile"]["Name"] for kind in kinds.values()}:
        boto3.client("iam", region_name=region).create_instance_profile(InstanceProfileName=name)

    ready = AWSNodeProvider.bootstrap_config(prepare_config(cluster))
    provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
    for name, kind in ready["available_node_types"].items():
        provider.create_node(dict(kind["node_config"]), {"ray-user-node-type": name}, 1)

    client = boto3.client("ec2", region_name=region)
    launched = {}
    for reservation in client.describe_instances()["Reservations"]:
        for instance in reservation["Instances"]:
            launched[
                next(tag["Value"] for tag in instance["Tags"] if tag["Key"] == "ray-user-node-type")
            ] = instance
    assert {name: item.get("InstanceLifecycle") for name, item in launched.items()} == {
        "head": None,
        "gpu": "spot",
        "cpu": "spot",
    }
    for name, kind in _workers(cluster).items():
        (machine,) = client.describe_instance_types(InstanceTypes=[launched[name]["InstanceType"]])[
            "InstanceTypes"
        ]
        gpus = sum(gpu["Count"] for gpu in machine.get("GpuInfo", {}).get("Gpus", []))
        assert kind["resources"] == {
            "CPU": machine["VCpuInfo"]["DefaultVCpus"],
            **({"GPU": gpus} if gpus else {}),
        }
