"""Infeasible requests are reported and given up, but not those of other jobs or a full cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from helpers import QUIET, small_config

import raypipe
from raypipe.distributed import pending
from raypipe.distributed.cluster import Cluster, TrainingResources
from raypipe.distributed.pending import (
    ClusterState,
    PendingRequest,
    PendingWatch,
    requesting,
    resource_shape,
)
from raypipe.errors import ResourceError
from raypipe.runs.run import Run

NODES = ({"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0})
GPU = PendingRequest((resource_shape(1, 2),), 1)


@contextmanager
def watching(
    patience: float, can_grow: bool = False
) -> Iterator[tuple[PendingWatch, list[str], list[bool]]]:
    """A watch of an empty cluster, the lines it printed, and whether it gave up."""
    said: list[str] = []
    over: list[bool] = []
    watch = PendingWatch(
        said.append,
        can_grow,
        patience,
        lambda: over.append(True),
        read_state=lambda: ClusterState((), ()),
    )
    try:
        yield watch, said, over
    finally:
        watch.stop()


def test_a_request_fits_or_not() -> None:
    state = ClusterState(NODES, ())
    assert not state.is_infeasible(PendingRequest((resource_shape(4),), 100)), (
        "they fit one after another"
    )
    assert state.is_infeasible(PendingRequest((resource_shape(5),), 1))
    assert state.is_infeasible(GPU)
    assert not state.is_infeasible(
        PendingRequest((resource_shape(2), resource_shape(2), resource_shape(2, 1)), 1)
    )
    assert state.is_infeasible(
        PendingRequest(
            (resource_shape(2), resource_shape(2), resource_shape(2), resource_shape(2)), 1
        )
    ), "they do not fit at the same time"
    assert str(PendingRequest((resource_shape(4, 1),) * 2, 1)) == "2 x 4 CPUs and 1 GPU"
    assert str(state) == "2 nodes, 6 CPUs, 1 GPUs"


def test_reported_within_a_minute_then_less_often_then_given_up() -> None:
    with watching(patience=600) as (watch, said, over), requesting(resource_shape(1, 2)):
        times = []
        for now in range(0, 600, 5):
            count = len(said)
            assert not watch.update(ClusterState(NODES, (GPU,)), 1000.0 + now)
            times += [now] * (len(said) - count)
        assert times[0] <= 60 and times == [20, 40, 80, 160, 320]
        assert (
            "requested 1 CPU and 2 GPUs, which no node of the cluster has (2 nodes, 6 CPUs, 1 GPUs)"
            in said[0]
        )
        assert not over and watch.update(ClusterState(NODES, (GPU,)), 1600.0)
        assert over and "for 600 s; request less" in watch.given_up


def test_a_node_that_comes_ends_the_wait() -> None:
    with (
        watching(patience=100, can_grow=True) as (watch, said, over),
        requesting(resource_shape(1, 2)),
    ):
        watch.update(ClusterState(NODES, (GPU,)), 0.0)
        assert (
            not watch.update(ClusterState(NODES, (GPU,)), 90.0)
            and "the autoscaler has added none" in said[-1]
        )
        assert not watch.update(ClusterState((*NODES, {"CPU": 8.0, "GPU": 4.0}), (GPU,)), 95.0), (
            "a node has it now"
        )
        assert not watch.update(ClusterState(NODES, (GPU,)), 120.0), "the wait starts again"
        assert not over


def test_requests_of_others_and_a_full_cluster_are_not_reported() -> None:
    with watching(patience=10) as (watch, said, over):
        with requesting(resource_shape(1)):
            for now in (0.0, 30.0, 60.0):
                assert not watch.update(
                    ClusterState(NODES, (GPU, PendingRequest((resource_shape(1),), 50))), now
                )
        with requesting(resource_shape(1, 2)):
            pass
        assert not watch.update(ClusterState(NODES, (GPU,)), 90.0), "nothing is requested any more"
        assert not said and not over


def _nodes(*names: str, status: str = "RUNNING") -> Any:
    """State of a cluster in Ray's format, with a node of each type."""
    from ray.core.generated import autoscaler_pb2

    number = autoscaler_pb2.NodeStatus.Value(status)
    states = [autoscaler_pb2.NodeState(ray_node_type_name=name, status=number) for name in names]
    return autoscaler_pb2.ClusterResourceState(node_states=states)


@pytest.mark.parametrize(
    ("state", "report", "expected"),
    [
        (_nodes("headgroup"), b"", True),  # KubeRay: only the head has started
        (
            _nodes(""),
            b'{"autoscaler_report": {"active_nodes": {"head": 1}}}',
            True,
        ),  # the older autoscaler
        (_nodes("", ""), b"", False),
        (_nodes(""), b'{"autoscaler_report": {"active_nodes": {"node_0a1b": 1}}}', False),
        (_nodes("gpu", status="DEAD"), b"not JSON", False),
    ],
)
def test_an_autoscaler_is_known_by_the_types_of_its_nodes(
    state: Any, report: bytes, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.experimental.internal_kv as store

    from raypipe.distributed import cluster

    reports = iter([b"", report])  # before its first report, too
    monkeypatch.setattr(cluster, "FIRST_REPORT_SECONDS", 1)
    monkeypatch.setattr(store, "_internal_kv_get", lambda key: next(reports, report))
    monkeypatch.setattr(pending, "_state", lambda: state)
    assert cluster._autoscaling() is expected


def test_a_cluster_that_does_not_tell_its_types_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise RuntimeError("no such request")

    monkeypatch.setattr(pending, "_state", fails)
    assert pending.node_types() == set()


@pytest.mark.ray
def test_the_state_of_a_cluster(cluster: str) -> None:
    import ray

    waits = ray.remote(num_cpus=1000, num_gpus=3)(lambda: None).remote()
    group = ray.util.placement_group([{"CPU": 500}, {"CPU": 500}])
    expected = {(resource_shape(1000, 3),), (resource_shape(500), resource_shape(500))}
    end = time.monotonic() + 20
    while (
        not expected <= {request.bundles for request in pending.cluster_state().pending}
        and time.monotonic() < end
    ):
        time.sleep(0.2)
    state = pending.cluster_state()
    assert all(
        state.is_infeasible(request) for request in state.pending if request.bundles in expected
    )
    assert expected <= {request.bundles for request in state.pending} and state.nodes[0]["CPU"] >= 1
    assert pending.node_types() == set(), "this cluster has no autoscaler"
    ray.cancel(waits)
    ray.util.remove_placement_group(group)


@pytest.mark.ray
def test_a_run_ends_with_what_it_requested_and_what_the_cluster_has(
    cluster: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(pending, "REPORT_AFTER", 0.5)
    # as if a node had left after the sizes were chosen
    monkeypatch.setattr(
        Cluster, "training_resources", lambda *_: TrainingResources(2, False, 400, 1)
    )
    run = f"{tmp_path}/run"
    config = small_config(run, "cluster.patience_seconds=2", "source.limit=150")
    with pytest.raises(
        ResourceError,
        match=r"proxy: requested 2 x 400 CPUs, which no node of the cluster has \(1 node, ",
    ):
        raypipe.run(config, until="proxy", progress=QUIET)
    record = Run(run).ledger()["proxy"]
    assert record.state == "failed" and "400 CPUs" in record.error
