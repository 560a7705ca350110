"""Exports for other tools: what is written, and that each tool reads it back where it is installed."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers import QUIET, digit_pngs
from PIL import Image
from scored import add_predictions, add_weights, everything_in, scored_run, without_ray  # noqa: F401

import raypipe
from raypipe import storage
from raypipe.errors import ConfigError, RaypipeError, RunError
from raypipe.exports import all_samples, cells
from raypipe.exports.card import code, escaped
from raypipe.runs.run import Run

pytestmark = pytest.mark.usefixtures("without_ray")
HOSTILE = '=cmd|"calc"!A1'
"""A class and a file name that a spreadsheet runs, if it is a cell."""
SINGLE_FILES = {"cleanlab": ".csv", "label-studio": ".csv", "indices": ".npy"}
SHARDS = ("huggingface", "croissant", "mds", "lance")


def exported(run: Run, to: str, format: str, **options: Any) -> dict[str, Any]:
    return raypipe.export(run.uri, 0.5, format, to, progress=QUIET, **options)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """40 PNG files by their path below a folder."""
    content, labels = digit_pngs(40)
    return {
        f"{HOSTILE if label == 1 else f'class-{label}'}/{number:04d}.png": data
        for number, (data, label) in enumerate(zip(content, labels, strict=True))
    }


@pytest.fixture
def run(tmp_path: Path, images: dict[str, bytes]) -> Run:
    """40 images in folders, 20 of which are kept, with weights."""
    for path, content in images.items():
        storage.write_bytes(f"{tmp_path}/images/{path}", content)
    run = scored_run(f"{tmp_path}/run", f"{tmp_path}/images", fragment_samples=8)
    add_weights(run, 0.5)
    return run


def expected(run: Run, images: dict[str, bytes]) -> list[dict[str, Any]]:
    """What an export should hold, in the order of the source."""
    keep = raypipe.KeepList(run.uri)
    names = run.classes().names
    weights = keep.weights
    assert weights is not None
    rows = zip(keep.ids, keep.labels.tolist(), keep.scores.tolist(), weights.tolist(), strict=True)
    return [
        {
            "image": images[sample_id],
            "label": label,
            "class": names[label],
            "sample_id": sample_id,
            "score": score,
            "weight": weight,
        }
        for sample_id, label, score, weight in sorted(rows)
    ]


def read_huggingface(to: str) -> list[dict[str, Any]]:
    datasets = pytest.importorskip("datasets")
    data = datasets.load_from_disk(to)
    names = data.features["label"].names
    assert data.info.splits["train"].num_examples == len(data) and str(data.split) == "train"
    assert data[0]["image"].size == (8, 8)
    raw = data.cast_column("image", datasets.Image(decode=False))
    return [row | {"image": row["image"]["bytes"], "class": names[row["label"]]} for row in raw]


def read_croissant(to: str) -> list[dict[str, Any]]:
    mlcroissant = pytest.importorskip("mlcroissant")
    data = mlcroissant.Dataset(jsonld=f"{to}/croissant.json")
    names = {row["classes/label"]: row["classes/name"] for row in data.records("classes")}
    rows = []
    for record in data.records("samples"):
        row = {key.removeprefix("samples/"): value for key, value in record.items()}
        rows.append(
            row
            | {"sample_id": row["sample_id"].decode(), "class": names[row["label"]]}
            | {"image": np.asarray(row["image"])}
        )
    return rows


def read_mds(to: str) -> list[dict[str, Any]]:
    streaming = pytest.importorskip("streaming")
    data = streaming.StreamingDataset(local=to, shuffle=False, batch_size=1)
    assert len(data) == 20
    return [
        row
        | {name: float(row[name]) for name in ("score", "weight")}
        | {"label": int(row["label"])}
        for row in (data[number] for number in range(len(data)))
    ]


def read_lance(to: str) -> list[dict[str, Any]]:
    lance = pytest.importorskip("lance")
    data = lance.dataset(to)
    assert data.count_rows() == 20 and len(data.get_fragments()) == 3
    return data.to_table().to_pylist()


READERS = {name: globals()[f"read_{name}"] for name in SHARDS}


@pytest.mark.parametrize("format", SHARDS)
def test_the_tool_reads_every_sample_back(
    run: Run, tmp_path: Path, images: dict[str, bytes], format: str
) -> None:
    if format == "lance":
        pytest.importorskip("lance")  # writes it, too
    to = f"{tmp_path}/out"
    done = exported(run, to, format, shard_samples=7)
    assert (done["samples"], done["shards"], done["missing"]) == (20, 3, 0)
    rows = READERS[format](to)
    wanted = expected(run, images)
    assert len(rows) == 20
    for row, want in zip(rows, wanted, strict=True):
        if isinstance(row["image"], np.ndarray):
            want = want | {"image": np.asarray(Image.open(io.BytesIO(want["image"])))}
            assert np.array_equal(row.pop("image"), want.pop("image"))
        assert {name: row[name] for name in want if name in row} == {
            name: value for name, value in want.items() if name in row
        }
        assert set(row) >= set(want) - {"image"}


@pytest.mark.parametrize("format", SHARDS)
def test_interrupted_exports_resume_and_others_are_refused(
    run: Run, tmp_path: Path, without_ray: list[Any], format: str
) -> None:
    if format == "lance":
        pytest.importorskip("lance")  # writes it, too
    to = f"{tmp_path}/out"

    def files() -> dict[str, bytes]:
        return {
            file.path: storage.read_bytes(f"{to}/{file.path}")
            for file in storage.listing(to)
            if not file.path.startswith("_")
        }

    exported(run, to, format, shard_samples=7)
    before = files()
    notes = [path for path in Path(f"{to}/.raypipe").iterdir() if "0000" in path.name]
    shard = json.loads(min(notes).read_text())["file"]
    storage.delete(f"{to}/{shard}")
    # what writers that were killed leave
    left = Path(f"{to}/data/killed.lance" if format == "lance" else f"{to}/.{shard}.{'0' * 32}")
    left.write_bytes(b"half")
    without_ray.clear()
    assert exported(run, to, format)["samples"] == 20
    assert len(without_ray) == 1
    assert not left.exists()
    if format == "lance":  # names its files at random
        assert len(files()) == len(before) and len(read_lance(to)) == 20
    else:
        assert files() == before
    without_ray.clear()
    exported(run, to, format)
    assert not without_ray
    other = "parquet" if format != "parquet" else "mds"
    with pytest.raises(RunError, match="contains another export"):
        exported(run, to, other)
    exported(run, to, other, force=True)
    assert {name.rsplit(".", 1)[-1] for name in files()} == {"parquet"}
    storage.write_bytes(f"{tmp_path}/mine/a.txt", b"mine")
    with pytest.raises(RunError, match=r"contains other files, such as a\.txt"):
        exported(run, f"{tmp_path}/mine", format)


def test_the_last_files_come_after_all_samples(
    run: Run, tmp_path: Path, images: dict[str, bytes]
) -> None:
    """A folder without its state is no dataset, so a missing sample cannot go unnoticed."""
    sample_id = sorted(raypipe.KeepList(run.uri).ids)[0]
    storage.delete(f"{tmp_path}/images/{sample_id}")
    to = f"{tmp_path}/out"
    with pytest.raises(raypipe.errors.StageError, match="1 of the 20 samples"):
        exported(run, to, "huggingface", shard_samples=7)
    assert not storage.exists(f"{to}/state.json")
    assert exported(run, to, "huggingface", allow_missing=True)["samples"] == 19
    info = storage.read_json(f"{to}/dataset_info.json")
    assert info["splits"]["train"]["num_examples"] == 19


@pytest.mark.parametrize("format", ["huggingface", "mds", "lance"])
def test_raypipe_reads_its_own_export(
    run: Run, tmp_path: Path, images: dict[str, bytes], format: str
) -> None:
    if format == "lance":
        pytest.importorskip("lance")
    exported(run, f"{tmp_path}/out.{format}", format, shard_samples=7)
    again = everything_in(f"{tmp_path}/out.{format}", id_column="sample_id")
    assert [(sample.sample_id, sample.image) for sample in again] == [
        (row["sample_id"], row["image"]) for row in expected(run, images)
    ]


def test_a_forced_lance_export_leaves_folders_of_others_alone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raypipe.exports.run.check_lance", lambda: None)
    to = f"{tmp_path}/out"
    storage.write_bytes(f"{to}/data/mine.lance", b"mine")
    for options in ({}, {"force": True}):
        with pytest.raises(RunError, match=r"contains other files|its folder data contains"):
            exported(run, to, "lance", **options)
    # nor does a forced export in place of one of another format
    exported(run, f"{tmp_path}/mds", "mds")
    storage.write_bytes(f"{tmp_path}/mds/data/mine.lance", b"mine")
    with pytest.raises(RunError, match="its folder data contains other files"):
        exported(run, f"{tmp_path}/mds", "lance", force=True)
    assert storage.read_bytes(f"{to}/data/mine.lance") == b"mine"
    assert storage.read_bytes(f"{tmp_path}/mds/data/mine.lance") == b"mine"


# -- the dataset card ------------------------------------------------------------------------------


def test_the_card_says_how_the_list_was_cut_and_how_far_to_trust_it(tmp_path: Path) -> None:
    """Of a real run."""
    shutil.copytree(Path(__file__).parents[1] / "data" / "run-0.1.0", tmp_path / "run")
    raypipe.export(f"{tmp_path}/run", 0.3, "huggingface", f"{tmp_path}/out", progress=QUIET)
    card = storage.read_bytes(f"{tmp_path}/out/README.md").decode()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["tags"] == ["raypipe", "data-pruning"]
    for words in (
        "72 samples that raypipe",
        "Kept: `72` of `240` scored samples",
        "Keep fraction: `0.3`",
        "Strategy: `ccs`",
        "Score: `moso`; higher means keep",
        "Measured directly: 149 samples; extrapolated: 91, by `gnn`",
        "Fidelity 0.94 (95",
        "interval 0.85 to 0.97)",
        "Stability is unknown",
        "Not measured. `raypipe evaluate`",
        "`seed.seed`: `0`",
        "`select.seed`: `0`",
    ):
        assert words in body, words


def test_the_card_shows_the_benefit_of_an_evaluation(run: Run, tmp_path: Path) -> None:
    point = {"fraction": 0.5, "difference": {"mean": 0.021, "low": 0.01, "high": 0.032}}
    record = run.record("extrapolate")
    summary = {
        "format": 1,
        "scores_of": {"fingerprint": record.fingerprint, "finished": record.finished},
        "seeds": 3,
        "training": {"model": "small"},
        "random": [],
        "lists": [{"name": "el2n, top", "fractions": [point, {**point, "fraction": 0.3}]}],
    }
    storage.write_json(run.evaluation_summary, summary)
    exported(run, f"{tmp_path}/out", "huggingface")
    card = storage.read_bytes(f"{tmp_path}/out/README.md").decode()
    line = "- `el2n, top`: +2.1 (95 % interval +1.0 to +3.2), 3 seeds, network `small`"
    assert card.count(line) == 1


def test_values_of_a_run_add_no_markup_to_the_card(run: Run, tmp_path: Path) -> None:
    bad = "x\n---\nlicense: evil\n# Title\n[a](https://evil.example) <b>`` www.evil.example"
    uri = run.path("keep", "keep-0.50.parquet")
    table = storage.read_table(uri)
    metadata = dict(table.schema.metadata)
    for key in (b"raypipe.strategy", b"raypipe.reason", b"raypipe.options"):
        metadata[key] = bad.encode()
    storage.write_table(uri, table.replace_schema_metadata(metadata))
    exported(run, f"{tmp_path}/out", "huggingface")
    card = storage.read_bytes(f"{tmp_path}/out/README.md").decode()
    _, front, body = card.split("---\n", 2)
    assert set(yaml.safe_load(front)) == {"pretty_name", "task_categories", "tags"}
    assert "evil" in body and body.count("\n# ") == 1
    assert not any(line.startswith(("---", "license", "# Title")) for line in body.splitlines())
    reason = next(line for line in body.splitlines() if line.startswith("- Reason"))
    assert not set(reason.removeprefix("- Reason: ")) & set("<>[]`*_") and "://" not in reason
    assert "www.evil" not in reason
    strategy = next(line for line in body.splitlines() if line.startswith("- Strategy"))
    assert strategy.count("`") == 2 and strategy.endswith("`")


@pytest.mark.parametrize(
    ("file", "format"),
    [
        ("keep/keep-0.50.parquet", "huggingface"),
        ("keep/keep-0.50.parquet", "indices"),
        ("index/classes.json", "mds"),
        ("index/classes.json", "label-studio"),
        ("run.json", "parquet"),
        ("scores/*", "cleanlab"),
        ("embeddings/*", "fiftyone"),
    ],
)
def test_an_export_of_a_damaged_run_ends_in_one_line(
    run: Run, tmp_path: Path, file: str, format: str
) -> None:
    add_predictions(run)
    path = min(Path(run.uri).glob(file))
    if file.startswith("keep") and format == "huggingface":
        table = pq.read_table(path)
        metadata = {**table.schema.metadata, b"raypipe.fraction": b"half"}
        pq.write_table(table.replace_schema_metadata(metadata), path)
    elif path.suffix == ".json":
        path.write_text("[1]")
    else:
        path.write_bytes(path.read_bytes()[:-20])
    to = f"{tmp_path}/out{SINGLE_FILES.get(format, '')}"
    with pytest.raises(RaypipeError) as caught:
        exported(run, to, format)
    assert "\n" not in str(caught.value) and run.uri in str(caught.value)


def test_markdown_shows_values_literally() -> None:
    assert escaped("a*b\n\n# c") == "a&#42;b # c"
    assert escaped("# a (b): c-d") == "&#35; a (b): c-d" and escaped("1. a") == "1&#46; a"
    assert code("a`b\n```") == "`a'b '''`" and code(" ") == "(empty)"
    assert "\x1b" not in code("\x1b[31m") + escaped("\x1b[31m")


# -- all samples -----------------------------------------------------------------------------------


def test_label_studio_gets_likely_label_errors_first(run: Run, tmp_path: Path) -> None:
    ranks = add_predictions(run)
    done = exported(run, f"{tmp_path}/tasks.csv", "label-studio", image_root="s3://bucket/train/")
    assert done["samples"] == 5
    rows = list(csv.DictReader(io.StringIO(Path(f"{tmp_path}/tasks.csv").read_text())))
    by_rank = sorted(ranks, key=ranks.__getitem__)
    assert [row["image"] for row in rows] == [f"s3://bucket/train/{path}" for path in by_rank]
    assert [row["sample_id"].removeprefix("'") for row in rows] == by_rank
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4", "5"]
    kept = set(raypipe.KeepList(run.uri).ids)
    assert [row["kept"] for row in rows] == [str(path in kept) for path in by_rank]
    assert all(row["label"] != row["predicted"] for row in rows)
    exported(run, f"{tmp_path}/tasks.csv", "label-studio", image_root="s3://bucket/train")
    with pytest.raises(RunError, match="already exists with other content"):
        exported(run, f"{tmp_path}/tasks.csv", "label-studio")
    exported(run, f"{tmp_path}/tasks.csv", "label-studio", force=True)
    rows = list(csv.DictReader(io.StringIO(Path(f"{tmp_path}/tasks.csv").read_text())))
    assert [row["image"] for row in rows] == [f"{tmp_path}/images/{path}" for path in by_rank]


@pytest.mark.parametrize(
    ("root", "quoted"),
    [
        ("https://images.example/train", True),
        ("/data/local-files/?d=train", True),
        ("s3://bucket/train", False),
        ("/mnt/train", False),
    ],
)
def test_images_are_quoted_in_addresses_alone(
    run: Run, tmp_path: Path, root: str, quoted: bool
) -> None:
    ranks = add_predictions(run, wrong=40)
    exported(run, f"{tmp_path}/tasks.csv", "label-studio", image_root=root)
    rows = list(csv.DictReader(io.StringIO(Path(f"{tmp_path}/tasks.csv").read_text())))
    by_rank = sorted(ranks, key=ranks.__getitem__)
    assert any(quote(path) != path for path in by_rank)
    expected = [f"{root}/{quote(path) if quoted else path}" for path in by_rank]
    assert [row["image"] for row in rows] == expected


def test_numbers_are_no_formulas() -> None:
    for number in ("-1", "+3", "-2.5e-3", "7"):
        assert cells.guarded(number) == number
    for formula in ("-1+1", "=1", "-a", "+", "1\n"[::-1], "-1\n", "@x"):
        assert cells.guarded(formula) == f"'{formula}"


@pytest.mark.parametrize("format", ["cleanlab", "label-studio", "fiftyone"])
def test_all_samples_are_written_one_shard_after_another(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    add_predictions(run)
    seen = list[weakref.ref[pa.Table]]()
    tables = all_samples.DescribedSamples.tables

    def watched(samples: all_samples.DescribedSamples) -> Iterator[pa.Table]:
        for table in tables(samples):
            assert sum(earlier() is not None for earlier in seen) <= 1  # the one before this
            seen.append(weakref.ref(table))
            yield table

    monkeypatch.setattr(all_samples.DescribedSamples, "tables", watched)
    exported(run, f"{tmp_path}/out{SINGLE_FILES.get(format, '')}", format)
    assert len(seen) == len(storage.names(run.scores_folder)) > 2


def test_no_cell_of_a_csv_file_is_a_formula(run: Run, tmp_path: Path) -> None:
    add_predictions(run, wrong=40)
    exported(run, f"{tmp_path}/tasks.csv", "label-studio")
    exported(run, f"{tmp_path}/issues.csv", "cleanlab")
    exported(run, f"{tmp_path}/list.csv", "list")
    hostile = 0
    for name in ("tasks", "issues", "list"):
        for row in csv.DictReader(io.StringIO(Path(f"{tmp_path}/{name}.csv").read_text())):
            for column in {"image", "sample_id", "path", "label", "predicted", "class"} & set(row):
                if not row[column].lstrip("-").isdigit():  # class indices
                    assert not row[column].startswith(cells.FORMULA_STARTS)
                    hostile += "=cmd" in row[column]
    assert hostile > 3
    paths = [
        row["path"] for row in csv.DictReader(io.StringIO(Path(f"{tmp_path}/list.csv").read_text()))
    ]
    assert all(Path(f"{tmp_path}/images/{path}").is_file() for path in paths)


@pytest.mark.parametrize("extension", ["csv", "parquet"])
def test_cleanlab_takes_the_issues(run: Run, tmp_path: Path, extension: str) -> None:
    ranks, to = add_predictions(run), f"{tmp_path}/issues.{extension}"
    assert exported(run, to, "cleanlab")["samples"] == 40
    if extension == "csv":
        table = pa.Table.from_pylist(list(csv.DictReader(io.StringIO(Path(to).read_text()))))
        issues = [row["is_label_issue"] == "True" for row in table.to_pylist()]
    else:
        table = pq.read_table(to)
        issues = table["is_label_issue"].to_pylist()
    ids = [name.removeprefix("'") for name in table["sample_id"].to_pylist()]
    assert {name for name, issue in zip(ids, issues, strict=True) if issue} == set(ranks)
    quality = np.array(table["label_quality"].to_pylist(), float)
    assert quality[issues].max() < 0.5 < quality[~np.array(issues)].min()  # p of the given label
    pytest.importorskip("cleanlab")
    import pandas as pd
    from cleanlab.classification import CleanLearning
    from sklearn.linear_model import LogisticRegression

    frame = pd.read_csv(to) if extension == "csv" else pd.read_parquet(to)
    labels = frame["given_label"].to_numpy()
    features = np.random.default_rng(0).normal(size=(len(labels), 3))
    learning = CleanLearning(LogisticRegression()).fit(features, labels, label_issues=frame)
    assert learning.get_label_issues()["is_label_issue"].sum() == 5


def test_label_studio_imports_the_tasks(run: Run, tmp_path: Path) -> None:
    """By the method that its importer calls for an uploaded CSV file."""
    pytest.importorskip("label_studio")
    add_predictions(run)
    exported(run, f"{tmp_path}/tasks.csv", "label-studio", image_root="s3://bucket/train")
    program = f"""
