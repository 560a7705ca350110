"""Images (and neighbours) per second of what a GPU does in a run, beside the limit, and beside one sample at a time. Needs no Ray.

    python benchmarks/gpu.py [--networks resnet18@32,resnet18@64,resnet50@224] [--device cuda|cpu] [--compile] [--jpegs FOLDER]

The limit is a plain forward pass of the same network on random pixels that are on the device already, channels last, in bfloat16 on a GPU;
its outputs are left there. Beside it, all in the same arithmetic:

    mean gradient   gradients of batches added up, as the first pass of MoSo does
    alignment       of every sample with the mean gradient, as the second pass does (--compile: by torch.compile, which is not timed)
    embedding       `raypipe.vision.forward.forward`, which is what the stage calls: pixels from the memory of the host, embeddings and what
                    the proxy says of each sample back into it
    one at a time   what the published MoSo code does (`published` in alignment.py), in float32 as there, on --few images

Then the search for the 32 nearest among 50,000 embeddings of length 512, by FAISS on --threads of the CPU and on the device
(`extrapolate.use_gpu`), with the distances, which a CPU computes in both.

Then, with --jpegs, a folder of WebDataset tars: decoding by torchvision, on a GPU by nvJPEG, to 224 pixels, and decoding with embedding.

Every figure is the best of --repeats, after a first time that is not counted. Images are random; seed 0.
"""

from __future__ import annotations

import argparse
import copy
import glob
import platform
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from alignment import measure, published
from torch import nn

from raypipe.config.measure import MeasureSettings
from raypipe.extrapolators.neighbours import NeighbourIndex
from raypipe.proxies.networks import build_network
from raypipe.scores.forward_mode import Aligner
from raypipe.scores.moso import gradient_sum
from raypipe.sources.types import RawSample
from raypipe.vision.devices import AdaptiveBatch, set_threads, to_device
from raypipe.vision.forward import forward
from raypipe.vision.gpu_decode import decode_jpegs, split_off_jpegs
from raypipe.vision.precision import use_precision

CLASSES = 1000
SCORED, WIDTH, NEAREST = 50_000, 512, 32
"""Of the search for neighbours."""
TO_REACH = {
    "alignment": ("times a forward pass", 2.8),
    "embedding": ("of a forward pass", 0.85),
    "one": ("times one at a time", 40.0),
}


def rate(run: Callable[[], Any], images: int, device: str, repeats: int) -> float:
    """Images per second, at best."""
    return images / measure(run, device, repeats)[0]


def network(name: str, size: int, arguments: argparse.Namespace) -> None:
    """One table."""
    device = arguments.device
    at_once = AdaptiveBatch(
        arguments.batch or MeasureSettings().images_at_once(device == "cuda", size)
    )
    torch.manual_seed(0)
    model = (
        build_network(name, CLASSES, size)
        .to(device=device, memory_format=torch.channels_last)
        .eval()
    )
    stream = np.random.default_rng(0).integers(
        0, 256, (arguments.batches * at_once.size, 3, size, size), np.uint8
    )
    names = np.random.default_rng(1).integers(0, CLASSES, len(stream)).astype(np.int64)
    pixels, labels = to_device(stream, device), to_device(names, device)
    print(
        f"\n{name} at {size} x {size}, {CLASSES} classes, {len(stream):,} images, {at_once.size} at a time",
        flush=True,
    )
    found: dict[str, float] = {}

    def tell(what: str, speed: float) -> None:
        found[what] = speed
        print(f"{what:<28}{speed:>12,.0f} images / s", flush=True)

    def passes(function: Callable[..., Any]) -> float:
        with use_precision(arguments.precision, device):
            return rate(
                lambda: at_once(function, pixels, labels), len(pixels), device, arguments.repeats
            )

    tell("forward (the limit)", passes(lambda images, _: _plain(model, images)))
    limit = found["forward (the limit)"]
    tell("mean gradient", passes(lambda images, target: gradient_sum(model, images, target)))
    with use_precision("float32", device):
        direction = {
            key: value / at_once.size
            for key, value in gradient_sum(model, pixels[:32], labels[:32]).items()
        }
    aligner = Aligner(model, direction, compiled=arguments.compile)
    tell("alignment", passes(aligner))
    tell(
        "embedding",
        rate(
            lambda: embed(model, stream, names, at_once, arguments),
            len(stream),
            device,
            arguments.repeats,
        ),
    )
    few, plain = (
        slice(0, arguments.few),
        copy.deepcopy(model).to(memory_format=torch.contiguous_format),
    )
    one = rate(
        lambda: published(plain, pixels[few], labels[few], direction),
        arguments.few,
        device,
        arguments.repeats,
    )
    tell("one at a time, as published", one)
    for what, value, most in (
        ("alignment", limit / found["alignment"], True),
        ("embedding", found["embedding"] / limit, False),
        ("one", found["alignment"] / one, False),
    ):
        title, bound = TO_REACH[what]
        reached = value <= bound if most else value >= bound
        name_of = "alignment" if what == "one" else what
        print(
            f"  {name_of} {value:.2f} {title}; to reach: {'at most' if most else 'at least'} {bound:g}: {'reached' if reached else 'NOT reached'}"
        )


