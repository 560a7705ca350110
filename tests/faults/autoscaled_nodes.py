"""Local nodes that Ray's own autoscaler starts and stops, through `ray start`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import psutil
from local_nodes import HEAD, LocalNodes, end_processes, node_id, start_node
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

EVENTS = "autoscaler.txt"
HEAD_TYPE = {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0}


class AutoscaledNodes(LocalNodes):
    """A running head whose autoscaler starts nodes for pending requests.

    Parameters
    ----------
    folder : Path
        Where the nodes keep their files.
    types : dict
        `available_node_types` of Ray's configuration, without the head's.
    idle_seconds : float
        Time after which an idle node is stopped.
    """

    def __init__(self, folder: Path, types: dict[str, Any], idle_seconds: float) -> None:
        self._types, self._idle = types, idle_seconds
        super().__init__(folder)

    def events(self, what: str) -> dict[int, str]:
        """Number and type of every node that was started ("up") or stopped ("down")."""
        file = self.folder / EVENTS
        lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        return {int(number): kind for which, number, kind in lines if which == what}

    def _of_head(self) -> tuple[list[str], dict[str, str]]:
        config = {
            "cluster_name": "local",
            "max_workers": sum(kind["max_workers"] for kind in self._types.values()),
            "upscaling_speed": 4.0,
            "idle_timeout_minutes": self._idle / 60,
            "provider": {
                "type": "external",
                "module": "autoscaled_nodes.Provider",
                "folder": str(self.folder),
                "address": self.address,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "use_node_id_as_ip": True,
            },
            "auth": {},
            "head_node_type": "head",
            "available_node_types": {
                "head": HEAD_TYPE,
                **{
                    name: {"node_config": {}, "min_workers": 0, **kind}
                    for name, kind in self._types.items()
                },
            },
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            **{
                name: []
                for name in (
                    "initialization_commands",
                    "setup_commands",
                    "head_setup_commands",
                    "worker_setup_commands",
                )
            },
            **{name: [] for name in ("head_start_ray_commands", "worker_start_ray_commands")},
        }
        file = self.folder / "autoscaling.json"
        file.write_text(json.dumps(config))  # which is YAML as well
        return [f"--autoscaling-config={file}"], {"AUTOSCALER_UPDATE_INTERVAL_S": "2"}


class Provider(NodeProvider):
    """Node provider of Ray's autoscaler. It runs in the monitor process of the head."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        of_head = {
            TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
            TAG_RAY_USER_NODE_TYPE: "head",
            TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
        }
        self._tags = {node_id(HEAD): of_head}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._last = HEAD

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        return cluster_config

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        for name, process in list(self._processes.items()):
            if process.poll() is not None:  # killed by somebody else
                self._forget(name)
        return [name for name, tags in self._tags.items() if tag_filters.items() <= tags.items()]

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        for _ in range(count):
            self._last += 1
            folder, address = self.provider_config["folder"], self.provider_config["address"]
            self._processes[node_id(self._last)] = start_node(
                self._last, folder, address, resources, dict(os.environ)
            )
            self._tags[node_id(self._last)] = dict(tags)
            self._note("up", self._last, tags)

    def terminate_node(self, node_id: str) -> None:
        process = self._processes.get(node_id)
        if process is not None and process.poll() is None:
            with contextlib.suppress(psutil.Error):
                end_processes(
                    [
                        *psutil.Process(process.pid).children(recursive=True),
                        psutil.Process(process.pid),
                    ]
                )
            process.wait(20)
        self._note("down", int(node_id, 16), self._tags[node_id])
        self._forget(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        return self._tags[node_id]

    def is_running(self, node_id: str) -> bool:
        return node_id in self._tags

    def is_terminated(self, node_id: str) -> bool:
        return node_id not in self._tags

    def internal_ip(self, node_id: str) -> str:
        return node_id  # with use_node_id_as_ip

    external_ip = internal_ip

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        self._tags[node_id].update(tags)

    def _forget(self, name: str) -> None:
        self._processes.pop(name, None)
        self._tags.pop(name, None)

    def _note(self, what: str, number: int, tags: dict[str, str]) -> None:
        with open(f"{self.provider_config['folder']}/{EVENTS}", "a") as file:
            file.write(f"{what} {number} {tags[TAG_RAY_USER_NODE_TYPE]}\n")