import io, json, os, sys
os.environ["DJANGO_SETTINGS_MODULE"] = "core.settings.label_studio"
import label_studio
sys.path.insert(0, os.path.dirname(label_studio.__file__))
import django
django.setup()
from data_import.models import FileUpload
class File(io.BytesIO):
    name = "tasks.csv"
    def open(self):
        self.seek(0)
        return self
    def __exit__(self, *_):
        return None  # stays open: the importer opens it twice
upload = FileUpload()
upload.__dict__["file"] = File(open({f"{tmp_path}/tasks.csv"!r}, "rb").read())
print("TASKS" + json.dumps(upload.read_tasks_list_from_csv()))
"""
    quiet = {"SENTRY_DSN": "", "FRONTEND_SENTRY_DSN": "", "COLLECT_ANALYTICS": "false"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, **quiet, "LABEL_STUDIO_BASE_DATA_DIR": f"{tmp_path}/studio"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    tasks = json.loads(result.stdout.rsplit("TASKS", 1)[1])
    assert [task["data"]["rank"] for task in tasks] == [1, 2, 3, 4, 5]
    assert all(task["data"]["image"].startswith("s3://bucket/train/") for task in tasks)


def test_fiftyone_imports_the_samples(run: Run, tmp_path: Path) -> None:
    ranks, to = add_predictions(run), f"{tmp_path}/fiftyone"
    assert exported(run, to, "fiftyone")["samples"] == 40
    keep, scores = raypipe.KeepList(run.uri), {}
    for file in storage.names(run.scores_folder):
        for row in storage.read_table(run.path("scores", file)).to_pylist():
            scores[row["sample_id"]] = row
    samples = storage.read_json(f"{to}/samples.json")["samples"]
    assert len({sample["_id"]["$oid"] for sample in samples}) == 40
    for sample in samples:
        row = scores[sample["sample_id"]]
        assert [sample[name] for name in ("score", "lower", "upper")] == [
            row[name] for name in ("score", "lower", "upper")
        ]
        assert sample["kept"] == (sample["sample_id"] in keep)
        assert sample["label_error_rank"] == ranks.get(sample["sample_id"])
        assert sample["ground_truth"]["label"] == run.classes().names[row["label"]]
        assert Path(sample["filepath"]).is_file()
    exported(run, to, "fiftyone")
    storage.write_bytes(f"{tmp_path}/mine/a.txt", b"mine")
    with pytest.raises(RunError, match=r"contains other files, such as a\.txt"):
        exported(run, f"{tmp_path}/mine", "fiftyone")
    pytest.importorskip("fiftyone")
    pytest.importorskip("mongomock")
    reader = Path(__file__).parents[1] / "fiftyone_reader.py"
    result = subprocess.run(
        [sys.executable, str(reader), to], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    read = json.loads(result.stdout.rsplit("READ", 1)[1])
    for name in ("sample_id", "filepath", "score", "lower", "upper", "kept", "label_error_rank"):
        assert read[name] == [sample[name] for sample in samples]
    for name in ("ground_truth", "prediction"):
        assert read[name] == [sample[name]["label"] for sample in samples]
    assert read["kept samples"] == 20 and read["classes"] == list(run.classes().names)


@pytest.mark.parametrize(
    ("format", "to", "options", "words"),
    [
        ("fiftyone", "out", {}, "needs a source in which every sample is a file"),
        ("label-studio", "out.csv", {}, "needs a source in which every sample is a file"),
        ("label-studio", "out.json", {}, r"ends in \.csv"),
        ("cleanlab", "out.txt", {}, r"ends in \.csv or \.parquet"),
        ("cleanlab", "out.csv", {"shard_samples": 3}, "has no shards"),
        ("cleanlab", "out.csv", {"snapshot": "x"}, "remove snapshot"),
        ("mds", "out", {"push_to": "a/b"}, "push_to needs format huggingface"),
        ("mds", "out", {"image_root": "/a"}, "image_root has no effect"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tmp_path: Path, format: str, to: str, options: dict[str, Any], words: str
) -> None:
    run = Run(str(Path(__file__).parents[1] / "data" / "run-0.1.0"))
    with pytest.raises(ConfigError, match=words):
        raypipe.export(run.uri, 0.3, format, f"{tmp_path}/{to}", progress=QUIET, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format", "package", "options", "command"),
    [
        ("lance", "lance", {}, r"pip install 'raypipe\[lance\]'"),
        ("huggingface", "datasets", {"push_to": "a/b"}, r"pip install 'raypipe\[hf\]'"),
    ],
)
def test_a_package_that_is_missing_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    package: str,
    options: dict[str, Any],
    command: str,
) -> None:
    run = Run(str(Path(__file__).parents[1] / "data" / "run-0.1.0"))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(ConfigError, match=command):
        raypipe.export(run.uri, 0.3, format, f"{tmp_path}/out", progress=QUIET, **options)


# -- the Hugging Face Hub --------------------------------------------------------------------------


class Hub:
    """A repository of the Hub, in memory: what the clients of the Hub are called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
        self.files: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.private: bool | None = None
        self.role = "write"

        def create_repo(
            _: Any, name: str, *, repo_type: str, private: bool, exist_ok: bool
        ) -> None:
            self.private = private

        def upload_file(_: Any, *, path_or_fileobj: bytes, path_in_repo: str, **__: Any) -> None:
            self.calls.append(path_in_repo)
            self.files[path_in_repo] = path_or_fileobj

        def download(_: Any, name: str, file: str, **__: Any) -> str:
            (folder / file).write_bytes(self.files[file])
            return str(folder / file)

        def push_to_hub(data: Any, name: str, *, split: str) -> None:
            self.calls.append("shards")
            self.files |= {
                ".gitattributes": b"",
                f"data/{split}.parquet": str(len(data)).encode(),
                "README.md": b"---\ndataset_info:\n  splits:\n  - name: train\n---\n# Pushed\n",
            }

        def load(_: Any, name: str) -> Any:
            return hub.DatasetCard(self.files["README.md"].decode())

        def whoami(_: Any) -> dict[str, Any]:
            return {"auth": {"accessToken": {"role": self.role, "displayName": "mine"}}}

        monkeypatch.setattr(hub.HfApi, "whoami", whoami)
        monkeypatch.setattr(hub.HfApi, "repo_exists", lambda *_, **__: self.private is not None)
        monkeypatch.setattr(hub.HfApi, "create_repo", create_repo)
        monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda *_, **__: list(self.files))
        monkeypatch.setattr(hub.HfApi, "upload_file", upload_file)
        monkeypatch.setattr(hub.HfApi, "hf_hub_download", download)
        monkeypatch.setattr(datasets.Dataset, "push_to_hub", push_to_hub)
        monkeypatch.setattr(hub.DatasetCard, "load", classmethod(load))


