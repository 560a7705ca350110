"""A finished run over a few Parquet files that can grow, without Ray and with minimal training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import QUIET, digit_pngs
from safetensors.torch import save
from serial import run_tasks

from raypipe import storage
from raypipe.config import Config, apply_overrides, parse_config
from raypipe.distributed.cluster import Cluster
from raypipe.distributed.context import Context
from raypipe.distributed.tree_sum import TreeSum
from raypipe.nightly import Night, run_night
from raypipe.pipeline import execute
from raypipe.runs.checkpoints import empty_proxy
from raypipe.runs.manifests import EpochRecord, ProxyManifest
from raypipe.runs.partition import SeedPart
from raypipe.runs.run import Run
from raypipe.runs.unit_result import UnitResult

FILE_ROWS = 150
FIRST = datetime(2026, 11, 22, 2, 0, 0, tzinfo=UTC)
SETTINGS: dict[str, Any] = {
    "source": {"format": "parquet", "fragment_samples": 75},
    "seed": {"fraction": 0.4},
    "proxy": {"model": "small", "image_size": 8, "epochs": 1, "checkpoints": 1, "parts": 1},
    "measure": {"scores": ["loss"], "loss": {"at": "checkpoints"}, "recalibrate": False},
    "extrapolate": {"method": "knn-published", "folds": 1, "judge_published": False},
    "trust": {"min_spearman": -1, "min_accuracy_over_chance": -1},
    "select": {"keep": [0.5], "strategy": "top"},
    "nightly": {"audit": 40, "drift_samples": 200},
}


def serial_stream(
    units: Sequence[Any],
    read: Callable[[Any], Any],
    make_actor: Callable[[], Any],
    pool: Any,
    patience: float,
    on_result: Callable[[UnitResult], None],
    *,
    units_per_actor: int = 1,
    name: Callable[[Any], str] = str,
) -> None:
    actor = make_actor() if units else None
    for unit in units:
        assert actor is not None
        on_result(actor(name(unit), read(unit)))


def serial_sums(
    groups: Sequence[Any],
    keys: Sequence[str],
    sum_group: Callable[[Any], list[Any]],
    merge: Callable[..., Any],
    store: Callable[[str, Any], None],
    pool: Any,
    on_report: Callable[[UnitResult], None],
) -> None:
    totals = [TreeSum(merge) for _ in keys]
    for group in groups:
        *values, report = sum_group(group)
        for total, value in zip(totals, values, strict=True):
            total.add(value)
        on_report(report)
    for key, total in zip(keys, totals, strict=True):
        store(key, total.whole())


def serial_parts(context: Context, parts: dict[str, Any], samples: int, *_: Any) -> float:
    for part in parts.values():
        part(context.config, context.run, samples, lambda done, total: None)
    return 0.0


def quick_training(config: Config, run: Run, part: SeedPart, *_: Any) -> None:
    """A few steps, and the files that the stage expects afterwards."""
    _untrained(run).write(run)
    torch.manual_seed(part.number)
    model = empty_proxy(run)
    images, labels = (
        torch.from_numpy(np.concatenate(item))
        for item in zip(*[part.read(run, shard)[1:] for shard in _shards(run)])
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model.train()
    for step in range(12):
        rows = torch.arange(step % 2, len(labels), 2)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    file = "epoch-0000.safetensors"
    storage.write_bytes(run.path(part.checkpoints, file), save(weights))
    EpochRecord(0, 0.01, 12, 1.0, 0.5, file, True, (), 0.0).write(run, part.folder)


def _untrained(run: Run) -> ProxyManifest:
    schema = pq.read_schema(run.seed_shard(min(run.done("seed"))))
    size = json.loads(schema.metadata[b"raypipe"])["image_size"]
    classes = len(run.classes().names)
    return ProxyManifest("small", classes, size, (0.3,) * 3, (0.4,) * 3, 0, 0, ())


def _shards(run: Run) -> list[str]:
    return storage.read_json(run.path("seed", "manifest.json"))["shards"]


def in_process(patch: pytest.MonkeyPatch) -> None:
    """Run stages in this process, as on one machine with two CPUs."""
    for module in ("embed.stage", "extrapolate.stage", "measure.gradients"):
        patch.setattr(f"raypipe.stages.{module}.stream", serial_stream)
    patch.setattr("raypipe.distributed.tasks.run_tasks", run_tasks)
    patch.setattr("raypipe.stages.measure.mean_gradient.tree_sums", serial_sums)
    for module in ("fit", "extremes"):
        patch.setattr(f"raypipe.stages.extrapolate.{module}.run_step_functions", serial_parts)
    patch.setattr("raypipe.stages.proxy.stage._train", quick_training)
    patch.setattr(Context, "cluster", Cluster(2, 0, 1, 2, False))


class Place:
    """A source of digits in files of FILE_ROWS rows, and a run of it."""

    def __init__(self, folder: Path, run: Path | None = None) -> None:
        self.folder = folder
        self.run = Run(str(run or folder / "run"))

    def config(self, *overrides: str) -> Config:
        where = {
            "run": self.run.uri,
            "source": {**SETTINGS["source"], "uri": str(self.folder / "data")},
        }
        return parse_config(apply_overrides({**SETTINGS, **where}, overrides))

    def add(self, number: int, rows: int = FILE_ROWS, invert: bool = False) -> None:
        """Write file `number`, or rewrite it with fewer rows or inverted pixels."""
        images, labels = digit_pngs(1797)
        start = number * FILE_ROWS
        part = [inverted(image) if invert else image for image in images[start : start + rows]]
        table = pa.table(
            {"image": [{"bytes": image} for image in part], "label": labels[start : start + rows]}
        )
        storage.write_table(
            str(self.folder / "data" / f"part-{number:02d}.parquet"), table, row_group_size=75
        )

    def remove(self, number: int) -> None:
        storage.delete(str(self.folder / "data" / f"part-{number:02d}.parquet"))

    def night(self, day: int, *overrides: str) -> Night:
        return run_night(
            self.config(*overrides), progress=QUIET, moment=FIRST + timedelta(days=day)
        )

    def copy(self, run: Path) -> Place:
        """Copy the run; the source is the same."""
        shutil.copytree(self.run.uri, run)
        return Place(self.folder, run)


def inverted(image: bytes) -> bytes:
    """Return the PNG of the negative of an image."""
    import io

    from PIL import Image, ImageOps

    buffer = io.BytesIO()
    ImageOps.invert(Image.open(io.BytesIO(image)).convert("L")).save(buffer, "PNG")
    return buffer.getvalue()


def finished_place(folder: Path) -> Place:
    """Create a finished run over four files."""
    place = Place(folder)
    for number in range(4):
        place.add(number)
    execute(place.config(), progress=QUIET)
    return place
