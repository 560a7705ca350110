"""A run on a head and two more nodes of this machine, submitted as a job; one node is killed in its middle, and the scores are compared.

    python benchmarks/three_nodes.py [--stage embed] [--dir /tmp/three] > benchmarks/results/three-nodes.txt

The head has no CPUs in Ray's books, as in cluster.yaml, the two others one each. The same job runs twice: undisturbed, and then so that one of
the two nodes loses its raylet and all of its processes to SIGKILL when half of the files of the stage are there. Printed is what a
user would type and see, with the seconds since the job was submitted; the folder of this machine that stands for shared storage
is written /shared. With --dir that folder is kept; an undisturbed run that is in it, and what it said, are taken from there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
from local_nodes import HEAD, ROOT, LocalNodes, ray_command

SETTINGS = [
    "source.limit=800",
    "source.fragment_samples=20",
    "seed.fraction=0.25",
    "proxy.epochs=3",
    "proxy.checkpoints=2",
    "measure.scores=[el2n]",
    "extrapolate.method=knn-published",
    "trust.min_spearman=-1",
    "trust.min_accuracy_over_chance=-1",
    "report.images=4",
]
FILES = {"embed": "embeddings/*.parquet", "extrapolate": "scores/*.parquet"}
"""By stage: what it writes, a file for every unit of its work."""
LIMIT = 600.0
"""Seconds that a job may take."""


class Transcript:
    """Prints lines without what is this machine's own."""

    def __init__(self, folder: str) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self.started = time.monotonic()
        self.lines: list[str] = []

    def say(self, text: str = "") -> None:
        with self._lock:
            self.lines.append(self._plain(text))
            print(self.lines[-1], flush=True)

    def heard(self, text: str) -> None:
        """A line that came by itself, with its time; not those on what is uploaded."""
        if text.strip() and not re.search(r"packaging\.py|working_dir\.py", text):
            self.say(f"{time.monotonic() - self.started:6.1f} s  {text.rstrip()}")

    def typed(self, text: str) -> None:
        self.say(f"$ {text}")

    def _plain(self, text: str) -> str:
        for found, written in (
            (self._folder, "/shared"),
            (sys.executable, "python"),
            (str(ROOT), "."),
        ):
            text = text.replace(found, written)
        text = re.sub(r"\x1b\[[0-9;]*m", "", text)
        return re.sub(r"\b(?!127\.)\d{1,3}(\.\d{1,3}){3}\b", "<address>", text)


def submit(
    nodes: LocalNodes, out: Transcript, run: Path, meanwhile: Callable[[], None] | None = None
) -> None:
    """Submit the job by Ray's command line and show what it says until it ends; `meanwhile` runs beside it."""
    entry = ["python", "jobs/run.py", "--config", "jobs/configs/digits.yaml", f"--set=run={run}"]
    entry += [f"--set={setting}" for setting in SETTINGS]
    arguments = ["job", "submit", f"--address={nodes.job_server}", "--working-dir=.", "--", *entry]
    out.typed("ray " + shlex.join(arguments))
    out.started = time.monotonic()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    sent = subprocess.Popen(ray_command(*arguments), env=nodes.environment, cwd=ROOT, **pipes)
    beside = threading.Thread(target=meanwhile, daemon=True) if meanwhile is not None else None
    if beside is not None:
        beside.start()
    for line in sent.stdout:
        out.heard(line)
    if sent.wait(LIMIT):
        sys.exit("the job failed")
    if beside is not None:
        beside.join(10)


def show_nodes(nodes: LocalNodes, out: Transcript) -> None:
    out.typed(f"ray list nodes --address {nodes.job_server}")
    command = ray_command("list", "nodes", f"--address={nodes.job_server}", "--format=json")
    said = subprocess.run(
        command, env=nodes.environment, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    for node in sorted(json.loads(said[said.index("[") :]), key=lambda node: node["node_ip"]):
        cpus = (node.get("resources_total") or {}).get("CPU", 0)
        head = "head, " if node["is_head_node"] else ""
        out.say(
            f"  {node['node_ip']}  {node['state']}  {head}{cpus:g} CPU  {node.get('state_message') or ''}".rstrip()
        )


def raypipe(nodes: LocalNodes, out: Transcript, *arguments: str) -> None:
    out.typed("raypipe " + shlex.join(arguments))
    command = [sys.executable, "-m", "raypipe.cli", *arguments]
    said = subprocess.run(
        command, env=nodes.environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    for line in (said.stdout + said.stderr).splitlines():
        out.say(f"  {line}")


def files_of(run: Path, folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / folder).glob("*.parquet"))}


