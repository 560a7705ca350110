"""Speed of reading: decoding on one core, and a whole pass through Ray Data beside a PyTorch DataLoader and the webdataset package.

    python benchmarks/reading.py [--imagenet FOLDER] [--cifar FOLDER] [--images 6000] [--repeats 2] [--quick]

--imagenet is a folder of WebDataset tars with .jpg and .cls, --cifar one of Parquet files with `image` and `label`; one that is not given
is left out. `pip install webdataset` for its row; raypipe does not need it.

**Decoding**: images per processor second of one thread, the bytes in memory. Plain is what everybody writes: `Image.open(..).convert("RGB")
.resize((size, size))`, whose filter is bicubic, and the same with the bilinear filter. torchvision is `decode_jpeg` and an antialiased resize.

**Streaming**: everything from files (in the page cache) to decoded batches at the consumer, without a network, in processes of their own:

- raypipe: `raypipe.distributed.actor_pool.stream` with the read task of the embed stage and its pool of actors, which do nothing. Without a GPU Ray
  joins reading and actor into one process; "read apart" is as beside a GPU, where decoded blocks go through the object store;
- DataLoader: as many workers as cores, each reads every n-th file front to back (tarfile, pyarrow) and decodes, with raypipe's decoder or
  plain (bilinear); batches of 64, stacked by the workers;
- webdataset: its own tar reader and loader, with raypipe's decoder and as many workers.

The files are hard links to a few, repeated in a temporary folder. Each system passes over N images and over 4 N, in a process started for that.
The rate is 3 N images over the difference of the two times, so what happens once, from the first import to the last worker's end, is in no
rate; it is the column "start s". Least time of the repeats. "per CPU s" is the same for processor seconds of all processes, which other work
on the machine disturbs less. Memory is the highest sum over all processes, Ray's included, of proportional set sizes: shared memory counts once.

What else was tried for decoding (192 ImageNet photographs, see `raypipe.vision.decode`): a JPEG's entropy coding must be undone whatever the scale,
and is two thirds of the time of full decoding, so that no scale can be much faster than 1/8. Scales that leave less than 1.75 times the
size are little faster and differ visibly; the whole file in one piece instead of 64 kB pieces gains 2 to 3 %.
`Image.reduce` (`reducing_gap`) matters only where a factor of four is left. libjpeg's fast transform and
plain upsampling gain a twentieth. torchvision has a faster resize, but decodes in full, and importing torch takes seconds and 300 MB in every task.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "RAY_worker_niceness", "0"
)  # of 15, with which other work on the machine would come before Ray's alone

import numpy as np
import psutil
from PIL import Image

from raypipe.config import Config, parse_config
from raypipe.runs.unit_result import UnitResult
from raypipe.vision.decode import decode

MAX_PIXELS = 100_000_000
BATCH = 64
TAR_COPIES = 4
"""The images of all tars, so many times, make one tar of the size that is usual."""


def plain(
    data: bytes, size: int, filter: Image.Resampling = Image.Resampling.BILINEAR
) -> np.ndarray:
    """What everybody writes: uint8 [3, size, size]."""
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), filter)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def ours(data: bytes, size: int) -> np.ndarray:
    return decode(data, size, MAX_PIXELS)


def of_torchvision(data: bytes, size: int) -> np.ndarray:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2.functional import resize

    pixels = decode_jpeg(
        torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB
    )
    return resize(pixels, [size, size], antialias=True).numpy()


def tar_samples(path: str) -> Iterator[tuple[bytes, int]]:
    """Image and label of a tar's samples, in order."""
    with tarfile.open(path) as tar:
        image = b""
        for member in tar:
            file = tar.extractfile(member)
            content = file.read() if file is not None else b""
            if member.name.endswith(".jpg"):
                image = content
            else:
                yield image, int(content)


def parquet_samples(path: str) -> Iterator[tuple[bytes, int]]:
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(path).iter_batches(256, use_threads=False):
        yield from zip(
            (image["bytes"] for image in batch["image"].to_pylist()),
            batch["label"].to_pylist(),
            strict=True,
        )


def samples_of(path: str) -> Iterator[tuple[bytes, int]]:
    return tar_samples(path) if path.endswith(".tar") else parquet_samples(path)


# --- one pass, in a process of its own -------------------------------------------------------------------------------


