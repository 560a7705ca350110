from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypipe import storage
from raypipe.api import select as select_again
from raypipe.config import SelectSettings, TrustSettings, parse_config
from raypipe.distributed.context import Context
from raypipe.errors import ConfigError, RunError, StageError, TrustError
from raypipe.progress import Progress
from raypipe.runs.keep_files import keep_file, keep_metadata
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.stages.select import writer
from raypipe.stages.select.stage import SelectStage, make_keep_lists, write_keep_lists

SAMPLES = 300


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(str(tmp_path / "run"))
    random = np.random.default_rng(0)
    storage.write_json(
        run.path("index", "classes.json"), {"names": ["cat", "dog", "owl"], "numeric": False}
    )
    for shard in range(6):
        count = (
            60 if shard < 5 else 0
        )  # a fragment whose samples were all rejected has an empty shard
        label = [None if random.random() < 0.05 else int(random.integers(3)) for _ in range(count)]
        score = random.normal(size=count).round(1).astype(np.float32)
        write_scores(
            run, f"part-{shard}", [f"part-{shard}/é{row}" for row in range(count)], label, score
        )
    judge(run, 0.5)
    return run


def judge(run: Run, least: float | None, samples: int = SAMPLES, measured: int = 30) -> None:
    """Write a ledger with scores of this fidelity."""
    interval = None if least is None else [least, least + 0.2]
    fidelity = {
        "spearman": None if least is None else least + 0.1,
        "spearman_interval": interval,
        "note": "only 3 held out",
    }
    detail = {"measured": measured, "fidelity": fidelity}
    run.write_ledger({"extrapolate": StageRecord(state="done", samples=samples, detail=detail)})


def write_scores(
    run: Run, fragment: str, ids: list[str], label: list[int | None], score: np.ndarray
) -> None:
    table = pa.table(
        {
            "sample_id": pa.array(ids, pa.string()),
            "label": pa.array(label, pa.int32()),
            "score": pa.array(score, pa.float32()),
            "lower": pa.array(score - 1, pa.float32()),
            "upper": pa.array(score + 1, pa.float32()),
            "measured": pa.array([False] * len(ids), pa.bool_()),
        }
    )
    storage.write_table(run.path("scores", fragment + ".parquet"), table)


def scores(run: Run) -> dict[str, tuple[int | None, float]]:
    return {
        row["sample_id"]: (row["label"], row["score"])
        for _, table in storage.iter_tables(run.path("scores"))
        for row in table.to_pylist()
    }


def test_top_lists_hold_the_highest_scores_and_are_nested(run: Run) -> None:
    lists = write_keep_lists(run, SelectSettings(strategy="top", keep=(0.3, 0.5, 0.125)))
    assert lists == {"keep-0.125.parquet": 38, "keep-0.30.parquet": 90, "keep-0.50.parquet": 150}
    everything, inner = scores(run), set[str]()
    for file, count in lists.items():
        rows = pq.read_table(run.path("keep", file)).to_pylist()
        ids = {row["sample_id"] for row in rows}
        assert len(rows) == len(ids) == count
        assert inner <= ids
        inner = ids
        assert all(everything[row["sample_id"]] == (row["label"], row["score"]) for row in rows)
        assert min(row["score"] for row in rows) >= max(
            score for key, (_, score) in everything.items() if key not in ids
        )


def test_the_file_says_how_it_was_made(run: Run) -> None:
    written = make_keep_lists(run, SelectSettings(strategy="balanced", keep=(0.7,)))
    detail = written.ledger_detail()
    assert (detail["samples"], detail["strategy"]) == (SAMPLES, "balanced")
    uri = run.path("keep", "keep-0.70.parquet")
    assert pq.read_schema(uri).names == ["sample_id", "label", "score"]
    assert keep_metadata(uri) == {
        "strategy": "balanced", "fraction": "0.7", "count": "210", "samples": "300", "scores": detail["scores"],
        "spearman": "0.6000", "spearman_low": "0.5000", "forced": "false",
    }  # fmt: skip


def test_balanced_keeps_the_same_share_of_each_class(run: Run) -> None:
    write_keep_lists(run, SelectSettings(keep=(0.4,), strategy="balanced"))
    before = [label for label, _ in scores(run).values()]
    after = pq.read_table(run.path("keep", "keep-0.40.parquet"))["label"].to_pylist()
    assert len(after) == 120
    for label in (0, 1, 2, None):
        assert abs(after.count(label) - 0.4 * before.count(label)) < 1


