"""Report pending resource requests that no node can satisfy, and give up after a while.

Ray itself waits forever for a GPU that no machine has. Stages therefore declare what they are about
to request (`requesting`), and a thread compares the pending requests of the cluster with its nodes.
It recognises the requests of this run by their shape, because other jobs have requests as well. It
reports within a minute, and also when nodes join or leave.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raypipe.distributed.spot import MARKET_TYPE, is_spot

log = logging.getLogger("raypipe")

POLL_SECONDS, REPORT_AFTER = 5.0, 20.0
"""Seconds between two polls, and until an infeasible request is reported. Each further report comes
after twice the time."""

DEAD = {"DEAD", "UNSPECIFIED"}
"""States of a node without resources."""

Shape = frozenset[tuple[str, float]]
"""CPUs and GPUs of one task or actor; amounts of 0 are left out."""

_requested: Counter[Shape] = Counter()
"""Shapes that this process requests now."""
_lock = threading.Lock()


@dataclass(frozen=True)
class PendingRequest:
    """Identical pending requests.

    Attributes
    ----------
    bundles : tuple of Shape
        What one request consists of: one shape for a task or actor; several shapes, to be provided
        together, for a training.
    count : int
        Number of such requests.
    off_spot : bool
        Whether spot machines cannot satisfy them.
    """

    bundles: tuple[Shape, ...]
    count: int
    off_spot: bool = False

    def __str__(self) -> str:
        parts = []
        for shape, each in Counter(self.bundles).items():
            amounts = [f"{amount:g} {name}{'s' * (amount != 1)}" for name, amount in sorted(shape)]
            times = each * self.count
            parts.append((f"{times} x " if times > 1 else "") + (" and ".join(amounts) or "0 CPUs"))
        return " + ".join(parts)


@dataclass(frozen=True)
class ClusterState:
    """Resources and pending requests of the cluster.

    Attributes
    ----------
    nodes : tuple of mapping
        Total resources of every living node with CPUs or GPUs, without spot machines.
    pending : tuple of PendingRequest
        Requests that are not satisfied yet.
    spot_nodes : tuple of mapping
        Total resources of every spot machine.
    """

    nodes: tuple[Mapping[str, float], ...]
    pending: tuple[PendingRequest, ...]
    spot_nodes: tuple[Mapping[str, float], ...] = ()

    def is_infeasible(self, request: PendingRequest) -> bool:
        """Whether one request does not fit into the cluster even if all nodes are idle.

        Bundles are placed greedily, the largest first.
        """
        nodes = self.nodes if request.off_spot else (*self.nodes, *self.spot_nodes)
        free = [dict(node) for node in nodes]
        for shape in sorted(
            request.bundles,
            key=lambda shape: sorted(amount for _, amount in shape),
            reverse=True,
        ):
            fits = next(
                (
                    node
                    for node in free
                    if all(node.get(name, 0) >= amount for name, amount in shape)
                ),
                None,
            )
            if fits is None:
                return True
            for name, amount in shape:
                fits[name] -= amount
        return False

    def __str__(self) -> str:
        nodes = (*self.nodes, *self.spot_nodes)
        totals = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
        count = f"{len(nodes)} node{'s' * (len(nodes) != 1)}"
        return f"{count}, {totals['CPU']:g} CPUs, {totals['GPU']:g} GPUs"


def resource_shape(cpus: float, gpus: float = 0.0) -> Shape:
    """Return the shape of a request for one task or actor."""
    return frozenset(
        (name, float(amount)) for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount > 0
    )


@contextlib.contextmanager
def requesting(*shapes: Shape) -> Iterator[None]:
    """Declare that pending requests of these shapes belong to this run while the block runs."""
    with _lock:
        _requested.update(shapes)
    try:
        yield
    finally:
        with _lock:
            _requested.subtract(shapes)


def cluster_state() -> ClusterState:
    """Read resources and pending requests from Ray. Raises what Ray raises if it cannot."""
    state = _state()
    pending = [
        PendingRequest(
            (_shape(item.request.resources_bundle),), item.count, _is_off_spot(item.request)
        )
        for item in state.pending_resource_requests
    ]
    for gang in state.pending_gang_resource_requests:
        # newer versions of Ray store them in the selectors
        requests = list(gang.requests) or [
            item for selector in gang.bundle_selectors for item in selector.resource_requests
        ]
        bundles = tuple(_shape(item.resources_bundle) for item in requests)
        pending.append(PendingRequest(bundles, 1, any(map(_is_off_spot, requests))))
    nodes: dict[bool, list[Mapping[str, float]]] = {False: [], True: []}
    for node in state.node_states:
        total = dict(node.total_resources)
        if _status(node) not in DEAD and (total.get("CPU", 0) > 0 or total.get("GPU", 0) > 0):
            nodes[is_spot(node.labels)].append(total)
    return ClusterState(tuple(nodes[False]), tuple(pending), tuple(nodes[True]))


def _is_off_spot(request: Any) -> bool:
    return any(
        constraint.label_key == MARKET_TYPE
        for selector in request.label_selectors
        for constraint in selector.label_constraints
    )


def node_types() -> set[str]:
    """Return the types of the living nodes that an autoscaler started.

    Empty without an autoscaler, or if Ray does not report the types.
    """
    try:
        return {
            node.ray_node_type_name for node in _state().node_states if _status(node) not in DEAD
        } - {""}
    except Exception as error:
        log.info("cannot read the node types of the cluster: %s", error)
        return set()


def _state() -> Any:
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    return get_cluster_resource_state(GcsClient(ray.get_runtime_context().gcs_address))


def _shape(bundle: Mapping[str, float]) -> Shape:
    return resource_shape(bundle.get("CPU", 0.0), bundle.get("GPU", 0.0))


def _status(node: object) -> str:
    kind = type(node).DESCRIPTOR.fields_by_name["status"].enum_type  # type: ignore[attr-defined]
    return kind.values_by_number[node.status].name  # type: ignore[attr-defined]


class PendingWatch:
    """Thread that reports infeasible requests of this run, and changes of the cluster's size.

    Parameters
    ----------
    say : callable
        Prints a line.
    can_grow : bool
        Whether an autoscaler can still add nodes.
    patience : float
        Seconds after which an infeasible request is given up.
    give_up : callable, optional
        Called once after that time. None only reports, for any time.
    read_state : callable
        Returns the `ClusterState`.

    Attributes
    ----------
    given_up : str
        Message for the user once `give_up` was called; "" before.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        can_grow: bool,
        patience: float,
        give_up: Callable[[], None] | None,
        read_state: Callable[[], ClusterState] = cluster_state,
    ) -> None:
        self.given_up = ""
        self._say = say
        self._can_grow = can_grow
        self._patience = patience
        self._give_up = give_up
        self._read_state = read_state
        self._since: dict[tuple[Shape, ...], float] = {}
        self._next_report: dict[tuple[Shape, ...], float] = {}
        self._size = ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, daemon=True, name="raypipe-pending-requests"
        )
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)

    def _watch(self) -> None:
        failures = 0
        while not self._stopped.wait(POLL_SECONDS):
            try:
                state = self._read_state()
            except Exception as error:
                failures += 1
                if failures == 3:
                    # the cluster is ending, or Ray has changed; the run continues without reports
                    log.info("cannot read the pending requests of the cluster: %s", error)
                continue
            failures = 0
            if self.update(state, time.monotonic()):
                return

    def update(self, state: ClusterState, now: float) -> bool:
        """Report on the state of the cluster at a time in seconds; return whether to give up."""
        if self._size not in ("", str(state)):
            self._say(f"{'cluster':<11} now {state}")
        self._size = str(state)
        infeasible = self._infeasible(state)
        shapes = {request.bundles for request in infeasible}
        self._since = {key: since for key, since in self._since.items() if key in shapes}
        self._next_report = {key: due for key, due in self._next_report.items() if key in shapes}
        for request in infeasible:
            waited = now - self._since.setdefault(request.bundles, now)
            if waited >= self._patience and self._give_up is not None:
                self.given_up = (
                    f"{self._describe(request, state)}, for {waited:.0f} s; request less (workers, "
                    "cpus_per_worker, use_gpu, min_actors) or add such a node, and rerun to resume"
                )
                self._give_up()
                return True
            if waited >= self._next_report.setdefault(request.bundles, REPORT_AFTER):
                self._next_report[request.bundles] = 2 * waited
                self._say(
                    f"{'waiting':<11} {self._describe(request, state)}; for {waited:.0f} s of "
                    f"{self._patience:.0f} (cluster.patience_seconds)"
                )
        return False

    def _infeasible(self, state: ClusterState) -> list[PendingRequest]:
        """Return the pending requests of this run that no node can satisfy."""
        with _lock:
            requested = {shape for shape, count in _requested.items() if count > 0}
        return [
            request
            for request in state.pending
            if set(request.bundles) <= requested and state.is_infeasible(request)
        ]

    def _describe(self, request: PendingRequest, state: ClusterState) -> str:
        autoscaler = ", and the autoscaler has added none" if self._can_grow else ""
        kind = " but spot machines (cluster.keep_off_spot)" if request.off_spot else ""
        return f"requested {request}, which no node of the cluster{kind} has ({state}){autoscaler}"
