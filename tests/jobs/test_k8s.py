"""jobs/k8s: KubeRay and Kubernetes know the fields of what the overlay builds, and the comments are true."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml
from kuberay_schema import SCHEMAS
from kustomize import build

from raypipe.config import load_config

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "jobs" / "k8s"
OVERLAY = FOLDER / "imagenet"
NAMESPACE, IMAGE = "raypipe-imagenet", "registry.example.com/raypipe:0.2"
KINDS = ["Namespace", "ServiceAccount", "Role", "RoleBinding", "RayJob", "CronJob"]


def objects(kind: str, folder: Path = OVERLAY) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would apply, of one kind."""
    return [item for item in build(folder) if item["kind"] == kind]


@pytest.fixture
def job() -> dict[str, Any]:
    return objects("RayJob")[0]


@pytest.fixture
def groups(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        group["groupName"]: group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    }


def _check(item: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(SCHEMAS[item["kind"]]).validate(item)


@pytest.mark.parametrize("kind", KINDS)
def test_every_object_has_the_fields_of_its_kind(kind: str) -> None:
    found = objects(kind)
    assert found and {item["kind"] for item in build(OVERLAY)} == set(KINDS)
    for item in found:
        _check(item)


def test_kustomizations_have_the_fields_of_their_kind() -> None:
    for folder in ("base", "imagenet"):
        _check(yaml.safe_load((FOLDER / folder / "kustomization.yaml").read_text()))


def test_names_are_in_the_overlay_alone(tmp_path: Path) -> None:
    """Another namespace, image and bucket reach everything, and the base has none of them."""
    base = "".join(path.read_text() for path in (FOLDER / "base").iterdir())
    for name in ("raypipe-imagenet", "registry", "your-bucket", "imagenet.yaml"):
        assert name not in base
    (tmp_path / "base").symlink_to(FOLDER / "base")
    text = (OVERLAY / "kustomization.yaml").read_text()
    text = text.replace("namespace: raypipe-imagenet", "namespace: mine")
    text = text.replace("registry.example.com/raypipe", "here/image").replace("your-bucket", "b")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kustomization.yaml").write_text(text)
    built = build(tmp_path / "mine")
    for item in built:
        place = "name" if item["kind"] == "Namespace" else "namespace"
        assert item["metadata"][place] == "mine", item["kind"]
    binding = next(item for item in built if item["kind"] == "RoleBinding")
    assert [subject["namespace"] for subject in binding["subjects"]] == ["mine"]
    everything = yaml.safe_dump(built)
    assert "here/image:0.2" in everything and "s3://b/runs/imagenet" in everything
    for name in ("raypipe-imagenet", "registry", "your-bucket", "image: raypipe"):
        assert name not in everything


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("kind: RayJob", "kind: RayJobs"), "nothing is"),
        (("name: raypipe\n    newName", "name: other\n    newName"), "no container has the image"),
        (("/spec/entrypoint", "/spec/entrypoints"), "entrypoints"),
        (("fieldPaths", "fieldPath"), "fieldPath"),
        (("namespace: raypipe", "nameSpace: raypipe"), "not understood"),
    ],
)
def test_a_mistake_in_an_overlay_is_found(
    tmp_path: Path, change: tuple[str, str], problem: str
) -> None:
    text = (OVERLAY / "kustomization.yaml").read_text()
    assert change[0] in text
    (tmp_path / "base").symlink_to(FOLDER / "base")
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "kustomization.yaml").write_text(text.replace(*change))
    with pytest.raises((AssertionError, KeyError), match=problem):
        build(tmp_path / "imagenet")


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_misspelt_field_anywhere_is_refused(kind: str) -> None:
    checked = 0
    for item in objects(kind):
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
    assert checked >= 3


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


def _at_the_end(template: dict[str, Any]) -> tuple[str, int]:
    """The command that a pod runs before its end, and the seconds that it has in all."""
    (container,) = template["spec"]["containers"]
    command = container["lifecycle"]["preStop"]["exec"]["command"][-1]
    return command, template["spec"]["terminationGracePeriodSeconds"]


def test_pods_that_go_leave_the_cluster_first(
    job: dict[str, Any], groups: dict[str, dict[str, Any]]
) -> None:
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    command, grace = _at_the_end(head)
    assert command.startswith("ray stop --grace-period ")
    assert int(shlex.split(command)[-1]) < grace
    for group in groups.values():
        command, grace = _at_the_end(group["template"])
        assert "'[b]in/ray start'" in command and "while pgrep -x raylet" in command
        (container,) = group["template"]["spec"]["containers"]
        variables = {item["name"]: item["value"] for item in container["env"]}
        drain = float(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert 10 < drain < grace - 10, "Ray ends its processes after it"
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
    pods = _pods(build(OVERLAY))
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
                "RAY_USAGE_STATS_ENABLED",
                "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S",
            }
            images.add(container["image"])
    assert images == {IMAGE}
    secret = r"AKIA|ASIA|aws_secret_access_key: |BEGIN [A-Z ]*PRIVATE KEY|password|stringData|kind: Secret|RAY_AUTH_TOKEN"
    for path in filter(Path.is_file, FOLDER.rglob("*")):
        assert not re.search(secret, path.read_text(encoding="utf-8"), re.IGNORECASE), path.name


def test_usage_statistics_are_off_in_every_pod_of_the_cluster(job: dict[str, Any]) -> None:
    for pod in _pods(job):
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in pod["containers"][0]["env"]
    assert (
        job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["disable-usage-stats"]
        == "true"
    )


