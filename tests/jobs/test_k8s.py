"""jobs/k8s: KubeRay and Kubernetes know the fields of the manifests, and the comments are true."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import shlex
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml
from kuberay_schema import SCHEMAS

from raypipe.config import load_config

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "jobs" / "k8s"
FILES = sorted(FOLDER.glob("*.yaml"))


def objects(file: str) -> list[dict[str, Any]]:
    return [
        item for item in yaml.safe_load_all((FOLDER / file).read_text(encoding="utf-8")) if item
    ]


@pytest.fixture
def job() -> dict[str, Any]:
    return objects("rayjob.yaml")[0]


@pytest.fixture
def groups(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        group["groupName"]: group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    }


def _check(item: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(SCHEMAS[item["kind"]]).validate(item)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_object_has_the_fields_of_its_kind(path: Path) -> None:
    found = objects(path.name)
    assert found
    for item in found:
        _check(item)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every named field of an object is, but for the maps whose keys are free."""
    free = {"requests", "limits", "annotations", "labels", "rayStartParams", "nodeSelector"}
    if isinstance(value, list):
        return [
            place for number, item in enumerate(value) for place in _places(item, (*path, number))
        ]
    if not isinstance(value, dict) or (path and path[-1] in free):
        return []
    return [
        place
        for key, item in value.items()
        for place in [(*path, key), *_places(item, (*path, key))]
    ]


