"""Fork the workers of a local Ray cluster from one process that has imported torch and Ray.

Each worker would import them again, about eight times in a run. A fork shares the imported pages
and starts several times sooner (benchmarks/results/worker-start-cpu.txt).

Ray starts `fork_client` instead of Python (`py_executable` of a runtime environment), which asks
this process for a fork. The child takes over the client's standard streams, environment, folder,
and command line, and then runs Ray's own worker script. Threads do not survive a fork, so this
process has none: if a library starts one while it is imported, the server ends, and the clients
become the workers themselves. So do clients of another job than the first: Ray keeps the job that
it was imported with.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import resource
import runpy
import select
import shlex
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMON = ("numpy", "pyarrow.parquet", "PIL.Image", "torch", "scipy.optimize")
"""Imported while the cluster starts. None of them imports Ray."""

OF_RAY = ("ray", "ray.data", "ray.train.torch")
"""Imported with the environment of the first worker: Ray 2.60 reads its settings and the job of the
worker (`JOB_VARIABLE`) when it is imported."""

JOB_VARIABLE = "RAY_JOB_ID"

OF_RAYPIPE = ("assessment", "distributed", "scores", "sources", "stages", "vision")
"""Packages of raypipe that most workers import from."""

FORK_SAFE_THREADS = ("jemalloc_bg_thd",)
"""Threads that their library starts again in the child: jemalloc's, by its handlers of forks."""


class ForkServer:
    """A fork server that lives until it is closed, this process ends, or its raylet ends."""

    def __init__(self, libraries: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="raypipe-")
        self._address = f"{self._folder.name}/fork"  # only this user can open the folder
        environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ}
        names = [str(Path(__file__).parents[2]), *libraries]
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(self._address)
            listener.listen(512)
            life, self._life = os.pipe()
            self.process = subprocess.Popen(
                # -P: the folder of this file would hide packages of the same names
                [sys.executable, "-P", __file__, str(listener.fileno()), str(life), *names],
                env=environment,
                pass_fds=(listener.fileno(), life),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the driver, which then ends its workers
            )
        os.close(life)

    def python(self) -> str:
        """Return the command that Ray starts in place of Python."""
        client = str(Path(__file__).with_name("fork_client.py"))
        return shlex.join([sys.executable, "-I", "-S", client, self._address])

    def close(self) -> None:
        """End the server. Its workers continue."""
        os.close(self._life)
        self.process.wait()
        self._folder.cleanup()


_servers: list[ForkServer] = []


def new_fork_server(libraries: Sequence[str]) -> ForkServer:
    """Start a fork server for a new cluster, and end that of the cluster before.

    It also imports those of `libraries` that are installed.
    """
    while _servers:
        _servers.pop().close()
    _servers.append(ForkServer(libraries))
    return _servers[0]


@dataclass(frozen=True)
class Worker:
    """What a client passed on.

    Attributes
    ----------
    command : list of str
        Command line, without Python.
    environment : dict of str to str
        Environment variables.
    folder : str
        Working directory.
    nice : int
        Niceness.
    files : tuple of int
        Soft and hard limit of open files. Ray raises the limit after the server has started.
    raylet : int
        Process that started the client.
    streams : list of int
        Descriptors of standard input, output and error.
    """

    command: list[str]
    environment: dict[str, str]
    folder: str
    nice: int
    files: tuple[int, int]
    raylet: int
    streams: list[int]


