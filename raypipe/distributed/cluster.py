"""Reaching Ray, and sizing pools and workers to what the cluster has."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import secrets
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raypipe import storage
from raypipe.config import ClusterSettings, PoolSettings, ProxySettings
from raypipe.errors import RaypipeError, ResourceError
from raypipe.progress import Progress

if TYPE_CHECKING:
    from raypipe.runs.layout import Run


UNITS_OF_A_NEW_NODE = 4
"""Times the work that justifies an actor on a node that is there justifies one on a node that has yet to come, which takes minutes."""

FIRST_REPORT = 15.0
"""Seconds in which a cluster that has just started says whether it has an autoscaler; it looks every 5 seconds."""


@dataclass(frozen=True)
class ActorPool:
    """Size of an actor pool and the share of a machine each member takes.

    max_actors  None: as many as the work justifies, of which the cluster gives those that its nodes have room for, whenever these come
    threads     torch threads in one actor; actors times threads never exceed the CPUs
    room        actors that the nodes which are there now can hold
    tasks       their work is done by tasks, whose processes serve one stage after the other and need not import torch in each
    """

    min_actors: int
    max_actors: int | None
    num_cpus: float
    num_gpus: float
    threads: int
    read_cpus: float
    room: int
    tasks: bool = False

    def sizes(self, units: int, worth: int = 1) -> tuple[int, int, int]:
        """Actors at least, at the start and at most, for some units of work of which `worth` justify the start of an actor."""
        justified = -(-units // worth)
        if self.max_actors is not None:
            most = min(self.max_actors, justified)
        else:
            most = max(
                min(justified, max(self.min_actors, self.room)),
                -(-units // (worth * UNITS_OF_A_NEW_NODE)),
            )
        least = min(self.min_actors, most)
        # those beyond what there is room for would only wait; Ray Data starts them when there is
        return least, least if self.num_gpus else max(least, min(most, self.room)), most


@dataclass(frozen=True)
class Cluster:
    """The resources of the cluster when a stage started.

    can_grow  an autoscaler can bring nodes
    joined    it is more than a cluster that this process made of this machine: nodes come and go, with an autoscaler or without
    """

    cpus: float
    gpus: float
    nodes: int
    largest_node_cpus: float
    can_grow: bool
    joined: bool = False

    def use_gpu(self, wish: bool | str) -> bool:
        if wish is True and not self.gpus and not self.can_grow:
            raise ResourceError(
                f"use_gpu is true, but the cluster has no GPU ({self}); set it to auto or false"
            )
        return self.gpus > 0 if wish == "auto" else bool(wish)

    def pool(self, settings: PoolSettings) -> ActorPool:
        """The pool for a stage that reads fragments and runs a network on them.

        With GPUs, each of them gets `actors_per_gpu` actors. Without, see `cpu_pool`.
        """
        if self.use_gpu(settings.use_gpu):
            share = (
                math.floor(1e4 / settings.actors_per_gpu) / 1e4
            )  # Ray counts in steps of that size
            room = int(self.gpus) * settings.actors_per_gpu
            most = self._most(settings.max_actors, max(settings.min_actors, room))
            return ActorPool(settings.min_actors, most, 1, share, 2, 1, room)
        return self.cpu_pool(settings.max_actors, settings.min_actors)

    def cpu_pool(self, max_actors: int | str, min_actors: int = 1) -> ActorPool:
        """One single-threaded actor per CPU, which reads for itself.

        On a cluster whose nodes come and go Ray Data gives the pool an actor for each CPU of each node, also of those that come while it
        works. On this machine alone the pool is as large as it will be, and tasks do the work of actors.
        """
        room = max(1, int(self.cpus))
        if not self.can_grow and min_actors > room:
            raise ResourceError(
                f"min_actors is {min_actors}, but the cluster ({self}) has room for {room} CPU actors"
            )
        return ActorPool(
            min_actors,
            self._most(max_actors, max(min_actors, room)),
            1,
            0,
            1,
            1,
            room,
            tasks=not self.joined,
        )

    def _most(self, max_actors: int | str, here: int) -> int | None:
        if max_actors == "auto":
            return None if self.joined else here
        return int(max_actors)

    def train_workers(self, settings: ProxySettings) -> tuple[int, bool, int, int]:
        """Workers of a training, whether each has a GPU, CPUs of each, and how many of `proxy.parts` trainings run side by side.

        Trainings share the CPUs of a fixed cluster rather than take turns on all of them: small networks gain less than twice
        from twice the threads, and the seconds that a training takes to start are spent once. A cluster that grows is asked for
        all trainings at once; those it has no room for wait. Raises ResourceError when not even one training fits.
        """
        gpu, workers = self.use_gpu(settings.use_gpu), settings.workers
        room = _between(1, (self.gpus if gpu else self.cpus) // workers, settings.parts)
        beside, sharing = (settings.parts, 1) if self.can_grow else (room, room)
        if settings.cpus_per_worker != "auto":
            cpus = settings.cpus_per_worker
        elif gpu:
            cpus = _between(1, self.cpus // (workers * sharing), 4)
        else:
            per_node = -(-workers * sharing // max(1, self.nodes))
            cpus = max(1, int(self.largest_node_cpus // per_node))
        if not self.can_grow:
            if gpu and workers > self.gpus:
                raise ResourceError(
                    f"proxy.workers is {workers} with a GPU each, but the cluster has {self}"
                )
            if workers * cpus > self.cpus:
                raise ResourceError(
                    f"proxy.workers x cpus_per_worker is {workers} x {cpus} CPUs, but the cluster has {self}; lower one of them"
                )
            if cpus > self.largest_node_cpus:
                raise ResourceError(
                    f"cpus_per_worker is {cpus}, but the largest node of the cluster ({self}) has {self.largest_node_cpus:g}; lower it"
                )
            beside = _between(1, self.cpus // (workers * cpus), beside)
        return workers, gpu, cpus, beside

    def __str__(self) -> str:
        return f"{self.nodes} node{'s' if self.nodes != 1 else ''}, {self.cpus:g} CPUs, {self.gpus:g} GPUs"


def _between(least: int, value: float, most: int) -> int:
    return max(least, min(int(value), most))


def connect(settings: ClusterSettings, run: Run, progress: Progress, verbose: bool) -> Cluster:
    """Join the cluster that `cluster.address` names, or start one on this machine. Raises RaypipeError when neither works."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault(
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5"
    )  # of 2 s: the end of a training is noticed that much sooner
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault(
        "RAY_task_oom_retries", "3"
    )  # without end otherwise; then the stage says that memory is short
    if not verbose:
        os.environ.setdefault(
            "RAY_BACKEND_LOG_LEVEL", "fatal"
        )  # what Ray's C++ side writes to this process's stderr
    import ray
    import ray.data
    import ray.train

    if not verbose:
        # Their session files keep everything; errors reach the user as exceptions.
        for name in ("ray", "ray.data", "ray.train"):
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler):
                    handler.setLevel(logging.CRITICAL + 1)
        warnings.filterwarnings("ignore", module=r"ray(\.|$)")
    options = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
    }
    local = settings.address == "local" or (
        settings.address == "auto" and not os.environ.get("RAY_ADDRESS")
    )
    if not ray.is_initialized():
        try:
            with contextlib.nullcontext() if verbose else _silent():
                if local:
                    _start_local(options)
                else:
                    ray.init(address=settings.address, **options)
        except Exception as error:  # Ray raises a plain one where a start takes too long
            where = (
                "a Ray cluster on this machine"
                if local
                else f"the Ray cluster at {settings.address!r}"
            )
            raise RaypipeError(f"cannot reach {where}: {error}") from None
    hosts = {node.get("NodeManagerHostname") for node in _living()}
    if storage.is_local(run.uri) and hosts - {socket.gethostname()}:
        progress.say(
            f"note: {run.uri} is a local path; every node of the cluster must see the same files there"
        )
    return current_cluster(joined=not local)


