"""`raypipe compare`: agreement of scores and lists on the samples that two runs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from scipy.stats import spearmanr

from raypipe import storage
from raypipe.cli import cli
from raypipe.config import parse_config
from raypipe.errors import RunError
from raypipe.keeplists import compare
from raypipe.keeplists.compare import compare_runs
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run


def scored(folder: Path, scores: dict[str, float], keep: int, **settings: Any) -> Run:
    """A run with these scores, whose list of 50 % holds the `keep` highest."""
    run = Run(str(folder))
    run.write_config(parse_config({"run": run.uri, "source": {"uri": "x"}, **settings}))
    ids = sorted(scores)
    half = len(ids) // 2
    for number, part in enumerate((ids[:half], ids[half:])):
        columns = {"sample_id": part, "score": pa.array([scores[name] for name in part])}
        storage.write_table(run.path("scores", f"{number}.parquet"), pa.table(columns))
    best = sorted(ids, key=lambda name: -scores[name])[:keep]
    storage.write_table(run.path("keep", "keep-0.50.parquet"), pa.table({"sample_id": best}))
    run.write_ledger({"extrapolate": StageRecord("done", samples=len(ids))})
    return run


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Run, Run]:
    random = np.random.default_rng(0)
    first = {f"{number:03d}.png": float(random.normal()) for number in range(200)}
    second = {name: score + float(random.normal()) for name, score in first.items()}
    second = dict(list(second.items())[20:]) | {f"new-{number}": 9.0 for number in range(5)}
    return (
        scored(tmp_path / "first", first, 100),
        scored(tmp_path / "second", second, 90, proxy={"epochs": 7}),
    )


def test_agreement_is_that_of_the_common_samples(runs: tuple[Run, Run]) -> None:
    found = compare_runs(*runs)
    assert found.samples == (200, 185, 180) and found.part == 1
    tables = [
        dict(zip(*(table[name].to_pylist() for name in ("sample_id", "score")), strict=True))
        for run in runs
        for table in [pa.concat_tables([t for _, t in storage.iter_tables(run.scores_folder)])]
    ]
    common = sorted(set(tables[0]) & set(tables[1]))
    expected = spearmanr(*([table[name] for name in common] for table in tables)).statistic
    assert found.spearman == pytest.approx(expected)
    kept = [
        set(storage.read_table(run.keep_list("keep-0.50.parquet"))["sample_id"].to_pylist())
        for run in runs
    ]
    (overlap,) = found.lists
    first, second = (names & set(common) for names in kept)
    assert (overlap.first, overlap.second) == (len(first), len(second))
    assert overlap.both == len(first & second)
    assert overlap.share == pytest.approx(2 * len(first & second) / (len(first) + len(second)))
    assert overlap.chance < overlap.share < 1
    assert found.settings["proxy.epochs"][1] == 7 and "run" not in found.settings
    assert compare_runs(runs[0], runs[0]).lists[0].share == 1


def test_large_runs_are_compared_on_the_same_random_samples(
    runs: tuple[Run, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare_runs(*runs)
    monkeypatch.setattr(compare, "MAX_SAMPLES", 100)
    found = compare_runs(*runs)
    assert found.part == 0.5 and 60 < found.samples[2] < 120
    assert found.samples[0] - found.samples[2] < 20, "the same samples are drawn of both"
    assert found.spearman == pytest.approx(whole.spearman, abs=0.15)
    assert found.lists[0].share == pytest.approx(whole.lists[0].share, abs=0.15)


def test_runs_without_a_common_sample_are_no_comparison(tmp_path: Path, runs: Any) -> None:
    other = scored(tmp_path / "other", {"a": 1.0, "b": 2.0}, 1)
    with pytest.raises(RunError, match=r"no sample in common; ids are such as '000.png' and 'a'"):
        compare_runs(runs[0], other)
    with pytest.raises(RunError, match="no run here"):
        compare_runs(runs[0], Run(str(tmp_path / "none")))


def test_the_command(runs: tuple[Run, Run]) -> None:
    result = CliRunner().invoke(cli, ["compare", *(run.uri for run in runs)])
    assert result.exit_code == 0, result.output
    assert "180 in both, 20 only in the first, 5 only in the second" in result.output
    assert "proxy.epochs: " in result.output and " | 7" in result.output
    assert "keep-0.50.parquet" in result.output and "(by chance" in result.output
