"""What a process and all that it starts take, by kind of process and by what is going on: processor seconds and memory. For `pipeline.py`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

EVERY_SECONDS = 0.5
RAYS_OWN = ("TrainController", "PlacementGroupCleaner", "DatasetManager", "SynchronizationActor", "_AutoscalingCoordinator",
            "_StatsActor", "ActorLocationTracker", "AutoscalingRequester", "DashboardAgent", "RuntimeEnvAgent", "PreemptionWatcher")  # fmt: skip
"""Actors and services that Ray starts for itself, by what their titles begin with."""
DRIVER, WORKER, RAY = "driver", "workers", "Ray"


@dataclass
class Seen:
    """One process: its kind, its last title, the stage it was first seen in, its processor seconds, and its highest memory in bytes."""

    kind: str
    title: str
    stage: str
    seconds: float = 0.0
    memory: int = 0


@dataclass
class Taken:
    """What a command took.

    seconds    processor seconds by stage and kind of process
    wall       seconds of the clock by stage
    memory     peak in bytes: `driver` and `largest worker`, each the resident set without shared memory; `workers` and `Ray`, what all of
               them had for themselves at one time; `object store`, what was added to /dev/shm
    processes  every one that was seen
    """

    seconds: dict[str, dict[str, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )
    wall: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    memory: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    processes: list[Seen] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "seconds": {stage: dict(kinds) for stage, kinds in self.seconds.items()},
            "wall": dict(self.wall),
            "memory": dict(self.memory),
            "processes": [vars(one) for one in self.processes],
        }


def watch(command: Sequence[str], log: str, stage: Callable[[], str]) -> tuple[int, Taken]:
    """Run a command, its output into the file `log`, and see what it takes; `stage` says what is going on. Returns its exit code, too.

    Twice a second everything that runs is looked up. What a process does between the last look and its end is missed: half a second of each
    at most.
    """
    found, shared = Taken(), _shared()
    processes: dict[tuple[int, float], Seen] = {}
    with open(log, "w") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    before = time.monotonic()
    try:
        while True:
            code = child.poll()
            if code is not None:
                break
            now, what = time.monotonic(), stage()
            found.wall[what] += now - before
            before = now
            _look(child.pid, what, processes, found)
            found.memory["object store"] = max(found.memory["object store"], _shared() - shared)
            time.sleep(EVERY_SECONDS)
    except BaseException:
        child.send_signal(signal.SIGINT)  # the driver stops its Ray
        child.wait()
        raise
    found.processes = list(processes.values())
    return code, found


def _look(root: int, stage: str, processes: dict[tuple[int, float], Seen], found: Taken) -> None:
    sums: dict[str, int] = defaultdict(int)
    try:
        driver = psutil.Process(root)
        everything = [driver, *driver.children(recursive=True)]
    except psutil.Error:
        return
    for process in everything:
        try:
            key, times = (process.pid, process.create_time()), process.cpu_times()
            title = " ".join(process.cmdline())
            own, files = _memory(process.pid)
        except (OSError, psutil.Error, ValueError):
            continue  # it has just ended
        if not title:
            continue
        kind = DRIVER if process.pid == root else _kind(title)
        one = processes.setdefault(key, Seen(kind, title, stage))
        if not title.startswith("ray::IDLE"):  # an idle worker keeps the name of what it did
            one.kind, one.title = kind, title[:100]
        seconds = times.user + times.system
        found.seconds[stage][one.kind] += seconds - one.seconds
        one.seconds, one.memory = seconds, max(one.memory, own + files)
        sums[one.kind] += own
        if one.kind != RAY:
            name = DRIVER if one.kind == DRIVER else "largest worker"
            found.memory[name] = max(found.memory[name], own + files)
    for kind in (WORKER, RAY):
        found.memory[kind] = max(found.memory[kind], sums[kind])


def _kind(title: str) -> str:
    if title.startswith("ray::"):
        return RAY if title.removeprefix("ray::").startswith(RAYS_OWN) else WORKER
    return WORKER if "default_worker.py" in title else RAY


def _memory(pid: int) -> tuple[int, int]:
    """Bytes of its own, and bytes of files, that a process has in memory."""
    with open(f"/proc/{pid}/status") as file:
        sizes = {
            name: 1024 * int(rest.split()[0])
            for name, _, rest in (line.partition(":") for line in file)
            if name[:3] == "Rss"
        }
    return sizes.get("RssAnon", 0), sizes.get(
        "RssFile", 0
    )  # of a process that has ended there are none


def _shared() -> int:
    room = os.statvfs("/dev/shm")
    return (room.f_blocks - room.f_bfree) * room.f_frsize
