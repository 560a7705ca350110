"""A small finished run, written as the stages write it, with invented scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raypipe import storage
from raypipe.config import SourceSettings, parse_config
from raypipe.report import thumbnails
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.sources import Fragment, RawSample
from raypipe.stages.select.stage import write_keep_lists

NUMBERS = [(name, pa.int64()) for name in ("start", "stop", "offset")]
INDEX = pa.schema(
    [
        ("fragment_id", pa.string()),
        ("path", pa.string()),
        *NUMBERS,
        ("members", pa.list_(pa.string())),
        ("error", pa.string()),
    ]
)


class FakeSource:
    """Grey squares, or noise. `reads` lists fragments that were read; those in `broken` fail."""

    def __init__(self, size: int = 8) -> None:
        self.settings = SourceSettings(uri="memory")
        self.size, self.noise = size, False
        self.reads, self.broken = list[str](), set[str]()

    def read(self, fragment: Fragment, keep_id: Callable[[str], bool]) -> Iterator[RawSample]:
        self.reads.append(fragment.fragment_id)
        if fragment.fragment_id in self.broken:
            raise OSError(f"{fragment.path}: gone")
        for position in range(fragment.start, fragment.stop):
            sample_id = f"{fragment.path}#{position}"
            if keep_id(sample_id):
                shape = (self.size, self.size, 3)
                noise = (
                    np.random.default_rng(position).integers(0, 256, shape, np.uint8)
                    if self.noise
                    else None
                )
                yield RawSample(
                    sample_id,
                    np.full(shape[:2], position % 256, np.uint8) if noise is None else noise,
                    0,
                )


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    fake = FakeSource()
    monkeypatch.setattr(thumbnails, "open_source", lambda settings: fake)
    return fake


@pytest.fixture
def make_run(tmp_path: Path, source: FakeSource) -> Callable[..., Run]:
    """Return make_run(names, fragments, size, path, **sections); samples are <path>#<number>."""

    def make(
        names: Sequence[str] = ("cat", "dog", "owl"),
        fragments: int = 4,
        size: int = 50,
        path: str = "part-{}",
        **sections: Any,
    ) -> Run:
        run = Run(str(tmp_path / "run"))
        sections["select"] = {"strategy": "top", **sections.get("select", {})}
        run.write_config(parse_config({"run": run.uri, "source": {"uri": "memory"}, **sections}))
        storage.write_json(
            run.path("index", "classes.json"), {"names": list(names), "numeric": True}
        )
        random, rows = np.random.default_rng(0), []
        for number in range(fragments):
            file = path.replace("{}", str(number))
            rows.append((f"f{number:03d}", file, 0, size, 0, [file], ""))
            write_fragment(run, f"f{number:03d}", file, size, len(names), random)
        rows.append(("broken", "cut.parquet", 0, 0, 0, [], "no footer"))
        reject(run, "broken", ["cut.parquet"], "file cannot be read: no footer")
        reject(run, "f000", [f"{path.replace('{}', '0')}#0"], "empty: 0 bytes")
        columns = list(zip(*rows, strict=True))
        storage.write_table(
            run.path("index", "fragments-0.parquet"), pa.table(columns, schema=INDEX)
        )
        write_fidelity(run, 0.7)
        done = {
            stage: StageRecord(
                "done",
                samples=fragments * size - 1,
                wall_seconds=wall,
                cpu_seconds=2 * wall,
                attempts=1,
            )
            for stage, wall in zip(
                ("seed", "proxy", "measure", "embed", "extrapolate", "select"),
                (1, 20, 9, 5, 4, 0.5),
                strict=True,
            )
        }
        judged = {"spearman": 0.7, "spearman_interval": [0.6, 0.8]}
        done["extrapolate"].detail = {"measured": 40, "fidelity": judged}
        run.write_ledger(
            {
                "index": StageRecord(
                    "done", samples=fragments * size, wall_seconds=1.0, cpu_seconds=0.5
                ),
                **done,
            }
        )
        write_keep_lists(run, run.config().select)
        return run

    return make


def write_fragment(
    run: Run, fragment: str, file: str, size: int, classes: int, random: np.random.Generator
) -> None:
    """Scores and embeddings; the first sample of the first fragment was rejected."""
    rows = np.arange(fragment == "f000", size)
    count = len(rows)
    ids = pa.array([f"{file}#{row}" for row in rows], pa.string())
    label = random.integers(0, classes, count).astype(np.int32)
    known = random.random(count) > 0.05
    labels = pa.array(label, pa.int32(), mask=~known)
    measured = random.random(count) < 0.2
    score = random.normal(label, 1).astype(np.float32)
    half = np.where(measured, 0, 0.5 + random.random(count)).astype(np.float32)
    columns = {
        "sample_id": ids,
        "label": labels,
        "score": score,
        "lower": score - half,
        "upper": score + half,
        "measured": measured,
    }
    storage.write_table(run.path("scores", f"{fragment}.parquet"), pa.table(columns))
    prediction = np.where(random.random(count) < 0.3, (label + 1) % classes, label).astype(np.int32)
    margin = np.where(prediction == label, 1, -1) * random.random(count)
    embedding = random.normal(size=(count, 6)).astype(np.float32)
    columns = {
        "sample_id": ids,
        "label": labels,
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(embedding.reshape(-1)), 6),
        "prediction": prediction,
        "confidence": (0.5 + 0.5 * np.abs(margin)).astype(np.float32),
        "margin": margin.astype(np.float32),
    }
    storage.write_table(run.path("embeddings", f"{fragment}.parquet"), pa.table(columns))


def write_fidelity(run: Run, spearman: float | None, **more: Any) -> None:
    interval = [spearman - 0.1, spearman + 0.1] if spearman is not None else None
    fidelity = {
        "spearman": spearman, "spearman_interval": interval,
        "pearson": spearman, "pearson_interval": interval,
        "overlap": {"0.3": 0.6}, "overlap_interval": {"0.3": [0.5, 0.7]},
        "n_fit": 30, "n_held": 10, "note": "",
        "baselines": {"class_mean": 0.4, "proxy_loss": None, "random": 0.0},
    } | more  # fmt: skip
    storage.write_json(
        run.path("extrapolator", "extrapolator.json"), {"method": "gnn", "fidelity": fidelity}
    )


def reject(run: Run, fragment: str, ids: list[str], reason: str) -> None:
    columns = {"sample_id": ids, "fragment": [fragment] * len(ids), "reason": [reason] * len(ids)}
    storage.write_table(run.path("rejects", f"{fragment}.parquet"), pa.table(columns))
