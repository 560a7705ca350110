"""Classes are matched by name wherever two sources, or two files of one source, meet."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import serial
from helpers import digit_pngs

from raypipe import storage
from raypipe.config import SourceSettings, parse_config
from raypipe.config.evaluate import EvaluateSettings
from raypipe.errors import ConfigError, SourceError
from raypipe.estimate import inspect_source
from raypipe.evaluation.decoded import TEST, DecodeUnit, TestSet, decode_test, list_test_set
from raypipe.evaluation.lists import cut_lists
from raypipe.runs.ledger import content_hash, fingerprint
from raypipe.runs.run import Run
from raypipe.sources import ClassMap, open_source

NAMES = ("ant", "bee", "cat")
OTHER_ORDER = ("cat", "ant", "bee")
RUN_CLASSES = ClassMap(NAMES, numeric=True)


def _write(path: Path, classes: list[str], names: tuple[str, ...] | None) -> str:
    """Write a sample of each class to a Parquet file, as ClassLabel or plain numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pngs, order = digit_pngs(len(classes))[0], names or NAMES
    table = pa.table({"image": pngs, "label": [order.index(name) for name in classes]})
    if names is not None:
        features = {"label": {"names": list(names), "_type": "ClassLabel"}}
        described = storage.json_bytes({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": described})
    pq.write_table(table, path)
    return str(path)


def _test_set(uri: str, classes: ClassMap = RUN_CLASSES) -> TestSet:
    return list_test_set(SourceSettings(uri=uri), SourceSettings(uri="elsewhere"), classes)


def _decoded(folder: Path, test: TestSet) -> list[int]:
    """Return the labels of the test set as classes of the run."""
    for number, fragment in enumerate(test.fragments):
        unit = DecodeUnit(TEST, number, fragment)
        decode_test(str(folder / "run"), test, 8, str(folder / "pixels"), unit)
    names = sorted(storage.names(str(folder / "pixels")))
    tables = [storage.read_table(str(folder / "pixels" / name)) for name in names]
    return [label for table in tables for label in table["label"].to_pylist()]


@pytest.mark.parametrize("names", [NAMES, OTHER_ORDER])
def test_a_test_set_with_its_classes_in_another_order(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    classes = [NAMES[row % 3] for row in range(90)]
    test = _test_set(_write(tmp_path / "test.parquet", classes, names))
    assert _decoded(tmp_path, test) == [row % 3 for row in range(90)]
    # results from before classes were matched by name are not reused, unless they were right
    fragment_ids = content_hash(fragment.fragment_id for fragment in test.fragments)
    assert (test.digest == fingerprint(fragment_ids, 90, False)) == (names == NAMES)


def test_shards_of_a_test_set_in_other_orders_and_a_class_that_the_run_lacks(
    tmp_path: Path,
) -> None:
    _write(tmp_path / "test/0.parquet", ["ant", "cat"], OTHER_ORDER)
    _write(tmp_path / "test/1.parquet", ["dog", "bee"], ("dog", *NAMES))
    test = _test_set(str(tmp_path / "test"))
    assert test.classes.unknown == ("dog",)
    assert _decoded(tmp_path, test) == [0, 2, 1]


def test_files_of_a_test_set_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    _write(tmp_path / "test/0.parquet", ["ant", "cat"], NAMES)
    storage.write_bytes(str(tmp_path / "test/1.parquet"), b"not Parquet")
    test = _test_set(str(tmp_path / "test"))
    ((path, reason),) = test.unreadable
    assert path == "1.parquet" and reason.startswith("not a readable Parquet file")
    assert _decoded(tmp_path, test) == [0, 2]
    storage.delete(str(tmp_path / "test/0.parquet"))
    with pytest.raises(SourceError, match=r"no readable samples \(1\.parquet: not a readable"):
        _test_set(str(tmp_path / "test"))


def test_names_against_numbers_without_names_are_refused(tmp_path: Path) -> None:
    numbers = _write(tmp_path / "numbers.parquet", ["ant", "bee"], None)
    named = _write(tmp_path / "named.parquet", ["ant", "bee"], NAMES)
    with pytest.raises(SourceError, match=r"of the run have names \(ant, bee, cat\)"):
        _test_set(numbers)
    with pytest.raises(SourceError, match=r"of the other source have names \(ant, bee, cat\)"):
        _test_set(named, ClassMap(("0", "1", "2"), numeric=True))
    with pytest.raises(SourceError, match=r"none of its classes \(ant, bee, cat\) is a class of"):
        _test_set(named, ClassMap(("ox", "pig"), numeric=False))
    # names that are the numbers mean the same; in any other order they need not
    assert _decoded(tmp_path, _test_set(numbers, ClassMap(("0", "1"), numeric=False))) == [0, 1]
    with pytest.raises(SourceError, match=r"have names \(0, 1, 10, 2\)"):
        _test_set(numbers, ClassMap(("0", "1", "10", "2"), numeric=False))


def test_shards_of_one_source_in_another_order(tmp_path: Path, no_ray: None) -> None:
    _write(tmp_path / "data/1.parquet", ["ant", "ant", "cat"], NAMES)
    _write(tmp_path / "data/2.parquet", ["cat", "ant", "bee"], OTHER_ORDER)
    source = SourceSettings(uri=str(tmp_path / "data"))
    balance = inspect_source(source).survey.balance
    assert balance is not None and balance.per_class == {"ant": 3, "cat": 2, "bee": 1}

    def index() -> list[tuple[str, str]]:
        """Index the source, and return id and class of every sample."""
        config = parse_config({"run": str(tmp_path / "run"), "source": source.model_dump()})
        serial.index(config)
        run, opened = Run(config.run), open_source(config.source)
        classes = run.classes()
        assert classes.names == NAMES
        return [
            (sample.sample_id, classes.names[classes.label_of(sample)[0]])
            for fragment in run.fragments()
            for sample in opened.read(fragment)
        ]

    first = index()
    assert [name for _, name in first] == ["ant", "ant", "cat", "cat", "ant", "bee"]
    # a file that is added later and comes first does not renumber the classes
    storage.write_bytes(str(tmp_path / "run/seed/seed-00000.parquet"), b"")
    _write(tmp_path / "data/0.parquet", ["bee"], OTHER_ORDER)
    assert index() == [("0.parquet#0", "bee"), *first]


@pytest.mark.parametrize(
    ("names", "message"),
    [(("ox", "pig"), "2.parquet states other class names"), (None, "2.parquet has numbers")],
)
def test_shards_that_cannot_be_matched_are_refused(
    tmp_path: Path, no_ray: None, names: tuple[str, ...] | None, message: str
) -> None:
    _write(tmp_path / "data/1.parquet", ["ant", "bee"], NAMES)
    _write(tmp_path / "data/2.parquet", list((names or NAMES)[:2]), names)
    source = SourceSettings(uri=str(tmp_path / "data"))
    with pytest.raises(SourceError, match=message):
        inspect_source(source)
    with pytest.raises(SourceError, match=message):
        serial.index(parse_config({"run": str(tmp_path / "run"), "source": source.model_dump()}))
    with pytest.raises(SourceError, match=message):
        _test_set(source.uri)


def test_another_run_is_compared_only_if_it_has_the_same_labels(
    scored: Run, tmp_path: Path
) -> None:
    other = Run(str(tmp_path / "other"))
    shutil.copytree(scored.uri, other.uri)
    settings = EvaluateSettings.model_validate({"keep": [0.5], "seeds": 1, "beside": other.uri})

    def compare() -> None:
        cut_lists(scored, scored.config(), settings)

    names = [f"digit {number}" for number in range(10)]
    storage.write_json(scored.classes_file, {"names": names, "numeric": True})
    # the same names in another order: the same labels with other numbers
    turned = {"names": names[::-1], "numeric": True}
    shards = list(storage.iter_tables(other.scores_folder))
    storage.write_json(other.classes_file, turned)
    with pytest.raises(ConfigError, match="has other labels for 198 samples of this run, such as"):
        compare()
    for name, table in shards:
        label = pa.array(
            [None if label is None else 9 - label for label in table["label"].to_pylist()],
            pa.int32(),
        )
        position = table.column_names.index("label")
        storage.write_table(
            storage.join(other.scores_folder, name), table.set_column(position, "label", label)
        )
    compare()
    storage.write_json(other.classes_file, {"names": list("0123456789"), "numeric": True})
    with pytest.raises(
        ConfigError, match=r"the classes of the run have names .* cannot be matched"
    ):
        compare()
