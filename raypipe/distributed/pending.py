"""What the cluster is asked for and has no node for: said within a minute, and given up after a while, instead of waiting in silence.
Nodes that come and go are said as well.

Ray itself waits for ever for a GPU that no machine has. Stages say what they are about to ask for (`asking`); a thread looks at what the
cluster's books have waiting, and knows its own requests from those of other jobs by their shape.
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

log = logging.getLogger("raypipe")

POLL_SECONDS, REPORT_AFTER = 5.0, 20.0
"""Seconds between two looks, and until a request that no node is large enough for is said. It is said again after twice the time."""

DEAD = {"DEAD", "UNSPECIFIED"}
"""States of a node that gives nothing."""

Shape = frozenset[tuple[str, float]]
"""CPUs and GPUs of one task or actor, those above 0."""

_requested: Counter[Shape] = Counter()
_lock = threading.Lock()


@dataclass(frozen=True)
class PendingRequest:
    """Requests that wait: `count` times all of `bundles` (one for a task or actor, several that must come together for a training)."""

    bundles: tuple[Shape, ...]
    count: int

    def __str__(self) -> str:
        parts = []
        for shape, each in Counter(self.bundles).items():
            amounts = [f"{amount:g} {name}{'s' * (amount != 1)}" for name, amount in sorted(shape)]
            times = each * self.count
            parts.append((f"{times} x " if times > 1 else "") + (" and ".join(amounts) or "0 CPUs"))
        return " + ".join(parts)


@dataclass(frozen=True)
class ClusterState:
    """What the living nodes have in all, and what waits."""

    nodes: tuple[Mapping[str, float], ...]
    waiting: tuple[PendingRequest, ...]

    def impossible(self, request: PendingRequest) -> bool:
        """Whether the nodes, all of them idle, could not hold one set of the request's bundles."""
        free = [dict(node) for node in self.nodes]
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
        totals = {name: sum(node.get(name, 0) for node in self.nodes) for name in ("CPU", "GPU")}
        return f"{len(self.nodes)} node{'s' * (len(self.nodes) != 1)}, {totals['CPU']:g} CPUs, {totals['GPU']:g} GPUs"


def resource_shape(cpus: float, gpus: float = 0.0) -> Shape:
    """The shape of a request."""
    return frozenset(
        (name, float(amount)) for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount > 0
    )


@contextlib.contextmanager
def requesting(*shapes: Shape) -> Iterator[None]:
    """While the block runs, requests of these shapes may wait in the cluster's books on behalf of this run."""
    with _lock:
        _requested.update(shapes)
    try:
        yield
    finally:
        with _lock:
            _requested.subtract(shapes)


def cluster_state() -> ClusterState:
    """The cluster's books. Raises whatever Ray does when it cannot tell."""
    state = _state()
    waiting = [
        PendingRequest((_shape(item.request.resources_bundle),), item.count)
        for item in state.pending_resource_requests
    ]
    for gang in state.pending_gang_resource_requests:
        bundles = [_shape(item.resources_bundle) for item in gang.requests]
        if not bundles:  # where later versions of Ray put them
            bundles = [
                _shape(item.resources_bundle)
                for selector in gang.bundle_selectors
                for item in selector.resource_requests
            ]
        waiting.append(PendingRequest(tuple(bundles), 1))
    nodes = [dict(node.total_resources) for node in state.node_states if _status(node) not in DEAD]
    return ClusterState(
        tuple(node for node in nodes if node.get("CPU", 0) > 0 or node.get("GPU", 0) > 0),
        tuple(waiting),
    )


def node_types() -> set[str]:
    """Names of the node types by which an autoscaler brought the living nodes; empty where there is none, or Ray cannot tell."""
    try:
        return {
            node.ray_node_type_name for node in _state().node_states if _status(node) not in DEAD
        } - {""}
    except Exception as error:
        log.info("the types of the cluster's nodes cannot be seen: %s", error)
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
    """Looks at the cluster's books until it is stopped; says what waits in vain, and calls `give_up` once when it did for too long.

    Also says when the cluster has become larger or smaller.

    can_grow  whether an autoscaler may still bring a node
    patience  seconds; `given_up` then holds the sentence for the user
    give_up   None: only says it, however long
    look      gives the books
    """

    def __init__(
        self,
        say: Callable[[str], None],
        can_grow: bool,
        patience: float,
        give_up: Callable[[], None] | None,
        look: Callable[[], ClusterState] = cluster_state,
    ) -> None:
        self.given_up = ""
        self._say, self._can_grow, self._patience, self._give_up, self._look = (
            say,
            can_grow,
            patience,
            give_up,
            look,
        )
        self._since: dict[tuple[Shape, ...], float] = {}
        self._next: dict[tuple[Shape, ...], float] = {}
        self._size = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="raypipe-demand")
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)

    def _watch(self) -> None:
        failed = 0
        while not self._over.wait(POLL_SECONDS):
            try:
                found = self._look()
                failed = 0
            except Exception as error:
                failed += 1
                if (
                    failed == 3
                ):  # a cluster that ends, or a Ray without these books: only the notice is lost
                    log.info("what the cluster is asked for cannot be seen: %s", error)
                continue
            if self.judge(found, time.monotonic()):
                return

    def judge(self, found: ClusterState, now: float) -> bool:
        """Say what is to be said at a time in seconds; whether it is time to give up."""
        if self._size not in ("", str(found)):
            self._say(f"{'cluster':<11} now {found}")
        self._size = str(found)
        with _lock:
            ours = {shape for shape, count in _requested.items() if count > 0}
        vain = [
            request
            for request in found.waiting
            if set(request.bundles) <= ours and found.impossible(request)
        ]
        keys = {request.bundles for request in vain}
        self._since = {key: since for key, since in self._since.items() if key in keys}
        self._next = {key: due for key, due in self._next.items() if key in keys}
        for request in vain:
            since = self._since.setdefault(request.bundles, now)
            waited = now - since
            if waited >= self._patience and self._give_up is not None:
                self.given_up = (
                    f"{self._sentence(request, found)}, for {waited:.0f} s; ask for less (workers, cpus_per_worker, use_gpu, min_actors), "
                    "or add such a node, and run again to resume"
                )
                self._give_up()
                return True
            if waited >= self._next.setdefault(request.bundles, REPORT_AFTER):
                self._next[request.bundles] = 2 * waited
                self._say(
                    f"{'waiting':<11} {self._sentence(request, found)}; for {waited:.0f} s of {self._patience:.0f} (cluster.patience_seconds)"
                )
        return False

    def _sentence(self, request: PendingRequest, found: ClusterState) -> str:
        more = ", and the autoscaler has brought none" if self._can_grow else ""
        return f"asked for {request}, which no node of the cluster can give ({found}){more}"
