"""Reaching Ray, and sizing pools and workers to what the cluster has."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raypipe import storage
from raypipe.config import ClusterSettings, PoolSettings, ProxySettings
from raypipe.errors import RaypipeError, ResourceError
from raypipe.progress import Progress

if TYPE_CHECKING:
    from raypipe.rundir import Run


@dataclass(frozen=True)
class Pool:
    """Size of an actor pool and the share of a machine each member takes.

    threads  torch threads in one actor; actors times threads never exceed the CPUs
    """

    min_actors: int
    max_actors: int
    num_cpus: float
    num_gpus: float
    threads: int
    read_cpus: float


@dataclass(frozen=True)
class Cluster:
    """The resources of the cluster when the run started. An autoscaling one may grow later."""

    cpus: float
    gpus: float
    nodes: int
    largest_node_cpus: float
    can_grow: bool

    def use_gpu(self, wish: bool | str) -> bool:
        if wish is True and not self.gpus and not self.can_grow:
            raise ResourceError(f"use_gpu is true, but the cluster has no GPU ({self}); set it to auto or false")
        return self.gpus > 0 if wish == "auto" else bool(wish)

    def pool(self, settings: PoolSettings) -> Pool:
        """The pool for a stage that reads fragments and runs a network on them.

        Without GPUs, every CPU gets one actor of one thread that takes half of it in Ray's books; the other half stays
        free for reading, so that a pool can never starve its own input, on two cores either.
        """
        if self.use_gpu(settings.use_gpu):
            most = max(settings.min_actors, int(self.gpus)) if settings.max_actors == "auto" else settings.max_actors
            return Pool(min(settings.min_actors, most), most, 1, 1, 2, 1)
        return self.cpu_pool(settings.max_actors, settings.min_actors)

    def cpu_pool(self, max_actors: int | str, min_actors: int = 1) -> Pool:
        """One single-threaded actor per CPU."""
        room = max(1, int(self.cpus))
        most = room if max_actors == "auto" else int(max_actors)
        if not self.can_grow and min_actors > 2 * room:
            raise ResourceError(f"min_actors is {min_actors}, but the cluster ({self}) has room for {room} CPU actors")
        return Pool(min(min_actors, most), max(most, min_actors), 0.5, 0, 1, 0.5)

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
                raise ResourceError(f"proxy.workers is {workers} with a GPU each, but the cluster has {self}")
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
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # of 2 s: the end of a training is noticed that much sooner
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what Ray's C++ side writes to this process's stderr
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
    options = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    local = settings.address == "local" or (settings.address == "auto" and not os.environ.get("RAY_ADDRESS"))
    if not ray.is_initialized():
        try:
            with contextlib.nullcontext() if verbose else _silent():
                if local:
                    _start_local(options)
                else:
                    ray.init(address=settings.address, **options)
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            where = "a Ray cluster on this machine" if local else f"the Ray cluster at {settings.address!r}"
            raise RaypipeError(f"cannot reach {where}: {error}") from None
    alive = [node for node in ray.nodes() if node.get("Alive")]
    total = ray.cluster_resources()
    cluster = Cluster(
        cpus=total.get("CPU", 0.0),
        gpus=total.get("GPU", 0.0),
        nodes=len([node for node in alive if node["Resources"].get("CPU", 0) > 0]) or 1,
        largest_node_cpus=max((node["Resources"].get("CPU", 0.0) for node in alive), default=1.0),
        can_grow=not local and _autoscaling(),
    )
    hosts = {node.get("NodeManagerHostname") for node in alive}
    if storage.is_local(run.uri) and hosts - {socket.gethostname()}:
        progress.say(f"note: {run.uri} is a local path; every node of the cluster must see the same files there")
    return cluster


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
    if not any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process less; nobody takes this machine away
    ray.init(address="local", include_dashboard=False, **options)


def _autoscaling() -> bool:
    """Whether the cluster has an autoscaler that can add nodes: its nodes then have types with names of the user's.

    The first of Ray's autoscalers reports them in a store of the cluster; the second, which KubeRay uses from Ray 2.47 on, does not, and
    the nodes say it themselves.
    """
    from ray.experimental.internal_kv import _internal_kv_get

    from raypipe.stages.demand import node_types

    try:
        report = json.loads(_internal_kv_get(b"__autoscaling_status") or b"{}").get("autoscaler_report") or {}
    except ValueError:
        report = {}
    types = {name for key in ("active_nodes", "idle_nodes") for name in report.get(key) or {}}
    return any(not re.fullmatch(r"node_[0-9a-f]+", name) for name in types | node_types())
