"""What the loss of a node costs, with and without notice: a run on nodes of this machine that are taken away one after the other.

    python benchmarks/preemption.py --dir FOLDER

Two nodes work for a run. In each stage one of them is taken away: after its end was announced to Ray, as a provider of spot
machines does (`announced`), or all at once (`lost`). In the announced case the node is killed as soon as nothing works there any more,
and at the latest after NOTICE seconds. Then another node is added. `proxy.max_failures` is 0 in the announced runs: a preemption that counted as
a failure would end the run.

Lost work is what has to be done again: for a training the seconds from its last saved state to the kill; for actors the
seconds since the fragments that they were at had been seen first. Scores are compared byte by byte with those of a run that nobody disturbed;
of a training on two workers, checkpoints and trajectory. What is in --dir already is not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from local_nodes import Announcer, LocalNodes
from soak_runs import configuration, write_source

from raypipe.config import dump_config, parse_config
from raypipe.runs.run import Run

SAMPLES = 1500
NOTICE = 120
"""Seconds between the announcement and the end of a node, as on AWS."""
WORKING = {"proxy": "_train_locally", "measure": ".submit", "embed": ".submit"}
"""By stage: what Ray writes into the titles of processes that work."""
COMPARED = {1: ("scores/*",), 2: ("proxy/checkpoints/*", "proxy/trajectory/*")}
"""By workers of the training: files that must be the same."""
LIMIT = 900.0


@dataclass
class Loss:
    """How a node was lost.

    stage, workers  of the training or of the actors there
    announced       whether it was announced
    left            seconds from the announcement until nothing worked there any more
    lost            seconds of work that are done again
    without_state   seconds from a saved state of the training to the next, at most
    """

    stage: str
    workers: int
    announced: bool
    left: float
    lost: float
    without_state: float


def settings(folder: Path, run: Path, workers: int, max_failures: int) -> dict[str, Any]:
    """A run whose epochs take long; adversarial examples make them so."""
    given = configuration(folder, run)
    given["proxy"] |= {
        "workers": workers,
        "cpus_per_worker": 1,
        "max_failures": max_failures,
        "epochs": 1,
        "checkpoints": 1,
        "batch_size": 16,
        "image_size": 32,
        "adversary": {"iterations": 40},
    }
    given["source"]["fragment_samples"] = 20
    given["measure"] = {
        "scores": ["loss", "moso"],
        "loss": {"at": "checkpoints"},  # a score that needs no rehearsal
        "max_actors": "auto",
    }
    given["embed"] = {"max_actors": "auto"}
    given["extrapolate"] |= {"score": "loss", "method": "knn"}
    return given


class Job:
    """A run on two nodes, and those that it loses."""

    def __init__(self, folder: Path, name: str, workers: int, announced: bool | None) -> None:
        self.run, self.workers, self.announced = Run(str(folder / name)), workers, announced
        config = folder / f"{name}.yaml"
        given = settings(folder, folder / name, workers, 0 if announced else 3)
        config.write_text(dump_config(parse_config(given)))
        until = "extrapolate" if workers == 1 else "proxy"
        self._command = [sys.executable, "-m", "raypipe.cli", "run", str(config), "--until", until]

    def disturb(self, nodes: LocalNodes, announcer: Announcer) -> list[Loss]:
        """Bring the run to its end, and lose a node in each stage."""
        there = [nodes.add(self.workers), nodes.add(self.workers)]
        driver = subprocess.Popen(
            self._command, env=nodes.driver(), stdout=sys.stderr, stderr=sys.stderr
        )
        losses = []
        try:
            for stage in WORKING if self.announced is not None else ():
                if self.workers > 1 and stage != "proxy":
                    break
                name = "RayTrainWorker" if self.workers > 1 else WORKING[stage]
                gone = wait_until(lambda s=stage, n=name: self._busy(nodes, there, s, n), driver)
                losses.append(self._lose(nodes, announcer, gone, stage, name))
                there.remove(gone)
                there.append(nodes.add(self.workers, wait=False))  # the next stage starts meanwhile
                print(losses[-1], file=sys.stderr)
            if driver.wait(LIMIT):
                sys.exit("the run failed")
        finally:
            driver.kill()
        return losses

    def _busy(self, nodes: LocalNodes, there: list[int], stage: str, name: str) -> int | None:
        """A node that works for a stage; of a training, after its first saved state."""
        record = self.run.ledger().get(stage) if self.run.exists() else None
        if record is None or record.state != "running":
            return None
        if stage == "proxy" and len(self._saves()) < 1:
            return None
        return next((node for node in there if nodes.workers(node, name)), None)

    def _saves(self) -> list[float]:
        """When the states of the training were written."""
        folder = Path(self.run.uri, "proxy")
        saved = []
        for file in (*folder.glob("resume/*-of-*.safetensors"), *folder.glob("*.safetensors")):
            with contextlib.suppress(FileNotFoundError):
                saved.append(file.stat().st_mtime)
        return sorted(saved)

    def _lose(
        self, nodes: LocalNodes, announcer: Announcer, node: int, stage: str, name: str
    ) -> Loss:
        started, training, longest = time.time(), stage == "proxy", 0.0
        seen = {worker.pid: started for worker in nodes.workers(node, name)}
        if self.announced:
            announcer.announce(node, NOTICE)
        while time.time() < started + (NOTICE if self.announced else 15 * training):
            busy = {worker.pid for worker in nodes.workers(node, name)}
            seen = {pid: seen.get(pid, time.time()) for pid in busy}
            if training and (saves := self._saves()):
                longest = max(longest, time.time() - saves[-1])
            if not busy and self.announced:
                break
            time.sleep(0.02)
        left, now = time.time() - started, time.time()
        lost = 0.0
        if seen:
            lost = now - self._saves()[-1] if training else sum(now - at for at in seen.values())
        if nodes.raylet(node) is not None:  # a node ends by itself once nothing works there
            nodes.lose(node)
        announced = bool(self.announced)
        return Loss(stage, self.workers, announced, left if announced else 0.0, lost, longest)


def wait_until(value: Callable[[], int | None], driver: subprocess.Popen[bytes]) -> int:
    end = time.monotonic() + LIMIT
    while (found := value()) is None:
        if driver.poll() is not None or time.monotonic() > end:
            sys.exit("the run ended before its node could be taken away")
        time.sleep(0.02)
    return found


def contents(run: Path, workers: int) -> dict[str, str]:
    files = [file for pattern in COMPARED[workers] for file in run.glob(pattern)]
    return {
        str(file.relative_to(run)): hashlib.blake2b(file.read_bytes()).hexdigest() for file in files
    }


def measure(folder: Path, workers: int, announced: bool | None) -> tuple[list[Loss], Path]:
    """One run, unless it is there already."""
    kind = {None: "undisturbed", True: "announced", False: "lost"}[announced]
    name = f"{kind}-{workers}"
    result = folder / f"{name}.json"
    if not result.exists():
        job = Job(folder, name, workers, announced)
        with (
            tempfile.TemporaryDirectory(prefix="rp-", dir="/tmp", ignore_cleanup_errors=True) as at,
            LocalNodes(Path(at) / "ray") as nodes,
            nodes.announcer() as announcer,
        ):
            losses = job.disturb(nodes, announcer)
        result.write_text(json.dumps([asdict(loss) for loss in losses]))
    return [Loss(**loss) for loss in json.loads(result.read_bytes())], folder / name


def table(folder: Path, numbers: list[int]) -> Iterator[str]:
    yield (
        f"{'stage':<9} {'workers':>7}  {'node':<10} {'empty after':>12} {'work lost':>10}  "
        f"{'without a saved state':>21}  compared"
    )
    for workers in numbers:
        _, truth = measure(folder, workers, None)
        expected = contents(truth, workers)
        for announced in (True, False):
            losses, run = measure(folder, workers, announced)
            found = contents(run, workers)
            differ = sum(found.get(name) != expected.get(name) for name in {*found, *expected})
            same = f"{len(expected)} files, {differ} differ"
            for loss in losses:
                left = f"{loss.left:.1f} s" if announced else ""
                saved = f"{loss.without_state:.1f} s" if loss.stage == "proxy" else ""
                yield (
                    f"{loss.stage:<9} {workers:>7}  {'announced' if announced else 'lost':<10} "
                    f"{left:>12} {loss.lost:>8.1f} s  {saved:>21}  {same}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--workers", type=int, nargs="+", choices=COMPARED, default=[1, 2])
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the nodes are ended
    folder = arguments.dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "source").exists():
        write_source(folder / "source", SAMPLES)
    for line in table(folder, arguments.workers):
        print(line, flush=True)


if __name__ == "__main__":
    main()
