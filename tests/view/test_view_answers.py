"""Searches, neighbours and lists, against slow loops over the files of the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from view.conftest import AUDIT_ROWS, SEED_ROWS

from raypipe import storage
from raypipe.api import load_scores, select
from raypipe.errors import ConfigError, RaypipeError
from raypipe.report.embeddings import scan_embeddings
from raypipe.runs.run import Run
from raypipe.view import neighbours
from raypipe.view.answers import Answers

Viewed = Callable[..., Run]


@pytest.fixture
def run(viewed: Viewed) -> Run:
    return viewed()


@pytest.fixture
def answers(run: Run) -> Answers:
    return Answers(run)


def ids(answers: Answers, **fields: Any) -> list[str]:
    """All ids that match, page by page."""
    fields = {name: str(value) for name, value in fields.items()}
    found = list[str]()
    while True:
        page = answers.search({**fields, "offset": str(len(found)), "limit": "37"})
        found += [sample["id"] for sample in page["samples"]]
        if len(found) >= page["total"]:
            assert len(found) == page["total"]
            return found


def rows_of(run: Run) -> list[dict[str, Any]]:
    """Every score, with the set of the sample and the proxy's opinion."""
    rows = []
    for fragment in sorted(run.done("scores")):
        scores = storage.read_table(run.score_shard(fragment)).to_pylist()
        proxy = storage.read_table(run.embedding_shard(fragment)).to_pylist()
        for place, (score, opinion) in enumerate(zip(scores, proxy, strict=True)):
            drawn = "seed" if place < SEED_ROWS else "rest"
            drawn = "audit" if SEED_ROWS <= place < SEED_ROWS + AUDIT_ROWS else drawn
            rows.append({**opinion, **score, "drawn": drawn})
    return rows


FILTERS: list[tuple[dict[str, Any], Callable[[dict[str, Any]], bool]]] = [
    ({}, lambda row: True),
    ({"label": 1}, lambda row: row["label"] == 1),
    ({"label": -1}, lambda row: row["label"] is None),
    ({"low": 0.5, "high": 1.5}, lambda row: 0.5 <= row["score"] <= 1.5),
    ({"drawn": "seed"}, lambda row: row["drawn"] == "seed"),
    ({"drawn": "audit", "label": 0}, lambda row: row["drawn"] == "audit" and row["label"] == 0),
    ({"drawn": "rest"}, lambda row: row["drawn"] == "rest"),
    ({"text": "PART-2#1"}, lambda row: "part-2#1" in row["sample_id"]),
]


SORTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "lowest": lambda row: row["score"],
    "highest": lambda row: -row["score"],
    "uncertain": lambda row: np.float32(row["lower"]) - np.float32(row["upper"]),
    "source": lambda row: 0,
}


def test_a_search_finds_what_a_loop_finds(run: Run, answers: Answers) -> None:
    for fields, rule in FILTERS:
        matching = [row for row in rows_of(run) if rule(row)]
        assert matching
        for sort, key in SORTS.items():
            expected = [row["sample_id"] for row in sorted(matching, key=key)]
            assert ids(answers, **fields, sort=sort) == expected, (fields, sort)


def test_labels_to_check_come_in_the_order_of_the_report(run: Run, answers: Answers) -> None:
    listed = [pick.sample_id for pick in scan_embeddings(run, 1000).suspects]
    assert len(listed) > 20
    assert ids(answers, doubtful=20, sort="labels") == listed[:20]
    assert answers.run({})["doubtful"] == len(listed)
    assert answers.search({"sort": "labels"})["samples"][3]["rank"] == 4


@pytest.mark.parametrize("fraction", [0.5, 0.42])
def test_kept_is_what_the_list_holds_stored_or_not(
    run: Run, answers: Answers, fraction: float
) -> None:
    found = answers.search({"keep": str(fraction), "kept": "kept"})["list"]
    assert ("not stored" in found) == (fraction == 0.42)
    kept, pruned = (set(ids(answers, keep=fraction, kept=word)) for word in ("kept", "pruned"))
    assert not storage.exists(run.keep_list("keep-0.42.parquet"))
    select(run.uri, fraction)
    stored = storage.read_table(run.keep_list(f"keep-{fraction:.2f}.parquet"))["sample_id"]
    assert kept == set(stored.to_pylist())
    assert kept | pruned == set(load_scores(run.uri)["sample_id"].to_pylist())
    assert not kept & pruned