def test_the_schedule_may_do_what_its_commands_need_and_no_more(job: dict[str, Any]) -> None:
    (schedule,) = objects("CronJob")
    roles = {(item["kind"], item["metadata"]["name"]): item for item in build(OVERLAY)}
    pod = _pods(schedule)[0]
    account = pod["serviceAccountName"]
    assert roles["RoleBinding", account]["subjects"] == [
        {"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}
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
        assert rule["verbs"] == ["create"] or len(rule["resourceNames"]) == 1
    named = {rule["resourceNames"][0]: set(rule["verbs"]) for rule in rules[1:]}
    assert named[job["metadata"]["name"]] == {"get"}  # the run itself is never deleted
    assert named["night"] == {"get", "list", "watch", "delete"}
    ray = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["serviceAccountName"]
    assert ("ServiceAccount", ray) in roles and ("RoleBinding", ray) not in roles


ALL = ["get run", "get night", "delete night", "get run", "create"]


@pytest.mark.parametrize(
    ("run", "night", "calls"),
    [
        ("Complete", "", ALL),
        ("Complete", "night/Complete", ALL),
        ("Complete", "night/Failed", ALL),
        ("Complete", "night/Running", ALL[:2]),
        ("Complete", "night/", ALL[:2]),  # created a moment ago, without a status yet
        ("Running", "", ALL[:1]),
        ("Suspended", "", ALL[:1]),
        ("", "", ALL[:1]),
    ],
)
def test_the_schedule_starts_a_night_after_the_run_and_the_last_night(
    tmp_path: Path, job: dict[str, Any], run: str, night: str, calls: list[str]
) -> None:
    """The commands of the CronJob, with a kubectl that writes down its arguments."""
    stored = {**job, "status": {"jobDeploymentStatus": run}}
    stored["metadata"] = {**job["metadata"], "uid": "1-2", "resourceVersion": "7", "generation": 2}
    stored["spec"] = {**job["spec"], "suspend": False}
    (tmp_path / "run.json").write_text(json.dumps(stored))
    _kubectl(
        tmp_path,
        f'printf "%s\\n" "$*" >> {tmp_path}/asked\n'
        f'case "$*" in "get rayjob run -o json") cat {tmp_path}/run.json;;\n'
        f'"get rayjob run "*) printf %s "{run}";; "get rayjob night "*) printf %s "{night}";;\n'
        f"create*) cat > {tmp_path}/created;; esac\n",
    )
    ended = _scheduled(tmp_path)
    assert ended.returncode == 0, ended.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    words = [line.split() for line in asked]
    assert [" ".join((line[0], *line[2:3])) for line in words if line[0] != "create"] == [
        call for call in calls if call != "create"
    ]
    assert ("create -f -" in asked) == ("create" in calls)  # the parts of a pipe start together
    if "create" not in calls:
        assert "nothing is started" in ended.stdout
        return
    created = json.loads((tmp_path / "created").read_text())
    _check(created)
    assert created["metadata"] == {"name": "night", "namespace": NAMESPACE}
    entrypoint = created["spec"].pop("entrypoint")
    assert entrypoint == job["spec"].pop("entrypoint").replace(
        "jobs/run.py", "jobs/nightly.py --refresh-exit-code 0"
    )
    assert "nightly" in entrypoint and job["spec"].pop("suspend") is True
    assert created["spec"] == job["spec"]


def _kubectl(folder: Path, script: str) -> None:
    (folder / "kubectl").write_text(f"#!/bin/sh\n{script}")
    (folder / "python").symlink_to(sys.executable)
    (folder / "kubectl").chmod(0o755)


def _scheduled(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the commands of the CronJob with the kubectl of a folder."""
    (container,) = _pods(objects("CronJob")[0])[0]["containers"]
    environment = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    script = container["args"][0].replace("/opt/raypipe/", f"{ROOT}/")
    return subprocess.run(
        [*container["command"], script],
        env=environment,
        timeout=20,
        capture_output=True,
        text=True,
    )


def test_the_schedule_fails_when_kubernetes_does_not_answer(tmp_path: Path) -> None:
    _kubectl(tmp_path, "exit 1\n")
    assert _scheduled(tmp_path).returncode == 1


def test_the_schedule_fails_for_a_run_that_cannot_be_a_night(
    tmp_path: Path, job: dict[str, Any]
) -> None:
    job["spec"]["entrypoint"] = "python train.py"
    (tmp_path / "run.json").write_text(json.dumps(job))
    _kubectl(
        tmp_path,
        f'case "$*" in "get rayjob run -o json") cat {tmp_path}/run.json;;\n'
        '"get rayjob run "*) printf Complete;; create*) [ -n "$(cat)" ];; esac\n',
    )
    ended = _scheduled(tmp_path)
    assert ended.returncode == 1
    assert "not the RayJob of a run: the entrypoint does not start /jobs/run.py" in ended.stderr


def test_applying_the_overlay_starts_nothing(job: dict[str, Any]) -> None:
    assert job["spec"]["suspend"] is True
    assert job["spec"]["shutdownAfterJobFinishes"] is True  # KubeRay suspends no other RayJob


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
    for file in filter(Path.is_file, FOLDER.rglob("*")):
        name = file.relative_to(FOLDER).as_posix()
        assert f"(k8s/{name})" in readme or "__pycache__" in name, name
