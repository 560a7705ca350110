"""Extrapolation against the number of samples: time, memory of every process, and its share of the embedding pass.

    python benchmarks/extrapolation_scale.py [--sizes 100000,1000000,10000000] [--plain] [--only growth,share] [--dir FOLDER]

Growth. For each size a run is made up as the stages before would have left it (index, measured scores of a seed set of 20,000,
embeddings of 128 dimensions in float16, one file a fragment; 10^7 samples take 2.8 GB), and the extrapolate stage is run on it:

- by default the stage itself, through Ray on all cores of this machine, each size in a Ray of its own;
- with --plain the function of the stage that scores a fragment, in one process with one thread, fragment after fragment.

The extrapolator (`gnn`, default settings but one fold) is fitted once, by the stage, on the smallest of the runs, and copied into the
others: the seed set is the same size everywhere, and so is the cost of the fit. "wall" is the time of the rest of the stage, without
the start of Ray; "processor" is that of the scoring actors alone. The exponent is that of samples in time, from the size before.
Memory is the peak of the resident set without shared memory (RssAnon + RssFile), looked up every half second while the stage
scores; of several processes of a kind it is that of the largest. The object store is what the raylet has of shared memory.

Share. ResNet-18 at 64x64 against the extrapolator on embeddings of its 512 dimensions, one thread each, least of several repeats, both
per image. All experts are switched on with equal weights, whatever the blend would leave out; "alone" is one expert, with the
search for neighbours where it needs it. Decoding, which the embedding pass also does, is not counted. The number of epochs of the fit does not
change the cost of a prediction, so the networks are fitted for one.

Embeddings: in each of the classes 8 clusters, in each of them a 16-dimensional Gaussian and noise in all directions. Scores: smooth in the
16 dimensions, differently for each class, with noise; loss, margin and entropy follow the score with noise.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import save

from raypipe import storage
from raypipe.config import Config, ExtrapolateSettings, parse_config
from raypipe.extrapolators.base import Nodes
from raypipe.extrapolators.blend import EXPERTS, AnchorGnn
from raypipe.runs.embeddings import SPECIAL_ROWS
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.runs.sizes import INDEX_FILE_FRAGMENTS
from raypipe.stages.index.rows import SCHEMA as INDEX

WIDTH, RESNET_WIDTH = 128, 512
CLUSTERS, INNER = 8, 16
SPREAD, BETWEEN, AROUND, NOISE = 0.5, 0.5, 0.2, 0.3
"""Of the embeddings: within a cluster, between clusters, in all directions; of the scores: noise."""
EVERY_SECONDS = 0.5
WORKER = "reading task or other worker"
REPEATS = 5
IMAGES, SCORED_AT_ONCE = 64, 1024
"""Images in a forward pass (the default of the embed stage on a CPU), and samples in a fragment (its default)."""


class World:
    """Where samples come from."""

    def __init__(self, classes: int, width: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.classes = classes
        self._centre = BETWEEN * random.standard_normal((classes, CLUSTERS, width), np.float32)
        self._directions = (
            SPREAD * random.standard_normal((INNER, width), np.float32) / math.sqrt(INNER)
        )
        self._slope = random.standard_normal((classes, INNER), np.float32) / math.sqrt(INNER)
        self._level = 0.5 * random.standard_normal((classes, CLUSTERS), np.float32)

    def draw(self, random: np.random.Generator, count: int) -> tuple[Nodes, np.ndarray]:
        """Samples and their scores, float32 [n]."""
        label, cluster = (
            random.integers(0, self.classes, count),
            random.integers(0, CLUSTERS, count),
        )
        inner = random.standard_normal((count, INNER), np.float32)
        embedding = self._centre[label, cluster] + inner @ self._directions
        embedding += AROUND * random.standard_normal(embedding.shape, np.float32)
        score = np.tanh((inner * self._slope[label]).sum(1)) + self._level[label, cluster]
        score += NOISE * random.standard_normal(count, np.float32)
        wrong = score[:, None] + 0.7 * random.standard_normal((count, 3), np.float32)
        return Nodes(
            embedding,
            label,
            np.stack([np.exp(-wrong[:, 0]), wrong[:, 1], np.exp(-wrong[:, 2] / 2)], 1),
        ), score


def write_run(folder: str, samples: int, arguments: argparse.Namespace) -> None:
    """What index, measure and embed would have left."""
    run, world = Run(folder), World(arguments.classes, WIDTH, arguments.seed)
    count = -(-samples // arguments.fragment)
    names = [f"f{number:06d}" for number in range(count)]
    ids, labels, scores = [], [], []
    os.makedirs(run.path("embeddings"), exist_ok=True)
    for number, name in enumerate(names):
        size = min(arguments.fragment, samples - number * arguments.fragment)
        seeds = arguments.seeds * (number + 1) // count - arguments.seeds * number // count
        nodes, score = world.draw(np.random.default_rng([arguments.seed, number]), size)
        own = [f"{name}/{row}" for row in range(size)]
        ids, labels, scores = (
            ids + own[:seeds],
            [*labels, nodes.label[:seeds]],
            [*scores, score[:seeds]],
        )
        write_embeddings(run.path("embeddings", f"{name}.parquet"), own, nodes, seeds)
    columns = {
        "sample_id": ids,
        "label": np.concatenate(labels).astype(np.int32),
        "moso": np.concatenate(scores),
    }
    storage.write_table(run.path("measured", "seed.parquet"), pa.table(columns))
    rows = [
        {
            "file_id": name,
            "fragment_id": name,
            "path": name,
            "start": number * arguments.fragment,
            "offset": 0,
        }
        | {
            "stop": min(samples, (number + 1) * arguments.fragment),
            "members": [],
            "error": "",
            "class_names": "",
            "labels": "[]",
        }
        for number, name in enumerate(names)
    ]
    for start in range(0, count, INDEX_FILE_FRAGMENTS):
        part = pa.Table.from_pylist(rows[start : start + INDEX_FILE_FRAGMENTS], schema=INDEX)
        storage.write_table(run.path("index", f"fragments-{start:05d}.parquet"), part)
    classes = {"names": [str(number) for number in range(arguments.classes)], "numeric": True}
    storage.write_json(run.path("index", "classes.json"), classes)
    storage.write_json(run.path("seed", "manifest.json"), {"shard_samples": [arguments.seeds]})
    storage.write_json(
        run.path("proxy", "proxy.json"),
        {"samples": arguments.seeds, "checkpoints": [], "final": "last"},
    )
    weight, bias = last_layer(arguments.classes, WIDTH, arguments.seed)
    storage.write_bytes(
        run.path("proxy", "checkpoints", "last"), save({"head.weight": weight, "head.bias": bias})
    )
    run.write_ledger({"proxy": StageRecord(state="done")})


def last_layer(classes: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a proxy that knows nothing; it costs what another does."""
    random = np.random.default_rng(seed)
    return random.standard_normal((classes, width), np.float32) / math.sqrt(width), np.zeros(
        classes, np.float32
    )


