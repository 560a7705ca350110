"""`raypipe extrapolate`: problems with tables, by id and count, and the command itself."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers import QUIET, by_id, score_files, stamps
from hypothesis import given, settings
from hypothesis import strategies as st

import raypipe
from raypipe import storage
from raypipe.cli import main
from raypipe.config import parse_config
from raypipe.distributed.context import Context
from raypipe.errors import ConfigError, RunError, SourceError, TrustError
from raypipe.report import build
from raypipe.runs.keep_files import keep_metadata
from raypipe.runs.lease import Lease
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.tables import validate
from raypipe.tables.embeddings import read_batches, usable
from raypipe.tables.fragments import plan_embeddings
from raypipe.tables.problems import ProblemCounts
from raypipe.tables.scores import read_scores
from raypipe.tables.stage import TableStage


def serial(units, function, on_result, **_: Any) -> None:
    """Replaces `run_tasks`, without Ray."""
    for unit in units:
        on_result(function(unit))


def write(path: Path | str, rows: int = 1 << 20, **columns: Any) -> str:
    """Write a Parquet file with row groups of `rows` rows; return its path."""
    storage.write_table(str(path), pa.table(columns), row_group_size=rows)
    return str(path)


def check(embeddings: str, scores: str) -> tuple[pa.Table, tuple[str, ...], dict[str, Any]]:
    """Scored samples, class names and problems of two tables."""
    problems = ProblemCounts()
    table = read_scores(scores, "score", problems)
    fragments = plan_embeddings(embeddings)
    scored, classes = validate.check_tables(fragments, table, problems, QUIET, serial)
    return scored, classes.names, problems.as_dict()


VECTORS = [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [2.0, 0.0]]


def test_what_is_wrong_with_scores_is_told_by_id_and_count(tmp_path) -> None:
    embeddings = write(tmp_path / "e.parquet", sample_id=["a", "b", "c", "d"], embedding=VECTORS)
    first = {"sample_id": ["d", None, "b", "x", "c"], "score": [1.5, 1.0, math.nan, 3.0, None]}
    second = {"sample_id": ["a", "a", None, "y", "d"], "score": [2.0, 2.0, 1.0, -math.inf, 1e300]}
    write(tmp_path / "s" / "1.parquet", **first)
    write(tmp_path / "s" / "2.parquet", **second)
    scored, classes, problems = check(embeddings, str(tmp_path / "s"))
    assert dict(zip(scored["sample_id"].to_pylist(), scored["score"].to_pylist(), strict=True)) == {
        "a": 2.0,
        "d": 1.5,
    }
    assert scored["embedding"].to_pylist() == [VECTORS[0], VECTORS[3]] and classes == ()
    assert problems == {
        "score_without_id": {"count": 2, "ids": ["1.parquet#1", "2.parquet#2"]},
        "score_not_finite": {"count": 4, "ids": ["b", "c", "y", "d"]},
        "score_repeated": {"count": 1, "ids": ["a"]},
        "score_without_embedding": {"count": 1, "ids": ["x"]},
    }
    assert "scored samples without an embedding, ignored: 1 (x)" in ProblemCounts(problems).lines()


KINDS = st.sampled_from(
    ["", "embedding_without_id", "embedding_missing", "embedding_width", "embedding_not_finite"]
)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(
        st.tuples(KINDS, st.lists(st.integers(-8, 8), min_size=3, max_size=3)),
        min_size=1,
        max_size=30,
    ),
    dtype=st.sampled_from([pa.float16(), pa.float32(), pa.float64()]),
    make=st.sampled_from([pa.list_, pa.large_list, lambda item: pa.list_(item, 3)]),
    per_group=st.integers(1, 8),
    bad=st.sampled_from([math.nan, math.inf, None]),
)
def test_every_embedding_is_used_or_left_out_for_its_reason(
    tmp_path_factory, rows, dtype, make, per_group, bad
) -> None:
    kind = make(dtype)
    if pa.types.is_fixed_size_list(kind):
        rows = [(fault if fault != "embedding_width" else "", values) for fault, values in rows]
    vectors: list[Any] = [np.array(values, np.float16).tolist() for _, values in rows]
    ids: list[str | None] = [f"id{number}" for number in range(len(rows))]
    for number, (fault, _) in enumerate(rows):
        if fault == "embedding_without_id":
            ids[number] = None
        elif fault == "embedding_missing":
            vectors[number] = None
        elif fault == "embedding_width":
            vectors[number] = vectors[number][:2]
        elif fault == "embedding_not_finite":
            vectors[number][1] = bad
    # Arrow does not convert Python's numbers to float16
    values = [
        None if v is None else [None if x is None else np.float16(x) for x in v] for v in vectors
    ]
    column = pa.array(values if dtype == pa.float16() else vectors, kind)
    path = write(
        tmp_path_factory.mktemp("e") / "e.parquet",
        per_group,
        sample_id=pa.array(ids, pa.string()),
        embedding=column,
    )
    kinds, matrices, names = [], [], []
    for fragment in plan_embeddings(path):
        for batch in read_batches(fragment):
            reasons, matrix = usable(batch, 3)
            kinds += [reason.partition(":")[0] for reason in reasons]
            matrices.append(matrix)
            names += batch.names(fragment.path)
    assert kinds == [fault for fault, _ in rows]
    expected = [values for fault, values in rows if not fault]
    np.testing.assert_array_equal(
        np.concatenate(matrices), np.array(expected, np.float32).reshape(-1, 3)
    )
    assert names == [sample_id or f"e.parquet#{number}" for number, sample_id in enumerate(ids)]


def test_files_are_cut_at_row_groups_and_names_follow_the_content(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("raypipe.tables.fragments.FRAGMENT_ROWS", 10)
    ids = [f"i{number}" for number in range(37)]
    path = write(tmp_path / "e" / "my file.parquet", 4, sample_id=ids, embedding=[[1.0]] * 37)
    fragments = plan_embeddings(str(tmp_path / "e"))
    assert [(fragment.first, fragment.rows) for fragment in fragments] == [
        (0, 8),
        (8, 8),
        (16, 8),
        (24, 8),
        (32, 5),
    ]
    assert [
        i
        for fragment in fragments
        for batch in read_batches(fragment)
        for i in batch.ids.to_pylist()
    ] == ids
    assert len({fragment.name for fragment in fragments}) == 5 and fragments[1].name.startswith(
        "my-file-000000008-"
    )
    write(path, 4, sample_id=ids, embedding=[[2.0, 3.0]] * 37)
    assert not {fragment.name for fragment in fragments} & {
        fragment.name for fragment in plan_embeddings(str(tmp_path / "e"))
    }


@pytest.mark.parametrize(
    ("label", "expected", "names"),
    [
        (pa.array([2, None, 0, -1]), [2, None, 0, None], ("0", "1", "2")),
        (pa.array([2.0, math.nan, 0.0, None]), [2, None, 0, None], ("0", "1", "2")),
        (pa.array(["owl", "cat", None, "cat"]), [1, 0, None, 0], ("cat", "owl")),
        (
            pa.array(["owl", "cat", None, "cat"]).dictionary_encode(),
            [1, 0, None, 0],
            ("cat", "owl"),
        ),
        (pa.nulls(4), [None] * 4, ()),
    ],
)
def test_labels(
    tmp_path, label: pa.Array, expected: list[int | None], names: tuple[str, ...]
) -> None:
    embeddings = write(
        tmp_path / "e.parquet", 2, sample_id=[1, 2, 3, 4], embedding=VECTORS, label=label
    )
    scores = write(
        tmp_path / "s.parquet", sample_id=["1", "2", "3", "4"], score=[1, 2, 3, 4]
    )  # 1 and "1" are one id
    scored, found, _ = check(embeddings, scores)
    assert (scored["label"].to_pylist(), found) == (expected, names)
    assert scored["score"].to_pylist() == [1, 2, 3, 4]


def test_the_width_is_that_of_most_scored_samples(tmp_path) -> None:
    vectors = [[1.0, 2.0], [1.0], [3.0, 4.0], [math.nan, 1.0], [5.0], [6.0]]
    embeddings = write(tmp_path / "e.parquet", sample_id=list("abcdef"), embedding=vectors)
    scored, _, problems = check(
        embeddings, write(tmp_path / "s.parquet", sample_id=list("abcd"), score=[1.0, 2, 3, 4])
    )
    assert scored["sample_id"].to_pylist() == ["a", "c"] and problems == {}


@pytest.mark.parametrize("rounds", [1, 3])
def test_ids_that_are_there_twice_are_told(tmp_path, monkeypatch, rounds: int) -> None:
    monkeypatch.setattr(validate, "HASHED_ROWS", -(-80 // rounds))
    ids = [f"i{number}" for number in range(80)]
    for part in range(4):
        rows = slice(20 * part, 20 * part + 20)
        write(tmp_path / "e" / f"{part}.parquet", 6, sample_id=ids[rows], embedding=[[1.0]] * 20)
    scores = write(tmp_path / "s.parquet", sample_id=ids[:3], score=[1.0, 2, 3])
    assert len(check(str(tmp_path / "e"), scores)[0]) == 3
    for number in range(60, 68):
        ids[number] = ids[number - 50]
    write(tmp_path / "e" / "3.parquet", 6, sample_id=ids[60:], embedding=[[1.0]] * 20)
    expected = r"sample_ids with more than one embedding: 8 \(i10, i11, i12, i13, i14, \.\.\.\)"
    with pytest.raises(SourceError, match=expected):
        check(str(tmp_path / "e"), scores)


def test_equal_hashes_of_different_ids_are_no_repetition(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        validate,
        "hash_ids",
        lambda ids: np.array([len(text) for text in ids.to_pylist()], np.uint64),
    )
    embeddings = write(tmp_path / "e.parquet", sample_id=["a", "b", "cc", "dd"], embedding=VECTORS)
    assert (
        len(
            check(embeddings, write(tmp_path / "s.parquet", sample_id=["a", "cc"], score=[1.0, 2]))[
                0
            ]
        )
        == 2
    )


GOOD = {"sample_id": ["a", "b", "c", "d"], "embedding": VECTORS}
SCORES = {"sample_id": ["a", "b"], "score": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("embeddings", "scores", "expected"),
    [
        (
            [{"sample_id": ["a"]}],
            SCORES,
            r"0\.parquet: no column 'embedding' \(or more than one\); the columns are sample_id",
        ),
        ([{"embedding": VECTORS}], SCORES, "no column 'sample_id'"),
        (
            [{**GOOD, "embedding": ["x"] * 4}],
            SCORES,
            "column 'embedding' is string; expected a list of float16",
        ),
        ([{**GOOD, "embedding": [[1]] * 4}], SCORES, "a list of float16"),
        (
            [{**GOOD, "sample_id": [1.0] * 4}],
            SCORES,
            "column 'sample_id' is double; expected text or whole numbers",
        ),
        ([{**GOOD, "label": [[1]] * 4}], SCORES, "column 'label' is list"),
        (
            [{**GOOD, "label": [0.5] * 4}],
            SCORES,
            "column 'label' has values that are not whole numbers",
        ),
        (
            [{**GOOD, "label": [10**7] * 4}],
            SCORES,
            "leave the column out if it holds something else",
        ),
        (
            [{**GOOD, "label": [1] * 4}, {**GOOD, "label": ["x"] * 4}],
            SCORES,
            "labels are numbers in some files and text in others",
        ),
        ([GOOD, GOOD], SCORES, r"sample_ids with more than one embedding: 4 \(a, b, c, d\)"),
        (
            [{name: pa.array(values)[:0] for name, values in GOOD.items()}],
            SCORES,
            "the files have no rows",
        ),
        (
            [GOOD],
            {"sample_id": ["a"], "rating": [1.0]},
            "no column 'score' .*; the columns are sample_id, rating",
        ),
        ([GOOD], {**SCORES, "score": ["1", "2"]}, "column 'score' is string; expected numbers"),
        (
            [GOOD],
            {"sample_id": ["a", "b", "a"], "score": [1.0, 2, 3]},
            r"samples with conflicting scores: 1 \(a\)",
        ),
        (
            [GOOD],
            {**SCORES, "score": [math.nan, None]},
            "no sample has a finite score in column 'score'",
        ),
        (
            [GOOD],
            {**SCORES, "sample_id": ["A", "B"]},
            "none of the 2 scored samples has an embedding; the first scored sample is 'A'",
        ),
        (
            [{**GOOD, "embedding": [[math.nan, 1.0], None, *VECTORS[2:]]}],
            SCORES,
            "no scored sample has a usable embedding",
        ),
    ],
)
def test_tables_that_cannot_be_used(
    tmp_path, embeddings: list[dict[str, Any]], scores: dict[str, Any], expected: str
) -> None:
    for number, columns in enumerate(embeddings):
        write(tmp_path / "e" / f"{number}.parquet", **columns)
    with pytest.raises(SourceError, match=expected):
        check(str(tmp_path / "e"), write(tmp_path / "s.parquet", **scores))


def test_files_that_cannot_be_used(tmp_path) -> None:
    with pytest.raises(SourceError, match=r"nowhere: no such file or folder$"):
        plan_embeddings(str(tmp_path / "nowhere"))
    path = Path(write(tmp_path / "e.parquet", **GOOD))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"e\.parquet: not a readable Parquet file"):
        plan_embeddings(str(path))


@pytest.mark.ray
def test_too_few_scores_for_the_method(cluster: str, tmp_path) -> None:
    stage = TableStage(
        write(tmp_path / "e.parquet", **GOOD), write(tmp_path / "s.parquet", **SCORES), "score"
    )
    context = Context(
        parse_config({"run": str(tmp_path / "out"), "source": {"uri": "x"}}),
        Run(str(tmp_path / "out")),
        QUIET,
    )
    with pytest.raises(
        SourceError, match="2 scored samples have a usable embedding, but method gnn needs 20"
    ):
        stage.execute(context, StageRecord())


def test_the_verb_is_the_function_of_the_api() -> None:
    from raypipe import api

    assert raypipe.extrapolate is api.extrapolate is raypipe.__getattr__("extrapolate")
    assert "raypipe.extrapolate" not in sys.modules, "no package hides the function"
    with pytest.raises(ConfigError, match=r"extrapolate\.method: 'magic' is not allowed"):
        raypipe.extrapolate("e", "s", "o", method="magic")


def test_an_output_in_the_wrong_place_is_refused(tmp_path) -> None:
    embeddings, scores = (
        write(tmp_path / "e" / "0.parquet", **GOOD),
        write(tmp_path / "s.parquet", **SCORES),
    )
    with pytest.raises(ConfigError, match="the output folder cannot be inside"):
        raypipe.extrapolate(str(tmp_path / "e"), scores, f"file://{tmp_path}/e/out")
    with pytest.raises(RunError, match=r"the folder holds something else, such as 0\.parquet"):
        raypipe.extrapolate(embeddings, scores, str(tmp_path / "e"))
    assert storage.names(str(tmp_path / "e")) == {"0.parquet"}


@pytest.fixture(scope="module")
def problem(s3: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Embeddings in three files on S3, some of them faulty, and ratings of half of the samples."""
    rng = np.random.default_rng(0)
    count = 420
    vectors, label = rng.normal(size=(count, 6)).astype(np.float32), rng.integers(0, 3, count)
    score = (np.sin(vectors[:, 0]) + label + 0.1 * rng.normal(size=count)).astype(np.float32)
    ids = [f"img/{number}" for number in range(count)]
    rows: list[list[float] | None] = vectors.tolist()
    rows[5], rows[6][2], rows[200] = None, math.nan, [1.0]  # type: ignore[index]
    for part in range(3):
        here = slice(140 * part, 140 * part + 140)
        columns = {
            "sample_id": ids[here],
            "embedding": rows[here],
            "label": [f"class {y}" for y in label[here]],
        }
        write(f"{s3}/own/e/{part}.parquet", 70, **columns)
    scored = sorted(rng.permutation(count)[:200].tolist())
    scores = str(tmp_path_factory.mktemp("own") / "ratings.parquet")
    write(
        scores,
        sample_id=[*(ids[row] for row in scored), "lost"],
        rating=[*score[scored].tolist(), 1.0],
    )
    faulty = {ids[5], ids[6], ids[200]}
    given = {ids[row]: score[row] for row in scored if ids[row] not in faulty}
    truth = dict(zip(ids, score.tolist(), strict=True))
    return {
        "embeddings": f"{s3}/own/e",
        "scores": f"file://{scores}",
        "given": given,
        "truth": truth,
        "faulty": faulty,
    }


