"""The whole job on files: Parquet and the run on S3, and a folder with unreadable images."""

from __future__ import annotations

import io
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_inputs import MAX_PIXELS, BadSample, bad_images
from helpers import QUIET, UNREADABLE, by_id, digit_pngs, small_config, stamps

import raypipe
from raypipe import storage
from raypipe.config import load_config
from raypipe.errors import RejectError, SourceError
from raypipe.runs.embeddings import COLUMNS, nodes_of
from raypipe.runs.manifests import EpochRecord, SeedManifest
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import read_shard
from raypipe.runs.status import describe_run
from raypipe.stages.extrapolate.model import load_extrapolator

pytestmark = pytest.mark.ray


def parquet(images: list[bytes], labels: list[int | None], names: list[str]) -> bytes:
    column = [{"bytes": image, "path": None} for image in images]
    buffer = io.BytesIO()
    pq.write_table(
        pa.table({"image": column, "label": labels, "name": names}), buffer, row_group_size=50
    )
    return buffer.getvalue()


@pytest.mark.parametrize(
    "rehearsal", [False, pytest.param(True, marks=pytest.mark.long)], ids=["plain", "rehearsed"]
)
def test_parquet_and_run_on_s3(cluster: str, s3: str, rehearsal: bool) -> None:
    images, labels = digit_pngs(400)
    for part in range(2):
        rows = range(part * 200, part * 200 + 200)
        content = parquet(
            [images[row] for row in rows],
            [labels[row] for row in rows],
            [f"digit-{row}" for row in rows],
        )
        storage.write_bytes(f"{s3}/data/train-{part}.parquet", content)
    storage.write_bytes(
        f"{s3}/data/train-2.parquet", content[:5000]
    )  # half a file must not stop the run
    odd = [
        *bad_images(),
        BadSample("no-label", images[0], None),
        BadSample("too-large", images[0], 10, words="10 is outside 0..9"),
    ]
    odd += [
        BadSample(
            f"digit-{row}", images[row], labels[row], words="duplicate id: also in train-0.parquet"
        )
        for row in range(5)
    ]
    content = parquet(
        [item.image for item in odd], [item.label for item in odd], [item.key for item in odd]
    )  # type: ignore[misc]
    storage.write_bytes(f"{s3}/data/train-3.parquet", content)
    wrong = {item.key: item.words for item in odd if item.words}
    right = [f"digit-{row}" for row in range(400)] + [item.key for item in odd if not item.words]
    assert len(right) == 410
    run = f"{s3}/runs/first-{rehearsal}"
    config = small_config(
        run,
        f"source.uri={s3}/data/train-{{0..4}}.parquet",  # the last one does not exist
        "source.format=auto",
        "source.limit=null",
        "source.fragment_samples=100",
        "source.id_column=name",
        "source.num_classes=10",
        f"source.max_pixels={MAX_PIXELS}",
        "source.max_reject_fraction=0.3",
        "extrapolate.score=el2n",
        f"extrapolate.rehearsal={str(rehearsal).lower()}",
        "extrapolate.judge_published=true",
        "measure.max_actors=2",
        "embed.max_actors=2",
    )
    result = raypipe.run(config, progress=QUIET)
    rows_by_id = by_id(run)
    assert set(rows_by_id) == set(right)
    assert [rows_by_id[f"digit-{row}"]["label"] for row in range(200, 205)] == labels[200:205]
    assert rows_by_id["no-label"]["label"] is None
    assert result.summary["counts"]["samples"] == 410
    rejects = pa.concat_tables(
        [table for _, table in storage.iter_tables(f"{run}/rejects")]
    ).to_pylist()
    wrong |= {
        "train-2.parquet": "cannot be read: not a readable Parquet file",
        "train-4.parquet": "cannot be read: no such file",
    }
    assert sorted(row["sample_id"] for row in rejects) == sorted(wrong)
    for row in rejects:
        assert re.search(wrong[row["sample_id"]], row["reason"])
    source = load_config(f"{run}/config.yaml").source
    assert (source.format, source.image_column, source.label_column) == (
        "parquet",
        "image",
        "label",
    )
    assert len(storage.read_table(f"{run}/keep/keep-0.50.parquet")) == 205
    assert b"<html" in storage.read_bytes(f"{run}/report/index.html")
    # a score that needs training on the sample is rehearsed on half of the seed set
    about = storage.read_json(f"{run}/extrapolator/extrapolator.json")
    fidelity, held_out = about["fidelity"], about["fidelity_seed"]
    assert fidelity["judged_on"] == ("rehearsal" if rehearsal else "seed")
    assert not storage.exists(f"{run}/extrapolator/audit.parquet")
    assert set(fidelity["baselines"]) >= {"class_mean", "knn_published", "proxy_loss", "random"}
    # with every baseline where it is judged on the seed set
    assert set(held_out["baselines"]) >= {
        "class_mean",
        "gnn_published",
        "knn_published",
        "proxy_loss",
        "random",
    }
    assert set(held_out["baselines"]["gnn_published"]["overlap_interval"]) == {"0.25", "0.5"}
    if rehearsal:
        assert_rehearsed(run)
    before = {file.path: file.stamp for file in storage.listing(f"{run}/scores")}
    gone = sorted(before)[0]
    storage.delete(f"{run}/scores/{gone}")
    raypipe.run(config, progress=QUIET)
    assert {file.path: file.stamp for file in storage.listing(f"{run}/scores")} == before
    if rehearsal:
        plain = config.model_copy(
            update={"extrapolate": config.extrapolate.model_copy(update={"rehearsal": False})}
        )
        raypipe.run(plain, progress=QUIET, until="extrapolate")
        assert (
            storage.read_json(f"{run}/extrapolator/extrapolator.json")["fidelity"]["judged_on"]
            == "seed"
        )
    assert not storage.names(f"{run}/rehearsal") and "rehearse" not in Run(run).ledger()
    assert raypipe.select(run, 0.1) == {"keep-0.10.parquet": 41}
    secrets = [
        storage.read_bytes(f"{run}/{file.path}")
        for file in storage.listing(run)
        if "parquet" not in file.path
    ]
    assert not any(b"AWS_SECRET" in content or b"aws_secret" in content for content in secrets)


