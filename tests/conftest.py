"""Fixtures shared by all tests: an S3 server on this machine."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from xdist.scheduler import LoadScopeScheduling

# Fixtures import what they need: torch and raypipe take seconds, and the process that only hands
# out the tests loads this file, too.

# Otherwise, every command and worker that a test starts compiles raypipe again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Threads of OpenMP busy-wait: next to another test or Ray's workers, two are much slower than one.
# Workers of xdist and the commands that tests start inherit it before they import anything.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def uses_ray(file: Path) -> bool:
    """Whether tests of a file use a Ray cluster."""
    if file.parent.name in ("faults", "jobs"):
        return True
    fixtures = r"\b(cluster|finished|finished_ledger|finished_scores|of_folders)\b[:,]|mark\.ray"
    return re.search(fixtures, file.read_text(encoding="utf-8")) is not None


class RayFirst(LoadScopeScheduling):
    """Hand out whole files, so that their fixtures are made once, those with Ray first.

    They are few tests that take long: at the end one of them would run alone. Two workers run them,
    each with a cluster of its own. Further ones take the other files, from the end, and fill the
    time in which both wait for a cluster.
    """

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition("::")[0]

    def _assign_work_unit(self, node: Any) -> None:
        if not has_cluster(node.gateway.id):
            others = (file for file in reversed(self.workqueue) if not uses_ray(ROOT / file))
            if (last := next(others, None)) is None:
                node.shutdown()
                return
            self.workqueue.move_to_end(last, last=False)
        super()._assign_work_unit(node)


def has_cluster(worker: str) -> bool:
    """Whether a worker of xdist runs tests that use Ray."""
    return worker in ("gw0", "gw1")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> RayFirst:
    config.option.loadscopereorder = False  # files in the order of collection, not by length
    return RayFirst(config, log)


def pytest_runtestloop(session: pytest.Session) -> None:
    """Let clusters have the processor first: their heartbeats and time limits run."""
    if not has_cluster(os.environ.get("PYTEST_XDIST_WORKER", "gw0")) and session.items:
        os.nice(10)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not uses_ray(item.path))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Use one thread in torch, which can be imported before the variable is set."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Endpoint of a local S3 server. The AWS variables point at it during the session."""
    from helpers import PLANTED
    from moto.server import ThreadedMotoServer

    from raypipe import storage

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for variable in (
            "AWS_PROFILE",
            "AWS_SESSION_TOKEN",
            "AWS_ENDPOINT_URL_S3",
            "HTTP_PROXY",
            "http_proxy",
            "ALL_PROXY",
            "all_proxy",
        ):
            patch.delenv(variable, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", PLANTED)
        patch.setenv(
            "RAYPIPE_TEST_PASSWORD", PLANTED
        )  # before Ray starts, so that its workers have it
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_CONFIG_FILE", "/dev/null")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        storage.places.remote_filesystem.cache_clear()  # earlier filesystems have another endpoint
        yield endpoint
        storage.places.remote_filesystem.cache_clear()
    server.stop()


@pytest.fixture(scope="session")
def s3(s3_server: str) -> str:
    """A bucket, as `s3://bucket`. Tests share it: write only inside a folder of your own."""
    from raypipe import storage

    storage.filesystem("s3://raypipe-test")[0].mkdir("raypipe-test")
    return "s3://raypipe-test"


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: object) -> str:
    """A folder to write to, once on disk and once on S3."""
    if request.param == "local":
        return str(tmp_path)
    return f"{request.getfixturevalue('s3')}/{abs(hash(request.node.nodeid)):x}"


@pytest.fixture(scope="session")
def cluster(s3_server: str) -> Iterator[str]:
    """Address of a Ray cluster on this machine, shared by all tests; its workers can use `s3`."""
    import ray
    from helpers import not_ended

    from raypipe.config import ClusterSettings
    from raypipe.distributed.cluster import connect
    from raypipe.progress import Progress
    from raypipe.runs.run import Run

    connect(ClusterSettings(address="local"), Run("unused"), Progress(quiet=True), verbose=False)
    yield ray.get_runtime_context().gcs_address
    processes = psutil.Process().children(recursive=True)
    ray.shutdown()
    # actors of drivers that a test killed can outlive the cluster
    for process in not_ended(processes, within_s=5):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray" in " ".join([process.name(), *process.cmdline()]):
                process.kill()


@pytest.fixture(scope="session")
def finished(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run of `helpers.small_config`. Tests that change it must restore it."""
    from helpers import QUIET, small_config

    import raypipe
    from raypipe import storage

    uri = str(tmp_path_factory.mktemp("finished") / "run")
    raypipe.run(small_config(uri), progress=QUIET)
    for file in ("run.json", "config.yaml"):
        storage.write_bytes(f"{uri}-as-made/{file}", storage.read_bytes(f"{uri}/{file}"))
    return uri


@pytest.fixture(scope="session")
def finished_ledger(finished: str) -> str:
    """A folder with the original ledger and configuration of `finished`."""
    return f"{finished}-as-made"


@pytest.fixture(scope="session")
def finished_scores(finished: str) -> dict[str, bytes]:
    """Content of every score shard of `finished`."""
    from helpers import score_files

    return score_files(finished)


@pytest.fixture(scope="session")
def of_folders(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run up to the embeddings over image folders: two proxies, a few unreadable files."""
    from helpers import QUIET, UNREADABLE, digit_pngs, small_config

    import raypipe

    folder = tmp_path_factory.mktemp("of-folders")
    images = {
        f"class-{label}/{number:04d}.png": image
        for number, (image, label) in enumerate(zip(*digit_pngs(300), strict=True))
    }
    for name, content in {**images, **UNREADABLE}.items():
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    where = [f"source.uri={folder}/data", "source.format=imagefolder", "source.limit=null"]
    config = small_config(f"{folder}/run", *where, "proxy.parts=2", "proxy.epochs=2")
    return raypipe.run(config, until="embed", progress=QUIET).uri
