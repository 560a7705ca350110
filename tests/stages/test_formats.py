"""The whole job on files: Parquet and run both on an S3 server, and a folder with images nobody can read."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import QUIET, UNREADABLE, by_id, digit_pngs, small_config

import raypipe
from raypipe import storage
from raypipe.errors import SourceError
from raypipe.rundir import Run

pytestmark = pytest.mark.ray


def test_parquet_and_run_on_s3(cluster: str, s3: str) -> None:
    images, labels = digit_pngs(400)
    for part in range(2):
        rows = slice(part * 200, part * 200 + 200)
        column = [{"bytes": image, "path": None} for image in images[rows]]
        buffer = io.BytesIO()
        pq.write_table(pa.table({"image": column, "label": labels[rows]}), buffer, row_group_size=50)
        storage.write_bytes(f"{s3}/data/train-{part}.parquet", buffer.getvalue())
    storage.write_bytes(f"{s3}/data/train-2.parquet", buffer.getvalue()[:5000])  # half a file does not stop the run
    run = f"{s3}/runs/first"
    config = small_config(
        run,
        f"source.uri={s3}/data",
        "source.format=auto",
        "source.limit=null",
        "source.fragment_samples=100",
        "source.max_reject_fraction=0.2",
        "extrapolate.score=el2n",
        "extrapolate.judge_published=true",
        "measure.max_actors=2",
        "embed.max_actors=2",
    )
    result = raypipe.run(config, progress=QUIET)
    rows_by_id = by_id(run)
    assert set(rows_by_id) == {f"train-{part}.parquet#{row}" for part in range(2) for row in range(200)}
    assert [rows_by_id[f"train-1.parquet#{row}"]["label"] for row in range(5)] == labels[200:205]
    assert result.summary["counts"]["samples"] == 400
    rejects = pa.concat_tables([table for _, table in storage.iter_tables(f"{run}/rejects")]).to_pylist()
    assert [row["sample_id"] for row in rejects] == ["train-2.parquet"]
    assert "cannot be read" in rejects[0]["reason"]
    assert len(storage.read_table(f"{run}/keep/keep-0.50.parquet")) == 200
    assert b"<html" in storage.read_bytes(f"{run}/report/index.html")
    # a score that only training on the sample gives is judged on the seed set, beside every baseline
    fidelity = storage.read_json(f"{run}/extrapolator/extrapolator.json")["fidelity"]
    assert fidelity["judged_on"] == "seed" and not storage.exists(f"{run}/extrapolator/audit.parquet")
    assert set(fidelity["baselines"]) >= {"class_mean", "gnn_published", "knn_published", "proxy_loss", "random"}
    assert set(fidelity["baselines"]["gnn_published"]["overlap_interval"]) == {"0.25", "0.5"}
    before = {file.path: file.stamp for file in storage.listing(f"{run}/scores")}
    gone = sorted(before)[0]
    storage.delete(f"{run}/scores/{gone}")
    raypipe.run(config, progress=QUIET)
    assert {file.path: file.stamp for file in storage.listing(f"{run}/scores")} == before
    assert raypipe.select(run, 0.1) == {"keep-0.10.parquet": 40}
    secrets = [storage.read_bytes(f"{run}/{file.path}") for file in storage.listing(run) if "parquet" not in file.path]
    assert not any(b"AWS_SECRET" in content or b"aws_secret" in content for content in secrets)


def test_what_cannot_be_read_is_rejected_with_its_reason(of_folders: str) -> None:
    run, bad = Run(of_folders), set(UNREADABLE)
    rejects = pa.concat_tables([table for _, table in storage.iter_tables(run.path("rejects"))]).to_pylist()
    assert {row["sample_id"] for row in rejects} == bad
    assert all(len(row["reason"]) > 8 for row in rejects)
    embedded = pa.concat_tables([table for _, table in storage.iter_tables(run.path("embeddings"), ["sample_id"])])
    assert len(set(embedded["sample_id"].to_pylist())) == len(embedded) == 300
    assert not set(embedded["sample_id"].to_pylist()) & bad
    assert run.record("embed").detail["rejects"] == 3


def test_a_source_that_cannot_be_used_stops_before_any_training(cluster: str, tmp_path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.parquet").write_bytes(b"PAR1 cut")
    config = small_config(str(tmp_path / "run"), f"source.uri={tmp_path}/data", "source.format=parquet")
    with pytest.raises(SourceError, match=r"nothing can be read \(a\.parquet: "):
        raypipe.run(config, progress=QUIET)
    with pytest.raises(SourceError, match="missing"):
        raypipe.run(small_config(str(tmp_path / "other"), f"source.uri={tmp_path}/missing", "source.format=auto"), progress=QUIET)