def write_embeddings(path: str, ids: list[str], nodes: Nodes, seeds: int) -> None:
    """A fragment's file; its first samples are those of the seed set."""
    values = pa.array(nodes.embedding.astype(np.float16).reshape(-1))
    loss, margin, entropy = nodes.signals.T
    columns = {
        "sample_id": ids,
        "label": nodes.label.astype(np.int32),
        "embedding": pa.FixedSizeListArray.from_arrays(values, nodes.embedding.shape[1]),
        "prediction": nodes.label.astype(np.int32),
        "confidence": np.exp(-loss),
        "loss": loss,
        "margin": margin,
        "entropy": entropy,
    }
    about = {SPECIAL_ROWS["seed"]: str(seeds), SPECIAL_ROWS["audit"]: "0"}
    table = pa.table(columns).replace_schema_metadata(about)
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for part in (table[:seeds], table[seeds:]):
            if len(part):
                writer.write_table(part, row_group_size=len(part))


def config_of(folder: str) -> Config:
    extrapolate = {"folds": 1, "judge_published": False}
    return parse_config(
        {
            "run": folder,
            "source": {"uri": folder},
            "extrapolate": extrapolate,
            "cluster": {"address": "local"},
        }
    )


def drive(folder: str, samples: int, work: str, answer: Connection) -> None:
    """In a process of its own: `fit`, `stage` or `plain`. Says when it begins, then the wall-clock and the processor seconds."""
    from raypipe.distributed.actor_pool import WorkerContext
    from raypipe.distributed.context import Context
    from raypipe.progress import Progress
    from raypipe.stages.extrapolate.fit import fit_extrapolator
    from raypipe.stages.extrapolate.measured import read_samples
    from raypipe.stages.extrapolate.stage import ExtrapolateStage, ScoreActor

    config, run, record = config_of(folder), Run(folder), StageRecord()
    if work == "plain":
        answer.send("begins")
        started = time.perf_counter()
        actor = ScoreActor(WorkerContext(config, run.uri, 1, False))
        for fragment in run.fragments():
            result = actor(
                fragment.fragment_id, read_samples(config, run.uri, fragment.fragment_id)
            )
            record.add_cost(result)
        answer.send((time.perf_counter() - started, record.cpu_seconds))
        return
    import ray

    context = Context(config, run, Progress(quiet=True))
    context.start_ray()
    answer.send("begins")
    started = time.perf_counter()
    if work == "fit":
        record.cpu_seconds = fit_extrapolator(context, [], samples)
    else:
        ExtrapolateStage().execute(context, record)
    answer.send((time.perf_counter() - started, record.cpu_seconds))
    ray.shutdown()