def test_the_bytes_are_the_same_every_time(run: Run) -> None:
    write_keep_lists(run, SelectSettings(strategy="top"))
    first = {
        file: storage.read_bytes(run.path("keep", file)) for file in storage.names(run.path("keep"))
    }
    write_keep_lists(run, SelectSettings(strategy="top"))
    assert first == {
        file: storage.read_bytes(run.path("keep", file)) for file in storage.names(run.path("keep"))
    }
    assert sorted(first) == [
        "keep-0.30.parquet",
        "keep-0.50.parquet",
        "keep-0.70.parquet",
        "keep-0.90.parquet",
    ]


def test_an_object_store_gets_the_same_lists(run: Run, s3: str) -> None:
    there = Run(f"{s3}/select")
    for file in storage.listing(run.uri):
        storage.write_bytes(there.path(file.path), storage.read_bytes(run.path(file.path)))
    lists = write_keep_lists(there, SelectSettings(strategy="top", keep=(0.4,)))
    write_keep_lists(run, SelectSettings(strategy="top", keep=(0.4,)))
    assert lists == {"keep-0.40.parquet": 120}
    assert storage.read_bytes(there.path("keep", "keep-0.40.parquet")) == storage.read_bytes(
        run.path("keep", "keep-0.40.parquet")
    )
    with pytest.raises(StageError):
        write_scores(there, "part-9", ["x"], [1], np.array([np.nan], np.float32))
        write_keep_lists(there, SelectSettings(strategy="top", keep=(0.9,)))
    assert storage.names(there.path("keep")) == {"keep-0.40.parquet"}


def test_another_fraction_is_added_and_lists_of_other_scores_are_removed(run: Run) -> None:
    write_keep_lists(run, SelectSettings(strategy="top", keep=(0.5,)))
    write_keep_lists(run, SelectSettings(strategy="top", keep=(0.2,)))
    assert storage.names(run.path("keep")) == {"keep-0.50.parquet", "keep-0.20.parquet"}
    write_scores(run, "part-9", ["new"], [1], np.array([9.0], np.float32))
    write_keep_lists(run, SelectSettings(strategy="top", keep=(0.2,)))
    assert storage.names(run.path("keep")) == {"keep-0.20.parquet"}


def test_rows_are_written_in_groups_as_they_come(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "GROUP_ROWS", 100)
    write_keep_lists(run, SelectSettings(strategy="top", keep=(1.0,)))
    assert pq.ParquetFile(run.path("keep", "keep-1.00.parquet")).num_row_groups > 1
    assert set(
        pq.read_table(run.path("keep", "keep-1.00.parquet"))["sample_id"].to_pylist()
    ) == set(scores(run))


def test_the_stage_is_complete_until_scores_are_added_or_a_list_is_missing(run: Run) -> None:
    config = parse_config({"run": run.uri, "source": {"uri": "x"}, "select": {"strategy": "top"}})
    stage, context, record = (
        SelectStage(),
        Context(config, run, Progress(quiet=True)),
        StageRecord(),
    )
    assert not stage.complete(context, record)
    stage.execute(context, record)
    assert record.samples == SAMPLES
    assert record.detail["lists"]["keep-0.70.parquet"] == 210
    assert stage.complete(context, record)
    storage.delete(run.path("keep", "keep-0.90.parquet"))
    assert not stage.complete(context, record)
    stage.execute(context, record)
    write_scores(run, "part-9", ["new"], [1], np.array([9.0], np.float32))
    assert not stage.complete(context, record)


@pytest.mark.parametrize("record", [{}, {"extrapolate": StageRecord(state="running")}])
def test_unfinished_scores_are_refused(run: Run, record: dict[str, StageRecord]) -> None:
    run.write_ledger(record)
    with pytest.raises(RunError, match="extrapolate is not finished"):
        write_keep_lists(run, SelectSettings(strategy="top"))
    assert storage.names(run.path("keep")) == set()


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        (
            0.19,
            r"Spearman correlation of 0\.29 \(95 % interval 0\.19 to 0\.39\), and its lower end is below trust\.min_spearman \(0\.2\)",
        ),
        (None, r"is not known \(only 3 held out\)"),
    ],
)
def test_unfaithful_scores_are_refused_unless_forced(
    run: Run, least: float | None, expected: str
) -> None:
    judge(run, least)
    with pytest.raises(TrustError, match=expected) as refusal:
        write_keep_lists(run, SelectSettings(strategy="top"))
    assert refusal.value.exit_code == 3
    for help_ in ("seed.fraction", "proxy.epochs", "measure.scores", "--force", "select.force"):
        assert help_ in str(refusal.value)
    assert storage.names(run.path("keep")) == set()
    write_keep_lists(run, SelectSettings(strategy="top", keep=(0.5,), force=True))
    about = keep_metadata(run.path("keep", "keep-0.50.parquet"))
    assert (about["forced"], about["spearman_low"]) == (
        "true",
        "unknown" if least is None else "0.1900",
    )
    # a forced list stays as long as its scores do
    with pytest.raises(TrustError):
        write_keep_lists(run, SelectSettings(strategy="top"))
    assert storage.names(run.path("keep")) == {"keep-0.50.parquet"}
    write_scores(run, "part-9", ["new"], [1], np.array([9.0], np.float32))
    with pytest.raises(TrustError):
        write_keep_lists(run, SelectSettings(strategy="top"))
    assert storage.names(run.path("keep")) == set()


