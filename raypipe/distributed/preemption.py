"""Learn that a node will be taken away: Ray drains it, as the notice of a spot machine requests.

Ray Train passes the same notice to its workers (`ray.train.get_preemption_info`), but not to a
training of a single worker, and each call is a round trip of all workers to an actor.
"""

from __future__ import annotations

import logging
import threading
from typing import Self

import ray

log = logging.getLogger("raypipe")

POLL_SECONDS = 1.0
"""Seconds between two requests for the nodes that are drained."""


def draining_nodes() -> set[str]:
    """Return the ids of the living nodes that are drained."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


class DrainWatch:
    """Context in which a thread watches whether a node is drained.

    Parameters
    ----------
    node : str, optional
        Id of the node. Default: the one of this process.

    Attributes
    ----------
    announced : bool
        Whether it is drained, or was before it died.
    """

    def __init__(self, node: str | None = None) -> None:
        self.announced = False
        self._node = node
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="raypipe-drain")

    def __enter__(self) -> Self:
        if ray.is_initialized():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        node, failed = self._node or ray.get_runtime_context().get_node_id(), False
        while not self.announced and not self._ended.wait(POLL_SECONDS):
            try:
                self.announced = node in draining_nodes()
            except Exception as error:
                if not failed:  # the training continues, without notice of the end of its node
                    log.info("cannot read which nodes are drained: %s", error)
                failed = True