def assert_rehearsed(run: str) -> None:
    """Check the rehearsal: half of the seed set, nothing of the other half, and the scores use it."""
    ledger, inner = Run(run).ledger(), Run(f"{run}/rehearsal")
    seed, half = SeedManifest.read(Run(run)), SeedManifest.read(inner)
    assert 0.3 < half.samples / seed.samples < 0.7
    assert ledger["rehearse"].detail["trained"] == half.samples == ledger["rehearse"].samples
    seen = pa.concat_tables(
        [table for _, table in storage.iter_tables(f"{inner.uri}/seen")]
    ).to_pylist()
    ids = {shard: read_shard(inner, shard)[0] for shard in half.shards}
    trained = {name for names in ids.values() for name in names}
    assert (
        len(seen) == seed.samples
        and {row["sample_id"] for row in seen if row["trained"]} == trained
    )
    scored = pa.concat_tables([table for _, table in storage.iter_tables(f"{inner.uri}/measured")])
    assert set(scored["sample_id"].to_pylist()) == trained
    for proxy in (Run(run), inner):  # no two trainings start alike
        assert len(EpochRecord.read_all(proxy)) == 4
    assert EpochRecord.read_all(Run(run))[0].loss != EpochRecord.read_all(inner)[0].loss
    predicted = storage.read_table(f"{run}/extrapolator/rehearsal.parquet")
    assert set(predicted["sample_id"].to_pylist()) == {row["sample_id"] for row in seen} - trained
    everyone = {
        row["sample_id"]: row
        for _, table in storage.iter_tables(f"{run}/measured")
        for row in table.to_pylist()
    }
    assert [everyone[row["sample_id"]]["el2n"] for row in predicted.to_pylist()] == predicted[
        "measured"
    ].to_pylist()
    # the written scores are those of the map
    model, fragment = (
        load_extrapolator(Run(run).config(), Run(run)),
        sorted(Run(run).done("embeddings"))[0],
    )
    assert model.transfer is not None
    table = storage.read_table(f"{run}/embeddings/{fragment}.parquet", COLUMNS)
    wanted = dict(
        zip(table["sample_id"].to_pylist(), model.predict(nodes_of(table)).tolist(), strict=True)
    )
    rows = [
        row
        for row in storage.read_table(f"{run}/scores/{fragment}.parquet").to_pylist()
        if not row["measured"]
    ]
    assert rows and all(
        row["score"] == pytest.approx(wanted[row["sample_id"]], rel=1e-5) for row in rows
    )