def test_a_list_that_was_cut_again_is_read_again(run: Run, answers: Answers) -> None:
    def stored() -> set[str]:
        table = storage.read_table(run.keep_list("keep-0.50.parquet"))
        return set(table["sample_id"].to_pylist())

    before = set(ids(answers, keep=0.5, kept="kept"))
    assert before == stored()
    select(run.uri, 0.5, "random", seed=7)
    assert stored() != before
    assert set(ids(answers, keep=0.5, kept="kept")) == stored()


def test_a_list_cut_for_the_page_goes_by_its_marks(run: Run, tmp_path: Path) -> None:
    answers = Answers(run, never=str(tmp_path / "never.txt"))
    first = answers.search({"keep": "0.42", "kept": "kept", "sort": "highest"})["samples"][0]
    answers.mark({"rows": [first["row"]], "mark": "never"})
    assert first["id"] in ids(answers, keep=0.42, kept="pruned")


def test_neighbours_are_those_of_a_loop_and_measured_ones_are_measured(
    run: Run, answers: Answers
) -> None:
    rows = rows_of(run)
    unit = np.array([row["embedding"] for row in rows])
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    similarity = unit @ unit[33]
    similarity[33] = -2
    order = [rows[place] for place in np.argsort(-similarity)]
    found = answers.sample({"row": "33"})
    assert found["id"] == rows[33]["sample_id"]
    assert [near["id"] for near in found["nearest"]] == [row["sample_id"] for row in order[:6]]
    measured = [row["sample_id"] for row in order if row["measured"]][:6]
    assert [near["id"] for near in found["measured_nearest"]] == measured
    assert found["nearest"][0]["similarity"] == pytest.approx(max(similarity), abs=1e-5)
    assert found["searched"] == len(rows)
    assert found["proxy"]["label"] == rows[33]["prediction"]
    kept = {item["fraction"]: item["kept"] for item in found["kept"]}
    assert kept[0.3] == (rows[33]["sample_id"] in ids(answers, keep=0.3, kept="kept"))


def test_a_measured_sample_whose_score_is_predicted_is_not_called_measured(run: Run) -> None:
    rows = rows_of(run)
    row = next(place for place, each in enumerate(rows) if each["measured"])
    assert Answers(run).sample({"row": str(row)})["why"] == "Its score (loss) was measured."
    for fragment in run.done("scores"):
        table = storage.read_table(run.score_shard(fragment))
        own = pa.array([4.5 if each else None for each in table["measured"].to_pylist()])
        storage.write_table(run.score_shard(fragment), table.append_column("measured_score", own))
    why = Answers(run).sample({"row": str(row)})["why"]
    assert why.startswith("Its measured score is 4.5, but the scores of all samples are predicted")


def test_a_large_source_is_searched_in_part_and_says_so(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "SEARCHED_BYTES", 110 * 6 * 4)
    assert 90 <= answers.sample({"row": "0"})["searched"] <= 110


def test_without_embeddings_there_are_no_neighbours_and_no_ranks(run: Run) -> None:
    storage.delete(run.embeddings_folder)
    answers = Answers(run)
    found = answers.sample({"row": "5"})
    assert found["nearest"] == [] and found["proxy"] is None and found["rank"] == 0
    assert not answers.run({})["embedded"]


def test_images_come_from_the_source_and_what_is_missing_has_a_reason(
    answers: Answers, source: Any
) -> None:
    source.broken = {"f001"}
    rows = {sample["id"]: sample["row"] for sample in answers.search({"limit": "240"})["samples"]}
    wanted = rows["part-0#7"], rows["part-1#7"]
    found = answers.images({"rows": ",".join(map(str, wanted))})
    assert found[str(wanted[0])]["uri"].startswith("data:image/")
    assert found[str(wanted[1])] == {"uri": "", "pixelated": False, "reason": "part-1: gone"}
    source.broken = set()  # what was unreadable is read again, what was read is held
    reads = len(source.reads)
    assert answers.images({"rows": ",".join(map(str, wanted))})[str(wanted[1])]["uri"]
    assert source.reads[reads:] == ["f001"]


def test_a_wrong_filter_is_named(answers: Answers) -> None:
    for fields, reason in (
        ({"label": "cat"}, "label: 'cat' is not a number"),
        ({"low": "nan"}, "low: 'nan' is not a number"),
        ({"keep": "1.5"}, "at most 1"),
        ({"kept": "kept"}, "give the keep fraction"),
        ({"sort": "size"}, "'size' is not one of"),
        ({"colour": "red"}, "unknown filter: colour"),
        ({"offset": "-1"}, "offset: '-1' is not a whole number"),
    ):
        with pytest.raises(ConfigError, match=reason):
            answers.search(fields)


