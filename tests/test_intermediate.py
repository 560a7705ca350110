"""A finished run keeps what resuming, new samples and the measured scores need, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import QUIET, small_config
from test_overwrite import LONG, config_of, finished

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.errors import RunError
from raypipe.pipeline import execute
from raypipe.runs.intermediate import remove_intermediate
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import Checkpoint, ProxyManifest, ProxyOfPart, TrainedProxy
from raypipe.runs.run import Run
from raypipe.stages.proxy.stage import ProxyStage

CHECKPOINTS = ("epoch-0000.safetensors", "epoch-0001.safetensors")
FROM_EMBEDDINGS = ("proxy.parts=3", "measure.loss.at=auto", "measure.scores=[loss]")
FROM_TRAJECTORY = ("proxy.parts=3", "measure.loss.at=trajectory", "measure.scores=[loss]")
AT_CHECKPOINTS = ("proxy.parts=3", "measure.scores=[moso]")


def trained(run: Run, config: Config) -> None:
    """Three proxies of two epochs: 100 bytes a checkpoint, 10 an epoch of the trajectory."""
    proxy = TrainedProxy(
        steps=2,
        epochs=2,
        trajectory=(("a.parquet",), ("b.parquet",)),
        checkpoints=tuple(Checkpoint(n, 0.1, file) for n, file in enumerate(CHECKPOINTS)),
        final=CHECKPOINTS[-1],
    )
    parts = (ProxyOfPart(5, (5,), proxy),) * 3
    ProxyManifest("small", 2, 8, (0.5,) * 3, (0.5,) * 3, 15, 0, parts).write(run)
    for part in range(3):
        for file in CHECKPOINTS:
            storage.write_bytes(run.path(f"proxy/part-{part}/checkpoints", file), bytes(100))
        for file in ("a.parquet", "b.parquet"):
            storage.write_bytes(run.path(f"proxy/part-{part}/trajectory", file), bytes(10))


@pytest.mark.parametrize(
    "scores, removed, size, left",
    [
        (FROM_EMBEDDINGS, ["checkpoints", "trajectory"], 360, {"checkpoints/epoch-0001"}),
        (
            FROM_TRAJECTORY,
            ["checkpoints"],
            300,
            {"checkpoints/epoch-0001", "trajectory/a", "trajectory/b"},
        ),
        (
            AT_CHECKPOINTS,
            ["trajectory"],
            60,
            {"checkpoints/epoch-0000", "checkpoints/epoch-0001"},
        ),
    ],
    ids=["from embeddings", "from the trajectory", "at checkpoints"],
)
def test_what_no_score_needs_is_removed(
    tmp_path: Path, scores: tuple[str, ...], removed: list[str], size: int, left: set[str]
) -> None:
    config = small_config(f"{tmp_path}/run", *scores)
    run = Run(config.run)
    trained(run, config)
    storage.write_bytes(run.path("rehearsal/proxy/checkpoints/x.safetensors"), bytes(1000))
    assert remove_intermediate(run, config) == (removed, size + 1000)
    for part in range(3):
        files = storage.walk(run.path(f"proxy/part-{part}"))
        assert {file.path.rpartition(".")[0] for file in files} == left
    # the training counts as done, and only because its record says what is gone
    context = Context(config, run, QUIET)
    assert ProxyStage().complete(context, StageRecord(detail={"removed": removed}))
    assert ProxyStage().complete(context, StageRecord()) == ("checkpoints" not in removed)
    assert remove_intermediate(run, config) == (removed, 0)


@pytest.mark.parametrize("seconds", [1, LONG])
def test_scores_that_need_removed_files_need_another_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    run, _ = finished(tmp_path, seconds, *FROM_EMBEDDINGS)
    records = run.ledger()
    records["proxy"].detail["removed"] = ["checkpoints", "trajectory"]
    run.write_ledger(records)
    known: dict[str, bool] = {}
    monkeypatch.setattr(
        "raypipe.pipeline.advance",
        lambda stage, context, records: known.update({stage.name: stage.name in records}),
    )
    monkeypatch.setattr("raypipe.pipeline.remove_intermediate", lambda *_: ([], 0))
    # another score from embeddings needs none of them
    measured = [*FROM_EMBEDDINGS[:2], "measure.scores=[el2n]", "measure.el2n.at=embeddings"]
    execute(config_of(run, *measured), redo=["measure"], progress=QUIET)
    assert known["proxy"] and not known["measure"]
    run.write_ledger(records)
    if seconds == LONG:
        with pytest.raises(RunError, match="--redo proxy"):
            execute(config_of(run, *AT_CHECKPOINTS), redo=["measure"], progress=QUIET)
        return
    execute(config_of(run, *AT_CHECKPOINTS), progress=QUIET)
    assert known["seed"] and not (known["proxy"] or known["measure"] or known["embed"])