def resources_at(address: str) -> Cluster:
    """Look at the cluster at an address, and leave it again unless this process had joined it before."""
    import ray

    from raypipe.runs.layout import Run

    before = ray.is_initialized()
    try:
        return connect(
            ClusterSettings(address=address), Run("unused"), Progress(quiet=True), verbose=False
        )
    finally:
        if not before:
            ray.shutdown()


def current_cluster(joined: bool) -> Cluster:
    """The cluster that this process has joined, or made, as it is now."""
    found = [
        {name: node["Resources"].get(name, 0.0) for name in ("CPU", "GPU")} for node in _living()
    ]
    return Cluster(
        cpus=sum(node["CPU"] for node in found),
        gpus=sum(node["GPU"] for node in found),
        nodes=len([node for node in found if node["CPU"] > 0]) or 1,
        largest_node_cpus=max((node["CPU"] for node in found), default=1.0),
        can_grow=joined and _autoscaling(),
        joined=joined,
    )


def _living() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node.get("Alive")]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hides what C++ writes to stderr while Ray starts; errors still come as exceptions."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _start_local(options: dict[str, Any]) -> None:
    import ray

    # Ray guards a local cluster with a token, which by itself it would leave in the home directory; that may be read-only.
    # The variable stays set, since the cluster's processes and this one need it as long as the cluster lives.
    if not any(
        name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault(
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0"
    )  # a process less; nobody takes this machine away
    ray.init(address="local", include_dashboard=False, **options)


def _autoscaling() -> bool:
    """Whether the cluster has an autoscaler that can add nodes: its nodes then have types with names of the user's.

    The first of Ray's autoscalers reports them in a store of the cluster; the second, which KubeRay uses from Ray 2.47 on, does not, and
    the nodes say it themselves. A cluster that has just started is given some seconds for the first report.
    """
    from raypipe.distributed.pending import node_types

    end = time.monotonic() + FIRST_REPORT
    while True:
        types = node_types() | _reported_types()
        if types or time.monotonic() > end:
            return any(not re.fullmatch(r"node_[0-9a-f]+", name) for name in types)
        time.sleep(0.5)


def _reported_types() -> set[str]:
    """Node types in the last report of the first of Ray's autoscalers; in clusters without one, a type for each node."""
    from ray.experimental.internal_kv import _internal_kv_get

    try:
        report = (
            json.loads(_internal_kv_get(b"__autoscaling_status") or b"{}").get("autoscaler_report")
            or {}
        )
    except ValueError:
        report = {}
    return {name for key in ("active_nodes", "idle_nodes") for name in report.get(key) or {}}
