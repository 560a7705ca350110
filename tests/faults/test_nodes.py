"""Several nodes, each with a raylet on this machine: nodes can be lost, join, and be released."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import preemption
import psutil
import pytest
from autoscaled_nodes import AutoscaledNodes
from helpers import by_id, score_files, small_config
from local_nodes import HEAD, LocalNodes
from soak_runs import write_source

from raypipe.config import PoolSettings, dump_config
from raypipe.distributed.cluster import ActorPool, Cluster
from raypipe.runs.run import Run

pytestmark = pytest.mark.timeout(600)

Nodes = TypeVar("Nodes", bound=LocalNodes)
SLOW, SLOW_TRAINING, HOG = (
    str(Path(__file__).with_name(name))
    for name in ("slow_units.py", "slow_training.py", "memory_hog.py")
)


@contextmanager
def cluster_of(kind: type[Nodes] = LocalNodes, **options: Any) -> Iterator[Nodes]:  # type: ignore[assignment]
    with (
        tempfile.TemporaryDirectory(
            prefix="rp-", dir="/tmp", ignore_cleanup_errors=True
        ) as folder,  # socket paths are short
        kind(Path(folder) / "ray", **options) as nodes,
    ):
        yield nodes


def start(nodes: LocalNodes, *command: str) -> subprocess.Popen[str]:
    """Start a process that joins the cluster."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, *command], env=nodes.driver(), cwd=nodes.folder, **pipes
    )


def end(process: subprocess.Popen[str], seconds: float = 300) -> str:
    """Return the output of a process that succeeded."""
    try:
        output, errors = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-4000:]
    return output