def config_of(folder: str) -> Config:
    form = "webdataset" if any(name.endswith(".tar") for name in os.listdir(folder)) else "parquet"
    source = {"uri": folder, "format": form}
    return parse_config({"run": f"{folder}-run", "source": source, "cluster": {"address": "local"}})


def pass_of_raypipe(folder: str, size: int, apart: bool) -> int:
    from raypipe.distributed.actor_pool import stream
    from raypipe.distributed.cluster import ActorPool, connect
    from raypipe.progress import Progress
    from raypipe.runs.run import Run
    from raypipe.stages.embed.stage import _read

    config = config_of(folder)
    config = config.model_copy(
        update={"proxy": config.proxy.model_copy(update={"image_size": size})}
    )
    run = Run(config.run)
    cluster = connect(config.cluster, run, Progress(quiet=True), verbose=False)
    # Ray joins reading and actors into one process where both ask for the same; beside a GPU they do not
    pool = (
        ActorPool(1, 1, 0.1, 0, 1, (cluster.cpus - 0.1) / int(cluster.cpus), 1)
        if apart
        else cluster.pool(config.embed)
    )
    counts: list[int] = []
    read = functools.partial(_read, config, run.uri, False)
    stream(
        run.fragments(),
        read,
        Count,
        pool,
        600,
        lambda result: counts.append(result.samples),
        name=attrgetter("fragment_id"),
    )
    return sum(counts)


def index(folder: str) -> None:
    """Write the index of a folder's run, as the index stage does in tasks."""
    from raypipe.runs.run import Run
    from raypipe.sources import open_source
    from raypipe.stages.index.listing import file_id
    from raypipe.stages.index.rows import rows_of
    from raypipe.stages.index.writer import IndexWriter

    config = config_of(folder)
    source, writer = open_source(config.source), IndexWriter(Run(config.run), config.source)
    for file in source.files():
        writer.add(file_id(file), file.size, list(rows_of(file_id(file), source.scan(file))))
    writer.close()


class Count:
    """Takes what the actors of the embed stage take, and does nothing with it."""

    def __call__(self, unit: str, batch: dict[str, np.ndarray]) -> UnitResult:
        assert batch["image"].dtype == np.uint8 and batch["image"].ndim == 4
        return UnitResult(unit, int((batch["reason"] == "").sum()))


def pass_of_loader(folder: str, size: int, decoder: Callable[[bytes, int], np.ndarray]) -> int:
    import torch
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    class Files(IterableDataset):
        def __iter__(self) -> Iterator[tuple[Any, int]]:
            worker = get_worker_info()
            for path in sorted(Path(folder).iterdir())[worker.id :: worker.num_workers]:
                for image, label in samples_of(str(path)):
                    yield torch.from_numpy(decoder(image, size)), label

    torch.set_num_threads(1)
    return sum(
        len(images)
        for images, _ in DataLoader(Files(), batch_size=BATCH, num_workers=os.cpu_count() or 1)
    )


def pass_of_webdataset(folder: str, size: int) -> int:
    import torch
    import webdataset

    torch.set_num_threads(1)
    urls = [str(path) for path in sorted(Path(folder).iterdir())]
    read = webdataset.WebDataset(urls, shardshuffle=False).to_tuple("jpg", "cls")
    data = read.map_tuple(lambda image: torch.from_numpy(ours(image, size)), int).batched(BATCH)
    return sum(
        len(images)
        for images, _ in webdataset.WebLoader(
            data, batch_size=None, num_workers=os.cpu_count() or 1
        )
    )


SYSTEMS: dict[str, Callable[[str, int], int]] = {
    "DataLoader, our decoder": lambda folder, size: pass_of_loader(folder, size, ours),
    "raypipe": lambda folder, size: pass_of_raypipe(folder, size, apart=False),
    "raypipe, read apart": lambda folder, size: pass_of_raypipe(folder, size, apart=True),
    "DataLoader, plain PIL": lambda folder, size: pass_of_loader(folder, size, plain),
    "webdataset, our decoder": pass_of_webdataset,
}


class Processes:
    """Processor seconds and highest memory of a process and all that come from it."""

    def __init__(self, pid: int, memory: bool) -> None:
        self._root, self._memory, self._seconds, self._over = (
            psutil.Process(pid),
            memory,
            {},
            threading.Event(),
        )
        self.peak = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(1.0 if self._memory else 0.2):
            total = 0
            for process in self._tree():
                try:
                    times = process.cpu_times()
                    self._seconds[process.pid] = times.user + times.system
                    total += process.memory_full_info().pss if self._memory else 0
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total)

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            return []

    def stop(self) -> float:
        """Processor seconds of all."""
        self._over.set()
        self._thread.join()
        return sum(self._seconds.values())


