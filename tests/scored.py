"""Runs with scores and a keep-list over any source, built without Ray and a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers import QUIET

from raypipe import storage
from raypipe.config import SourceSettings, absolute_paths, parse_config
from raypipe.distributed.context import Context
from raypipe.runs.keep_files import keep_file
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.sources import RawSample, Source, open_source
from raypipe.stages.index.stage import IndexStage
from raypipe.stages.select.stage import write_keep_lists


def scored_run(folder: str, uri: str, keep: float = 0.5, **source: Any) -> Run:
    """Build a run in `folder` over the source at `uri`: index, scores and one keep-list.

    Unreadable samples have no score.
    """
    config = absolute_paths(
        parse_config(
            {
                "run": folder,
                "source": {"uri": uri, **source},
                "select": {"keep": [keep], "strategy": "top"},
            }
        )
    )
    stored = open_source(config.source)
    config = config.model_copy(
        update={"source": config.source.model_copy(update={"format": stored.format})}
    )
    run, record = Run(config.run), StageRecord(state="done")
    run.write_config(config)
    with pytest.MonkeyPatch.context() as patch:
        serially(patch)
        IndexStage().execute(Context(config, run, QUIET), record)
    classes, random, samples = run.classes(), np.random.default_rng(0), 0
    for fragment in run.fragments():
        readable = [
            sample
            for sample in stored.read(run.with_members(fragment))
            if not sample.reason and len(sample.image)
        ]
        order = random.permutation(
            len(readable)
        )  # scores/ is not in source order: the seed set comes first
        labels = [classes.index(readable[row].label)[0] for row in order]
        score = random.normal(size=len(readable)).astype(np.float32)
        columns = {
            "sample_id": pa.array([readable[row].sample_id for row in order], pa.string()),
            "label": pa.array(labels, pa.int32(), mask=np.array(labels, np.int32) < 0),
            "score": pa.array(score),
            "lower": pa.array(score - 1),
            "upper": pa.array(score + 1),
            "measured": pa.array([True] * len(readable)),
        }
        storage.write_table(
            run.path("scores", f"{fragment.fragment_id}.parquet"), pa.table(columns)
        )
        samples += len(readable)
    run.write_ledger(
        {
            "index": record,
            "extrapolate": StageRecord(state="done", samples=samples, detail={"measured": samples}),
        }
    )
    write_keep_lists(run, config.select)
    return run


def add_predictions(run: Run, wrong: int = 5) -> dict[str, int]:
    """Add the output of proxies that contradict the first labels; return their ranks by id.

    Of the contradicted samples, the one with the highest number is contradicted most.
    """
    random, classes, ranks, ids = np.random.default_rng(1), len(run.classes().names), {}, []
    for file in sorted(storage.names(run.scores_folder)):
        table = storage.read_table(run.path("scores", file))
        label = table["label"].fill_null(-1).to_numpy().copy()
        margin = random.uniform(1, 2, len(label)).astype(np.float32)
        for row in range(len(label)):
            if len(ids) < wrong and label[row] >= 0:
                margin[row] = -1.0 - len(ids)
                ids.append(table["sample_id"][row].as_py())
                label[row] = (label[row] + 1) % classes
        columns = {
            "sample_id": table["sample_id"],
            "prediction": pa.array(np.maximum(label, 0), pa.int32()),
            "confidence": pa.array(random.uniform(0.5, 1, len(label)), pa.float32()),
            "loss": pa.array(np.log1p(np.exp(-margin))),
            "margin": pa.array(margin),
        }
        storage.write_table(run.path("embeddings", file), pa.table(columns))
    ranks |= {sample_id: wrong - place for place, sample_id in enumerate(ids)}
    return ranks


def serially(patch: pytest.MonkeyPatch) -> list[Any]:
    """Run tasks one after another in this process; the list receives their units."""
    called: list[Any] = []

    def run_tasks(
        units: Iterable[Any],
        function: Callable[[Any], Any],
        on_result: Callable[[Any], None],
        **_: Any,
    ) -> None:
        for unit in units:
            called.append(unit)
            on_result(function(unit))

    patch.setattr("raypipe.distributed.tasks.run_tasks", run_tasks)
    patch.setattr(Context, "cluster", None)
    return called


def opened(uri: str, **options: Any) -> Source:
    """Open the source at a URI."""
    return open_source(SourceSettings(uri=uri, **options))


def everything_in(uri: str, **options: Any) -> list[RawSample]:
    """All samples of a source, in its order."""
    source = opened(uri, **options)
    limit = source.settings.limit
    samples = (
        sample
        for file in source.files()
        for part in source.scan(file).fragments
        for sample in source.read(part)
    )
    return list(islice(samples, limit))


def add_weights(run: Run, keep: float) -> np.ndarray:
    """Add a column of weights to the keep-list, as some strategies do; return it, float32 [n]."""
    uri = run.path("keep", keep_file(keep))
    table = storage.read_table(uri)
    weight = np.linspace(0.5, 2, len(table)).astype(np.float32)
    storage.write_table(
        uri,
        table.append_column("weight", pa.array(weight)).replace_schema_metadata(
            table.schema.metadata
        ),
    )
    return weight


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """See `serially`."""
    return serially(monkeypatch)