def next_worker(
    listener: socket.socket, life: int, package: str, more: Sequence[str]
) -> Worker | None:
    """Fork a worker for every request.

    Parameters
    ----------
    listener : socket.socket
        Where clients connect.
    life : int
        Descriptor of a pipe that ends with the driver.
    package : str
        Folder that contains the package raypipe.
    more : sequence of str
        Libraries to import if they are installed.

    Returns
    -------
    Worker or None
        In every child: the worker that it becomes. In the server: None, when the driver or the
        raylet has ended, or when a fork would not be safe.
    """
    for name in COMMON:
        importlib.import_module(name)
    for name in more:
        with contextlib.suppress(ImportError):  # the worker that needs it says so
            importlib.import_module(name)
    raylet = job = None
    while True:
        waiting: list[Any] = [listener, life]
        ready = select.select(waiting, [], [], 1.0)[0]
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if life in ready or (raylet and not Path(f"/proc/{raylet}").exists()):
            return None
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        try:
            worker = _received(connection)
        except (OSError, ValueError, struct.error):  # the client ended meanwhile
            connection.close()
            continue
        if raylet is None:
            raylet, job = worker.raylet, worker.environment.get(JOB_VARIABLE)
            import_with(worker.environment, package)
            if _has_threads() or _forks_draw_equal_ids():
                return None
            gc.collect()
            gc.freeze()  # a collection in a child would write to, and so copy, every page
        if worker.environment.get(JOB_VARIABLE) == job and os.fork() == 0:
            listener.close()
            os.close(life)
            _take_over(worker)
            connection.settimeout(None)
            connection.sendall(b"1")  # not before: until then, the client can do without the fork
            connection.detach()  # stays open until this process ends
            return worker
        connection.close()
        for stream in worker.streams:
            os.close(stream)


def _received(connection: socket.socket) -> Worker:
    connection.settimeout(10)
    head, streams, _, _ = socket.recv_fds(connection, 4, 3)
    (size,) = struct.unpack("!I", head)
    content = b""
    while len(content) < size:
        content += (more := connection.recv(size - len(content)))
        if not more:
            raise ValueError("the request ends early")
    return Worker(**json.loads(content.decode("utf-8", "surrogateescape")), streams=streams)


def import_with(environment: dict[str, str], package: str) -> None:
    """Import everything that most workers need, so that forks of this process have it."""
    os.environ.update(environment)
    with _class_ids_of_the_system():
        _import_all(package)


def _import_all(package: str) -> None:
    for name in OF_RAY:
        importlib.import_module(name)
    added = [] if package in sys.path else [package]  # the driver's own path may have it
    sys.path += added
    for part in OF_RAYPIPE:
        parent = importlib.import_module(f"raypipe.{part}")
        for module in pkgutil.walk_packages(parent.__path__, f"{parent.__name__}."):
            importlib.import_module(module.name)
    for folder in added:
        sys.path.remove(folder)


@contextlib.contextmanager
def _class_ids_of_the_system() -> Iterator[None]:
    """Let `@ray.remote` draw the ids of actor classes from the system.

    Ray 2.60 draws them from a generator of its own, which also draws the ids of workers and tasks,
    and which forks would share: workers would then draw equal ids.
    """
    import ray.actor

    own = ray.actor.ActorClassID

    class ActorClassID:
        @staticmethod
        def from_random() -> Any:
            return own(os.urandom(own.size()))

    vars(ray.actor)["ActorClassID"] = ActorClassID
    try:
        yield
    finally:
        vars(ray.actor)["ActorClassID"] = own


def _forks_draw_equal_ids() -> bool:
    """Whether the generator of Ray's ids was used before the fork, as another version may do."""
    import ray

    drawn = []
    for _ in range(2):
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(sender, ray.ObjectID.from_random().binary())
            os._exit(0)
        os.close(sender)
        drawn.append(os.read(receiver, 1024))
        os.close(receiver)
        os.waitpid(child, 0)
    return drawn[0] == drawn[1]


def _has_threads() -> bool:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return len([name for name in names if name not in FORK_SAFE_THREADS]) > 1


def _take_over(worker: Worker) -> None:
    """Give this process, a child of the server, everything of the client."""
    import numpy as np

    os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(worker.environment)
    os.chdir(worker.folder)
    os.setpriority(os.PRIO_PROCESS, 0, worker.nice)
    resource.setrlimit(resource.RLIMIT_NOFILE, worker.files)
    # Ray sets the score of the process that it started, the client; some systems forbid it
    score = os.environ.get("RAY_worker_oom_score_adjustment", "1000")  # noqa: SIM112
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(score)
    np.random.seed()  # forks would draw the same numbers
    for target, stream in enumerate(worker.streams):
        os.dup2(stream, target)
        os.close(stream)


def become(worker: Worker) -> None:
    """Run Ray's worker script in this process."""
    sys.argv = list(worker.command)
    script = worker.command[0]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    of_driver, folder, *names = sys.argv[2:]
    child = next_worker(socket.socket(fileno=int(sys.argv[1])), int(of_driver), folder, names)
    if child is not None:
        become(child)