def one_pass(
    system: str, folder: str, size: int, images: int, memory: bool
) -> tuple[float, float, int]:
    """Wall-clock seconds, processor seconds and bytes (0 where they were not looked at) of a pass over a folder."""
    started = time.perf_counter()
    command = [sys.executable, __file__, "--child", json.dumps([system, folder, size])]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watch = Processes(child.pid, memory)
    assert child.stdout is not None
    line = child.stdout.readline()
    seconds = time.perf_counter() - started
    cpu = watch.stop()  # before the processes of Ray are gone
    _, errors = child.communicate()
    if child.returncode or int(line or 0) != images:
        sys.exit(f"{system}: {line.strip() or 'no'} images instead of {images}\n{errors}")
    return seconds, cpu, watch.peak


# --- the tables ------------------------------------------------------------------------------------------------------


def decoding(name: str, images: list[bytes], sizes: list[int], repeats: int) -> None:
    import torch

    torch.set_num_threads(1)
    decoders = {
        "plain PIL": lambda data, size: plain(data, size, Image.Resampling.BICUBIC),
        "plain PIL, bilinear": plain,
        "torchvision": of_torchvision,
        "raypipe": ours,
    }
    print(
        f"\nDecoding {len(images):,} JPEGs of {name}, one thread: images per processor second, times plain PIL, times bilinear"
    )
    print(f"{'':<22}" + "".join(f"{f'{size} px':>10}{'':>8}{'':>8}" for size in sizes))
    best = {key: dict.fromkeys(sizes, float("inf")) for key in decoders}
    for _ in range(repeats):  # they take turns, so that other work on the machine falls on all
        for size in sizes:
            for key, decoder in decoders.items():
                started = time.process_time()
                for data in images:
                    decoder(data, size)
                best[key][size] = min(best[key][size], time.process_time() - started)
    for key, row in best.items():
        ratios = (
            (best["plain PIL"][size] / row[size], best["plain PIL, bilinear"][size] / row[size])
            for size in sizes
        )
        cells = (
            f"{len(images) / row[size]:>10,.0f}{a:>8.2f}{b:>8.2f}"
            for size, (a, b) in zip(sizes, ratios, strict=True)
        )
        print(f"{key:<22}" + "".join(cells), flush=True)


def streaming(
    name: str,
    few: tuple[str, int],
    many: tuple[str, int],
    size: int,
    repeats: int,
    systems: list[str],
) -> None:
    """Each folder with the number of its images."""
    print(f"\nStreaming {name} at {size} px: {few[1]:,} and {many[1]:,} images")
    print(
        f"{'':<26}{'images/s':>9}{'of DL':>7}{'per CPU s':>11}{'of DL':>7}{'start s':>9}{'peak MB':>9}{'of 4 N':>8}"
    )
    against = (0.0, 0.0)
    for system in systems:
        seconds, cpu, peak = [float("inf")] * 2, [float("inf")] * 2, [0, 0]
        for repeat in range(repeats):
            for which, (folder, images) in enumerate((few, many)):
                took = one_pass(system, folder, size, images, memory=repeat == 0)
                print(
                    f"  {system}, {images:,}: {took[0]:.1f} s, {took[1]:.1f} CPU s, {took[2] / 1e6:,.0f} MB",
                    file=sys.stderr,
                )
                seconds[which], cpu[which] = min(seconds[which], took[0]), min(cpu[which], took[1])
                peak[which] = max(peak[which], took[2])
        more = many[1] - few[1]
        rate, per_cpu = (
            more / (times[1] - times[0]) if times[1] > times[0] else float("nan")
            for times in (seconds, cpu)
        )
        against = against if any(against) else (rate, per_cpu)
        peaks = "".join(
            f"{bytes / 1e6:>{width},.0f}" for bytes, width in zip(peak, (9, 8), strict=True)
        )
        print(
            f"{system:<26}{rate:>9,.0f}{rate / against[0]:>7.2f}{per_cpu:>11,.0f}{per_cpu / against[1]:>7.2f}"
            f"{seconds[0] - few[1] / rate:>9.1f}{peaks}",
            flush=True,
        )
    if name != "ImageNet" or importlib.util.find_spec("webdataset") is None:
        print(
            f"{'webdataset':<26}not installed"
            if name == "ImageNet"
            else f"{'webdataset':<26}reads no Parquet"
        )


