"""Keep-lists by every strategy and option from files; the choice is tested in tests/selection."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raypipe import cli, storage
from raypipe.api import select as select_again
from raypipe.config import SelectSettings, parse_config
from raypipe.distributed.context import Context
from raypipe.errors import ConfigError, RunError, TrustError
from raypipe.progress import Progress
from raypipe.runs import score_stream
from raypipe.runs.keep_files import keep_metadata
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.runs.score_stream import read_ids, unknown_id_notes
from raypipe.selection import STRATEGIES, near_duplicates
from raypipe.sources.id_sampling import in_sample
from raypipe.stages.select import near_duplicates as cluster_by_cluster
from raypipe.stages.select.options import refuse_unused_options
from raypipe.stages.select.recall import held_out_recall
from raypipe.stages.select.stage import SelectStage, make_keep_lists, write_keep_lists

SHARDS, ROWS = 5, 40
SAMPLES = SHARDS * ROWS


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Scores and embeddings; in each shard, pairs of samples have similar embeddings."""
    run, draw = Run(str(tmp_path / "run")), np.random.default_rng(0)
    storage.write_json(
        run.path("index", "classes.json"), {"names": ["cat", "dog", "owl"], "numeric": False}
    )
    for shard in range(SHARDS):
        rows = 0 if shard == 3 else ROWS if shard < 3 else 2 * ROWS
        label, score = draw.integers(3, size=rows), draw.normal(size=rows).astype(np.float32)
        vectors = draw.normal(size=(rows // 2, 8)).repeat(2, 0) + 0.01 * draw.normal(size=(rows, 8))
        ids = pa.array([f"{shard}/é{row}" for row in range(rows)], pa.string())
        named = {"sample_id": ids, "label": pa.array(label, pa.int32())}
        storage.write_table(
            run.path("scores", f"{shard}.parquet"), pa.table({**named, "score": score})
        )
        values = pa.array(vectors.astype(np.float16).reshape(-1))
        loss = pa.array(draw.exponential(size=rows).astype(np.float32))
        hit = np.random.default_rng(shard).random(rows) < np.array([0.9, 0.5, 0.7])[label]
        embedding = pa.FixedSizeListArray.from_arrays(values, 8)
        storage.write_table(
            run.path("embeddings", f"{shard}.parquet"),
            pa.table(
                {
                    **named,
                    "embedding": embedding,
                    "prediction": pa.array(np.where(hit, label, (label + 1) % 3), pa.int32()),
                    "loss": loss,
                    "margin": pa.array((np.arange(rows) + shard / 9).astype(np.float32)),
                }
            ),
        )
    detail = {"measured": SAMPLES, "score": "moso"}
    run.write_ledger({"extrapolate": StageRecord(state="done", samples=SAMPLES, detail=detail)})
    run.write_config(parse_config({"run": run.uri, "source": {"uri": "x"}}))
    return run


def kept(run: Run, fraction: str = "0.50") -> list[str]:
    return pq.read_table(run.path("keep", f"keep-{fraction}.parquet"))["sample_id"].to_pylist()


def column(run: Run, folder: str, name: str) -> dict[str, float]:
    tables = [table for _, table in storage.iter_tables(run.path(folder), ["sample_id", name])]
    table = pa.concat_tables(tables)
    return dict(zip(table["sample_id"].to_pylist(), table[name].to_pylist(), strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_writes_its_list_and_says_how(run: Run, strategy: str) -> None:
    settings = SelectSettings(keep=(0.25,), strategy=strategy, strata=5)
    assert write_keep_lists(run, settings) == {"keep-0.25.parquet": 50}
    uri = run.path("keep", "keep-0.25.parquet")
    assert pq.read_schema(uri).names == ["sample_id", "label", "score"]
    about = keep_metadata(uri)
    assert about["strategy"] == strategy
    expected = {
        "mixed": {"easy_fraction": 0.5, "difficulty": "loss"},
        "random": {"seed": 0},
        "ccs": {
            "seed": 0,
            "difficulty": "loss",
            "hard_cutoff": "auto",
            "strata": 5,
            "by_class": True,
        },
        "beta": {"seed": 0, "beta_exponent": 4.0},
        "band": {"difficulty": "loss", "hard_cutoff": "auto", "by_class": True},
        "d2": {"difficulty": "loss", "hard_cutoff": "auto", "by_class": True},
        "infomax": {"difficulty": "loss", "hard_cutoff": "auto", "by_class": True},
        "coverage": {
            "difficulty": "loss",
            "hard_cutoff": "auto",
            "strata": 5,
            "by_class": True,
        },
        "typical": {"by_class": True},
    }
    assert json.loads(about.get("options", "{}")) == expected.get(strategy, {})


def test_recall_quotas_go_by_predictions_of_proxies_that_did_not_see_the_samples(
    run: Run,
) -> None:
    label = np.array(list(column(run, "embeddings", "label").values()))
    hit = np.array(list(column(run, "embeddings", "prediction").values())) == label
    recall = [(hit[label == y].sum() + 1) / ((label == y).sum() + 2) for y in range(3)]
    assert held_out_recall(run) == pytest.approx(recall)

    settings = SelectSettings(keep=(0.25,), strategy="random", quotas="recall")
    write_keep_lists(run, settings)
    about = keep_metadata(run.path("keep", "keep-0.25.parquet"))
    assert json.loads(about["options"]) == {"seed": 0, "by_class": True, "quotas": "recall"}
    table = pq.read_table(run.path("keep", "keep-0.25.parquet"))
    shares = np.bincount(table["label"].to_numpy()) / np.bincount(label)
    expected = (1 - np.array(recall)) * 50 / ((1 - np.array(recall)) * np.bincount(label)).sum()
    assert shares == pytest.approx(expected, abs=1 / np.bincount(label).min())

    # with one proxy, only samples outside the seed set count
    one = {"run": run.uri, "source": {"uri": "x"}, "proxy": {"parts": 1}}
    run.write_config(parse_config(one | {"seed": {"fraction": 0.5}}))
    ids = list(column(run, "embeddings", "label"))
    rule = in_sample(0.5, run.config().seed.seed)
    outside = np.array([not rule(name) for name in ids])
    few = [
        (hit[outside & (label == y)].sum() + 1) / ((outside & (label == y)).sum() + 2)
        for y in range(3)
    ]
    assert held_out_recall(run) == pytest.approx(few)
    assert few != pytest.approx(recall)


def test_ccs_cuts_lists_within_each_class_unless_told_otherwise(run: Run) -> None:
    write_keep_lists(run, SelectSettings(keep=(0.25,), strategy="ccs"))
    about = keep_metadata(run.path("keep", "keep-0.25.parquet"))
    assert about["strategy"] == "ccs" and json.loads(about["options"])["by_class"]
    for settings, within in (
        (SelectSettings(strategy="top"), False),
        (SelectSettings(strategy="ccs", by_class=False), False),
    ):
        assert settings.within_classes is within
        write_keep_lists(run, settings.model_copy(update={"keep": (0.25,)}))
        assert "by_class" not in json.loads(
            keep_metadata(run.path("keep", "keep-0.25.parquet")).get("options", "{}")
        )


@pytest.mark.parametrize("rows", [1, 70, 1 << 16])
@pytest.mark.parametrize("strategy", ["ccs", "top", "normalized"])
def test_lists_are_the_same_from_memory_and_from_files(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, rows: int
) -> None:
    always, never = (str(tmp_path / name) for name in ("always.txt", "never.txt"))
    Path(always).write_text("4/é3\n0/é1\n0/é2\n", encoding="utf-8")
    Path(never).write_text("2/é39\n1/é0\n", encoding="utf-8")
    settings = SelectSettings(
        strategy=strategy, keep=(0.3, 0.5), always_keep=always, never_keep=never
    )
    read: list[str] = []
    plain = score_stream.ScoreStream._read
    monkeypatch.setattr(
        score_stream.ScoreStream,
        "_read",
        lambda self, file, with_ids: read.append(file) or plain(self, file, with_ids),
    )
    monkeypatch.setattr(score_stream, "CHUNK_ROWS", rows)
    lists, passes = [], []
    for most, compressed in ((0, 4), (1 << 20, 1 << 20), (1 << 20, 4)):
        monkeypatch.setattr(score_stream, "CACHE_BYTES", most)
        monkeypatch.setattr(score_stream, "EXPANSION", compressed)
        read.clear()
        write_keep_lists(run, settings)
        lists.append(
            {
                file: storage.read_bytes(run.path("keep", file))
                for file in sorted(storage.names(run.path("keep")))
            }
        )
        passes.append(len(read) / SHARDS)
    assert lists[0] == lists[1] == lists[2] and len(lists[0]) == 2
    # in memory: once for lists of ids and once for the rest, or without and then with ids
    assert passes[2] == 2 and passes[1] in (2, 3) and passes[0] > passes[1]
    assert set(kept(run)) >= {"4/é3", "0/é1", "0/é2"} and not set(kept(run)) & {"2/é39", "1/é0"}


def test_difficulty_is_the_aum_of_proxies_that_did_not_see_the_samples(run: Run) -> None:
    margin = column(run, "embeddings", "margin")
    write_keep_lists(
        run, SelectSettings(strategy="band", keep=(0.5,), difficulty="aum", by_class=False)
    )
    assert set(kept(run)) == set(sorted(margin, key=lambda name: margin[name])[50:150])
    about = json.loads(keep_metadata(run.path("keep", "keep-0.50.parquet"))["options"])
    assert about["difficulty"] == "aum"
    one = {"run": run.uri, "source": {"uri": "x"}, "proxy": {"parts": 1}}
    run.write_config(parse_config(one))
    with pytest.raises(ConfigError, match=r"difficulty: aum needs the margins of proxies that"):
        write_keep_lists(run, SelectSettings(strategy="ccs", keep=(0.5,), difficulty="aum"))


def test_difficulty_is_el2n_only_where_that_is_the_score(run: Run) -> None:
    settings = SelectSettings(strategy="ccs", keep=(0.5,), difficulty="el2n")
    with pytest.raises(ConfigError, match=r"el2n needs a run whose score is el2n.*is moso\. Use"):
        write_keep_lists(run, settings)
    detail = {"measured": SAMPLES, "score": "el2n"}
    run.write_ledger({"extrapolate": StageRecord(state="done", samples=SAMPLES, detail=detail)})
    write_keep_lists(run, settings)
    about = json.loads(keep_metadata(run.path("keep", "keep-0.50.parquet"))["options"])
    by_el2n = kept(run)
    write_keep_lists(run, settings.model_copy(update={"difficulty": "score"}))
    assert about["difficulty"] == "el2n" and by_el2n == kept(run)
    one = {"run": run.uri, "source": {"uri": "x"}, "measure": {"el2n": {"at": "trajectory"}}}
    run.write_config(parse_config(one))
    with pytest.raises(ConfigError, match=r"el2n needs a run"):
        write_keep_lists(run, settings)


def test_difficulty_is_the_score_where_that_is_one(run: Run) -> None:
    settings = SelectSettings(keep=(0.5,), strategy="mixed", easy_fraction=1.0)
    for score, folder, name in (("moso", "embeddings", "loss"), ("el2n", "scores", "score")):
        records = run.ledger()
        records["extrapolate"].detail["score"] = score
        run.write_ledger(records)
        write_keep_lists(run, settings)
        value = column(run, folder, name)
        assert set(kept(run)) == set(sorted(value, key=lambda sample: value[sample])[:100])


def test_losses_of_other_samples_are_noticed(run: Run) -> None:
    table = storage.read_table(run.path("embeddings", "0.parquet"))
    storage.write_table(
        run.path("embeddings", "0.parquet"), table.take(list(range(ROWS - 1, -1, -1)))
    )
    with pytest.raises(RunError, match="hold different samples"):
        write_keep_lists(run, SelectSettings(strategy="beta"))
    storage.delete(run.path("embeddings", "0.parquet"))
    for settings in (
        SelectSettings(strategy="beta"),
        SelectSettings(strategy="top", near_duplicates=0.9),
    ):
        with pytest.raises(RunError, match=r"0\.parquet"):
            write_keep_lists(run, settings)


def test_listed_ids_are_kept_or_not_and_unknown_ones_told(run: Run, tmp_path: Path) -> None:
    write_keep_lists(run, SelectSettings(strategy="top", keep=(0.5,)))
    (tmp_path / "never.txt").write_text("\r\n".join([*kept(run)[:7], "", "gone"]), encoding="utf-8")
    low = sorted(set(column(run, "scores", "score")) - set(kept(run)))[:9]
    pq.write_table(
        pa.table({"sample_id": [*low, "a", "b", "c", "d", "e", "f", None]}),
        tmp_path / "always.parquet",
    )
    settings = SelectSettings(
        strategy="top",
        keep=(0.5,),
        always_keep=str(tmp_path / "always.parquet"),
        never_keep=str(tmp_path / "never.txt"),
        min_per_class=2,
    )
    first = kept(run)[:7]
    detail = make_keep_lists(run, settings.model_copy(update={"keep": (0.5,)})).ledger_detail()
    assert len(kept(run)) == 100 and set(low) <= set(kept(run)) and not set(first) & set(kept(run))
    assert unknown_id_notes(detail["marked"]) == [
        "select.always_keep: 6 of its ids are not among the scores (a, b, c, d, e, ...)",
        "select.never_keep: 1 of its ids are not among the scores (gone)",
    ]
    about = json.loads(keep_metadata(run.path("keep", "keep-0.50.parquet"))["options"])
    assert about == {
        "always_keep": 9,
        "always_keep_unknown": 6,
        "never_keep": 7,
        "never_keep_unknown": 1,
        "min_per_class": 2,
    }


def test_a_list_of_ids_that_changes_makes_the_stage_anew(run: Run, tmp_path: Path) -> None:
    (tmp_path / "never.txt").write_text("0/é1\n")
    config = parse_config(
        {
            "run": run.uri,
            "source": {"uri": "x"},
            "select": {"never_keep": str(tmp_path / "never.txt")},
        }
    )
    stage, context, record = (
        SelectStage(),
        Context(config, run, Progress(quiet=True)),
        StageRecord(),
    )
    stage.execute(context, record)
    assert stage.complete(context, record)
    (tmp_path / "never.txt").write_text("0/é1\n0/é2\n")
    assert not stage.complete(context, record)
    (tmp_path / "never.txt").unlink()
    assert not stage.complete(context, record)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        (b"\xff\xfe\x00a", "neither UTF-8 text"),
        (b"PAR1 cut", "not a readable Parquet file"),
    ],
)
def test_a_list_of_ids_that_cannot_be_read_is_refused(
    tmp_path: Path, content: bytes | None, expected: str
) -> None:
    if content is not None:
        (tmp_path / "ids").write_bytes(content)
    with pytest.raises(ConfigError, match=f"select.never_keep: .*{expected}"):
        read_ids(str(tmp_path / "ids"), "select.never_keep")


def test_a_table_without_ids_and_ids_in_both_lists_are_refused(run: Run, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ConfigError, match="has no column sample_id; the columns are: id"):
        select_again(run.uri, 0.5, always_keep=str(tmp_path / "other.parquet"))
    (tmp_path / "a.txt").write_text("x\n0/é1\n")
    (tmp_path / "b.txt").write_text("0/é1\ny\n")
    with pytest.raises(ConfigError, match=r"1 ids are in both always_keep and never_keep \(0/é1\)"):
        select_again(
            run.uri, 0.5, always_keep=str(tmp_path / "a.txt"), never_keep=str(tmp_path / "b.txt")
        )
    assert storage.names(run.path("keep")) == set()


@pytest.mark.parametrize("small", [False, True])
def test_of_near_duplicates_the_higher_score_stays(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    if small:  # many clusters, few of them held at a time
        monkeypatch.setattr(near_duplicates, "CLUSTER_SIZE", 20)
        monkeypatch.setattr(cluster_by_cluster, "HELD_BYTES", 1000)
    (tmp_path / "always.txt").write_text("0/é0\n0/é1\n")
    settings = SelectSettings(
        strategy="top", keep=(0.4,), near_duplicates=0.99, always_keep=str(tmp_path / "always.txt")
    )
    detail = make_keep_lists(run, settings.model_copy(update={"keep": (0.4,)})).ledger_detail()
    score, names = column(run, "scores", "score"), set(kept(run, "0.40"))
    pairs = [
        (f"{shard}/é{row}", f"{shard}/é{row + 1}")
        for shard in range(SHARDS)
        for row in range(0, 80, 2)
        if f"{shard}/é{row}" in score
    ]
    assert len(names) == 80 and {"0/é0", "0/é1"} <= names
    both = [pair for pair in pairs if set(pair) <= names and pair != ("0/é0", "0/é1")]
    if not small:
        assert not both and detail["marked"]["near_duplicates"] == 99
        assert all((min(pair, key=score.__getitem__)) not in names for pair in pairs[1:])
    else:  # a pair on both sides of a border is not seen
        assert (
            detail["marked"]["clusters"] == 10
            and len(both) <= 8
            and detail["marked"]["near_duplicates"] >= 85
        )
    with pytest.raises(ConfigError, match="near duplicates"):
        make_keep_lists(run, settings.model_copy(update={"keep": (0.9,)}))


def test_a_random_list_needs_no_faithful_scores(run: Run) -> None:
    records = run.ledger()
    records["extrapolate"].detail |= {
        "measured": 10,
        "fidelity": {"spearman": 0.0, "spearman_interval": [-0.1, 0.1]},
    }
    run.write_ledger(records)
    with pytest.raises(TrustError):
        write_keep_lists(run, SelectSettings(strategy="moderate"))
    write_keep_lists(run, SelectSettings(strategy="random", keep=(0.5,)))
    assert keep_metadata(run.path("keep", "keep-0.50.parquet"))["forced"] == "false"


def test_weights_are_a_column(run: Run) -> None:
    write_keep_lists(
        run, SelectSettings(keep=(0.5,), strategy="ccs", weights="inclusion", strata=4)
    )
    table = pq.read_table(run.path("keep", "keep-0.50.parquet"))
    assert (
        table.schema.names == ["sample_id", "label", "score", "weight"]
        and table.schema.field("weight").type == pa.float32()
    )
    assert (
        np.mean(table["weight"].to_numpy()) == pytest.approx(1, rel=1e-5)
        and len(set(table["weight"].to_pylist())) > 1
    )


def test_scores_from_tables_have_neither_losses_nor_embeddings(run: Run) -> None:
    records = run.ledger()
    records["extrapolate"].detail = {
        "measured": SAMPLES,
        "tables": {"embeddings": "e", "scores": "s"},
    }
    run.write_ledger(records)
    with pytest.raises(
        ConfigError, match=r"beta needs the proxy's loss, which scores from tables do not have$"
    ):
        write_keep_lists(run, SelectSettings(strategy="beta"))
    with pytest.raises(ConfigError, match=r"set select\.difficulty: score$"):
        write_keep_lists(run, SelectSettings(strategy="ccs"))
    for strategy in ("d2", "infomax", "coverage"):
        with pytest.raises(ConfigError, match=rf"{strategy} needs embeddings/, which scores from"):
            write_keep_lists(run, SelectSettings(strategy=strategy, difficulty="score"))
    with pytest.raises(ConfigError, match=r"quotas: recall needs the proxy's predictions"):
        write_keep_lists(run, SelectSettings(strategy="top", quotas="recall"))
    with pytest.raises(ConfigError, match="difficulty: aum needs the margins"):
        write_keep_lists(run, SelectSettings(strategy="band", difficulty="aum"))
    with pytest.raises(ConfigError, match="no embeddings/ to search"):
        write_keep_lists(run, SelectSettings(strategy="top", near_duplicates=0.9))
    assert write_keep_lists(
        run, SelectSettings(strategy="ccs", difficulty="score", keep=(0.5,))
    ) == {"keep-0.50.parquet": 100}


@pytest.mark.parametrize("line", ['"{}"', "{},why", '["{}", "x"]', "  {}"])
def test_lists_whose_lines_hold_more_than_an_id_are_refused(
    run: Run, tmp_path: Path, line: str
) -> None:
    write_keep_lists(run, SelectSettings(strategy="top", keep=(0.5,)))
    some_id = kept(run)[0]
    (tmp_path / "never.txt").write_text(line.format(some_id) + "\n", encoding="utf-8")
    settings = SelectSettings(strategy="top", keep=(0.5,), never_keep=f"{tmp_path}/never.txt")
    with pytest.raises(ConfigError, match=f"contains {some_id!r}; write one id a line"):
        write_keep_lists(run, settings)


@pytest.mark.parametrize(
    ("strategy", "option"),
    [("random", "hard_cutoff"), ("top", "beta_exponent"), ("ccs", "easy_fraction")],
)
def test_options_of_other_strategies_are_refused(strategy: str, option: str) -> None:
    settings = SelectSettings(strategy=strategy)
    with pytest.raises(ConfigError, match=f"select.{option} has no effect on .* {strategy}"):
        refuse_unused_options(settings, {option, "keep", "seed"})
    refuse_unused_options(SelectSettings(strategy="auto"), {option})


def test_the_command_line_has_every_option(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO", logger="raypipe")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "never.txt").write_text("0/é1\ngone\n")
    (tmp_path / "always.txt").write_text("0/é2\n")
    given = "--strategy ccs --by-class --keep 0.3 --seed 4 --difficulty score --hard-cutoff 0.2 --strata 7 --weights class --min-per-class 1 --quotas equal"
    more = "--near-duplicates 0.999 --always-keep always.txt --never-keep never.txt"
    with pytest.raises(SystemExit) as stop:
        cli.main(["select", run.uri, *given.split(), *more.split()])
    assert (
        stop.value.code or 0
    ) == 0 and capsys.readouterr().out == "keep-0.30.parquet  60 samples\n"
    assert caplog.messages == [
        "note: select.never_keep: 1 of its ids are not among the scores (gone)"
    ]
    options = json.loads(keep_metadata(run.path("keep", "keep-0.30.parquet"))["options"])
    assert options.pop("near_duplicates_left_out") > 50
    assert options == {
        "seed": 4, "difficulty": "score", "hard_cutoff": 0.2, "strata": 7, "weights": "class", "min_per_class": 1,
        "by_class": True, "quotas": "equal", "near_duplicates": 0.999, "always_keep": 1, "always_keep_unknown": 0, "never_keep": 1, "never_keep_unknown": 1,
    }  # fmt: skip
    for bad, expected in (
        ("--strategy best", "'best'"),
        ("--strategy mixed --easy-fraction 2", "select.easy_fraction: 2"),
        ("--strategy beta --beta-exponent 0", "select.beta_exponent: 0"),
        ("--difficulty hard", "select.difficulty"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["select", run.uri, *bad.split()])
        assert stop.value.code == 2 and expected in capsys.readouterr().err
    with pytest.raises(ConfigError, match="unknown setting; did you mean 'strata'"):
        select_again(run.uri, 0.5, "ccs", stratas=3)