@pytest.mark.parametrize(
    "file", ["rayjob.yaml", "rayjob-scheduled.yaml", "access.yaml", "kustomization.yaml"]
)
def test_a_misspelt_field_anywhere_is_refused(file: str) -> None:
    checked = 0
    for item in objects(file):
        for *above, field in _places(item):
            broken = copy.deepcopy(item)
            inner = broken
            for key in above:
                inner = inner[key]
            inner[f"{field}s"] = inner.pop(field)
            if "kind" not in broken:
                continue
            with pytest.raises(jsonschema.ValidationError):
                _check(broken)
            checked += 1
    assert checked >= 6


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "shutdownAfterJobFinishes"), "yes"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplicas"), -1),
        (
            ("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"),
            0,
        ),  # KubeRay takes strings only
        (("spec", "rayClusterSpec", "autoscalerOptions", "upscalingMode"), "Fast"),
        (
            (
                "spec",
                "rayClusterSpec",
                "headGroupSpec",
                "template",
                "spec",
                "containers",
                0,
                "resources",
                "limits",
                "memory",
            ),
            "16 GB",
        ),
    ],
)
def test_a_wrong_value_is_refused(job: dict[str, Any], place: tuple[Any, ...], value: Any) -> None:
    inner = job
    for key in place[:-1]:
        inner = inner[key]
    assert inner[place[-1]] != value
    inner[place[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        _check(job)


def test_its_command_is_one_that_the_entry_point_takes(
    job: dict[str, Any], entry: ModuleType
) -> None:
    program, script, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "python"
    image = "/opt/raypipe/"
    assert script == f"{image}jobs/run.py" and (ROOT / script.removeprefix(image)).is_file()
    options = entry.parser().parse_args(arguments)
    config = load_config(str(ROOT / options.config.removeprefix(image)), options.set)
    assert options.config.startswith(f"{image}jobs/configs/")
    assert config.run.startswith("s3://") and config.source.uri.startswith("s3://")
    with pytest.raises(SystemExit):
        entry.parser().parse_args([*arguments, "--setting", "a=b"])


@pytest.fixture
def entry() -> ModuleType:
    spec = importlib.util.spec_from_file_location("jobs_run", ROOT / "jobs" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_does_not_ask_for_more_than_the_groups_may_grow_to(
    job: dict[str, Any], groups: dict[str, dict[str, Any]]
) -> None:
    config = load_config(str(ROOT / "jobs" / "configs" / "imagenet.yaml"))
    limits = groups["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"
    assert (
        max(config.proxy.workers, config.measure.max_actors, config.embed.max_actors)
        <= groups["gpu"]["maxReplicas"]
    )
    assert config.proxy.cpus_per_worker <= int(limits["cpu"])
    assert job["spec"]["activeDeadlineSeconds"] > config.cluster.patience_seconds


def test_workers_come_when_asked_for_and_the_head_does_no_work(
    job: dict[str, Any], groups: dict[str, dict[str, Any]]
) -> None:
    spec = job["spec"]["rayClusterSpec"]
    assert (
        spec["enableInTreeAutoscaling"] is True and job["spec"]["shutdownAfterJobFinishes"] is True
    )
    assert set(groups) == {"gpu", "cpu"}
    for group in groups.values():
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    tested = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"\nray=={spec['rayVersion']}\n" in tested.replace("[data,default,train]", "")


def test_pods_that_go_leave_the_cluster_first(
    job: dict[str, Any], groups: dict[str, dict[str, Any]]
) -> None:
    templates = [
        job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"],
        *(group["template"] for group in groups.values()),
    ]
    for template in templates:
        (container,) = template["spec"]["containers"]
        command = container["lifecycle"]["preStop"]["exec"]["command"]
        grace = int(shlex.split(command[-1])[-1])
        assert command[-1].startswith("ray stop --grace-period ")
        assert grace < template["spec"]["terminationGracePeriodSeconds"]
    from ray.scripts.scripts import cli

    assert "--grace-period" in [
        name for option in cli.commands["stop"].params for name in option.opts
    ]
    started = {name for option in cli.commands["start"].params for name in option.opts}
    assert {
        f"--{name}" for name in job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]
    } <= started


def _pods(value: Any) -> list[dict[str, Any]]:
    """Every pod of an object."""
    if isinstance(value, dict):
        return [value] * ("containers" in value) + [
            pod for item in value.values() for pod in _pods(item)
        ]
    return [pod for item in value for pod in _pods(item)] if isinstance(value, list) else []


def test_no_pod_runs_as_root_nor_holds_a_secret() -> None:
    pods = [pod for path in FILES for item in objects(path.name) for pod in _pods(item)]
    assert len(pods) == 5
    images = set()
    for pod in pods:
        assert (
            pod["securityContext"]["runAsNonRoot"] is True
            and pod["securityContext"]["runAsUser"] > 0
        )
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {item["name"] for item in container.get("env", [])} <= {
                "RAY_USAGE_STATS_ENABLED"
            }
            images.add(container["image"])
    assert len(images) == 1, "one image for all"
    secret = r"AKIA|ASIA|aws_secret_access_key: |BEGIN [A-Z ]*PRIVATE KEY|password|stringData|kind: Secret|RAY_AUTH_TOKEN"
    for path in FOLDER.iterdir():
        assert not re.search(secret, path.read_text(encoding="utf-8"), re.IGNORECASE), path.name


def test_usage_statistics_are_off_in_every_pod_of_the_cluster(job: dict[str, Any]) -> None:
    for pod in _pods(job):
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in pod["containers"][0]["env"]
    assert (
        job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["disable-usage-stats"]
        == "true"
    )


def test_the_schedule_may_do_what_its_commands_need_and_no_more(job: dict[str, Any]) -> None:
    (schedule,) = objects("rayjob-scheduled.yaml")
    roles = {(item["kind"], item["metadata"]["name"]): item for item in objects("access.yaml")}
    pod = _pods(schedule)[0]
    account = pod["serviceAccountName"]
    assert roles["RoleBinding", account]["subjects"] == [
        {"kind": "ServiceAccount", "name": account, "namespace": "raypipe"}
    ]
    rules = roles[("Role", roles["RoleBinding", account]["roleRef"]["name"])]["rules"]
    assert {verb for rule in rules for verb in rule["verbs"]} == {
        "create",
        "get",
        "list",
        "watch",
        "delete",
    }
    for rule in rules:
        assert (rule["apiGroups"], rule["resources"]) == (["ray.io"], ["rayjobs"])
        assert rule["verbs"] == ["create"] or rule["resourceNames"] == [job["metadata"]["name"]]
    ray = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["serviceAccountName"]
    assert ("ServiceAccount", ray) in roles and ("RoleBinding", ray) not in roles
    (kustomization,) = objects("kustomization.yaml")
    (generated,) = kustomization["configMapGenerator"]
    assert pod["volumes"][0]["configMap"]["name"] == generated["name"] and generated["files"] == [
        "rayjob.yaml"
    ]
    assert all(
        (FOLDER / file).is_file() for file in [*kustomization["resources"], *generated["files"]]
    )


@pytest.mark.parametrize(
    ("found", "calls"),
    [
        ("", ["get", "delete", "create"]),
        ("raypipe-imagenet/Complete", ["get", "delete", "create"]),
        ("raypipe-imagenet/Failed", ["get", "delete", "create"]),
        ("raypipe-imagenet/Running", ["get"]),
        ("raypipe-imagenet/", ["get"]),  # created a moment ago, without a status yet
    ],
)
def test_the_schedule_leaves_a_run_alone_that_goes_on(
    tmp_path: Path, found: str, calls: list[str]
) -> None:
    """The commands of the CronJob, with a kubectl that writes down what it is asked."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$*" >> {tmp_path}/asked\n'
        f'case "$*" in *" get "*) printf %s "{found}";; create*) cat > {tmp_path}/created;; esac\n'
    )
    kubectl.chmod(0o755)
    (container,) = _pods(objects("rayjob-scheduled.yaml")[0])[0]["containers"]
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    mount = container["volumeMounts"][0]["mountPath"]
    script = container["args"][0].replace(f"{mount}/", f"{FOLDER}/")
    subprocess.run(
        [*container["command"], script],
        check=True,
        env=environment,
        timeout=20,
        capture_output=True,
    )
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [
        next(word for word in line.split() if word in {"get", "delete", "create"}) for line in asked
    ] == calls
    if "create" in calls:
        assert asked[-1] == "create -f -"
        created, once = (
            yaml.safe_load(text)
            for text in ((tmp_path / "created").read_text(), (FOLDER / "rayjob.yaml").read_text())
        )
        entrypoint = created["spec"].pop("entrypoint")
        assert entrypoint == once["spec"].pop("entrypoint").replace(
            "jobs/run.py", "jobs/nightly.py --refresh-exit-code 0"
        )
        assert "nightly" in entrypoint and created == once


def test_the_schedule_fails_when_kubernetes_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "kubectl").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "kubectl").chmod(0o755)
    (container,) = _pods(objects("rayjob-scheduled.yaml")[0])[0]["containers"]
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    assert (
        subprocess.run(
            [*container["command"], *container["args"]], env=environment, timeout=20
        ).returncode
        == 1
    )


def test_the_image_installs_tested_versions_and_is_not_root() -> None:
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n", " ", text).splitlines()
    steps = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    base = [value for word, value in steps if word == "FROM"][-1]
    assert re.match(r"python:3\.1[1-9]-slim", base)
    assert any(
        "pip install" in value and "-c constraints.txt" in value and "[jobs]" in value
        for word, value in steps
        if word == "RUN"
    )
    users = [value for word, value in steps if word == "USER"]
    assert users and users[-1].isdigit() and int(users[-1]) > 0
    assert "ENV RAY_USAGE_STATS_ENABLED=0" in text and "wget" in text and "kubectl" in text
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    taken = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored and "**/.env*" in ignored
    copied = {
        word
        for step, value in steps
        if step == "COPY" and "--from" not in value
        for word in value.split()[:-1]
    }
    assert copied == taken and all((ROOT / name).exists() for name in copied)


def test_files_name_the_same_image_and_say_how_they_are_used(job: dict[str, Any]) -> None:
    image = job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["image"]
    assert f"-t {image} ." in (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    readme = (ROOT / "jobs" / "README.md").read_text(encoding="utf-8")
    for file in FOLDER.iterdir():
        assert file.name in readme or file.suffix == ".dockerignore", file.name