def test_what_cannot_be_read_is_rejected_with_its_reason(of_folders: str) -> None:
    run, bad = Run(of_folders), set(UNREADABLE)
    rejects = pa.concat_tables(
        [table for _, table in storage.iter_tables(run.path("rejects"))]
    ).to_pylist()
    assert {row["sample_id"] for row in rejects} == bad
    assert all(len(row["reason"]) > 8 for row in rejects)
    embedded = pa.concat_tables(
        [table for _, table in storage.iter_tables(run.path("embeddings"), ["sample_id"])]
    )
    assert len(set(embedded["sample_id"].to_pylist())) == len(embedded) == 300
    assert not set(embedded["sample_id"].to_pylist()) & bad
    assert run.record("embed").detail["rejects"] == 3


def test_a_rotten_source_stops_the_run_and_another_limit_resumes_it(of_folders: str) -> None:
    config, run = Run(of_folders).config(), Run(of_folders)
    strict = config.model_copy(
        update={"source": config.source.model_copy(update={"max_reject_fraction": 0.0})}
    )
    before = {
        folder: stamps(of_folders, folder)
        for folder in ("index", "seed", "proxy", "embeddings", "rejects")
    }
    raypipe.run(strict, until="embed", progress=QUIET)
    assert {folder: stamps(of_folders, folder) for folder in before} == before, (
        "the limit alone redoes nothing that is finished"
    )
    first = min(run.done("rejects"))
    for fragment in run.done("embeddings") - {first}:
        storage.delete(run.path("embeddings", f"{fragment}.parquet"))
        storage.delete(run.path("rejects", f"{fragment}.parquet"))
    with pytest.raises(
        RejectError,
        match=r"^[123] of \d+ samples read so far were rejected .* allows 0 % of 303\. [12] x ",
    ):
        raypipe.run(
            strict, until="embed", progress=QUIET
        )  # by the rejects of the first attempt, before anything is read
    assert run.done("embeddings") == {first}
    storage.delete(run.path("embeddings", f"{first}.parquet"))
    with pytest.raises(
        RejectError,
        match=r"set source\.max_reject_fraction to more than 0\.\d+; finished work is kept",
    ):
        raypipe.run(strict, until="embed", progress=QUIET)  # while it is read
    assert any(
        "embed       failed" in line and "samples read so far were rejected" in line
        for line in describe_run(of_folders)
    )
    raypipe.run(config, until="embed", progress=QUIET)
    assert run.record("embed").detail["rejects"] == len(UNREADABLE)


def test_a_source_that_cannot_be_used_stops_before_any_training(cluster: str, tmp_path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.parquet").write_bytes(b"PAR1 cut")
    config = small_config(
        str(tmp_path / "run"), f"source.uri={tmp_path}/data", "source.format=parquet"
    )
    with pytest.raises(SourceError, match=r"nothing can be read \(a\.parquet: "):
        raypipe.run(config, progress=QUIET)
    with pytest.raises(SourceError, match="missing"):
        raypipe.run(
            small_config(
                str(tmp_path / "other"), f"source.uri={tmp_path}/missing", "source.format=auto"
            ),
            progress=QUIET,
        )
