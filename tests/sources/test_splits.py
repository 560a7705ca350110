"""Several splits in one folder are refused, with the pattern that selects one."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pyarrow as pa
import pytest
from serial import index, no_ray  # noqa: F401
from source_helpers import ids, make, picture, samples, scans
from test_huggingface import arrow, images, save
from test_webdataset import pairs, tar

from raypipe import storage
from raypipe.config import Config, SourceSettings, parse_config
from raypipe.errors import SourceError
from raypipe.estimate import inspect_source
from raypipe.evaluation.decoded import list_test_set
from raypipe.sources import ClassMap
from raypipe.sources.splits import several_splits
from raypipe.tables.files import stored_files
from raypipe.tables.fragments import plan_embeddings


@pytest.mark.parametrize(
    ("train", "others", "include"),
    [
        ("train-00000-of-00002.parquet", "test-00000-of-00001.parquet", "train-*"),
        ("data/train-0.parquet", "data/validation-0.parquet", "*train*"),
        ("train/0.tar", "val/0.tar test/0.tar", "train/*"),
        ("set/Train/0.tar", "set/Test/0.tar", "*/Train/*"),
        ("imagenet-train-000000.tar", "imagenet-val-000000.tar", "*-train-*"),
        ("cifar_train_0.tar", "cifar_test_0.tar", "*_train_*"),
        ("split=train/0.parquet", "split=test/0.parquet", "*train*"),
        ("train2017/0.tar", "val2017/0.tar", "*train*"),
        ("train.parquet", "test.parquet", "train.*"),
        ("a-train.tar", "a-dev.tar", "*-train.*"),
    ],
)
def test_names_that_show_splits(train: str, others: str, include: str) -> None:
    paths = [train, train.replace("0", "1"), *others.split()]
    splits = several_splits(paths)
    assert splits is not None and splits.include == include
    inside = [path for path in paths if fnmatch.fnmatchcase(path, include)]
    assert inside == [path for path in paths if "train" in path.lower()]


@pytest.mark.parametrize(
    "paths",
    [
        ["train-0.tar", "bus-0.tar", "plane-0.tar"],  # classes
        ["train/0.tar", "train/1.tar"],
        ["train/val-0.tar", "train/val-1.tar"],
        ["train_test_split-0.tar", "train-1.tar"],
        ["latest-0.tar", "trains-0.tar", "contest-1.tar", "evaluation.tar"],
        ["0.parquet", "1.parquet"],
    ],
)
def test_names_that_show_no_splits(paths: list[str]) -> None:
    assert several_splits(paths) is None


@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_splits_are_refused_unless_they_are_named(tmp_path: Path, ending: str) -> None:
    for number, split in enumerate(("train", "train", "test")):
        uri = f"{tmp_path}/{split}-{number}.{ending}"
        if ending == "tar":
            storage.write_bytes(uri, tar(pairs(1, number)))
        else:
            storage.write_table(uri, pa.table({"image": [picture(number)], "label": [number]}))
    words = r"several splits: test \(1 file\), train \(2 files\); set source.include to 'train-\*'"
    for uri in (tmp_path, f"{tmp_path}/*.{ending}"):
        with pytest.raises(SourceError, match=words):
            list(make(str(uri), format="auto").files())
    train = samples(make(str(tmp_path), include="train-*"))
    assert [name.partition("#")[0] for name in ids(train)] == [
        f"train-0.{ending}",
        f"train-1.{ending}",
    ]
    assert len(samples(make(f"{tmp_path}/{{train,test}}-*.{ending}"))) == 3
    if ending == "parquet":
        with pytest.raises(
            SourceError, match=r"several splits: .*; give the files of one, such as"
        ):
            stored_files(str(tmp_path))
        assert len(stored_files(f"{tmp_path}/train-*")) == 2


def test_rows_of_several_splits_in_one_file_are_refused(tmp_path: Path) -> None:
    def write(splits: list[str | None], name: str = "0.parquet") -> Path:
        images = [picture(row) for row in range(len(splits))]
        table = pa.table({"image": images, "label": list(range(len(splits))), "split": splits})
        storage.write_table(f"{tmp_path}/{name}", table, row_group_size=2)
        return tmp_path

    uri = str(write(["train", "train", None, "extra", "test", "train"]))  # test is not an extreme
    (scan,) = (make(uri).scan(file) for file in make(uri).files())
    problem = scan.fragments[0].error
    assert problem.startswith("column 'split' has several splits (test, train); write the rows")
    survey = inspect_source(SourceSettings(uri=uri)).survey
    assert survey.unreadable_files == (("0.parquet", problem),)
    assert len(samples(make(uri, label_column="split"))) == 6
    write(["train", "Training", None])
    assert len(samples(make(uri))) == 3
    write(["0", "fold", "1"])
    assert len(samples(make(uri))) == 3


def _of_split(folder: Path, name: str, split: str | None, **columns: object) -> None:
    """Write a file of two rows; the name of their split is in a column."""
    table = {"image": [picture(len(name)), picture(1)], "label": [0, 1], "Split": [split] * 2}
    storage.write_table(f"{folder}/{name}", pa.table({**table, **columns}))


def test_files_of_several_splits_by_their_rows_are_refused(tmp_path: Path, no_ray: None) -> None:
    data = tmp_path / "data"
    for name, split in (("0", "train"), ("1", None), ("2", "Training"), ("3", "val")):
        _of_split(data, f"{name}.parquet", split)

    def config(run: str, **source: object) -> Config:
        return parse_config({"run": f"{tmp_path}/{run}", "source": {"uri": str(data), **source}})

    words = (
        r"3\.parquet: its column 'split' names the split validation, but that of 0\.parquet names "
        "train; set source.include to a pattern that only the files of one split match, or drop"
    )
    with pytest.raises(SourceError, match=words):
        index(config("all"))
    with pytest.raises(SourceError, match=words):
        inspect_source(SourceSettings(uri=str(data)))
    train = config("train", include="[0-2].parquet")
    assert index(train).samples == 6
    assert index(config("named", uri=f"{data}/{{0..3}}.parquet")).samples == 8
    # the files of a finished index are not opened again, but their split counts
    _of_split(data, "2b.parquet", "test")
    with pytest.raises(SourceError, match=r"2b\.parquet: .* the split test, .* names train"):
        index(train.model_copy(update={"source": config("x", include="[0-2]*.parquet").source}))
    test = SourceSettings(uri=str(data), include="[0-3].parquet")
    with pytest.raises(SourceError, match=r"--test-set include to a pattern"):
        list_test_set(test, test, ClassMap(("0", "1"), numeric=True))


def test_tables_of_several_splits_are_refused(tmp_path: Path) -> None:
    columns = {"sample_id": ["a", "b"], "embedding": [[1.0, 2.0]] * 2}
    _of_split(tmp_path, "0.parquet", "train", **columns)
    _of_split(tmp_path, "1.parquet", "test", **columns)
    words = r"1\.parquet: .* the split test, .*; give the files of one split, or drop"
    with pytest.raises(SourceError, match=words):
        plan_embeddings(str(tmp_path))
    assert len(plan_embeddings(f"{tmp_path}/{{0,1}}.parquet")) == 2
    _of_split(tmp_path, "2.parquet", None, **columns, Split=["train", "test"])
    with pytest.raises(SourceError, match=r"2\.parquet: column 'Split' has several splits"):
        plan_embeddings(f"{tmp_path}/2.parquet")


def test_saved_datasets_of_several_splits_are_refused(tmp_path: Path) -> None:
    train, test = images(6, split=["train"] * 6), images(6, split=["test"] * 6)
    found = scans(make(save(f"{tmp_path}/two", arrow(train), arrow(test))))
    assert [scan.split for scan in found] == ["train", "test"]
    (scan,) = scans(make(save(f"{tmp_path}/one", arrow(pa.concat_tables([train, test])))))
    assert scan.fragments[0].error.startswith("column 'split' has several splits (test, train)")
    assert not scan.fragments[0].samples


@pytest.mark.parametrize(
    ("folders", "refused"),
    [
        (["Training", "Testing"], "Testing and Training"),
        (["train", "val", "annotations"], "train and val"),
        (["train", "bus", "plane"], ""),  # vehicles
        (["train"], "train"),
        (["seg_train", "seg_test"], "seg_train and seg_test"),
        (["train", "holdout"], "holdout and train"),
        (["train", "unlabeled"], "train"),
        (["train_images", "test_images", "notes"], "train_images and test_images"),
        (["express_train", "driving_test", "bus"], ""),
    ],
)
def test_folders_that_are_splits(tmp_path: Path, folders: list[str], refused: str) -> None:
    for number, folder in enumerate(folders):
        storage.write_bytes(f"{tmp_path}/{folder}/x.png", picture(number))
    source = make(str(tmp_path))
    if not refused:
        assert {sample.label for sample in samples(source)} == set(folders)
        return
    refused = " and ".join(sorted(refused.split(" and ")))
    with pytest.raises(SourceError, match=f"{refused} are not classes; set source.uri to"):
        list(source.files())


@pytest.mark.parametrize(
    ("column", "values", "mixed"),
    [
        ("subset", ["train", "test", "train"], True),
        ("is_valid", [True, False, False], True),
        ("Is_Train", ["False", "True", "True"], True),
        ("is_test", [0, 1, 0], True),
        ("is_test", [0, 0, 0], False),
        ("usage", ["indoor", "outdoor", "train"], False),
    ],
)
def test_other_columns_that_name_splits(
    tmp_path: Path, column: str, values: list[object], mixed: bool
) -> None:
    images = [picture(number) for number in range(3)]
    columns = {"image": images, "label": [0, 1, 0], column: values}
    storage.write_table(f"{tmp_path}/a.parquet", pa.table(columns))
    lines = [f"{number}.png,{number},{value}" for number, value in enumerate(values)]
    (tmp_path / "a.csv").write_text("\n".join([f"path,label,{column}", *lines, ""]))
    for number, image in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(image)
    (scan,) = scans(make(f"{tmp_path}/a.parquet"))
    assert (f"column '{column}' has several splits" in scan.fragments[0].error) == mixed
    if mixed:
        with pytest.raises(SourceError, match=f"column '{column}' is"):
            make(f"{tmp_path}/a.csv")
    else:
        assert len(samples(make(f"{tmp_path}/a.csv"))) == 3
