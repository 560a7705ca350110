"""A Ray cluster of several nodes on this machine, each with raylet, loopback address and ports of its own.

It stands beside other Ray clusters of the machine: folder, home, token and ports are its own, and only processes whose command names its
folder are ever ended. Linux only, where all of 127.0.0.0/8 is this machine.
The head has no CPUs in Ray's books, as in cluster.yaml.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import psutil

ROOT = Path(__file__).resolve().parents[1]
PORTS = (
    "node-manager-port",
    "object-manager-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
)
PORTS += ("runtime-env-agent-port", "metrics-export-port")
HEAD_PORTS = ("port", "dashboard-port", "ray-client-server-port")
QUICK = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "5",
}
QUICK |= {"RAY_worker_niceness": "0"}
"""A dead node is noticed after five seconds instead of half a minute, and workers do not stand back behind all else on the machine."""
ATTEMPTS = 4
"""How often a node is started: Ray gives up when it takes more than half a minute, as it may on a busy machine."""
HEAD = 2
"""Number of the head: it has the address 127.0.0.2 (Ray takes 127.0.0.1 for the machine's address in its network)."""


def ray_command(*arguments: str) -> list[str]:
    """Ray's command line, of this interpreter."""
    return [sys.executable, "-m", "ray.scripts.scripts", *arguments]


def node_id(number: int) -> str:
    """The id that the node of a number has in Ray's books."""
    return f"{number:056x}"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def start_node(
    number: int, folder: str, address: str, resources: dict[str, float], environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start `ray start` for a node of the cluster at `address`. It may take seconds to be there."""
    ports = zip(PORTS, free_ports(len(PORTS)), strict=True)
    command = ray_command(
        "start", f"--address={address}", *_common(number, folder, resources), *_options(ports)
    )
    own = environment | {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_id(number)}
    with open(f"{folder}/node-{number}.log", "wb") as log:
        return subprocess.Popen(
            command, env=own, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )


def _common(number: int, folder: str, resources: dict[str, float]) -> list[str]:
    least = [f"--num-cpus={resources.get('CPU', 0):g}", f"--num-gpus={resources.get('GPU', 0):g}"]
    least += [
        f"--node-ip-address=127.0.0.{number}",
        "--object-store-memory=100000000",
        f"--temp-dir={folder}/{number}",
    ]
    return [
        "--block",
        "--disable-usage-stats",
        "--min-worker-port=0",
        "--max-worker-port=0",
        *least,
    ]


def _options(values: Any) -> list[str]:
    return [f"--{option}={value}" for option, value in values]


class LocalNodes:
    """A running head, and the nodes that were added to it. Use it as a context: at its end all of them are killed.

    folder     an empty folder with a short path (sockets are made in it)
    jobs       with a job server, at `job_server`
    variables  more of the environment of all its processes
    last       number of the node that was added last
    """

    def __init__(
        self, folder: Path, jobs: bool = False, variables: Mapping[str, str] | None = None
    ) -> None:
        self.folder, self.last = folder, HEAD
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._added: dict[int, dict[str, float]] = {}
        (folder / "home").mkdir(parents=True)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        paths = os.pathsep.join(
            [str(ROOT), *(str(ROOT / name) for name in ("benchmarks", "tests", "tests/faults"))]
        )
        self.environment = {
            key: value for key, value in os.environ.items() if not key.startswith("RAY_")
        }
        self.environment |= {
            "PATH": path,
            "PYTHONPATH": paths,
            "HOME": str(folder / "home"),
            **QUICK,
        }
        self.environment |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "OMP_NUM_THREADS": "1",
        }
        self.environment |= variables or {}
        ports = dict(
            zip((*HEAD_PORTS, *PORTS), free_ports(len(HEAD_PORTS) + len(PORTS)), strict=True)
        )
        self.address, self.job_server = (
            f"127.0.0.{HEAD}:{ports['port']}",
            f"http://127.0.0.1:{ports['dashboard-port']}",
        )
        command = ray_command(
            "start", "--head", *_common(HEAD, str(folder), {"CPU": 0}), *_options(ports.items())
        )
        command += [f"--include-dashboard={str(jobs).lower()}"]
        more, variables = self._of_head()
        command, started = (
            command + more,
            self.environment | {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_id(HEAD)} | variables,
        )
        for _ in range(ATTEMPTS):
            with open(folder / "head.log", "wb") as log:
                self._head = subprocess.Popen(
                    command, env=started, cwd=folder, stdout=log, stderr=log, start_new_session=True
                )
            if self._is_there("head.log", self._head):
                return
            self.__exit__()
        raise RuntimeError(f"the head did not start:\n{(folder / 'head.log').read_text()[-3000:]}")

    def _of_head(self) -> tuple[list[str], dict[str, str]]:
        """What else the command and the environment of the head have."""
        return [], {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end_processes(list(self._mine()))
        self._head.wait(20)

    def driver(self) -> dict[str, str]:
        """The environment of a process that is to join the cluster."""
        return self.environment | {"RAY_ADDRESS": self.address}

    def add(self, cpus: int, gpus: int = 0, wait: bool = True) -> int:
        """Add a node; returns its number, the last part of its address."""
        self.last += 1
        number = self.last
        self._added[number] = {"CPU": cpus, "GPU": gpus}
        self._start(number)
        if wait:
            self.wait_for(number)
        return number

    def wait_for(self, number: int) -> None:
        """Until a node that was added is there."""
        for _ in range(ATTEMPTS):
            if self._is_there(f"node-{number}.log", self._nodes[number]):
                return
            self._start(number)
        raise RuntimeError(
            f"node {number} did not start:\n{(self.folder / f'node-{number}.log').read_text()[-3000:]}"
        )

    def _start(self, number: int) -> None:
        self._nodes[number] = start_node(
            number, str(self.folder), self.address, self._added[number], self.environment
        )

    def raylet(self, number: int) -> psutil.Process | None:
        """The raylet of a node; None where it has none that lives."""
        for process in self._mine():
            with contextlib.suppress(psutil.Error):
                if (
                    process.name() == "raylet"
                    and f"--node_ip_address=127.0.0.{number}" in process.cmdline()
                ):
                    return process
        return None

    def workers(self, number: int, name: str = "ray::") -> list[psutil.Process]:
        """Processes of a node that work, where Ray calls them by a name that has `name` in it."""
        raylet, found = self.raylet(number), []
        for process in raylet.children(recursive=True) if raylet is not None else ():
            with contextlib.suppress(psutil.Error):
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def terminate(self, number: int) -> None:
        """SIGTERM to `ray start` of a node, as when a provider ends a machine."""
        self._nodes[number].terminate()

    def lose(self, number: int) -> None:
        """SIGKILL a node's raylet and all that works there, as when a machine goes."""
        raylet = self.raylet(number)
        assert raylet is not None, f"node {number} has no raylet"
        end_processes([raylet, *raylet.children(recursive=True)])
        if number in self._nodes:
            end_processes(
                [psutil.Process(self._nodes[number].pid)]
                if self._nodes[number].poll() is None
                else []
            )
            self._nodes.pop(number).wait(20)

    def announcer(self) -> Announcer:
        """Something that announces the end of nodes. Start it some seconds before it is needed."""
        return Announcer(self)

    def _mine(self) -> Iterator[psutil.Process]:
        """Processes of this cluster: those whose command names its folder, and what these have started."""
        seen: set[int] = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(str(self.folder) in part for part in process.cmdline()):
                    for each in (process, *process.children(recursive=True)):
                        if each.pid not in seen and each.pid != os.getpid():
                            seen.add(each.pid)
                            yield each

    def _is_there(self, log: str, process: subprocess.Popen[bytes]) -> bool:
        """Whether a node came up; it was given up by Ray otherwise."""
        while "Ray runtime started" not in (self.folder / log).read_text(errors="replace"):
            if process.poll() is not None:
                return False
            time.sleep(0.2)
        return True


class Announcer:
    """Announces to Ray that nodes will be taken away, as a provider of spot machines does.

    A process that has imported Ray does it at once; `ray drain-node` takes seconds to start.
    """

    def __init__(self, nodes: LocalNodes) -> None:
        command = [sys.executable, "-c", ANNOUNCER, nodes.address]
        self._process = subprocess.Popen(
            command,
            env=nodes.environment,
            cwd=nodes.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def announce(self, number: int, seconds: int) -> None:
        """Announce that a node will be taken away in some seconds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{node_id(number)} {seconds}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer == "True\n", f"node {number} was not drained: {answer}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(20)


ANNOUNCER = """
import sys, time
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
gcs = GcsClient(address=sys.argv[1])
for line in sys.stdin:
    node, seconds = line.split()
    end = int(1000 * (time.time() + int(seconds)))
    accepted, why = gcs.drain_node(node, reason, "spot", end)
    print(accepted or why, flush=True)
"""


def end_processes(processes: list[psutil.Process]) -> None:
    """SIGKILL, and wait until they are gone."""
    for each in processes:
        with contextlib.suppress(psutil.Error):
            each.kill()
    psutil.wait_procs(processes, timeout=10)