@pytest.fixture(scope="module")
def made(cluster: str, problem: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Output folder of the command; `printed` next to it holds what the command printed."""
    out = tmp_path_factory.mktemp("made") / "out"
    arguments = [
        "--embeddings",
        problem["embeddings"],
        "--scores",
        problem["scores"],
        "--out",
        str(out),
    ]
    with pytest.MonkeyPatch.context() as patch, (out.parent / "printed").open("w") as printed:
        patch.setattr(sys, "stdout", printed)
        with pytest.raises(SystemExit) as stop:
            main(
                [
                    "extrapolate",
                    *arguments,
                    "--score-column",
                    "rating",
                    "--method",
                    "knn",
                    "--confidence",
                    "0.8",
                ]
            )
    assert stop.value.code == 0
    return str(out)


@pytest.mark.ray
def test_every_embedding_has_one_score_or_a_reason(made: str, problem: dict[str, Any]) -> None:
    rows, given, truth = by_id(made), problem["given"], problem["truth"]
    assert set(rows) == set(truth) - problem["faulty"]
    rejects = pa.concat_tables(
        [table for _, table in storage.iter_tables(made + "/rejects")]
    ).to_pylist()
    assert Counter(row["reason"].partition(":")[0] for row in rejects) == Counter(
        ["embedding_missing", "embedding_not_finite", "embedding_width"]
    )
    assert {row["sample_id"] for row in rejects} == problem["faulty"]
    assert {key: row["score"] for key, row in rows.items() if row["measured"]} == given
    inside = []
    for key, row in rows.items():
        assert row["lower"] <= row["score"] <= row["upper"] and row["measured"] == (
            row["lower"] == row["upper"]
        )
        if not row["measured"]:
            inside.append(row["lower"] <= truth[key] <= row["upper"])
    assert 0.68 < np.mean(inside) < 0.92
    assert {row["label"] for row in rows.values()} == {0, 1, 2}


@pytest.mark.ray
def test_the_summary_is_as_honest_as_that_of_a_run(made: str, problem: dict[str, Any]) -> None:
    from scipy.stats import spearmanr

    summary, count = json.loads(Path(made, "summary.json").read_text()), len(problem["given"])
    assert summary["counts"] == {
        "embeddings": 420,
        "samples": 417,
        "left_out": 3,
        "scored": 201,
        "measured": count,
        "extrapolated": 417 - count,
    }
    fidelity, problems = summary["fidelity"], summary["problems"]
    assert (fidelity["judged_on"], fidelity["n_held"]) == (
        "scored",
        count,
    )  # each held out once, of five parts
    assert set(fidelity["baselines"]) == {"class_mean", "knn_published", "mlp", "random"}
    folds = pa.concat_tables(
        [storage.read_table(f"{made}/extrapolator/fold-{part}.parquet") for part in range(5)]
    )
    assert fidelity["spearman"] == pytest.approx(
        spearmanr(folds["measured"], folds["predicted"]).statistic
    )
    low, high = fidelity["spearman_interval"]
    rows = by_id(made)
    others = [
        (row["score"], problem["truth"][key]) for key, row in rows.items() if not row["measured"]
    ]
    assert low - 0.05 < spearmanr(*zip(*others, strict=True)).statistic < high + 0.05
    assert summary["intervals"]["confidence"] == 0.8 and set(summary["intervals"]["of_class"]) == {
        "0",
        "1",
        "2",
    }
    assert (
        summary["learning_curve"]["points"][-1]["samples"]
        == summary["learning_curve"]["doubled"]["samples"] // 2
    )
    assert problems["score_without_embedding"] == {"count": 1, "ids": ["lost"]}
    assert problems["embedding_width"] == {"count": 1, "ids": ["img/200"]}
    printed = Path(made).parent.joinpath("printed").read_text()
    for expected in (
        f"scores      {made}/scores  (417 samples, {count} measured)",
        f"left out    {made}/rejects  (3 samples)",
        f"fidelity    Spearman {fidelity['spearman']:.2f} (95 % interval {low:.2f} to {high:.2f})",
        f"on {count} scored samples held out of the fit",
        f"class_mean {fidelity['baselines']['class_mean']['spearman']:.2f}",
        "twice as many scored samples",
    ):
        assert expected in printed


@pytest.mark.ray
def test_only_what_is_missing_is_made_again(made: str, problem: dict[str, Any]) -> None:
    before, times = (
        score_files(made),
        {folder: stamps(made, folder) for folder in ("scores", "extrapolator")},
    )
    gone = sorted(before)[1]
    storage.delete(f"{made}/scores/{gone}")
    options = {"score_column": "rating", "method": "knn", "confidence": 0.8, "progress": QUIET}
    result = raypipe.extrapolate(problem["embeddings"], problem["scores"], made, **options)
    assert score_files(made) == before and result.summary["counts"]["samples"] == 417
    after = {folder: stamps(made, folder) for folder in ("scores", "extrapolator")}
    assert after["scores"].pop(gone) != times["scores"].pop(gone)
    assert after == times
    whole = stamps(made, "scores")
    again = raypipe.extrapolate(problem["embeddings"], problem["scores"], made, **options)
    assert stamps(made, "scores") == whole and again.summary == result.summary


@pytest.mark.ray
def test_other_verbs_on_what_was_made_from_tables(
    made: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raypipe.select(made, [0.5, 0.25], "balanced") == {
        "keep-0.25.parquet": 104,
        "keep-0.50.parquet": 208,
    }
    fidelity = json.loads(Path(made, "summary.json").read_text())["fidelity"]
    metadata = keep_metadata(f"{made}/keep/keep-0.50.parquet")
    # balanced lists are cut within classes
    assert metadata["spearman"] == f"{fidelity['spearman_within']:.4f}"
    assert metadata["spearman_all"] == f"{fidelity['spearman']:.4f}"
    run = Run(made)
    records, config = run.ledger(), run.config()
    records["extrapolate"].detail["fidelity"]["spearman_interval"] = [0.1, 0.2]
    original = storage.read_bytes(run.path("run.json"))
    run.write_ledger(records)
    with pytest.raises(
        TrustError,
        match=r"More scored samples \(twice as many is predicted to add",
    ):
        raypipe.select(made, 0.5)
    storage.write_bytes(run.path("run.json"), original)
    with pytest.raises(RunError, match=r"was extrapolated from tables, .*summary\.json"):
        build(run)
    with pytest.raises(RunError, match="written by `raypipe extrapolate`"):
        raypipe.run(
            {"run": made, "source": {"uri": "digits://", "format": "digits"}}, progress=QUIET
        )
    assert run.config() == config and config.extrapolate.method == "knn"
    with pytest.raises(SystemExit):
        main(["status", made])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "run",
        "extrapolate",
        "spent",
    ] and "417 samples" in lines[1]


@pytest.mark.ray
def test_changed_scores_make_everything_anew_and_the_output_may_be_on_s3(
    cluster: str, s3: str, problem: dict[str, Any], tmp_path, capsys
) -> None:
    given = problem["given"]
    embeddings = problem["embeddings"] + "/0.parquet"
    out = f"{s3}/own/out"
    for factor in (1, -2):
        scores = write(
            tmp_path / "s.parquet",
            sample_id=list(given),
            score=[factor * float(value) for value in given.values()],
        )
        result = raypipe.extrapolate(embeddings, scores, out, method="knn-published")
        rows = by_id(out)
        assert all(
            row["score"] == factor * given[key] for key, row in rows.items() if row["measured"]
        )
        assert (
            result.summary["problems"]["score_without_embedding"]["count"]
            == len(given) - result.summary["counts"]["measured"]
        )
    assert "settings, scores or embeddings changed: running it again" in capsys.readouterr().err
    with Lease(Run(out)), pytest.raises(RunError, match="in use by another driver"):
        raypipe.extrapolate(embeddings, scores, out, method="knn-published", progress=QUIET)
