"""A cluster that does not answer, or lacks what the settings request, is reported before any work."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import QUIET, small_config

from raypipe import storage
from raypipe.distributed import reach
from raypipe.distributed.cluster import Cluster
from raypipe.distributed.context import Context
from raypipe.distributed.reach import address_of, check_reachable
from raypipe.errors import RaypipeError, ResourceError
from raypipe.pipeline import execute


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of something that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed() -> str:
    """An address where nothing listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "WAIT_SECONDS", 1.0)
    monkeypatch.setattr(reach, "PAUSE_SECONDS", 0.1)


def test_the_time_that_is_waited_is_less_than_a_minute() -> None:
    assert reach.WAIT_SECONDS + 2 * reach.TRY_SECONDS + reach.PAUSE_SECONDS < 60
    assert 2 * reach.TRY_SECONDS < 20  # until the first message


def test_where_an_address_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert address_of("auto") == address_of("local") == ("", "")
    assert address_of("head:6379") == ("head:6379", "cluster.address")
    monkeypatch.setenv("RAY_ADDRESS", "other:1")
    assert address_of("auto") == ("other:1", "RAY_ADDRESS")
    assert address_of("local") == ("", "")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert address_of("auto") == ("", "")


def test_a_closed_port_is_named_and_waited_for_briefly(
    closed: str, brief: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "raypipe")
    started = time.monotonic()
    with pytest.raises(RaypipeError) as error:
        check_reachable(closed, QUIET)
    assert 1 <= time.monotonic() - started < 5
    assert f"cannot reach the Ray cluster at '{closed}' (cluster.address): " in str(error.value)
    assert "refused" in str(error.value) and "\n" not in str(error.value)
    assert f"no Ray cluster answers at {closed} (Connection refused); waiting 1 s" in caplog.text


def test_what_is_no_address_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head-node")
    with pytest.raises(RaypipeError, match="RAY_ADDRESS is 'head-node', which is not an address"):
        check_reachable("auto", QUIET)
    with pytest.raises(RaypipeError, match=r"cluster\.address is 'head:99999', which is not an"):
        check_reachable("head:99999", QUIET)


def test_an_invalid_host_name_is_one_line(brief: None) -> None:
    for address in ("head..node:6379", f"{'a' * 64}:6379"):
        with pytest.raises(RaypipeError, match=r"cannot reach .* not a valid host name\. Correct"):
            check_reachable(address, QUIET)


def test_a_port_of_something_else_is_given_up_on(silent: str) -> None:
    """In a process of its own: Ray's attempt to connect cannot be ended."""
    code = (
        "from raypipe.distributed import reach; from raypipe.progress import Progress; "
        "reach.WAIT_SECONDS, reach.TRY_SECONDS = 3.0, 1.0\n"
        f"try: reach.check_reachable({silent!r}, Progress())\n"
        "except Exception as error: print(type(error).__name__, error); raise SystemExit(1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert f"RaypipeError cannot reach the Ray cluster at '{silent}'" in done.stdout


def test_a_client_address_is_tried_like_any_other(silent: str, closed: str, brief: None) -> None:
    check_reachable(f"ray://{silent}", QUIET)  # Ray itself gives up on it in half a minute
    with pytest.raises(RaypipeError, match="cannot reach"):
        check_reachable(f"ray://{closed}", QUIET)


@pytest.mark.ray
def test_a_cluster_answers_at_once(cluster: str) -> None:
    started = time.monotonic()
    check_reachable(cluster, QUIET)
    assert time.monotonic() - started < 5


def test_a_wrong_address_is_reported_before_the_index(
    tmp_path: Path, closed: str, brief: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(RaypipeError, match=f"cannot reach the Ray cluster at '{closed}'"):
        execute(small_config(f"{tmp_path}/run", f"cluster.address={closed}"), progress=QUIET)
    assert not storage.names(f"{tmp_path}/run/index")


@pytest.mark.parametrize(
    "override, message",
    [
        ("proxy.use_gpu=true", "proxy: use_gpu is true, but the cluster has no GPU"),
        ("embed.use_gpu=true", "embed: use_gpu is true, but the cluster has no GPU"),
        ("extrapolate.use_gpu=true", "extrapolate: use_gpu is true, but the cluster has no GPU"),
        ("proxy.workers=5", "proxy: proxy.workers x cpus_per_worker is 5 x 1 CPUs"),
        ("measure.min_actors=5 measure.max_actors=auto", "measure: min_actors is 5"),
    ],
)
def test_resources_that_do_not_exist_are_refused_before_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.setattr(Context, "cluster", Cluster(2, 0, 1, 2, False))
    with pytest.raises(ResourceError, match=message):
        execute(small_config(f"{tmp_path}/run", *override.split()), progress=QUIET)
    assert not storage.names(f"{tmp_path}/run/index")
