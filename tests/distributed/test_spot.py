"""Long trainings keep off spot machines, and the run says when that is impossible or changes nothing."""

from __future__ import annotations

import pytest

from raypipe.config import ClusterSettings
from raypipe.distributed import pending
from raypipe.distributed.cluster import connect, current_cluster
from raypipe.distributed.pending import PendingRequest, cluster_state, resource_shape
from raypipe.errors import ResourceError
from raypipe.progress import Progress
from raypipe.runs.run import Run

OFF_SPOT = ClusterSettings(keep_off_spot=True)
SPOT = {"ray.io/market-type": "spot"}


def _living(monkeypatch: pytest.MonkeyPatch, *nodes: tuple[float, dict[str, str]]) -> None:
    described = [{"Resources": {"CPU": cpus}, "Labels": labels} for cpus, labels in nodes]
    monkeypatch.setattr("raypipe.distributed.cluster._living_nodes", lambda: described)


def test_trainings_are_sized_to_the_nodes_that_they_can_run_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _living(monkeypatch, (4, {}), (16, SPOT), (2, {"ray.io/market-type": "on-demand"}))
    cluster = current_cluster(joined=False)
    assert (cluster.cpus, cluster.nodes, cluster.largest_node_cpus) == (22, 3, 16)
    assert cluster.for_trainings(ClusterSettings()) is cluster
    steady = cluster.for_trainings(OFF_SPOT)
    assert (steady.cpus, steady.nodes, steady.largest_node_cpus) == (6, 2, 4)
    _living(monkeypatch, (4, {}))
    alone = current_cluster(joined=False)
    assert alone.for_trainings(OFF_SPOT) is alone


def test_a_cluster_of_spot_machines_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _living(monkeypatch, (0, {}), (16, SPOT))
    with pytest.raises(ResourceError, match=r"all CPUs of the cluster .* are on spot machines"):
        current_cluster(joined=False).for_trainings(OFF_SPOT)


def test_a_request_that_only_spot_machines_have_room_for_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.core.generated import autoscaler_pb2 as state
    from ray.core.generated.common_pb2 import LabelSelector, LabelSelectorConstraint

    running = state.NodeStatus.Value("RUNNING")
    labels = LabelSelector(
        label_constraints=[LabelSelectorConstraint(label_key="ray.io/market-type")]
    )
    request = state.ResourceRequest(resources_bundle={"CPU": 8}, label_selectors=[labels])
    selector = state.BundleSelector(resource_requests=[request, request])
    monkeypatch.setattr(
        pending,
        "_state",
        lambda: state.ClusterResourceState(
            node_states=[
                state.NodeState(total_resources={"CPU": 4}, status=running),
                state.NodeState(total_resources={"CPU": 16}, labels=SPOT, status=running),
            ],
            pending_resource_requests=[state.ResourceRequestByCount(request=request, count=1)],
            pending_gang_resource_requests=[state.GangResourceRequest(bundle_selectors=[selector])],
        ),
    )
    found = cluster_state()
    shape = resource_shape(8)
    assert found.pending == (
        PendingRequest((shape,), 1, off_spot=True),
        PendingRequest((shape, shape), 1, off_spot=True),
    )
    assert all(found.is_infeasible(request) for request in found.pending)
    assert not found.is_infeasible(PendingRequest((shape, shape), 1))
    assert str(found) == "2 nodes, 20 CPUs, 0 GPUs"


@pytest.mark.ray
def test_a_setting_that_changes_nothing_is_reported(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    progress = Progress(quiet=True)
    monkeypatch.setattr(progress, "say", said.append)
    settings = ClusterSettings(address="local", keep_off_spot=True)
    connect(settings, Run("s3://unused/run"), progress, verbose=False)
    connect(ClusterSettings(address="local"), Run("s3://unused/run"), progress, verbose=False)
    assert said == [
        "note: no node has the label ray.io/market-type=spot; until one does, "
        "cluster.keep_off_spot has no effect"
    ]
