"""Ids of `embed.from` that are not those of the source are reported before any training."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import small_config

import raypipe
from raypipe.errors import ConfigError
from raypipe.progress import Progress
from raypipe.runs import table_ids
from raypipe.runs.table_ids import compare_ids
from raypipe.stages.embed.table_check import check_embeddings

IDS = [f"digits/{number:04d}" for number in range(600)]


def _table(folder: Path, ids: Sequence[str], name: str = "a.parquet") -> str:
    folder.mkdir(exist_ok=True)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(2 * len(ids))), 2)
    table = pa.table({"sample_id": list(ids), "embedding": embedding})
    pq.write_table(table, folder / name, row_group_size=64)
    return str(folder)


def _check(table: str, *overrides: str) -> str:
    config = small_config("run", f"embed.from={table}", *overrides)
    printed = io.StringIO()
    context: Any = SimpleNamespace(config=config, progress=Progress(printed))
    check_embeddings(context)
    return printed.getvalue()


def test_a_table_with_every_sample_is_accepted_without_a_word(tmp_path: Path) -> None:
    assert _check(_table(tmp_path / "t", [*IDS, "other"])) == ""


def test_ids_of_another_source_end_the_run_before_it_begins(tmp_path: Path) -> None:
    table = _table(tmp_path / "t", [f"{number}.png" for number in range(600)])
    with pytest.raises(ConfigError) as caught:
        _check(table)
    text = str(caught.value)
    assert "has no row for 600 of 600 samples drawn from the source (100 %), such as digi" in text
    assert text.endswith(".png. source.max_reject_fraction allows 1 %. Fix the ids of the table")
    with pytest.raises(ConfigError, match="no row for 256 of 256 samples drawn"):
        _check(table, "source.limit=null")
    with pytest.raises(ConfigError, match=r"no row for .*, or set source.max_reject_fraction to"):
        _check(_table(tmp_path / "half", IDS[::2]))


def test_a_few_missing_ids_are_named_with_their_number(tmp_path: Path) -> None:
    table = _table(tmp_path / "t", IDS[:-40])
    text = _check(table, "source.max_reject_fraction=0.2")
    assert (
        text.startswith("note: embed.from: ")
        and "such as digits/0560, digits/0561, digits/0562; its" in text
    )
    assert text.endswith("Samples without an embedding are rejected\n")
    assert "no row for 40 of 600 samples drawn from the source (6.7 %)" in text


def test_an_id_that_occurs_twice_ends_the_run(tmp_path: Path) -> None:
    _table(tmp_path / "t", IDS)
    with pytest.raises(ConfigError, match=r"600 of 600 ids drawn .* occur more than once, such as"):
        _check(_table(tmp_path / "t", IDS, "b.parquet"))


def test_a_source_that_cannot_be_read_is_left_to_the_index(tmp_path: Path) -> None:
    table = _table(tmp_path / "t", IDS)
    assert _check(table, f"source.uri={tmp_path}/none", "source.format=parquet") == ""


def test_of_a_large_table_a_part_is_read_which_only_shows_that_all_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_ids, "MAX_ROWS", 128)
    table = _table(tmp_path / "t", IDS)
    comparison = compare_ids(table, IDS[::5])
    assert comparison.rows == 128 and comparison.share == pytest.approx(128 / 600)
    assert 0 < len(comparison.missing) < 120
    assert comparison.note(0.01, 100) == ("", False) and comparison.foreign(600) == 0
    others = compare_ids(table, [f"{number}" for number in range(100)])
    text, stops = others.note(0.01, 100)
    assert stops and "128 of its rows were read. " in text
    assert others.note(0.01, 32) == ("", False)  # their rows can be among those not read
    _table(tmp_path / "t", [f"x{number}" for number in range(600)], "b.parquet")
    assert compare_ids(table, IDS[:5]).share == pytest.approx(128 / 1200, rel=0.1)


def test_inspect_warns_of_samples_without_a_row_and_of_rows_without_a_sample(
    tmp_path: Path,
) -> None:
    table = _table(tmp_path / "t", [*IDS[:300], *(f"x{number}" for number in range(50))])
    given = {"source": {"uri": "digits://"}, "embed": {"from": table}}
    survey = raypipe.inspect(config=given, samples=1797)
    assert survey.cost is not None
    missing, foreign = survey.cost.warnings[-2:]
    assert "has no row for 1,497 of 1,797 samples drawn" in missing
    assert missing.endswith("more than 0.83. The run stops before any training")
    assert foreign == (
        "embed.from: 50 of its 350 rows belong to no sample of the source; they are ignored"
    )
    limited = raypipe.inspect(config=given, overrides=["limit=300"])
    assert limited.cost is not None
    assert limited.cost.warnings[-1] == foreign