# -- lists ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["txt", "parquet"])
def test_marks_are_written_and_moved_and_what_a_file_holds_stays(
    run: Run, tmp_path: Path, ending: str
) -> None:
    always, never = (tmp_path / f"{name}.{ending}" for name in ("always", "never"))
    old = ["part-1#4", "of another run"]
    if ending == "txt":
        always.write_text("\n".join(old))
    else:
        pq.write_table(pa.table({"sample_id": old}), always)

    def stored(path: Path) -> list[str]:
        if ending == "txt":
            return path.read_text().splitlines()
        return pq.read_table(path)["sample_id"].to_pylist()

    answers = Answers(run, str(always), str(never))
    assert ids(answers, mark="always") == ["part-1#4"]
    row = {sample["id"]: sample["row"] for sample in answers.search({"limit": "240"})["samples"]}
    answers.mark({"rows": [row["part-2#1"], row["part-1#4"]], "mark": "never"})
    assert stored(always) == ["of another run"]
    assert sorted(stored(never)) == ["part-1#4", "part-2#1"]
    answers.mark({"rows": [row["part-2#1"]], "mark": "always"})
    assert stored(always) == ["of another run", "part-2#1"] and stored(never) == ["part-1#4"]
    answers.mark({"rows": [row["part-1#4"]], "mark": "none"})
    assert stored(never) == [] and ids(answers, mark="never") == []
    found = answers.mark({"query": {"label": 2, "high": 1.5}, "mark": "never"})
    assert found["marked"] == len(stored(never)) > 5
    assert set(stored(never)) == set(ids(Answers(run, str(always), str(never)), mark="never"))
    assert f"--always-keep {always} --never-keep {never}" in found["command"]
    # the lists do what they promise
    select(run.uri, 0.5, always_keep=str(always), never_keep=str(never))
    kept = set(storage.read_table(run.keep_list("keep-0.50.parquet"))["sample_id"].to_pylist())
    assert "part-2#1" in kept and not kept & set(stored(never))


def test_a_file_that_something_else_changed_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    never = tmp_path / "never.txt"
    answers = Answers(run, never=str(never))
    never.write_text("mine\n")
    with pytest.raises(ConfigError, match="changed by something else"):
        answers.mark({"rows": [1], "mark": "never"})
    assert never.read_text() == "mine\n" and ids(answers, mark="never") == []


def test_files_that_hold_anything_else_are_refused(run: Run, tmp_path: Path) -> None:
    image = tmp_path / "a.jpg"
    image.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ConfigError, match="neither UTF-8 text"):
        Answers(run, str(image))
    damaged = tmp_path / "always.parquet"
    pq.write_table(pa.table({"sample_id": ["a"]}), damaged)
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=rf"^--always-keep: {damaged}: "):
        Answers(run, str(damaged))
    with pytest.raises(ConfigError, match="has other columns than sample_id"):
        Answers(run, run.keep_list("keep-0.30.parquet"))
    shared = tmp_path / "shared.txt"
    shared.write_text("part-1#4\n")
    with pytest.raises(ConfigError, match="the same file"):
        Answers(run, str(shared), str(shared))
    copy = tmp_path / "copy.txt"
    copy.write_text("part-1#4\n")
    with pytest.raises(ConfigError, match="share ids"):
        Answers(run, str(shared), str(copy))
    with pytest.raises(ConfigError, match="--never-keep FILE"):
        Answers(run, str(shared)).mark({"rows": [0], "mark": "never"})


def test_an_id_that_text_cannot_hold_is_refused(viewed: Viewed, tmp_path: Path) -> None:
    run = viewed(path="a\u2028b-{}")
    always, never = tmp_path / "always.txt", tmp_path / "never.txt"
    answers = Answers(run, str(always), str(never))
    with pytest.raises(ConfigError, match=r"ends in \.parquet"):
        answers.mark({"rows": [0], "mark": "always"})
    assert not always.exists() and ids(answers, mark="always") == []


def test_a_run_without_scores_or_images_is_refused(run: Run) -> None:
    storage.delete(run.scores_folder)
    with pytest.raises(RaypipeError, match="no scores here"):
        Answers(run)
    ledger = run.ledger()
    ledger["extrapolate"].detail["tables"] = {"scores": "s.parquet"}
    del ledger["index"]
    run.write_ledger(ledger)
    with pytest.raises(RaypipeError, match="raypipe attach"):
        Answers(run)
