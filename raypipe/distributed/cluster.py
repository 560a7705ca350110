"""Connect to Ray, and size pools and workers to the resources of the cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from raypipe import storage
from raypipe.config import ClusterSettings, PoolSettings, ProxySettings
from raypipe.distributed.local_cluster import NO_AUTOSCALER, start_local
from raypipe.distributed.reach import check_reachable
from raypipe.distributed.spot import MARKET_TYPE, SPOT, is_spot
from raypipe.distributed.waiting import waiting_variables
from raypipe.errors import RaypipeError, ResourceError
from raypipe.progress import Progress

if TYPE_CHECKING:
    from raypipe.runs.run import Run


NEW_NODE_FACTOR = 4
"""An actor on a node that has yet to start needs this many times the work of one on an existing
node: the start takes minutes."""

FIRST_REPORT_SECONDS = 15.0
"""Seconds until a new cluster has reported whether it has an autoscaler."""


class PoolSize(NamedTuple):
    """Minimal, initial and maximal number of actors."""

    minimum: int
    initial: int
    maximum: int


@dataclass(frozen=True)
class ActorPool:
    """Size of an actor pool, and the share of a machine that each actor takes.

    Attributes
    ----------
    min_actors : int
        Minimal number of actors.
    max_actors : int, optional
        None: as many as the work justifies; the cluster starts those that its nodes have room for,
        including nodes that join later.
    num_cpus, num_gpus : float
        Share of a machine.
    threads : int
        Torch threads in one actor. Actors times threads never exceed the CPUs.
    read_cpus : float
        Share of a machine of a task that reads.
    room : int
        Actors that the existing nodes can hold.
    tasks : bool
        Whether tasks do the work of the actors. Their processes serve one stage after another, so
        that torch is not imported again in every stage.
    """

    min_actors: int
    max_actors: int | None
    num_cpus: float
    num_gpus: float
    threads: int
    read_cpus: float
    room: int
    tasks: bool = False

    def sizes(self, units: int, units_per_actor: int = 1) -> PoolSize:
        """Return the number of actors for some units of work.

        Parameters
        ----------
        units : int
            Units of work.
        units_per_actor : int
            Units that justify the start of an actor.
        """
        justified = -(-units // units_per_actor)
        if self.max_actors is not None:
            maximum = min(self.max_actors, justified)
        else:
            maximum = max(
                min(justified, max(self.min_actors, self.room)),
                -(-units // (units_per_actor * NEW_NODE_FACTOR)),
            )
        minimum = min(self.min_actors, maximum)
        # actors beyond the room would only wait; Ray Data starts them once there is room
        initial = minimum if self.num_gpus else max(minimum, min(maximum, self.room))
        return PoolSize(minimum, initial, maximum)


@dataclass(frozen=True)
class TrainingResources:
    """Resources for the trainings of the proxies.

    Attributes
    ----------
    workers : int
        Workers of each training.
    gpu : bool
        Whether each worker has a GPU.
    cpus : int
        CPUs of each worker.
    side_by_side : int
        Trainings that run at the same time, out of `proxy.parts` x `proxy.repeats`.
    """

    workers: int
    gpu: bool
    cpus: int
    side_by_side: int


@dataclass(frozen=True)
class Cluster:
    """Resources of the cluster at the start of a stage.

    Attributes
    ----------
    cpus, gpus : float
        Totals over all nodes.
    nodes : int
        Nodes with CPUs.
    largest_node_cpus : float
        CPUs of the largest node.
    can_grow : bool
        Whether an autoscaler can add nodes.
    joined : bool
        Whether this process joined an existing cluster, whose nodes come and go with or without an
        autoscaler, rather than starting one on this machine.
    off_spot : Cluster, optional
        The cluster without its spot machines; None if it has no spot machine.
    """

    cpus: float
    gpus: float
    nodes: int
    largest_node_cpus: float
    can_grow: bool
    joined: bool = False
    off_spot: Cluster | None = None

    def for_trainings(self, settings: ClusterSettings) -> Cluster:
        """Return the part of the cluster that long trainings can run on.

        Raises
        ------
        ResourceError
            If `cluster.keep_off_spot` leaves no node.
        """
        if not settings.keep_off_spot or self.off_spot is None:
            return self
        if not self.off_spot.cpus and not self.can_grow:
            raise ResourceError(
                f"cluster.keep_off_spot is true, but all CPUs of the cluster ({self}) are on spot "
                "machines; add an on-demand node, or set it to false"
            )
        return self.off_spot

    def use_gpu(self, setting: bool | str) -> bool:
        """Resolve a setting `use_gpu`: true, false or "auto".

        Raises ResourceError if it requires GPUs that the cluster cannot have.
        """
        if setting is True and not self.gpus and not self.can_grow:
            raise ResourceError(
                f"use_gpu is true, but the cluster has no GPU ({self}); set it to auto or false"
            )
        return self.gpus > 0 if setting == "auto" else bool(setting)

    def pool(self, settings: PoolSettings) -> ActorPool:
        """Return the pool of a stage that reads fragments and runs a network on them.

        Each GPU has `actors_per_gpu` actors. Without GPUs, see `cpu_pool`.
        """
        if self.use_gpu(settings.use_gpu):
            share = math.floor(1e4 / settings.actors_per_gpu) / 1e4  # Ray counts in steps of 1e-4
            room = int(self.gpus) * settings.actors_per_gpu
            maximum = self._max_actors(settings.max_actors, max(settings.min_actors, room))
            return ActorPool(settings.min_actors, maximum, 1, share, 2, 1, room)
        return self.cpu_pool(settings.max_actors, settings.min_actors)

    def cpu_pool(self, max_actors: int | str, min_actors: int = 1) -> ActorPool:
        """Return a pool of one single-threaded actor per CPU, which reads its own data.

        On a cluster whose nodes come and go, Ray Data gives the pool an actor per CPU of every
        node, including nodes that join while it works. On a single machine the size of the pool is
        constant, and tasks do the work of actors.
        """
        room = max(1, int(self.cpus))
        if not self.can_grow and min_actors > room:
            raise ResourceError(
                f"min_actors is {min_actors}, but the cluster ({self}) has room for {room} CPU "
                "actors; lower it"
            )
        return ActorPool(
            min_actors,
            self._max_actors(max_actors, max(min_actors, room)),
            1,
            0,
            1,
            1,
            room,
            tasks=not self.joined,
        )

    def _max_actors(self, max_actors: int | str, on_this_machine: int) -> int | None:
        if max_actors == "auto":
            return None if self.joined else on_this_machine
        return int(max_actors)

    def training_resources(self, settings: ProxySettings) -> TrainingResources:
        """Divide the cluster among the trainings of the proxies.

        On a fixed cluster, trainings share the CPUs instead of taking turns on all of them: small
        networks gain less than a factor of two from twice the threads, and the seconds that a
        training takes to start are spent once. A growing cluster is asked for all trainings at
        once; those without room wait.

        Raises
        ------
        ResourceError
            If not even one training fits.
        """
        gpu, workers = self.use_gpu(settings.use_gpu), settings.workers
        room = _clamp(1, (self.gpus if gpu else self.cpus) // workers, settings.proxies)
        side_by_side, sharing = (settings.proxies, 1) if self.can_grow else (room, room)
        if settings.cpus_per_worker != "auto":
            cpus = settings.cpus_per_worker
        elif gpu:
            cpus = _clamp(1, self.cpus // (workers * sharing), 4)
        else:
            per_node = -(-workers * sharing // max(1, self.nodes))
            cpus = max(1, int(self.largest_node_cpus // per_node))
        if not self.can_grow:
            if gpu and workers > self.gpus:
                raise ResourceError(
                    f"proxy.workers is {workers} with a GPU each, but the cluster has {self}; "
                    "lower it"
                )
            if workers * cpus > self.cpus:
                raise ResourceError(
                    f"proxy.workers x cpus_per_worker is {workers} x {cpus} CPUs, but the cluster "
                    f"has {self}; lower one of them"
                )
            if cpus > self.largest_node_cpus:
                raise ResourceError(
                    f"cpus_per_worker is {cpus}, but the largest node of the cluster ({self}) has "
                    f"{self.largest_node_cpus:g}; lower it"
                )
            side_by_side = _clamp(1, self.cpus // (workers * cpus), side_by_side)
        return TrainingResources(workers, gpu, cpus, side_by_side)

    def __str__(self) -> str:
        nodes = f"{self.nodes} node{'s' if self.nodes != 1 else ''}"
        return f"{nodes}, {self.cpus:g} CPUs, {self.gpus:g} GPUs"


def _clamp(minimum: int, value: float, maximum: int) -> int:
    return max(minimum, min(int(value), maximum))


def connect(
    settings: ClusterSettings,
    run: Run,
    progress: Progress,
    verbose: bool,
    libraries: Sequence[str] = (),
) -> Cluster:
    """Join the cluster that `cluster.address` names, or start one on this machine.

    Parameters
    ----------
    settings : ClusterSettings
    run : Run
        Its folder must be seen by all nodes.
    progress : Progress
    verbose : bool
        Whether to show the output of Ray.
    libraries : sequence of str
        Packages of the networks, for `cluster.preload`.

    Raises
    ------
    RaypipeError
        If that fails.
    """
    set_ray_defaults(verbose)
    import ray
    import ray.data
    import ray.train

    if not verbose:
        _silence_loggers()
    options = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
    }
    local = settings.address == "local" or (
        settings.address == "auto" and not os.environ.get("RAY_ADDRESS")
    )
    if not ray.is_initialized():
        check_reachable(settings.address, progress)
        try:
            with contextlib.nullcontext() if verbose else _silent():
                if local:
                    start_local(options, settings.preload, libraries)
                else:
                    ray.init(
                        address=settings.address,
                        runtime_env={"env_vars": waiting_variables()},
                        **options,
                    )
        except Exception as error:  # Ray raises a plain Exception if the start takes too long
            where = (
                "a Ray cluster on this machine"
                if local
                else f"the Ray cluster at {settings.address!r}"
            )
            raise RaypipeError(f"cannot reach {where}: {error}") from None
    hosts = {node.get("NodeManagerHostname") for node in _living_nodes()}
    if storage.is_local(run.uri) and hosts - {socket.gethostname()}:
        progress.say(
            f"note: {run.uri} is a local path; every node of the cluster must see the same files "
            "there"
        )
    cluster = current_cluster(joined=not local)
    if settings.keep_off_spot and cluster.off_spot is None:
        progress.say(
            f"note: no node has the label {MARKET_TYPE}={SPOT}; until one does, "
            "cluster.keep_off_spot has no effect"
        )
    return cluster


def set_ray_defaults(verbose: bool) -> None:
    """Set environment variables of Ray that are not set yet. Must precede the import of Ray."""
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        # instead of 2 s: the end of a training is noticed sooner
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # instead of unlimited: the stage then reports that memory is short
        "RAY_task_oom_retries": "3",
    }
    if not verbose:
        # output of Ray's C++ code to the stderr of this process
        defaults["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _silence_loggers() -> None:
    """Keep Ray's log off the terminal: its session files have all of it, and errors are raised."""
    for name in ("ray", "ray.data", "ray.train"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"ray(\.|$)")