def compare(first: Path, second: Path, out: Transcript) -> bool:
    """Whether two runs have the same scores, in words."""
    here, there = files_of(first, "scores"), files_of(second, "scores")
    same = sum(there.get(name) == content for name, content in here.items())
    rows = [
        row
        for path in sorted((second / "scores").glob("*.parquet"))
        for row in pq.read_table(path)["sample_id"].to_pylist()
    ]
    out.say(
        f"score files      {len(here)} and {len(there)}; {same} of them are the same, byte for byte"
    )
    out.say(f"samples          {len(rows):,} rows, {len(set(rows)):,} different ids")
    return here == there and len(rows) == len(set(rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stage", choices=sorted(FILES), default="embed", help="in whose middle the node is killed"
    )
    parser.add_argument(
        "--dir",
        default="",
        help="an existing folder with a short path (default: one that is removed)",
    )
    options = parser.parse_args()
    os.environ["NO_COLOR"] = "1"
    with tempfile.TemporaryDirectory(
        prefix="rp-", dir="/tmp", ignore_cleanup_errors=True
    ) as temporary:
        shared = Path(options.dir or temporary)
        out = Transcript(str(shared))
        out.say(f"# python benchmarks/three_nodes.py --stage {options.stage}      (2-core x86-64)")
        with LocalNodes(Path(temporary) / "ray", jobs=True) as nodes:
            lost = _start(nodes, out)
            _undisturbed(nodes, out, shared)
            _killed(nodes, out, shared, options.stage, lost)
        out.say("\n# compared")
        if not compare(shared / "undisturbed", shared / "killed", out):
            sys.exit("the scores differ")


def _start(nodes: LocalNodes, out: Transcript) -> int:
    """Start the two nodes beside the head; returns the number of that which will be lost."""
    port = nodes.address.partition(":")[2]
    out.typed(f"ray start --head --num-cpus=0 --node-ip-address=127.0.0.{HEAD} --port={port} ...")
    numbers = [nodes.add(1, wait=False), nodes.add(1, wait=False)]
    for number in numbers:
        nodes.wait_for(number)
        out.typed(
            f"ray start --address={nodes.address} --num-cpus=1 --node-ip-address=127.0.0.{number} ..."
        )
    show_nodes(nodes, out)
    return numbers[-1]


def _undisturbed(nodes: LocalNodes, out: Transcript, shared: Path) -> None:
    said = shared / "undisturbed.txt"
    if said.exists():
        for line in said.read_text().splitlines():
            out.say(line)
        return
    first = len(out.lines)
    out.say("\n# undisturbed")
    submit(nodes, out, shared / "undisturbed")
    said.write_text("\n".join(out.lines[first:]) + "\n")


def _killed(nodes: LocalNodes, out: Transcript, shared: Path, stage: str, number: int) -> None:
    out.say(f"\n# the same in another folder; a node is killed in the middle of {stage}")
    units = len(list((shared / "undisturbed").glob(FILES[stage])))
    raylet = nodes.raylet(number)
    assert raylet is not None

    def kill() -> None:
        while len(done := list((shared / "killed").glob(FILES[stage]))) < units / 2:
            time.sleep(0.005)
        nodes.lose(number)
        left = f"{len(done)} of {units} units of {stage} were done"
        out.heard(
            f">>>> kill -9 {raylet.pid}, the raylet of node 127.0.0.{number}, and all of its workers; {left}"
        )

    submit(nodes, out, shared / "killed", kill)
    out.say()
    show_nodes(nodes, out)
    raypipe(nodes, out, "status", str(shared / "killed"))


if __name__ == "__main__":
    main()