def told_by(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what a driver of slow units printed; around it, Ray can report a dead node."""
    (line,) = [line for line in end(process).splitlines() if line.startswith("{")]
    return json.loads(line)


def wait_until(
    true: Callable[[], Any], process: subprocess.Popen[str] | None, what: str, seconds: float = 120
) -> Any:
    """Return the first truthy value of `true`."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        if process is not None and process.poll() is not None:
            pytest.fail(f"the driver ended before {what}: {process.communicate()[1][-4000:]}")
        assert time.monotonic() < deadline, f"no {what} in {seconds:.0f} s"
        time.sleep(0.002)
    return value


def lose_in(
    nodes: LocalNodes, number: int, driver: subprocess.Popen[str], run: Run, stage: str, name: str
) -> None:
    """Lose a node while a worker of that name works for a stage; the worker is suspended first."""

    def working() -> list[psutil.Process]:
        record = run.ledger().get(stage) if run.exists() else None
        return (
            nodes.workers(number, name) if record is not None and record.state == "running" else []
        )

    for worker in wait_until(working, driver, f"{name} in {stage}"):
        worker.send_signal(signal.SIGSTOP)
    assert run.ledger()[stage].state == "running", f"{stage} was over before its node was lost"
    nodes.lose(number)


def check(run: Run, scores: dict[str, bytes], samples: int) -> None:
    """Check that the run is complete and that its scores are as expected."""
    assert score_files(run.uri) == scores
    assert len(by_id(run.uri)) == samples
    assert all(record.state == "done" for record in run.ledger().values())


@pytest.mark.ray
def test_the_only_node_is_lost_and_another_comes(finished: str, tmp_path: Path) -> None:
    run, config = Run(str(tmp_path / "run")), tmp_path / "config.yaml"
    shutil.copytree(finished, run.uri, ignore=shutil.ignore_patterns("embeddings"))
    config.write_text(dump_config(small_config(run.uri, "embed.max_actors=auto")))
    with cluster_of() as nodes:
        first = nodes.add(1)
        driver = start(nodes, "-m", "raypipe.cli", "run", str(config), "--until", "embed")
        lose_in(nodes, first, driver, run, "embed", ".submit")
        assert len(run.done("embeddings")) < 5
        nodes.add(1)
        end(driver)
    embedded, expected = (
        {path.name: path.read_bytes() for path in Path(uri, "embeddings").glob("*.parquet")}
        for uri in (run.uri, finished)
    )
    assert embedded == expected and len(expected) == 5
    record = run.ledger()["embed"]
    assert record.state == "done" and record.attempts == 2, "one in the run that was copied"


@pytest.mark.ray
@pytest.mark.long
def test_a_training_moves_from_nodes_that_are_announced_to_go(tmp_path: Path) -> None:
    """The second of them goes before the training can react."""
    with cluster_of() as nodes, nodes.announcer() as announcer:
        used = [nodes.add(1)]
        driver = start(nodes, SLOW_TRAINING, str(tmp_path), "24")
        wait_until(lambda: list(tmp_path.iterdir()), driver, "step")
        announcer.announce(used[-1], 60)
        used.append(nodes.add(1))
        wait_until(lambda: list(tmp_path.glob(f"*-{used[-1]}")), driver, "step on the second node")
        for worker in nodes.workers(used[-1], "_train_locally"):
            worker.send_signal(signal.SIGSTOP)
        announcer.announce(used[-1], 60)
        time.sleep(4)  # the driver looks every second
        nodes.lose(used[-1])
        used.append(nodes.add(1))
        end(driver)
    steps = sorted(path.name for path in tmp_path.iterdir())
    assert [int(name[:3]) for name in steps] == list(range(24)), "no step is repeated"
    assert list(dict.fromkeys(int(name[4:]) for name in steps)) == used


@pytest.mark.ray
@pytest.mark.long
def test_a_pool_grows_onto_a_node_that_comes_and_gives_it_back(tmp_path: Path) -> None:
    with cluster_of() as nodes:
        first = nodes.add(1)
        driver = start(nodes, SLOW, str(tmp_path), "120", "2")
        wait_until(lambda: list(tmp_path.iterdir()), driver, "unit")
        second = nodes.add(1)
        told = told_by(driver)
        assert sorted(told["units"]) == list(range(120))
        assert {path.name.partition("-")[2] for path in tmp_path.iterdir()} == {
            str(first),
            str(second),
        }
        assert told["joined"] and not told["can_grow"] and told["busy"] == []


@pytest.mark.ray
@pytest.mark.long
def test_a_node_is_lost_in_every_stage(
    cluster: str, finished_scores: dict[str, bytes], tmp_path: Path
) -> None:
    import ray

    run, config = Run(str(tmp_path / "run")), tmp_path / "config.yaml"
    config.write_text(
        dump_config(small_config(run.uri, "measure.max_actors=auto", "embed.max_actors=auto"))
    )
    cpus = int(
        ray.cluster_resources()["CPU"]
    )  # threads of the training, which rounding depends on, are then those of `finished`
    with cluster_of() as nodes:
        lost = nodes.add(cpus)
        driver = start(nodes, "-m", "raypipe.cli", "run", str(config), "--until", "extrapolate")
        wait_until(lambda: _epochs(run), driver, "epoch")
        for stage, name in (
            ("proxy", "_train_locally"),
            ("measure", ".submit"),
            ("embed", ".submit"),
            ("extrapolate", "_in_task"),
        ):
            lose_in(nodes, lost, driver, run, stage, name)
            lost = nodes.add(cpus)
        end(driver, 400)
    check(run, finished_scores, 600)


def _epochs(run: Run) -> list[Path]:
    return list(Path(run.uri, "proxy", "epochs").glob("*.json"))


@pytest.mark.ray
@pytest.mark.long
def test_workers_that_die_of_memory_are_reported_as_that() -> None:
    most = (
        psutil.virtual_memory().percent / 100 + 0.12
    )  # of the machine, 2.9 of 24 GB more than is used now
    limits = {"RAY_memory_usage_threshold": f"{most:.2f}", "RAY_memory_monitor_refresh_ms": "250"}
    with cluster_of(variables=limits) as nodes:
        nodes.add(1)
        said = end(start(nodes, HOG)).splitlines()[-1]
    assert said.startswith("MemoryShortageError: workers ran out of memory")


@pytest.mark.ray
@pytest.mark.long
def test_nothing_new_is_begun_on_a_node_that_is_announced_to_go_by_a_signal(tmp_path: Path) -> None:
    with cluster_of() as nodes:
        first, second = nodes.add(1), nodes.add(1)
        driver = start(nodes, SLOW, str(tmp_path), "40", "3")

        def done(node: int) -> int:
            return len(list(tmp_path.glob(f"*-{node}")))

        wait_until(lambda: done(first) and done(second), driver, "unit on both nodes")
        nodes.terminate(first)
        time.sleep(5)  # two units were in flight there, a second each
        before = done(first)
        time.sleep(4)
        assert done(first) == before and done(second) >= 8
        nodes.lose(first)
        assert sorted(told_by(driver)["units"]) == list(range(40))


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("workers", [1, 2])
def test_nodes_that_are_announced_to_go_cost_no_work_and_change_no_byte(
    tmp_path: Path, workers: int
) -> None:
    """A node goes in each stage; no failure of a training worker is allowed."""
    write_source(tmp_path / "source", preemption.SAMPLES)
    _, truth = preemption.measure(tmp_path, workers, announced=None)
    losses, run = preemption.measure(tmp_path, workers, announced=True)
    assert [loss.stage for loss in losses] == list(preemption.WORKING)[: 3 if workers == 1 else 1]
    assert all(loss.lost == 0 and loss.left < preemption.NOTICE for loss in losses)
    assert losses[0].without_state < 30
    expected = preemption.contents(truth, workers)
    assert expected and preemption.contents(run, workers) == expected


@pytest.mark.ray
@pytest.mark.long
def test_a_run_from_no_worker_at_all_through_an_autoscaler_and_a_drained_node(
    cluster: str, finished_scores: dict[str, bytes], tmp_path: Path
) -> None:
    import ray

    run, config = Run(str(tmp_path / "run")), tmp_path / "config.yaml"
    config.write_text(
        dump_config(small_config(run.uri, "measure.max_actors=auto", "embed.max_actors=auto"))
    )
    cpus = int(ray.cluster_resources()["CPU"])
    settings = f"--set=proxy.cpus_per_worker={cpus}"  # `auto` has no node to look at
    with cluster_of(
        AutoscaledNodes,
        types={"worker": {"resources": {"CPU": cpus}, "max_workers": 2}},
        idle_seconds=15,
    ) as nodes:
        driver = start(
            nodes, "-m", "raypipe.cli", "run", str(config), "--until", "extrapolate", settings
        )
        wait_until(lambda: _epochs(run), driver, "epoch", 200)
        drained = next(
            number for number in nodes.events("up") if nodes.workers(number, "_train_locally")
        )
        with nodes.announcer() as announcer:
            announcer.announce(drained, 30)
        time.sleep(5)
        if nodes.raylet(drained) is not None:  # it ends by itself once it is idle
            nodes.lose(drained)
        end(driver, 400)
        brought = nodes.events("up")
        assert len(brought) >= 2, "another came for the one that was drained"
        wait_until(
            lambda: all(nodes.raylet(number) is None for number in brought),
            None,
            "end of idle nodes",
            90,
        )
        assert nodes.raylet(HEAD) is not None
    check(run, finished_scores, 600)


@pytest.mark.ray
@pytest.mark.long
def test_gpu_nodes_come_for_a_pool_that_asks_for_gpus_and_go(tmp_path: Path) -> None:
    types = {
        "gpu": {"resources": {"CPU": 4, "GPU": 1}, "max_workers": 2},
        "cpu": {"resources": {"CPU": 1}, "max_workers": 1},
    }
    with cluster_of(
        AutoscaledNodes, types=types, idle_seconds=10
    ) as nodes:  # GPUs that Ray only counts; the units need none
        told = told_by(start(nodes, SLOW, str(tmp_path), "150", "2", "gpu"))
        assert told["can_grow"] and told["busy"] == [] and sorted(told["units"]) == list(range(150))
        kinds = nodes.events("up")
        worked = {int(path.name.partition("-")[2]) for path in tmp_path.iterdir()}
        assert len(worked) == 2 and {kinds[number] for number in worked} == {"gpu"}
        assert 2 < len({path.read_text() for path in tmp_path.iterdir()}) <= 6, (
            "at most three on each"
        )
        wait_until(
            lambda: nodes.events("down").keys() >= kinds.keys(), None, "end of idle nodes", 90
        )


@pytest.mark.parametrize(
    ("pool", "units", "worth", "expected"),
    [
        (Cluster(8, 0, 2, 4, False).cpu_pool("auto"), 100, 1, (1, 8, 8)),  # this machine alone
        (Cluster(8, 0, 2, 4, False).cpu_pool("auto"), 5, 1, (1, 5, 5)),
        (Cluster(8, 0, 2, 4, False, True).cpu_pool("auto"), 100, 1, (1, 8, 25)),
        (Cluster(8, 0, 2, 4, False, True).cpu_pool("auto"), 9, 1, (1, 8, 8)),
        (Cluster(8, 0, 2, 4, False, True).cpu_pool("auto"), 640, 16, (1, 8, 10)),
        (Cluster(0, 0, 1, 0, True, True).cpu_pool("auto"), 3, 1, (1, 1, 1)),
        (Cluster(0, 0, 1, 0, True, True).cpu_pool("auto"), 40, 1, (1, 1, 10)),
        (Cluster(2, 0, 1, 2, True, True).cpu_pool(30), 1000, 1, (1, 2, 30)),
        (Cluster(2, 0, 1, 2, True, True).cpu_pool(30, 6), 1000, 1, (6, 6, 30)),
        (Cluster(2, 0, 1, 2, True, True).cpu_pool("auto", 6), 10, 1, (6, 6, 6)),
        (
            Cluster(8, 0, 2, 4, True, True).pool(PoolSettings(use_gpu=True)),
            100,
            1,
            (1, 1, 25),
        ),  # from no GPU at all
        (Cluster(8, 3, 2, 4, False).pool(PoolSettings()), 100, 1, (1, 1, 3)),
        (Cluster(8, 3, 2, 4, False).pool(PoolSettings(actors_per_gpu=3)), 100, 1, (1, 1, 9)),
    ],
)
def test_a_pool_is_as_large_as_its_work_justifies(
    pool: ActorPool, units: int, worth: int, expected: tuple[int, int, int]
) -> None:
    assert pool.sizes(units, worth) == expected


@pytest.mark.parametrize("actors", [1, 2, 3, 6, 7, 100])
def test_actors_that_share_a_gpu_have_room_on_it(actors: int) -> None:
    share = Cluster(8, 1, 1, 8, False).pool(PoolSettings(actors_per_gpu=actors)).num_gpus
    assert share * actors <= 1 and share * 1e4 == pytest.approx(round(share * 1e4)), (
        "in Ray's steps"
    )