def resources_at(address: str) -> Cluster:
    """Return the resources of a cluster, and leave it unless this process had already joined it."""
    import ray

    from raypipe.runs.run import Run

    had_joined = ray.is_initialized()
    try:
        return connect(
            ClusterSettings(address=address), Run("unused"), Progress(quiet=True), verbose=False
        )
    finally:
        if not had_joined:
            ray.shutdown()


def current_cluster(joined: bool) -> Cluster:
    """Return the current state of the cluster that this process joined or started."""
    nodes, can_grow = _living_nodes(), joined and _autoscaling()
    cluster = _cluster_of(nodes, can_grow, joined)
    others = [node for node in nodes if not is_spot(node["Labels"])]
    if len(others) == len(nodes):
        return cluster
    return dataclasses.replace(cluster, off_spot=_cluster_of(others, can_grow, joined))


def _cluster_of(nodes: Sequence[dict[str, Any]], can_grow: bool, joined: bool) -> Cluster:
    resources = [
        {name: node["Resources"].get(name, 0.0) for name in ("CPU", "GPU")} for node in nodes
    ]
    return Cluster(
        cpus=sum(node["CPU"] for node in resources),
        gpus=sum(node["GPU"] for node in resources),
        nodes=len([node for node in resources if node["CPU"] > 0]) or 1,
        largest_node_cpus=max((node["CPU"] for node in resources), default=1.0),
        can_grow=can_grow,
        joined=joined,
    )


