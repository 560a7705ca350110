from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import QUIET, digit_pngs
from scored import add_weights, everything_in, opened, scored_run, without_ray  # noqa: F401

import raypipe
from raypipe import storage
from raypipe.cli import main
from raypipe.errors import ConfigError, RunError, StageError
from raypipe.exports import formats, index_files
from raypipe.runs.lease import Lease
from raypipe.runs.run import Run
from raypipe.sources import RawSample

pytestmark = pytest.mark.usefixtures("without_ray")


def sources(folder: Path, count: int = 40) -> dict[str, str]:
    """The same images as folder, tars, Parquet with bytes and Parquet with pixels, by format."""
    images, labels = digit_pngs(count)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        storage.write_bytes(f"{folder}/images/class-{label}/{number:04d}.png", image)
    for half in range(2):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for number in range(half * count // 2, (half + 1) * count // 2):
                for ending, content in (
                    ("cls", str(labels[number]).encode()),
                    ("png", images[number]),
                ):
                    member = tarfile.TarInfo(f"deep/{number:04d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        storage.write_bytes(f"{folder}/tars/part-{half}.tar", buffer.getvalue())
        rows = slice(half * count // 2, (half + 1) * count // 2)
        column = [{"bytes": image, "path": None} for image in images[rows]]
        storage.write_table(
            f"{folder}/parquet/part-{half}.parquet",
            pa.table({"image": column, "label": labels[rows]}),
            row_group_size=7,
        )
    return {
        "imagefolder": f"{folder}/images",
        "webdataset": f"{folder}/tars",
        "parquet": f"{folder}/parquet",
    }


def exported(run: Run, to: str, format: str = "webdataset", **options: Any) -> dict[str, Any]:
    return raypipe.export(run.uri, None, format, to, progress=QUIET, **options)


def members(folder: str) -> list[dict[str, bytes]]:
    """Members of each sample of all tars in a folder, by extension."""
    result: dict[str, dict[str, bytes]] = {}
    for name in sorted(storage.names(folder)):
        with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(f"{folder}/{name}"))) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (
                    0,
                    0,
                    0,
                    "",
                    0o644,
                )
                key, _, extension = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                result.setdefault(f"{name}#{key}", {})[extension] = content.read()
    return list(result.values())


def kept_of(run: Run) -> tuple[raypipe.KeepList, list[RawSample]]:
    """The keep-list, and its samples as the source has them, in the order of the source."""
    keep = raypipe.KeepList(run.uri)
    return keep, [
        sample
        for sample in everything_in(**run.config().source.model_dump())
        if sample.sample_id in keep
    ]


def contents(folder: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(f"{folder}/{name}") for name in storage.names(folder)}


@pytest.mark.parametrize("format", ["imagefolder", "webdataset", "parquet"])
def test_stored_bytes_go_unchanged_from_any_format_into_shards(tmp_path: Path, format: str) -> None:
    run = scored_run(f"{tmp_path}/run", sources(tmp_path / "data")[format], fragment_samples=8)
    keep, expected = kept_of(run)
    score = dict(zip(keep.ids, keep.scores.tolist(), strict=True))
    for kind in ("webdataset", "parquet"):
        done = exported(run, f"{tmp_path}/{kind}", kind, shard_samples=5)
        assert (done["samples"], done["shards"], done["missing"]) == (20, 4, 0)
    tar = members(f"{tmp_path}/webdataset")
    assert [item["png"] for item in tar] == [sample.image for sample in expected]
    about = [json.loads(item["json"]) for item in tar]
    assert [item["sample_id"] for item in about] == [sample.sample_id for sample in expected]
    assert [item["score"] for item in about] == [score[sample.sample_id] for sample in expected]
    label = run.classes().index
    assert [item["cls"].decode() for item in tar] == [
        str(label(sample.label)[0]) for sample in expected
    ]
    assert [item["class"] for item in about] == [
        run.classes().names[item["label"]] for item in about
    ]
    # and back through raypipe's own sources
    again = everything_in(f"{tmp_path}/webdataset")
    assert [(sample.image, sample.label) for sample in again] == [
        (sample.image, label(sample.label)[0]) for sample in expected
    ]
    again = everything_in(f"{tmp_path}/parquet", id_column="sample_id")
    assert [sample[:2] for sample in again] == [sample[:2] for sample in expected]
    names = run.classes().names
    assert [sample.label for sample in again] == [
        names[label(sample.label)[0]] for sample in expected
    ]
    assert {
        scan.class_names
        for scan in map(opened(f"{tmp_path}/parquet").scan, opened(f"{tmp_path}/parquet").files())
    } == {run.classes().names}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Digits, which are arrays; 60 of 120 are kept."""
    return scored_run(f"{tmp_path}/run", "digits://", limit=120, fragment_samples=16)


def test_pixels_become_png_and_weights_go_along(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "GROUP_ROWS", 7)
    weights = add_weights(run, 0.5)
    keep, expected = kept_of(run)
    weight = dict(zip(keep.ids, weights.tolist(), strict=True))
    exported(run, f"{tmp_path}/parquet", "parquet", shard_samples=40)
    exported(run, f"{tmp_path}/tar", shard_bytes=100_000)
    assert sorted(storage.names(f"{tmp_path}/parquet")) == [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]
    assert (
        len(storage.names(f"{tmp_path}/tar")) == 2
        and max(map(len, contents(f"{tmp_path}/tar").values())) < 130_000
    )
    file = pq.ParquetFile(f"{tmp_path}/parquet/train-00000-of-00002.parquet")
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [
        7,
        7,
        7,
        7,
        7,
        5,
    ]
    assert [(field.name, str(field.type)) for field in file.schema_arrow] == [
        ("image", "struct<bytes: binary, path: string>"), ("label", "int64"), ("sample_id", "string"), ("score", "float"), ("weight", "float"),
    ]  # fmt: skip
    features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == file.schema_arrow.names
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {
        "names": [str(digit) for digit in range(10)],
        "_type": "ClassLabel",
    }
    rows = pq.read_table(f"{tmp_path}/parquet").to_pylist()
    assert [row["weight"] for row in rows] == [weight[row["sample_id"]] for row in rows]
    assert [row["sample_id"] for row in rows] == [sample.sample_id for sample in expected]
    for row, item, sample in zip(rows, members(f"{tmp_path}/tar"), expected, strict=True):
        assert item["png"] == row["image"]["bytes"] and row["image"]["path"].endswith(".png")
        assert np.array_equal(np.asarray(formats.Image.open(io.BytesIO(item["png"]))), sample.image)
        assert json.loads(item["json"])["weight"] == row["weight"]


def test_the_same_command_makes_only_what_is_missing_and_the_same_bytes(
    run: Run, tmp_path: Path, without_ray: list[Any]
) -> None:
    to = f"{tmp_path}/out"
    for format in ("webdataset", "parquet"):
        exported(run, f"{to}/{format}", format, shard_samples=13)
        before, names = contents(f"{to}/{format}"), sorted(storage.names(f"{to}/{format}"))
        storage.delete(f"{to}/{format}/{names[0]}")
        storage.write_bytes(f"{to}/{format}/{names[2]}", before[names[2]][:-1])
        storage.delete(f"{to}/{format}/.raypipe/{names[3]}.json")
        left = Path(f"{to}/{format}/.{names[1]}.{'0' * 32}")  # by a writer that was killed
        left.write_bytes(b"half")
        without_ray.clear()
        done = exported(run, f"{to}/{format}", format)  # the size of a shard is known
        assert [shard.name for shard in without_ray] == [names[0], names[2], names[3]]
        assert contents(f"{to}/{format}") == before and done["samples"] == 60 and not left.exists()
        without_ray.clear()
        assert exported(run, f"{to}/{format}", format) == done and not without_ray
        exported(run, f"{to}/{format}-again", format, shard_samples=13)
        assert contents(f"{to}/{format}-again") == before


def test_another_export_into_the_same_folder_is_refused_unless_forced(
    run: Run, tmp_path: Path
) -> None:
    to = f"{tmp_path}/out"
    exported(run, to, shard_samples=10)
    raypipe.select(run.uri, 0.25)
    with pytest.raises(
        RunError,
        match=r"contains another export \(webdataset, keep 0\.5, 60 samples of .*differs in "
        "keep_list and samples",
    ):
        raypipe.export(run.uri, 0.25, "webdataset", to, progress=QUIET)
    for options, what in (
        ({"shard_samples": 11}, "shard_samples"),
        ({"shard_bytes": 11}, "shard_bytes"),
        ({"format": "parquet"}, "format"),
    ):
        with pytest.raises(RunError, match=f"differs in {what}; give another folder"):
            raypipe.export(
                run.uri, 0.5, **{"format": "webdataset", "to": to, "progress": QUIET, **options}
            )
    storage.delete(
        f"{to}/.raypipe/train-00004.tar.json"
    )  # as after a kill; its shard goes all the same
    raypipe.export(run.uri, 0.25, "webdataset", to, force=True, progress=QUIET, shard_samples=10)
    assert sorted(storage.names(to)) == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    assert len(members(to)) == 30
    with Lease(Run(f"{to}/.raypipe")), pytest.raises(RunError, match="in use by another driver"):
        raypipe.export(run.uri, 0.25, "webdataset", to, progress=QUIET)


def test_folders_with_something_else_are_left_alone(tmp_path: Path) -> None:
    uri = sources(tmp_path)["parquet"]
    run = scored_run(f"{tmp_path}/run", uri)
    with pytest.raises(ConfigError, match="cannot be within the source"):
        exported(run, f"{uri}/kept")
    storage.write_bytes(f"{tmp_path}/notes/a.txt", b"mine")
    with pytest.raises(RunError, match=r"contains other files, such as a\.txt"):
        exported(run, f"{tmp_path}/notes")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["a.txt"]
    exported(run, f"{tmp_path}/notes", force=True)
    assert sorted(storage.names(f"{tmp_path}/notes")) == ["a.txt", "train-00000.tar"]


def test_what_cannot_be_read_any_more_is_told_and_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, to = sources(tmp_path)["imagefolder"], f"{tmp_path}/out"
    run = scored_run(f"{tmp_path}/run", uri, 0.9, fragment_samples=8)
    exported(run, f"{tmp_path}/whole", shard_samples=20)
    ids = sorted(raypipe.KeepList(run.uri).ids)
    before = {sample_id: storage.read_bytes(f"{uri}/{sample_id}") for sample_id in ids[3:6]}
    storage.delete(f"{uri}/{ids[3]}")
    storage.write_bytes(f"{uri}/{ids[4]}", b"")
    storage.write_bytes(f"{uri}/{ids[5]}", b"words")
    command = ["export", run.uri, "--format", "webdataset", "--to", to, "--shard-samples", "20"]

    def exit_code(*more: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main([*command, *more])
        return int(stop.value.code or 0)

    assert exit_code() == 1
    said = capsys.readouterr().err
    assert (
        f"3 of the 36 samples of the keep-list are missing ({ids[3]}: no such file" in said
        and "note: " in said
    )
    missing = {
        item["sample_id"]: item["reason"]
        for item in storage.read_json(f"{to}/.raypipe/missing.json")
    }
    assert list(missing) == ids[3:6]
    assert "empty" in missing[ids[4]] and "not an image" in missing[ids[5]]
    assert exit_code("--allow-missing") == 0
    assert "33 samples in 2 files" in (said := capsys.readouterr().out) and "3 missing" in said
    assert exit_code() == 1
    for sample_id, content in before.items():
        storage.write_bytes(f"{uri}/{sample_id}", content)
    assert exit_code() == 0
    assert contents(to) == contents(f"{tmp_path}/whole") and not storage.exists(
        f"{to}/.raypipe/missing.json"
    )


def test_samples_that_changed_places_or_labels_are_missing(tmp_path: Path) -> None:
    uri = sources(tmp_path)["webdataset"]
    run = scored_run(f"{tmp_path}/run", uri, 1.0)
    content = bytearray(storage.read_bytes(f"{uri}/part-0.tar"))
    assert content[512:513] == b"0"  # the label of the first sample
    content[512:513] = b"1"
    position = content.index(b"deep/0002.png")
    storage.write_bytes(f"{uri}/part-0.tar", bytes(content[: position - position % 512]))
    with pytest.raises(StageError, match="19 of the 40 samples"):
        exported(run, f"{tmp_path}/out", shard_samples=7)
    missing = {
        item["sample_id"]: item["reason"]
        for item in storage.read_json(f"{tmp_path}/out/.raypipe/missing.json")
    }
    assert missing["part-0.tar#deep/0000"] == "its label is not the one it was scored with"
    assert "cut off" in missing["part-0.tar#deep/0002"]
    assert missing["part-0.tar#deep/0011"] == "no longer in the source"
    assert len(members(f"{tmp_path}/out")) == 21


def test_indices_are_positions_in_the_source(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = raypipe.KeepList(run.uri)
    exported(run, f"{tmp_path}/kept.npy", "indices")
    indices = np.load(f"{tmp_path}/kept.npy")
    about = storage.read_json(f"{tmp_path}/kept.json")
    assert indices.dtype == np.int64 and about["sample_ids"] == [
        f"digits/{number:04d}" for number in indices
    ]
    assert about["sample_ids"] == sorted(keep.ids) and about["keep_list"]["fraction"] == "0.5"
    score = dict(zip(keep.ids, keep.scores.tolist(), strict=True))
    assert about["scores"] == [score[sample_id] for sample_id in about["sample_ids"]]
    exported(run, f"{tmp_path}/again.json", "indices")
    assert storage.read_json(f"{tmp_path}/again.json")["indices"] == indices.tolist()
    monkeypatch.setattr(index_files, "LOCAL_FRAGMENTS", 0)  # through tasks
    monkeypatch.setattr(index_files, "TASK_FRAGMENTS", 2)
    exported(run, f"{tmp_path}/again.json", "indices")  # with the same content
    raypipe.select(run.uri, 0.25)
    with pytest.raises(RunError, match=r"again\.json: already exists with other content"):
        raypipe.export(run.uri, 0.25, "indices", f"{tmp_path}/again.json", progress=QUIET)
    done = raypipe.export(
        run.uri, 0.25, "indices", f"{tmp_path}/again.json", force=True, progress=QUIET
    )
    assert done["samples"] == 30 == len(storage.read_json(f"{tmp_path}/again.json")["indices"])


@pytest.mark.parametrize("format", ["webdataset", "parquet"])
def test_indices_count_through_all_files(tmp_path: Path, format: str) -> None:
    uri = sources(tmp_path)[format]
    run = scored_run(f"{tmp_path}/run", uri, fragment_samples=8)
    exported(run, f"{tmp_path}/kept.json", "indices")
    about = storage.read_json(f"{tmp_path}/kept.json")
    everything = everything_in(uri)
    assert [everything[index].sample_id for index in about["indices"]] == about["sample_ids"]
    assert about["order"].endswith("sorted by path, from 0")


def test_indices_of_folders_are_those_of_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    root = tmp_path / "images"
    names = [
        "a/z.png",
        "a/b/1.png",
        "a/b-c/1.png",
        "a/c.PNG",
        "a-b/1.jpeg",
        "a/.hidden.png",
        "B/1.webp",
        "a/b/x/1.bmp",
        "ü/1.tif",
        "B/2.ppm",
    ]
    for number, name in enumerate(names):
        storage.write_bytes(f"{root}/{name}", digit_pngs(number + 1)[0][number])
    run = scored_run(f"{tmp_path}/run", str(root), 0.6)
    exported(run, f"{tmp_path}/kept.json", "indices")
    about = storage.read_json(f"{tmp_path}/kept.json")
    stored = [str(Path(path).relative_to(root)) for path, _ in ImageFolder(root).samples]
    assert len(stored) == len(names) and stored != sorted(stored)
    assert [stored[index] for index in about["indices"]] == about["sample_ids"] and len(
        about["indices"]
    ) == 5
    assert "ImageFolder" in about["order"]


def test_indices_of_folders_that_are_links(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    for number, name in enumerate(("a/1.png", "elsewhere/2.png", "elsewhere/in/3.png")):
        storage.write_bytes(f"{tmp_path}/{name}", digit_pngs(number + 1)[0][number])
    root = tmp_path / "images"
    root.mkdir()
    for name, target in (("b", "elsewhere"), ("c", "a"), ("d", "elsewhere/in")):
        (root / name).symlink_to(tmp_path / target)
    (root / "c-file").mkdir()
    (root / "c-file/x.png").symlink_to(tmp_path / "a/1.png")
    run = scored_run(f"{tmp_path}/run", str(root), 1.0)
    exported(run, f"{tmp_path}/kept.json", "indices")
    about = storage.read_json(f"{tmp_path}/kept.json")
    stored = [os.path.relpath(path, root) for path, _ in ImageFolder(root).samples]
    assert [stored[index] for index in about["indices"]] == about["sample_ids"]
    assert len(about["indices"]) == len(stored) == 5


def test_what_torchvision_does_not_list_is_missing(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.gif", "b/1.png"):
        storage.write_bytes(f"{tmp_path}/images/{name}", digit_pngs(1)[0][0])
    run = scored_run(f"{tmp_path}/run", f"{tmp_path}/images", 1.0)
    with pytest.raises(
        StageError,
        match=r"1 of the 3 samples of the keep-list are missing \(a/2\.gif: not among torchvision",
    ):
        exported(run, f"{tmp_path}/kept.npy", "indices")
    exported(run, f"{tmp_path}/kept.npy", "indices", allow_missing=True)
    assert np.load(f"{tmp_path}/kept.npy").tolist() == [0, 1]
    assert [item["sample_id"] for item in storage.read_json(f"{tmp_path}/kept.missing.json")] == [
        "a/2.gif"
    ]


def test_lists_of_paths(tmp_path: Path) -> None:
    run = scored_run(f"{tmp_path}/run", sources(tmp_path)["imagefolder"], fragment_samples=8)
    keep, expected = kept_of(run)
    exported(run, f"{tmp_path}/kept.csv", "list")
    rows = list(csv.DictReader(io.StringIO(storage.read_bytes(f"{tmp_path}/kept.csv").decode())))
    assert [(row["path"], row["class"]) for row in rows] == [
        (sample.sample_id, sample.label) for sample in expected
    ]
    assert [run.classes().names[int(row["label"])] for row in rows] == [
        row["class"] for row in rows
    ]
    score = dict(zip(keep.ids, keep.scores, strict=True))
    assert [np.float32(row["score"]) for row in rows] == [score[row["path"]] for row in rows]
    exported(run, f"{tmp_path}/kept.txt", "list")
    lines = storage.read_bytes(f"{tmp_path}/kept.txt").decode().splitlines()
    assert lines == [f"{row['path']} {row['label']}" for row in rows]


def test_unlabelled_samples(tmp_path: Path) -> None:
    for number in range(4):
        storage.write_bytes(f"{tmp_path}/images/{number}.png", digit_pngs(number + 1)[0][number])
    run = scored_run(f"{tmp_path}/run", f"{tmp_path}/images", 0.5)
    ids = sorted(raypipe.KeepList(run.uri).ids)
    for format, to in (
        ("webdataset", "tar"),
        ("parquet", "parquet"),
        ("list", "kept.txt"),
        ("indices", "kept.json"),
    ):
        exported(run, f"{tmp_path}/{to}", format)
    assert [sorted(item) for item in members(f"{tmp_path}/tar")] == [["json", "png"]] * 2
    assert [sample.label for sample in everything_in(f"{tmp_path}/parquet")] == [None, None]
    assert storage.read_bytes(f"{tmp_path}/kept.txt").decode().split() == ids
    assert [
        f"{index}.png" for index in storage.read_json(f"{tmp_path}/kept.json")["indices"]
    ] == ids


def test_from_and_to_an_object_store(tmp_path: Path, s3: str) -> None:
    uri = sources(tmp_path)["webdataset"]
    for file in storage.listing(uri):
        storage.write_bytes(
            f"{s3}/export/data/{file.path}", storage.read_bytes(f"{uri}/{file.path}")
        )
    run = scored_run(f"{s3}/export/run", f"{s3}/export/data", fragment_samples=8)
    done = exported(run, f"{s3}/export/out", shard_samples=8)
    assert (done["samples"], done["shards"]) == (20, 3)
    before = contents(f"{s3}/export/out")
    storage.delete(f"{s3}/export/out/train-00001.tar")
    exported(run, f"{s3}/export/out")
    assert contents(f"{s3}/export/out") == before and len(before) == 3
    exported(run, f"{s3}/export/kept.npy", "indices")
    assert len(np.load(io.BytesIO(storage.read_bytes(f"{s3}/export/kept.npy")))) == 20


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"keep": 0.7}, RunError, r"fraction 0\.7; available: keep-0\.25\.parquet, "
        r"keep-0\.50\.parquet\. Write it with `raypipe select .*--keep 0\.7`"),
        ({"keep": None}, RunError, "several keep-lists"),
        ({"keep": 7}, ConfigError, "not a fraction"),
        ({"format": "tfrecord"}, ConfigError, "'tfrecord' is not allowed: Input should be "
            "'indices', 'list', 'webdataset', .* or 'openlineage'"),
        ({"format": "indices", "to": "kept.txt"}, ConfigError, r"ends in \.npy or \.json"),
        ({"format": "list", "to": "kept.csv"}, ConfigError, "this one is digits"),
        ({"format": "indices", "to": "kept.npy", "shard_samples": 3}, ConfigError, "no shards"),
        ({"shard_samples": 0}, ConfigError, "shard_samples: 0 is not allowed: .* greater than or "
        "equal to 1"),
        ({"run": "nowhere"}, RunError, "no run here"),
    ],
)  # fmt: skip
def test_what_is_refused(
    run: Run, tmp_path: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    raypipe.select(run.uri, 0.25)
    with pytest.raises(error, match=words):
        raypipe.export(
            **{
                "run": run.uri,
                "keep": 0.5,
                "format": "webdataset",
                "to": f"{tmp_path}/out",
                "progress": QUIET,
                **options,
            }
        )
    assert not storage.exists(f"{tmp_path}/out")


def test_a_run_without_lists_or_without_images(run: Run, tmp_path: Path) -> None:
    storage.delete(run.path("keep"))
    with pytest.raises(
        RunError, match=r"no keep-list; available: none\. Write it with `raypipe select"
    ):
        exported(run, f"{tmp_path}/out")
    records = run.ledger()
    records["extrapolate"].detail["tables"] = {"embeddings": "e", "scores": "s"}
    del records["index"]
    run.write_ledger(records)
    with pytest.raises(RunError, match="from tables, without images; make a run over the images"):
        exported(run, f"{tmp_path}/out")


def test_a_list_of_other_scores_is_refused(run: Run, tmp_path: Path) -> None:
    uri = raypipe.KeepList(run.uri).uri
    table = storage.read_table(uri)
    storage.write_table(
        uri,
        table.slice(30).append_column("x", table["score"].slice(30))
        if False
        else pa.concat_tables([table.slice(30), table.slice(0, 30)]),
    )
    with pytest.raises(RunError, match=r"of 60 samples do not match scores/.*raypipe select"):
        exported(run, f"{tmp_path}/out")