def watch(folder: str, samples: int, work: str) -> tuple[float, float, dict[str, int]]:
    """Wall-clock and processor seconds of `drive`, and the peak of each kind of process, in bytes."""
    spawn = get_context("spawn")
    mine, theirs = spawn.Pipe()
    child = spawn.Process(target=drive, args=(folder, samples, work, theirs))
    child.start()
    theirs.close()
    peaks: dict[int, int] = {}
    kinds: dict[int, str] = {}
    begun, result = False, None
    try:
        while result is None:
            if mine.poll(EVERY_SECONDS):
                message = mine.recv()
                begun, result = True, None if message == "begins" else message
            if begun:
                look(psutil.Process(child.pid), peaks, kinds)
    except EOFError:
        sys.exit(f"the {work} of {samples:,} samples failed")
    child.join()
    found: dict[str, int] = {}
    for pid, peak in peaks.items():
        found[kinds[pid]] = max(found.get(kinds[pid], 0), peak)
    return *result, found


def look(driver: psutil.Process, peaks: dict[int, int], kinds: dict[int, str]) -> None:
    """Keep the highest memory of a process and of all that it started, and what each is; of the raylet also that of its objects."""
    for process in [driver, *driver.children(recursive=True)]:
        try:
            with open(f"/proc/{process.pid}/status") as file:
                sizes = {
                    name: 1024 * int(rest.split()[0])
                    for name, _, rest in (line.partition(":") for line in file)
                    if "Rss" in name
                }
            command = " ".join(process.cmdline())
        except (OSError, psutil.Error):
            continue  # it has just ended
        if not sizes:
            continue
        peaks[process.pid] = max(peaks.get(process.pid, 0), sizes["RssAnon"] + sizes["RssFile"])
        if process.pid == driver.pid:
            kinds[process.pid] = "driver"
        elif "ScoreActor" in command:
            kinds[process.pid] = "scoring actor"
        elif command.startswith("ray::"):
            kinds.setdefault(process.pid, WORKER)
        else:
            name = next(
                (
                    name
                    for name in ("gcs_server", "raylet")
                    if os.path.basename(command.split(" ")[0]) == name
                ),
                None,
            )
            kinds[process.pid] = name or "other process of Ray"
            if name == "raylet":
                peaks[-1], kinds[-1] = max(peaks.get(-1, 0), sizes["RssShmem"]), "object store"