def _living_nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node.get("Alive")]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hide what C++ code writes to stderr while Ray starts; errors are still raised."""
    sys.stderr.flush()
    saved, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(devnull)


def _autoscaling() -> bool:
    """Whether the cluster has an autoscaler: then its nodes have types that the user named.

    The first version of Ray's autoscaler reports the types in a key-value store of the cluster.
    With the second version, which KubeRay uses from Ray 2.47 on, the nodes report them. A cluster
    that has just started gets `FIRST_REPORT_SECONDS` for the first report.
    """
    from ray.experimental.internal_kv import _internal_kv_get

    from raypipe.distributed.pending import node_types

    if _internal_kv_get(NO_AUTOSCALER):
        return False
    end = time.monotonic() + FIRST_REPORT_SECONDS
    while True:
        types = node_types() | _reported_types()
        if types or time.monotonic() > end:
            return any(not re.fullmatch(r"node_[0-9a-f]+", name) for name in types)
        time.sleep(0.1)


def _reported_types() -> set[str]:
    """Return the node types in the last report of the first version of Ray's autoscaler.

    A cluster without an autoscaler reports one type per node.
    """
    from ray.experimental.internal_kv import _internal_kv_get

    try:
        report = (
            json.loads(_internal_kv_get(b"__autoscaling_status") or b"{}").get("autoscaler_report")
            or {}
        )
    except ValueError:
        report = {}
    return {name for key in ("active_nodes", "idle_nodes") for name in report.get(key) or {}}
