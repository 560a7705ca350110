"""Advice of messages: it names the cause, and what it says helps."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import raypipe
from raypipe.config import SourceSettings, apply_overrides, parse_config
from raypipe.distributed.context import Context
from raypipe.errors import ConfigError, RunError, SourceError, StageError
from raypipe.estimate.inspect_text import describe_survey
from raypipe.evaluation.decoded import list_test_set
from raypipe.evaluation.held_out import source_of_test_set
from raypipe.progress import Progress
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.run import Run
from raypipe.sources import class_map, open_source
from raypipe.sources.classes import ClassMap, lone_classes_note
from raypipe.sources.formats import LABEL_PLACES
from raypipe.stages.index.classes import write_classes
from raypipe.stages.seed.stage import SeedStage, size_problem


def images(folder: Path, *names: str) -> str:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(path, "PNG")
    return str(folder)


def source_error(uri: str, **options: Any) -> str:
    with pytest.raises(SourceError) as error:
        list(open_source(SourceSettings(uri=uri, **options)).files())
    return str(error.value)


def config(*settings: str) -> Any:
    return parse_config(
        apply_overrides({"run": "out", "source": {"uri": "digits://"}}, list(settings))
    )


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ("cat/1,a\ncat/2,b\n", "cat/1.png exists: add the endings of the files to the list"),
        ("cat\\1.png,a\ncat\\2.png,b\n", "they exist with slashes (/) instead of backslashes"),
        ("dog/1.png,a\ndog/2.png,b\n", "set source.root"),
    ],
)
def test_a_list_of_paths_that_do_not_exist(tmp_path: Path, listed: str, words: str) -> None:
    root = images(tmp_path, "cat/1.png", "cat/2.png")
    (tmp_path / "list.csv").write_text("path,label\n" + listed)
    message = source_error(f"{root}/list.csv")
    assert words in message and ("set source.root" in message) == (words == "set source.root")


def test_a_test_set_that_does_not_exist_is_an_option_of_evaluate(tmp_path: Path) -> None:
    uri, classes = str(tmp_path / "nope"), ClassMap(("a", "b"), numeric=False)
    for options, words in (
        ({}, "no such file or folder; check --test"),
        ({"format": "filelist"}, "--test"),
    ):
        with pytest.raises(SourceError, match=words) as error:
            list_test_set(SourceSettings(uri=uri, **options), SourceSettings(uri="x"), classes)
        assert "source." not in str(error.value)
    config = parse_config({"run": "x", "source": {"uri": "y"}})
    with pytest.raises(SourceError, match=r"no such file or folder; check --test$"):
        source_of_test_set(config, uri, [])


def manifest(samples: int, *per_class: int) -> SeedManifest:
    return SeedManifest(
        samples=samples, per_class=per_class, shards=(), mean=(0.0,) * 3, std=(1.0,) * 3
    )


@pytest.mark.parametrize(
    ("seed", "total", "settings", "words", "never"),
    [
        (manifest(5, 3, 2), 5, ["seed.fraction=1"], "the source has 5 samples", "Raise"),
        (
            manifest(40, 40),
            400,
            [],
            "but the source has one class.*set source.label_column to null and pseudo_labels.clusters",
            "Raise",
        ),
        (manifest(8, 4, 4), 80, [], r"Raise seed.fraction \(now 0.1\)", "pseudo_labels"),
        (manifest(8, 4, 4), 80, ["seed.fraction=1"], "seed.fraction is 1", "Raise"),
    ],
)
def test_a_seed_set_that_is_too_small(
    seed: SeedManifest, total: int, settings: list[str], words: str, never: str
) -> None:
    import re

    problem = size_problem(seed, config("seed.fraction=0.1", *settings), total)
    assert re.search(words, problem) and never not in problem
    assert size_problem(manifest(400, 200, 200), config(*settings), 4000) == ""


@pytest.mark.parametrize("format", LABEL_PLACES)
def test_a_source_without_labels(tmp_path: Path, format: str) -> None:
    run = Run(f"{tmp_path}/run")
    write_classes(run, ClassMap((), numeric=False))
    source = {"uri": str(tmp_path), "format": format}
    context = Context(parse_config({"run": run.uri, "source": source}), run, Progress())
    with pytest.raises(StageError) as error:  # before anything is drawn
        SeedStage().execute(context, StageRecord())
    assert f"has no labels. They are read from {LABEL_PLACES[format]}." in str(error.value)
    assert "source.label_column to null and pseudo_labels.clusters" in str(error.value)


def test_tars_named_after_classes_have_no_labels(tmp_path: Path) -> None:
    image = images(tmp_path / "images", "0.png")
    for name in ("cat", "dog"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.add(f"{image}/0.png", "0.png")
    text = "\n".join(describe_survey(raypipe.inspect(f"{tmp_path}/*.tar")))
    assert "the samples have no labels" in text and "not from the names of tars" in text
    ignored = raypipe.inspect(
        f"{tmp_path}/*.tar", overrides=["label_column=null", "pseudo_labels.clusters=2"]
    )
    text = "\n".join(describe_survey(ignored))
    assert "source.label_column is null" in text and "a run needs" not in text


@pytest.mark.parametrize("names", [["cat/1.png", "cat/2.png"], ["1.png", "2.png"]])
def test_a_preview_of_one_class_or_none_names_pseudo_labels(
    tmp_path: Path, names: list[str]
) -> None:
    survey = raypipe.inspect(images(tmp_path, *names))
    text = "\n".join(describe_survey(survey))
    assert "a run needs 2 classes" in text and "pseudo_labels.clusters" in text


def test_minus_one_is_no_label_in_every_format() -> None:
    for classes in (
        class_map(None, frozenset({0, 1, 2}), None),
        class_map(("a", "b", "c"), frozenset(), None),
        class_map(None, frozenset({"a", "b"}), None),
    ):
        assert classes.index(-1) == (-1, "")
        assert classes.index(-2)[1]


def test_sparse_class_numbers_get_advice_that_helps() -> None:
    sparse = frozenset({10, 2_000_000, 3_000_000, 4_000_000})
    with pytest.raises(
        SourceError, match=r"Store the ids as text.* or number the classes"
    ) as error:
        class_map(None, sparse, None)
    assert "num_classes" not in str(error.value)
    with pytest.raises(SourceError, match=r"if that is one wrong label, set source.num_classes"):
        class_map(None, frozenset({*range(20), 5_000_000}), None)
    assert class_map(None, frozenset({*range(20), 5_000_000}), 20).names[-1] == "19"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("select.keep=half", "select.keep: 'half' is not allowed: expected a list, such as [a, b]"),
        ("select.keep=1.5", "select.keep.0: 1.5 is not allowed"),
        ("proxy.model=resnt18", "did you mean 'resnet18'?"),
        ("embed.max_actors=autoo", "did you mean 'auto'?"),
        ("measure.scores=el2", "did you mean 'el2n'?"),
    ],
)
def test_settings(settings: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(settings)
    assert words in str(error.value) and "tuple" not in str(error.value)
    assert len(str(error.value).splitlines()) == 2  # one problem, one line


def test_fewer_epochs_than_the_checkpoints_of_the_printed_configuration() -> None:
    assert config("proxy.epochs=8").proxy.checkpoints == 8
    assert config("proxy.epochs=8", "proxy.checkpoints=10").proxy.checkpoints == 8
    with pytest.raises(ConfigError, match=r"checkpoints \(9\) cannot be more than epochs \(8\)"):
        config("proxy.epochs=8", "proxy.checkpoints=9")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("metadata.csv", "set source.uri to .*/metadata.csv, with source.format filelist"),
        ("metadata.jsonl", "write metadata.jsonl as CSV"),
    ],
)
def test_a_table_next_to_images_is_not_ignored(tmp_path: Path, table: str, words: str) -> None:
    import re

    root = images(tmp_path, "cat/1.png", "dog/2.png")
    (tmp_path / table).write_text("file_name,label\ncat/1.png,5\ndog/2.png,6\n")
    assert re.search(words, source_error(root))
    folders = open_source(SourceSettings(uri=root, format="imagefolder"))
    assert sum(len(file.members) for file in folders.files()) == 2
    if table.endswith(".csv"):
        listed = open_source(SourceSettings(uri=f"{root}/{table}", format="filelist"))
        labels = {label for file in listed.files() for label in listed.scan(file).labels}
        assert labels == {5, 6}


def test_an_only_folder_that_holds_the_classes(tmp_path: Path) -> None:
    root = images(tmp_path, "images/cat/1.png", "images/dog/2.png")
    message = source_error(root)
    assert "'images', would be the only class" in message
    assert message.endswith(f"set source.uri to {root}{os.sep}images")
    unlabelled = open_source(SourceSettings(uri=root, label_column=None))
    assert sum(len(file.members) for file in unlabelled.files()) == 2
    one = images(tmp_path / "one", "cat/a/1.png", "cat/2.png")
    assert list(open_source(SourceSettings(uri=one)).files())


def test_captions_taken_for_labels_are_noticed() -> None:
    assert "9,800 classes in 10,000 samples" in lone_classes_note(10_000, 9_800)
    assert "label_column" in lone_classes_note(100, 51) and not lone_classes_note(100, 50)
    assert not lone_classes_note(10, 10)


def test_a_bucket_that_does_not_exist_is_named(s3: str) -> None:
    bucket = s3.removeprefix("s3://").partition("/")[0]
    with pytest.raises(RunError, match=f"bucket '{bucket}-nope' does not exist"):
        Run(f"s3://{bucket}-nope/runs/first").ledger()
    with pytest.raises(RunError, match="no run here"):
        Run(f"{s3}/runs/first").ledger()