def link(files: list[str], folder: str, count: int) -> str:
    """A folder of so many hard links to some files in turn, and its index beside it."""
    os.makedirs(folder)
    for number in range(count):
        source = files[number % len(files)]
        os.link(source, os.path.join(folder, f"{number:05d}{os.path.splitext(source)[1]}"))
    index(folder)
    return folder


def imagenet_tar(folder: str, to: str) -> tuple[list[bytes], str, int]:
    """The images of all tars of a folder, one tar of them several times, and how many it has."""
    samples = [
        sample for path in sorted(Path(folder).glob("*.tar")) for sample in tar_samples(str(path))
    ]
    path = os.path.join(to, "all.tar")
    with tarfile.open(path, "w") as tar:
        for copy in range(TAR_COPIES):
            for row, (image, label) in enumerate(samples):
                for extension, content in (("jpg", image), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{copy}-{row:06d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return [image for image, _ in samples], path, TAR_COPIES * len(samples)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--imagenet", help="a folder of WebDataset tars")
    parser.add_argument("--cifar", help="a folder of Parquet files")
    parser.add_argument(
        "--images", type=int, default=6000, help="N of ImageNet; of CIFAR it is ten times as many"
    )
    parser.add_argument("--sizes", default="64,224", help="pixels")
    parser.add_argument("--repeats", type=int, default=2, help="the least time of so many")
    parser.add_argument(
        "--systems",
        default="",
        help="only those whose names begin so, separated by commas, and the DataLoader",
    )
    parser.add_argument("--tables", default="decoding,streaming", help="which")
    parser.add_argument(
        "--dir",
        help="where the repeated files are written, and deleted again; default: a temporary folder",
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the images")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        system, folder, size = json.loads(arguments.child)
        print(SYSTEMS[system](folder, size), flush=True)
        return
    import torch
    import torchvision

    has_webdataset = importlib.util.find_spec("webdataset") is not None
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {Image.__version__}, numpy {np.__version__}"
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, no GPU used; Python {platform.python_version()}, {versions}"
    )
    images = arguments.images // (10 if arguments.quick else 1)
    chosen = [
        system
        for system in SYSTEMS
        if system == "DataLoader, our decoder"
        or any(map(system.startswith, arguments.systems.split(",")))
    ]
    with tempfile.TemporaryDirectory(prefix="raypipe-reading-", dir=arguments.dir) as scratch:
        if arguments.imagenet:
            jpegs, tar, per_tar = imagenet_tar(arguments.imagenet, scratch)
            if "decoding" in arguments.tables:
                decoding(
                    "ImageNet",
                    jpegs,
                    list(map(int, arguments.sizes.split(","))),
                    max(3, arguments.repeats),
                )
            count = max(2, round(images / per_tar))
            few = link([tar], os.path.join(scratch, "few"), count), count * per_tar
            many = link([tar], os.path.join(scratch, "many"), 4 * count), 4 * count * per_tar
            for size in map(
                int, arguments.sizes.split(",") if "streaming" in arguments.tables else ()
            ):
                systems = [
                    system for system in chosen if has_webdataset or "webdataset" not in system
                ]
                streaming("ImageNet", few, many, size, arguments.repeats, systems)
        if arguments.cifar:
            sources = sorted(map(str, Path(arguments.cifar).glob("train*.parquet")))
            copies = [shutil.copy(source, scratch) for source in sources]
            per_file = sum(1 for _ in parquet_samples(copies[0]))
            jpegs = [image for image, _ in parquet_samples(copies[0])][:2000]
            if "decoding" in arguments.tables:
                decoding("CIFAR-10", jpegs, [32], max(3, arguments.repeats))
            count = max(2, round(10 * images / per_file))
            few = link(copies, os.path.join(scratch, "few-cifar"), count), count * per_file
            many = (
                link(copies, os.path.join(scratch, "many-cifar"), 4 * count),
                4 * count * per_file,
            )
            systems = [system for system in chosen if "webdataset" not in system]
            if "streaming" in arguments.tables:
                streaming("CIFAR-10", few, many, 32, arguments.repeats, systems)


if __name__ == "__main__":
    main()