def _plain(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(images)
        return result


def embed(
    model: nn.Module,
    stream: Any,
    names: np.ndarray,
    at_once: AdaptiveBatch,
    arguments: argparse.Namespace,
) -> Any:
    return forward(
        model,
        stream,
        names,
        at_once,
        arguments.device,
        arguments.device == "cuda" and arguments.precision == "bfloat16",
    )


def search(arguments: argparse.Namespace) -> None:
    """Neighbours on the device beside FAISS."""
    draw = np.random.default_rng(0)
    scored, queries = (
        draw.normal(size=(rows, WIDTH)).astype(np.float32) for rows in (SCORED, arguments.queries)
    )
    index, rows = NeighbourIndex(scored), {}
    print(
        f"\nsearch for {NEAREST} of {SCORED:,} embeddings of length {WIDTH}, {len(queries):,} queries",
        flush=True,
    )
    # a CPU has its name with a number, so that it does what a GPU does
    for what, device in (
        ("FAISS", "cpu"),
        ("matrix product", "cuda" if arguments.device == "cuda" else "cpu:0"),
    ):
        index.device = device
        speed = rate(
            lambda: index.search(queries, NEAREST),
            len(queries),
            arguments.device,
            arguments.repeats,
        )
        print(f"{what + ', ' + device:<28}{speed:>12,.0f} queries / s", flush=True)
        rows[what] = index.search(queries, NEAREST)[1]
    print(
        f"  {(rows['FAISS'] == rows['matrix product']).mean():.6f} of the neighbours are the same"
    )


def jpegs(arguments: argparse.Namespace) -> None:
    """Decoding, and decoding with embedding, of the JPEGs in tars."""
    samples = []
    for path in sorted(glob.glob(f"{arguments.jpegs}/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None and member.name.endswith((".jpg", ".jpeg")):
                    samples.append(RawSample(member.name, file.read(), None))
    limit, size, device = 100_000_000, 224, arguments.device
    images, pixels, _ = split_off_jpegs(samples, size, limit)
    at_once = AdaptiveBatch(
        arguments.batch or MeasureSettings().images_at_once(device == "cuda", size)
    )
    model = (
        build_network("resnet50", CLASSES, size)
        .to(device=device, memory_format=torch.channels_last)
        .eval()
    )
    names = np.zeros(len(images), np.int64)

    def decoded() -> Any:
        return decode_jpegs(images, pixels, size, limit, device, at_once.size)[0]

    print(
        f"\n{len(images)} JPEGs of {np.mean([len(image) for image in images]) / 1e3:.0f} kB to {size} x {size}",
        flush=True,
    )
    for what, run in (
        ("decoding", decoded),
        ("decoding and embedding", lambda: embed(model, decoded(), names, at_once, arguments)),
    ):
        print(
            f"{what:<28}{rate(run, len(images), device, arguments.repeats):>12,.0f} images / s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks",
        default="resnet18@32,resnet18@64,resnet50@64,resnet50@224",
        help="name@pixels, with commas",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"]
    )
    parser.add_argument(
        "--precision", default="bfloat16", choices=["float32", "tf32", "bfloat16"], help="on a GPU"
    )
    parser.add_argument(
        "--batch", type=int, help="images at a time; default: as measure.batch_size: auto"
    )
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--few", type=int, default=32, help="images one at a time")
    parser.add_argument("--queries", type=int, default=20_000, help="of the search for neighbours")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="torch.compile the alignment")
    parser.add_argument(
        "--give-back",
        action="store_true",
        help="memory to the system after each batch, unlike raypipe's workers",
    )
    parser.add_argument("--jpegs", metavar="FOLDER", help="of WebDataset tars")
    arguments = parser.parse_args()
    (torch.set_num_threads if arguments.give_back else set_threads)(arguments.threads)
    on_gpu = arguments.device == "cuda"
    machine = (
        torch.cuda.get_device_name()
        if on_gpu
        else f"{platform.machine()}, {arguments.threads} thread(s)"
    )
    arithmetic = arguments.precision if on_gpu else "float32"
    about = ", alignment compiled" * arguments.compile + ", memory given back" * arguments.give_back
    print(f"{machine}; torch {torch.__version__}, {arithmetic}{about}")
    for name, size in (item.split("@") for item in arguments.networks.split(",")):
        network(name, int(size), arguments)
    search(arguments)
    if arguments.jpegs:
        jpegs(arguments)


if __name__ == "__main__":
    main()
