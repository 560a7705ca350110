"""Rates of the work of a run: constants that were measured, and a few that are assumed.

Unless noted otherwise they were measured on one core of an x86-64 server (AMD EPYC, torch 2.15,
float32); another core is easily half or twice as fast. `raypipe inspect --like RUN` replaces them,
stage by stage, by what a finished run took.
"""

from __future__ import annotations

from raypipe.config.extrapolate import gnn_epochs
from raypipe.vision.network_costs import costed_as

PARAMETERS = {
    "small": 174_000,
    "resnet18": 11_174_000,
    "resnet34": 21_282_000,
    "resnet50": 23_521_000,
    "resnet101": 42_513_000,
    "wide_resnet50_2": 66_847_000,
    "resnext50_32x4d": 22_993_000,
}
"""Weights, except those of the last layer for more than ten classes."""
WIDTHS = {"small": 96, "resnet18": 512, "resnet34": 512}
"""Length of an embedding."""
WIDTH = 2048
"""Length of an embedding of the other networks."""

GPU_MACS = 4e12
"""The same of a GPU, about a T4 at half precision. Assumed, not measured by this project.

Data-centre GPUs are several times faster.
"""
MEAN_GRADIENT = 2.9
"""Forward passes that the mean gradient is worth (benchmarks/results/alignment-cpu.txt)."""
ALIGNMENT = 2.4
"""The same for the alignment of each sample's gradient with the mean (the same table)."""
WITH_NORMS = 4.0
"""The same for alignments and norms of gradients (the same table)."""
ATTACK = 2.4
"""The same for an iteration of an attack, forward and back to the pixels.

Measured: 2.1 to 2.6 (small, ResNet-18).
"""

EPOCH_SECONDS = 0.15
"""Per training epoch, outside the network: writing trajectory and state."""
SAMPLE_SECONDS = 0.3e-3
"""Per sample and stage: passing it on, writing its row."""
HASH_SECONDS = 0.05e-3
"""Per sample of the source: deciding by its id whether it is drawn."""
FILE_SECONDS = 20e-3
"""Of the index, per file that states how many samples it has."""
HEADER_SECONDS = 0.1e-3
"""Of the index, per sample if every header is read."""
THREADS_POWER = 0.5
"""A training on t threads is t ** 0.5 times faster: the networks are small, so threads wait."""
FIT_SECONDS = {
    "knn": (0.1, 0.05e-3),
    "knn-published": (0.1, 0.05e-3),
    "trees": (0.2, 0.1e-3),
    "mlp": (0.5, 2e-3),
    "proxy": (0.1, 0.01e-3),
}
"""A fit of an extrapolator: seconds, and seconds per seed sample."""
GNN_FIT = 2.0
"""A fit of gnn: seconds."""
GNN_SAMPLE_EPOCH = 0.32e-3
"""A fit of gnn: seconds per seed sample and epoch, for embeddings of length 96."""
GRAPH_SAMPLE = 5e-3
"""A fit of gnn-published: seconds per sample of the whole source."""
CURVE_SAMPLE = 1.25e-3
"""The learning curve: seconds per seed sample."""

START_SECONDS = {
    "index": 6.0,
    "seed": 1.0,
    "label": 5.0,
    "proxy": 10.0,
    "measure": 6.0,
    "rehearse": 12.0,
    "embed": 4.0,
    "extrapolate": 6.0,
    "pilot": 4.0,
    "select": 0.2,
    "report": 1.0,
}
"""Wall-clock seconds of a stage whatever the data: starting Ray and processes, on two cores."""
START_CPU_SECONDS = {
    "label": 3.0,
    "proxy": 1.0,
    "measure": 2.0,
    "rehearse": 3.0,
    "embed": 2.0,
    "extrapolate": 3.0,
    "pilot": 2.0,
}
"""The processor seconds of the same that the ledger counts."""

SPREAD = {"run": (0.6, 1.8), "cpu": (0.4, 2.2), "gpu": (0.25, 4.0)}
"""How far off an estimate can be, as factors.

By its basis: a run's ledger, the constants above, or the assumed GPU.
"""


def width(model: str, image_size: int) -> int:
    """Return the length of the embeddings of a proxy for images of `image_size` pixels."""
    model = costed_as(model)
    if model not in PARAMETERS:
        from raypipe.proxies.sizes import size_of

        return size_of(model, image_size).width
    return WIDTHS.get(model, WIDTH)


def parameters(model: str, image_size: int) -> int:
    """Return the weights of a proxy for images of `image_size` pixels."""
    model = costed_as(model)
    if model not in PARAMETERS:
        from raypipe.proxies.sizes import size_of

        return size_of(model, image_size).parameters
    return PARAMETERS[model]


def fit_seconds(method: str, seed: int, samples: int, epochs: int | None, values: int) -> float:
    """Return the processor seconds of one fit of an extrapolator.

    Parameters
    ----------
    method
        `extrapolate.method`.
    seed, samples
        Samples of the seed set and of the source.
    epochs
        None if the size of the seed set decides.
    values
        Length of the embeddings, of all that are seen side by side (`proxy.repeats`).
    """
    if method == "gnn-published":
        return GRAPH_SAMPLE * samples
    if method == "gnn":
        seen = seed * (epochs or gnn_epochs(seed))
        return GNN_FIT + GNN_SAMPLE_EPOCH * seen * (0.9 + 0.1 * values / 96)
    fixed, each = FIT_SECONDS.get(method, FIT_SECONDS["knn"])  # of another package: like knn
    return fixed + each * seed


def predict_seconds(seed: int, values: int, search: bool = True) -> float:
    """Return the processor seconds to predict the score of one sample.

    They cover its row, its embedding and, with `search`, the search of its neighbours among the
    seed samples on the CPU. `values` is the length of all its embeddings.
    """
    return 0.1e-3 + 0.3e-6 * values + search * 5e-11 * min(seed, 50_000) * values
