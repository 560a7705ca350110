"""Small configurations and comparisons for tests that run the whole pipeline."""

from __future__ import annotations

import functools
import io
import time
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from PIL import Image
from sklearn.datasets import load_digits

from raypipe import storage
from raypipe.api import load_scores
from raypipe.config import Config, apply_overrides, parse_config
from raypipe.progress import Progress
from raypipe.runs.run import Run

QUIET = Progress(quiet=True)
PLANTED = "planted-4f1d9c62a7"
"""A password in the environment of all tests. Nothing may write it to any output."""

SMALL: dict[str, Any] = {
    "source": {"uri": "digits://", "format": "digits", "limit": 600, "fragment_samples": 128},
    "seed": {"fraction": 0.35},
    "proxy": {
        "model": "small",
        "image_size": 8,
        "epochs": 4,
        "parts": 1,
        "batch_size": 64,
        "checkpoints": 2,
        "crop_padding": 1,
        "flip": False,
    },
    "measure": {
        "max_actors": 1,
        "scores": ["moso", "el2n", "grand", "loss"],
        "moso": {"weights": "lr"},  # Eq. 4, which tests compute themselves
        "loss": {"at": "checkpoints"},
    },
    "embed": {"max_actors": 1},
    "extrapolate": {
        "method": "knn",  # gnn: fits of 10 s each; tests of it say so
        "epochs": 4,
        "neighbours": 8,
        "folds": 2,
        "judge_published": False,
    },
    "trust": {"min_spearman": -1, "min_stability": -1, "min_accuracy_over_chance": -1},
    "select": {"keep": [0.25, 0.5], "strategy": "top"},
    "report": {"images": 4},
}
"""Settings of a minimal run: starting an actor takes longer than all of its work."""


UNREADABLE = {
    "class-0/empty.png": b"",
    "class-1/words.jpg": b"not an image",
    "class-2/cut.png": b"\x89PNG\r\n\x1a\n" + bytes(52),
}
"""Files of the fixture `of_folders` that are not images."""


def small_config(run: str, *overrides: str) -> Config:
    """`SMALL`, written to `run`, with `section.field=value` changes."""
    return parse_config(apply_overrides({"run": run, **SMALL}, overrides))


def cross_fit_config(run: str, score: str, *overrides: str) -> Config:
    """Settings of a minimal run with cross-fitting, and the score that keep-lists are cut from."""
    return small_config(
        run,
        "proxy.parts=3",
        "measure.loss.at=auto",
        f"extrapolate.score={score}",
        "embed.dtype=float32",
        *overrides,
    )


def digit_images(count: int) -> tuple[np.ndarray, list[int]]:
    """The first of scikit-learn's digits, uint8 [n, 8, 8], and their labels."""
    digits = load_digits()
    return (digits.images[:count] * 255 / 16).round().astype(np.uint8), digits.target[
        :count
    ].tolist()


def digit_pngs(count: int) -> tuple[list[bytes], list[int]]:
    """The same images as PNG files, and their labels."""
    images, labels = digit_images(count)
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return encoded, labels


@functools.cache
def photograph(seed: int) -> Image.Image:
    """Noise of 1000 x 760 pixels whose spectrum falls with frequency, as in photographs."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(1000), np.fft.fftfreq(760)))
    shaped = np.fft.fft2(random.normal(size=(3, 760, 1000))) / np.maximum(frequency, 1 / 1000)
    pixels = np.fft.ifft2(shaped).real
    pixels = pixels.mean(0) + 0.3 * pixels  # colours are correlated
    return Image.fromarray(
        (128 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    )


def measured_with(run: Run, file: str, part: int = 0) -> Any:
    """The network of a checkpoint with recalibrated BatchNorm, with which scores are measured."""
    from raypipe.runs.checkpoints import load_checkpoint
    from raypipe.runs.partition import proxy_parts
    from raypipe.stages.measure.gradient_job import GradientFolders

    return load_checkpoint(
        run,
        file,
        folder=GradientFolders.of(run.config(), run).of_part(proxy_parts(run)[part]).calibrated,
    )


def table_of(run: Run, folder: str) -> pa.Table:
    """All files of a folder of a run as one table."""
    tables = [table for _, table in storage.iter_tables(run.path(folder))]
    return pa.concat_tables([table.replace_schema_metadata(None) for table in tables])


def score_files(run: str) -> dict[str, bytes]:
    """Content of every score shard by name."""
    return _files(run, "scores")


def _files(run: str, folder: str) -> dict[str, bytes]:
    root = Run(run).path(folder)
    return {
        file.path: storage.read_bytes(storage.join(root, file.path))
        for file in storage.listing(root)
    }


def stamps(run: str, folder: str) -> dict[str, str]:
    """Time stamps of the files in a folder of a run: equal ones mean that nothing was rewritten."""
    return {file.path: file.stamp for file in storage.listing(Run(run).path(folder))}


def by_id(run: str) -> dict[str, dict[str, Any]]:
    """Rows of all score shards by sample_id, which must be unique."""
    table: pa.Table = load_scores(run)
    rows = {row["sample_id"]: row for row in table.to_pylist()}
    assert len(rows) == len(table), "a sample has two scores"
    return rows


def not_ended(processes: list[psutil.Process], within_s: float) -> list[psutil.Process]:
    """Wait until the processes have ended, and return those that run on.

    Polls: `psutil.wait_procs` of psutil 7.2.2 opens pidfds, which some sandboxes cannot.
    """
    end = time.monotonic() + within_s
    while processes := [each for each in processes if _runs(each)]:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return processes


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