def test_a_push_can_be_repeated_and_replaces_nothing_else(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch, tmp_path)

    def push(**options: Any) -> None:
        exported(run, f"{tmp_path}/out", "huggingface", push_to="user/kept", **options)

    push()
    assert hub.private
    assert hub.calls == ["raypipe.json", "shards", "README.md", "raypipe.json"]
    assert json.loads(hub.files["raypipe.json"])["complete"]
    _, front, body = hub.files["README.md"].decode().split("---\n", 2)
    assert {"dataset_info", "tags", "pretty_name"} <= set(yaml.safe_load(front))
    assert "20 samples that raypipe" in body and "Pushed" not in body
    push()  # the same export: datasets itself skips shards that it has uploaded
    assert hub.calls.count("shards") == 2
    for mark in (b'{"raypipe_export": "another"}', b"[]", b"no JSON"):
        hub.files["raypipe.json"] = mark
        with pytest.raises(RunError, match=r"user/kept: the repository contains other files"):
            push()
    assert hub.calls.count("shards") == 2
    push(force=True)
    assert hub.calls.count("shards") == 3


def test_an_interrupted_push_is_not_marked_as_complete(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch, tmp_path)
    with monkeypatch.context() as patch:

        def interrupted(*_: Any, **__: Any) -> None:
            raise ConnectionError("reset")

        patch.setattr("datasets.Dataset.push_to_hub", interrupted)
        with pytest.raises(RunError, match=r"reset\); rerun to try again\. The export in"):
            exported(run, f"{tmp_path}/out", "huggingface", push_to="user/kept")
    assert not json.loads(hub.files["raypipe.json"])["complete"]
    exported(run, f"{tmp_path}/out", "huggingface", push_to="user/kept")
    assert json.loads(hub.files["raypipe.json"])["complete"]


def test_a_push_that_cannot_succeed_is_refused_before_the_export(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, to = Hub(monkeypatch, tmp_path), f"{tmp_path}/out"

    def refused(match: str) -> None:
        with pytest.raises(RunError, match=match):
            exported(run, to, "huggingface", push_to="user/kept")
        assert not storage.exists(to) and not hub.calls

    hub.role = "read"
    refused("the token 'mine' can only read")
    hub.role, hub.private = "fineGrained", True
    hub.files["a.txt"] = b"mine"
    refused(r"other files, such as a\.txt; .*the split train and the card are replaced")

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no\nroute")

    def without_token(*_: Any, **__: Any) -> None:
        raise huggingface_hub.errors.LocalTokenNotFoundError("no token")

    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", offline)
    refused(r"ConnectionError: no route\); rerun to try again\. Nothing was exported")
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", without_token)
    refused(r"no token\); log in with `hf auth login` or set HF_TOKEN")