def test_the_threshold_is_a_setting_and_measured_scores_need_none(run: Run) -> None:
    judge(run, 0.19)
    write_keep_lists(run, SelectSettings(strategy="top"), trust=TrustSettings(min_spearman=0.19))
    judge(run, 0.3)
    records = run.ledger()
    records["extrapolate"].detail["learning_curve"] = {"doubled": {"gain": 0.044}}
    run.write_ledger(records)
    with pytest.raises(
        TrustError, match=r"seed\.fraction; twice as large is predicted to add 0\.04\)"
    ):
        write_keep_lists(
            run, SelectSettings(strategy="top"), trust=TrustSettings(min_spearman=0.31)
        )
    judge(run, None)
    write_keep_lists(
        run, SelectSettings(strategy="top", force=False), trust=TrustSettings(min_spearman=-1)
    )
    assert keep_metadata(run.path("keep", "keep-0.30.parquet"))["forced"] == "false"
    judge(run, -0.5, measured=SAMPLES)
    write_keep_lists(run, SelectSettings(strategy="top"))
    records = run.ledger()
    records["extrapolate"].detail["stability"] = {"value": 0.1, "interval": [0.0, 0.2]}
    run.write_ledger(records)
    with pytest.raises(TrustError, match=r"trust\.min_stability"):
        write_keep_lists(run, SelectSettings(strategy="top"))
    write_keep_lists(run, SelectSettings(strategy="random"))  # uses no score


def test_the_verb_goes_by_the_run_and_can_be_forced(run: Run) -> None:
    sections = {"trust": {"min_spearman": 0.6}, "select": {"strategy": "top"}}
    run.write_config(parse_config({"run": run.uri, "source": {"uri": "x"}, **sections}))
    with pytest.raises(TrustError, match=r"below trust\.min_spearman \(0\.6\)"):
        select_again(run.uri, 0.5)
    assert select_again(run.uri, 0.5, force=True) == {"keep-0.50.parquet": 150}
    assert keep_metadata(run.path("keep", "keep-0.50.parquet"))["forced"] == "true"


def test_no_sample_at_all_is_refused(run: Run) -> None:
    storage.delete(run.path("scores"))
    with pytest.raises(RunError, match="no sample"):
        write_keep_lists(run, SelectSettings(strategy="top"))


def test_a_missing_score_is_refused_and_no_list_is_written(run: Run) -> None:
    write_scores(run, "part-9", ["x", "y"], [1, 1], np.array([np.nan, 1.0], np.float32))
    with pytest.raises(StageError, match=r"1 of 302 scores are not finite"):
        write_keep_lists(run, SelectSettings(strategy="top"))
    assert storage.names(run.path("keep")) == set()


def test_an_id_that_occurs_twice_at_the_threshold_is_noticed(run: Run) -> None:
    storage.delete(run.path("scores"))
    write_scores(run, "part-0", ["a", "a"], [0, 0], np.zeros(2, np.float32))
    with pytest.raises(StageError, match="sample_ids that occur twice"):
        write_keep_lists(run, SelectSettings(strategy="top", keep=(0.5,)))
    assert storage.listing(run.path("keep")) == []


def test_a_bad_fraction_is_refused(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"1\.5 is not a fraction"):
        write_keep_lists(run, SelectSettings(strategy="top").model_copy(update={"keep": (1.5,)}))


@pytest.mark.parametrize(
    ("fraction", "file"),
    [
        (0.7, "0.70"),
        (0.125, "0.125"),
        (1, "1.00"),
        (0.3, "0.30"),
        (1e-05, "0.00001"),
        (0.1 + 0.2, "0.30000000000000004"),
    ],
)
def test_file_names(fraction: float, file: str) -> None:
    assert keep_file(fraction) == f"keep-{file}.parquet"


def test_neither_torch_nor_ray_is_imported() -> None:
    code = "import sys, raypipe.stages.select.stage, raypipe.stages.report; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