def growth(arguments: argparse.Namespace) -> None:
    how = (
        "one process, one thread, without Ray"
        if arguments.plain
        else f"the stage through Ray, {os.cpu_count()} cores"
    )
    print(
        f"\nGrowth: {how}; {arguments.seeds:,} scored samples, {arguments.classes} classes, {WIDTH} dimensions, fragments of "
        f"{arguments.fragment:,}"
    )
    folder = tempfile.mkdtemp(prefix="raypipe-extrapolation-", dir=arguments.dir)
    rows: list[tuple[int, float, float]] = []
    memory: list[dict[str, int]] = []
    try:
        for number, samples in enumerate(arguments.sizes):
            place = os.path.join(folder, str(samples))
            if shutil.disk_usage(folder).free < 1.5 * samples * (2 * WIDTH + 60):
                sys.exit(
                    f"{folder} has no room for {samples:,} embeddings; name another folder with --dir"
                )
            with ProcessPoolExecutor(
                1, mp_context=get_context("spawn")
            ) as other:  # its memory is not ours
                other.submit(write_run, place, samples, arguments).result()
            if number == 0:
                wall, spent, peaks = watch(place, samples, "fit")
                shutil.copytree(
                    os.path.join(place, "extrapolator"), os.path.join(folder, "extrapolator")
                )
                meta = storage.read_json(os.path.join(folder, "extrapolator", "model.json"))
                weights = ", ".join(
                    f"{name} {weight:.2f}" for name, weight in meta["weights"].items()
                )
                search = meta["search"]
                print(
                    f"fit, judging it and learning curve, once: {wall:.0f} s wall, {spent:.0f} s processor, largest task "
                    f"{peaks.get(WORKER, 0) / 2**20:.0f} MiB; blend: {weights}; neighbours {search['kind']}, recall {search['recall']:.3f}"
                )
                print(
                    f"\n{'samples':>12}{'wall s':>10}{'us each':>9}{'exponent':>10}{'processor s':>13}{'us each':>9}{'exponent':>10}"
                )
            else:
                shutil.copytree(
                    os.path.join(folder, "extrapolator"), os.path.join(place, "extrapolator")
                )
            wall, spent, peaks = watch(place, samples, "plain" if arguments.plain else "stage")
            rows.append((samples, wall, spent))
            memory.append(peaks)
            cells = [f"{samples:>12,}"]
            for column, width in ((1, 10), (2, 13)):
                took, power = rows[-1][column], ""
                if number:
                    power = (
                        f"{math.log(took / rows[-2][column]) / math.log(samples / rows[-2][0]):.3f}"
                    )
                cells.append(f"{took:>{width}.1f}{1e6 * took / samples:>9.0f}{power:>10}")
            print("".join(cells), flush=True)
            shutil.rmtree(place)
        print(
            "\npeak memory, MiB"
            + " " * 16
            + "".join(f"{samples:>14,}" for samples in arguments.sizes)
            + f"{'last / before':>16}"
        )
        for kind in sorted(set().union(*memory)):
            peaks_of = [found.get(kind) for found in memory]
            line = "".join(f"{peak / 2**20:>14.0f}" if peak else f"{'':>14}" for peak in peaks_of)
            before, last = (peaks_of[-2], peaks_of[-1]) if len(peaks_of) > 1 else (None, None)
            print(f"{kind:<32}{line}" + (f"{last / before:>16.3f}" if before and last else ""))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def share(arguments: argparse.Namespace) -> None:
    from raypipe.proxies.networks import build_network

    torch.set_num_threads(1)
    network = build_network("resnet18", 1000, 64).eval()
    pixels = torch.randint(
        0, 256, (IMAGES, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    world, random = (
        World(arguments.classes, RESNET_WIDTH, arguments.seed),
        np.random.default_rng(arguments.seed),
    )
    seed, score = world.draw(random, arguments.seeds)
    started = time.process_time()
    gnn = AnchorGnn(ExtrapolateSettings(epochs=1), arguments.classes)
    gnn.head = last_layer(arguments.classes, RESNET_WIDTH, arguments.seed)
    gnn.fit(seed, score)
    fitted = time.process_time() - started
    nodes, _ = world.draw(random, SCORED_AT_ONCE)
    weights = {"as blended": gnn._weights, "all experts": dict.fromkeys(EXPERTS, 1 / len(EXPERTS))}
    weights |= {name: {**dict.fromkeys(EXPERTS, 0.0), name: 1.0} for name in EXPERTS}
    forward, search, predicted = math.inf, math.inf, dict.fromkeys(weights, math.inf)
    with torch.inference_mode():
        for _ in range(REPEATS):
            forward = min(forward, seconds(network, pixels) / IMAGES)
            search = min(search, seconds(gnn._nearest, nodes) / SCORED_AT_ONCE)
            for name in predicted:
                gnn._weights = weights[name]
                action = gnn.predict if name in EXPERTS else gnn.predict_with_difficulty
                predicted[name] = min(predicted[name], seconds(action, nodes) / SCORED_AT_ONCE)
    print(
        f"\nShare: one thread, {arguments.seeds:,} scored samples, {arguments.classes} classes, {RESNET_WIDTH} dimensions "
        f"(a fit with one epoch of its networks: {fitted:.0f} s); target: 15 %"
    )
    print(f"{'':<42}{'ms / image':>12}{'of forward':>12}")
    print(f"{'forward pass of ResNet-18 at 64x64':<42}{1e3 * forward:>12.3f}{'':>12}")
    for name, took in {"search for neighbours": search, **predicted}.items():
        title = (
            name
            if name.startswith("search")
            else f"  {name} alone"
            if name in EXPERTS
            else f"search + prediction, {name}"
        )
        print(f"{title:<42}{1e3 * took:>12.3f}{took / forward:>12.1%}")


def seconds(action: Any, *given: Any) -> float:
    started = time.process_time()
    action(*given)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", default="100000,1000000,10000000", help="numbers of samples with commas, rising"
    )
    parser.add_argument("--seeds", type=int, default=20_000, help="scored samples")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--fragment", type=int, default=1024, help="samples in a fragment")
    parser.add_argument("--plain", action="store_true", help="one process, without Ray")
    parser.add_argument("--only", default="growth,share", help="growth, share or both with a comma")
    parser.add_argument(
        "--dir",
        help="where the embeddings are written, and deleted again; default: a temporary folder",
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.sizes = [int(float(size)) for size in arguments.sizes.split(",")]
    with open("/proc/cpuinfo") as file:
        model = next(
            (line.split(":")[1].strip() for line in file if line.startswith("model name")), "?"
        )
    print(
        f"{platform.machine()}, {model}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB; torch "
        f"{torch.__version__}, faiss {importlib.metadata.version('faiss-cpu')}, numpy {np.__version__}; seed {arguments.seed}"
    )
    parts = arguments.only.split(",")
    if "growth" in parts:
        growth(arguments)
    if "share" in parts:
        share(arguments)


if __name__ == "__main__":
    main()
