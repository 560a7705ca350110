"""`raypipe attach`: scores from tables get their images, and work as a run does. Without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from helpers import QUIET, by_id, digit_pngs
from nights import in_process

import raypipe
from raypipe import storage
from raypipe.cli import main
from raypipe.config.evaluate import EvaluateSettings
from raypipe.errors import ConfigError, RunError, SourceError
from raypipe.evaluation.lists import origins
from raypipe.keeplists.compare import compare_runs
from raypipe.nightly import run_night
from raypipe.report import build
from raypipe.runs.run import Run

COUNT = 120


@pytest.fixture
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)


def folder_of(place: Path, rows: range = range(COUNT), flat: bool = False) -> str:
    """An image folder of digits; ids are `<label>/<row>.png`, or `<row>.png` if it is flat."""
    images, labels = digit_pngs(COUNT)
    for row in rows:
        path = place / ("" if flat else str(labels[row])) / f"{row:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images[row])
    return str(place)


def extrapolated(
    place: Path, rows: range = range(COUNT), flat: bool = False, **columns: Any
) -> str:
    """A folder of `raypipe extrapolate` whose ids are those of `folder_of`."""
    labels = digit_pngs(COUNT)[1]
    draw = np.random.default_rng(3)
    ids = [f"{row:04d}.png" if flat else f"{labels[row]}/{row:04d}.png" for row in rows]
    order = draw.permutation(len(ids)).tolist()  # not that of the images
    vectors = draw.normal(size=(len(ids), 4)).astype(np.float32)
    table = {
        "sample_id": ids,
        "label": [str(labels[row]) for row in rows],
        "embedding": vectors.tolist(),
        **columns,
    }
    embeddings = pa.table({k: v for k, v in table.items() if v is not None}).take(pa.array(order))
    half = len(ids) // 2
    for number, part in enumerate((embeddings.slice(0, half), embeddings.slice(half))):
        storage.write_table(f"{place}/embeddings/{number}.parquet", part)
    scored = ids[::2]
    storage.write_table(
        f"{place}/scores.parquet",
        pa.table({"sample_id": scored, "score": vectors[::2, 0].tolist()}),
    )
    return raypipe.extrapolate(
        f"{place}/embeddings",
        f"{place}/scores.parquet",
        f"{place}/out",
        method="knn-published",
        progress=QUIET,
    ).uri


def scores_of(run: str, without: tuple[str, ...] = ()) -> dict[str, tuple[Any, ...]]:
    names = ("score", "lower", "upper", "measured")
    return {
        key: tuple(row[name] for name in names)
        for key, row in by_id(run).items()
        if key not in without
    }


def test_report_and_export_work_as_for_any_run(
    tmp_path: Path, in_one_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = extrapolated(tmp_path)
    for call, words in (
        (lambda: build(Run(out)), "raypipe attach"),
        (lambda: raypipe.export(out, None, "list", f"{tmp_path}/a.csv"), "raypipe attach"),
    ):
        with pytest.raises(RunError, match=words):
            call()
    images, run = folder_of(tmp_path / "images"), f"{tmp_path}/run"
    with pytest.raises(SystemExit) as ended:
        main(
            ["attach", out, "--images", images, "--to", run, "--set", "source.fragment_samples=50"]
        )
    shown = capsys.readouterr()
    assert ended.value.code == 0, shown.err
    assert f"matched     {COUNT} of {COUNT} images; 0 scores have no image" in shown.out
    assert "note:" not in shown.err
    assert scores_of(run) == scores_of(out) and len(Run(run).fragments()) > 2
    assert {key: row["label"] for key, row in by_id(run).items()} == {
        key: int(key[0]) for key in by_id(out)
    }
    # the same list as that of the tables, whatever the order
    for folder in (out, run):
        raypipe.select(folder, keep=0.5)
    kept = [raypipe.KeepList(folder, keep=0.5) for folder in (out, run)]
    assert set(kept[0].ids) == set(kept[1].ids) and len(kept[0]) == COUNT // 2
    page = storage.read_bytes(build(Run(run))).decode()
    assert page.count("data:image/") > 40 and "not finished" not in page
    assert "Score score of" in page and "given for 60 of them" in page
    assert "is not known. Do not prune" not in page and "The proxy was trained on" not in page
    summary = storage.read_json(Run(run).report_summary)
    assert summary["unfinished"] == [] and summary["counts"]["accounted"] is True
    exported = raypipe.export(run, 0.5, "parquet", f"{tmp_path}/exported", progress=QUIET)
    assert exported["samples"] == COUNT // 2 and not exported["missing"]
    raypipe.export(run, 0.5, "indices", f"{tmp_path}/rows.json", progress=QUIET)
    paths = sorted(f"{path.parent.name}/{path.name}" for path in Path(images).rglob("*.png"))
    rows = json.loads(Path(f"{tmp_path}/rows.json").read_text())["indices"]
    assert {paths[row] for row in rows} == set(kept[1].ids)  # as torchvision numbers them
    # an evaluation names the score of the tables, not that of the default settings
    ids = [pa.array(kept[1].ids)]
    (origin,) = origins(Run(run), Run(run).config(), EvaluateSettings(), ids)
    assert origin.score == "score"
    (origin,) = origins(Run(run), Run(run).config(), EvaluateSettings(beside=[run]), ids)[1:]
    assert origin.score == "score"
    # of settings, those that mean something are compared
    changed = yaml.safe_load(storage.read_bytes(Run(out).config_file))
    changed["proxy"] = {"image_size": 16}
    storage.write_bytes(Run(out).config_file, yaml.safe_dump(changed).encode())
    compared = compare_runs(Run(out), Run(run)).settings
    assert "source.uri" in compared and not any("proxy" in name for name in compared)
    # a second call has nothing to do
    before = storage.read_bytes(Run(run).ledger_file)
    raypipe.attach(out, images, run, overrides=["source.fragment_samples=50"], progress=QUIET)
    after = storage.read_bytes(Run(run).ledger_file)
    assert json.loads(before)["stages"] == json.loads(after)["stages"]
    # images that are gone are not scored any more
    next(Path(images).rglob("0000.png")).unlink()
    counts = raypipe.attach(
        out, images, run, overrides=["source.fragment_samples=50"], progress=QUIET
    ).summary
    assert (counts["matched"], counts["without_image"]) == (COUNT - 1, 1)
    assert len(by_id(run)) == COUNT - 1
    with pytest.raises(RunError, match="no proxy can score new samples"):
        run_night(Run(run).config(), progress=QUIET)


def test_what_has_no_counterpart_is_counted_and_named(
    tmp_path: Path, in_one_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = extrapolated(tmp_path, range(100))
    images = folder_of(tmp_path / "images", range(10, 110))
    broken = min(Path(images).rglob("0050.png"))
    broken.write_bytes(b"")
    (tmp_path / "images" / "3" / "0000.png").write_bytes(broken.read_bytes())
    result = raypipe.attach(out, images, f"{tmp_path}/run")
    counts = result.summary
    assert counts["images"] == 101 and counts["matched"] == 90 and counts["rejected"] == 11
    assert counts["without_image"] == 10 and counts["measured"] == 45
    labels = digit_pngs(100)[1]
    absent = {f"{labels[row]}/{row:04d}.png" for row in range(10)}
    listed = storage.read_table(f"{result.uri}/without_image.parquet")["sample_id"].to_pylist()
    assert set(listed) == absent and set(counts["examples"]) <= absent
    assert scores_of(result.uri) == scores_of(out, tuple(absent))
    shown = capsys.readouterr().err
    assert "11 of 101 images have no score or cannot be read" in shown
    assert "10 scores without an image, such as '" in shown
    rejects = pa.concat_tables(
        table for _, table in storage.iter_tables(Run(result.uri).rejects_folder)
    )
    assert set(rejects["reason"].to_pylist()) == {"no score: its id is not in the tables"}


@pytest.mark.parametrize("labelled", [True, False])
def test_images_without_labels_have_those_of_the_tables(
    tmp_path: Path, in_one_process: None, labelled: bool
) -> None:
    columns = {} if labelled else {"label": None}
    out = extrapolated(tmp_path, flat=True, **columns)
    images = folder_of(tmp_path / "images", flat=True)
    run = raypipe.attach(out, images, f"{tmp_path}/run", progress=QUIET).uri
    labels = digit_pngs(COUNT)[1]
    found = {key: row["label"] for key, row in by_id(run).items()}
    assert found == {f"{row:04d}.png": labels[row] if labelled else None for row in range(COUNT)}
    assert Run(run).classes().names == (tuple("0123456789") if labelled else ())


def test_other_images_of_the_same_ids_are_noticed(
    tmp_path: Path, in_one_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"class {row % 3}" for row in range(COUNT)]
    out = extrapolated(tmp_path, flat=True, label=names)
    table = pa.table(
        {
            "image": digit_pngs(COUNT)[0],
            "label": [f"class {(row + (row < 12)) % 3}" for row in range(COUNT)],
            "key": [f"{row:04d}.png" for row in range(COUNT)],
        }
    )
    storage.write_table(f"{tmp_path}/images.parquet", table)
    call = (out, f"{tmp_path}/images.parquet", f"{tmp_path}/run")
    with pytest.raises(
        SourceError,
        match=r"none of 120 images has the id of a score: images have ids such as "
        r"'images\.parquet#0', scores such as '00\d\d\.png'; set source\.uri or source\.id_column",
    ):
        raypipe.attach(*call, progress=QUIET)
    again = raypipe.attach(*call, overrides=["source.id_column=key"])
    assert again.summary["rejected"] == 0 and again.summary["matched"] == COUNT
    assert "note: 12 images of another class than in the tables" in capsys.readouterr().err
    assert by_id(call[2])["0000.png"]["label"] == 1  # that of the image
    storage.write_table(call[1], table.set_column(1, "label", pa.array(["x", "y", "z"] * 40)))
    with pytest.raises(SourceError, match="labels of the tables do not fit those of the images"):
        raypipe.attach(
            *call[:2], f"{tmp_path}/other", overrides=["source.id_column=key"], progress=QUIET
        )


def test_folders_that_hold_something_else_are_refused(tmp_path: Path, in_one_process: None) -> None:
    out = extrapolated(tmp_path)
    images = folder_of(tmp_path / "images")
    run = raypipe.attach(out, images, f"{tmp_path}/run", progress=QUIET).uri
    with pytest.raises(RunError, match="not written by `raypipe extrapolate`"):
        raypipe.attach(run, images, f"{tmp_path}/other", progress=QUIET)
    for folder in (out, images):
        with pytest.raises(RunError, match="the folder holds something else"):
            raypipe.attach(out, images, folder, progress=QUIET)
    with pytest.raises(ConfigError, match="label_column: null"):
        raypipe.attach(
            out, images, f"{tmp_path}/x", overrides=["source.label_column=null"], progress=QUIET
        )
    with pytest.raises(RunError, match="written by `raypipe extrapolate`"):
        raypipe.run({"run": run, "source": {"uri": images}}, progress=QUIET)
