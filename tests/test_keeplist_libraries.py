"""Keep-lists around the datasets of other libraries, and around streams of dicts."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from scored import scored_run
from torch.utils.data import DataLoader

import raypipe
from raypipe.errors import SourceError


@pytest.fixture
def keep(tmp_path: Path) -> raypipe.KeepList:
    return raypipe.KeepList(scored_run(f"{tmp_path}/run", "digits://", limit=60).uri)


def rows(keep: raypipe.KeepList) -> list[dict[str, Any]]:
    return [{"sample_id": f"digits/{number:04d}", "value": number} for number in range(60)]


def wanted(keep: raypipe.KeepList) -> list[int]:
    return sorted(int(sample_id.removeprefix("digits/")) for sample_id in keep.ids)


def test_a_stream_is_filtered_every_time_and_in_workers(keep: raypipe.KeepList) -> None:
    stream = keep.filter_stream(rows(keep))
    for _ in range(2):
        assert [row["value"] for row in stream] == wanted(keep)
    assert [row["value"] for row in pickle.loads(pickle.dumps(stream))] == wanted(keep)
    loader = DataLoader(stream, batch_size=None)  # type: ignore[arg-type]
    assert [row["value"] for row in loader] == wanted(keep)
    with pytest.raises(SourceError, match="sample 0 has no 'id'"):
        list(keep.filter_stream(rows(keep), "id"))
    with pytest.warns(UserWarning, match="contains no sample of the 60 read.*check id_column"):
        assert not list(keep.filter_stream(rows(keep), "value"))


def test_hugging_face(keep: raypipe.KeepList) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(rows(keep))
    kept = keep.filter_huggingface(data)
    assert isinstance(kept, datasets.Dataset) and kept["value"][:] == wanted(keep)
    stream = keep.filter_huggingface(data.to_iterable_dataset())
    assert isinstance(stream, datasets.IterableDataset)
    assert [row["value"] for row in stream] == wanted(keep)
    named = data.rename_column("sample_id", "id").to_iterable_dataset()
    assert [row["value"] for row in keep.filter_huggingface(named, id_column="id")] == wanted(keep)
    with pytest.raises(SourceError):
        keep.filter_huggingface(data.select(range(10)))
    with pytest.raises(SourceError, match="cannot be a sample id"):  # not an empty stream
        list(
            keep.filter_huggingface(
                data.add_column("x", [0.5] * len(data)).to_iterable_dataset(), id_column="x"
            )
        )


def test_mds(keep: raypipe.KeepList, tmp_path: Path) -> None:
    streaming = pytest.importorskip("streaming")
    columns = {"sample_id": "str", "value": "int"}
    with streaming.MDSWriter(out=f"{tmp_path}/mds", columns=columns) as out:
        for row in rows(keep):
            out.write(row)
    data = streaming.StreamingDataset(local=f"{tmp_path}/mds", shuffle=False, batch_size=4)
    assert sorted(row["value"] for row in keep.filter_stream(data)) == wanted(keep)


def _litdata_row(number: int) -> dict[str, Any]:
    return {"sample_id": f"digits/{number:04d}", "value": number}


def test_litdata(keep: raypipe.KeepList, tmp_path: Path) -> None:
    litdata = pytest.importorskip("litdata")
    litdata.optimize(
        fn=_litdata_row,
        inputs=list(range(60)),
        output_dir=f"{tmp_path}/lit",
        chunk_bytes="1MB",
        num_workers=1,
    )
    data = litdata.StreamingDataset(f"{tmp_path}/lit")
    assert sorted(row["value"] for row in keep.filter_stream(data)) == wanted(keep)
