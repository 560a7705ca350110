"""Finished work is only replaced when the user asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import QUIET, small_config
from scored import scored_run

import raypipe
from raypipe import storage
from raypipe.config import Config
from raypipe.errors import ConfigError, RunError
from raypipe.pipeline import STAGE_NAMES, execute, make_stage
from raypipe.runs.ledger import StageRecord, fingerprint
from raypipe.runs.overwrite import REDO_SECONDS
from raypipe.runs.run import Run

LONG = REDO_SECONDS / 2 + 1
"""Two stages that took this long are not redone unasked."""


def images(folder: Path, classes: str) -> str:
    """An image folder whose files are no images: nothing here reads them."""
    for number in range(8):
        path = folder / classes[number % len(classes)] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]))
    return str(folder)


def finished(tmp_path: Path, seconds: float, *overrides: str) -> tuple[Run, Config]:
    """A run whose ledger says that every stage is done and took `seconds`."""
    run = scored_run(f"{tmp_path}/run", images(tmp_path / "cats", "ab"))
    config = config_of(run, *overrides)
    fingerprints: dict[str, str] = {}
    for name in STAGE_NAMES:
        stage = make_stage(name)
        if stage.applies_to(config):
            inputs = [fingerprints[need] for need in stage.needs if need in fingerprints]
            fingerprints[name] = fingerprint(name, stage.settings(config), inputs)
    records = {
        name: StageRecord("done", value, wall_seconds=seconds)
        for name, value in fingerprints.items()
    }
    records["select"].detail["lists"] = {"keep-0.50.parquet": 4}
    run.write_config(config)
    run.write_ledger(records)
    return run, config


def config_of(run: Run, *overrides: str) -> Config:
    source = Path(run.uri).parent / "cats"
    where = [f"source.uri={source}", "source.format=imagefolder", "source.limit=null"]
    return small_config(run.uri, *where, *overrides)


def content(run: Run) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in Path(run.uri).rglob("*")
        if path.is_file() and path.name != "driver.json" and path.parent.name != "logs"
    }


@pytest.mark.parametrize("until", [None, "seed"])
def test_a_run_over_another_source_is_not_replaced(tmp_path: Path, until: str | None) -> None:
    run, _ = finished(tmp_path, 1)
    before, dogs = content(run), images(tmp_path / "dogs", "xyz")
    with pytest.raises(RunError) as error:
        execute(config_of(run, f"source.uri={dogs}"), until=until, progress=QUIET)
    message = str(error.value)
    assert f"source.uri {tmp_path}/cats -> {dogs}" in message
    assert "pass --overwrite" in message and "\n" not in message
    assert ("1 keep-list" in message) == (until is None)  # the lists stay where `until` ends
    assert content(run) == before


def test_overwrite_removes_what_the_other_source_left(tmp_path: Path) -> None:
    run, _ = finished(tmp_path, 1)
    dogs = images(tmp_path / "dogs", "xyz")
    execute(config_of(run, f"source.uri={dogs}"), until="index", overwrite=True, progress=QUIET)
    assert run.classes().names == ("x", "y", "z")
    assert list(run.ledger()) == ["index"] and not storage.names(run.scores_folder)
    assert Run(run.config().source.uri).uri == dogs


def test_overwrite_keeps_the_run_of_the_same_source(tmp_path: Path) -> None:
    run, config = finished(tmp_path, LONG)
    scores = storage.names(run.scores_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raypipe.stages.index.stage.IndexStage.complete", lambda *_: True)
        execute(config, until="index", overwrite=True, progress=QUIET)
    assert storage.names(run.scores_folder) == scores and "report" in run.ledger()


def test_long_work_is_not_repeated_for_other_settings(tmp_path: Path) -> None:
    run, _ = finished(tmp_path, LONG)
    before = content(run)
    with pytest.raises(RunError) as error:
        execute(config_of(run, "proxy.epochs=7"), progress=QUIET)
    message = str(error.value)
    assert (
        "proxy.epochs 4 -> 7" in message and "--redo proxy" in message and "1 keep-list" in message
    )
    assert "seed" not in message.partition("(")[2].partition(")")[2]  # the seed set stays
    assert content(run) == before
    with pytest.raises(RunError, match="--redo proxy"):  # a later stage does not cover the first
        execute(config_of(run, "proxy.epochs=7"), redo=["embed"], progress=QUIET)


@pytest.mark.parametrize(
    "seconds, overrides, redo",
    [
        (1, ["proxy.epochs=7"], []),
        (LONG, ["select.strategy=random", "report.images=5"], ["select"]),
        (LONG, ["source.limit=4"], ["index"]),
        (LONG, [], []),
    ],
    ids=["short work", "cut again", "named", "same settings"],
)
def test_other_changes_are_let_through(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    overrides: list[str],
    redo: list[str],
) -> None:
    run, _ = finished(tmp_path, seconds)
    with_record: dict[str, bool] = {}
    monkeypatch.setattr(
        "raypipe.pipeline.advance",
        lambda stage, context, records: with_record.update({stage.name: stage.name in records}),
    )
    monkeypatch.setattr("raypipe.pipeline.remove_intermediate", lambda *_: ([], 0))
    execute(config_of(run, *overrides), redo=redo, progress=QUIET)
    from_nothing = [name for name, known in with_record.items() if not known]
    expected = {"select": ["select", "report"], "index": list(with_record)}
    assert from_nothing == (expected[redo[0]] if redo else [])


def test_only_the_index_of_another_source_is_replaced_unasked(tmp_path: Path) -> None:
    run = Run(f"{tmp_path}/run")
    images(tmp_path / "cats", "ab")
    execute(config_of(run), until="index", progress=QUIET)
    dogs = images(tmp_path / "dogs", "xyz")
    execute(config_of(run, f"source.uri={dogs}"), until="index", progress=QUIET)
    assert run.classes().names == ("x", "y", "z")


@pytest.mark.parametrize("name", ["labels/0.txt", "keep/a.csv", "config.yaml"])
def test_a_folder_with_other_things_is_no_run_folder(tmp_path: Path, name: str) -> None:
    run, file = Run(f"{tmp_path}/run"), tmp_path / "run" / name
    images(tmp_path / "cats", "ab")
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(RunError, match=f"holds {name.split('/')[0]}, but no run"):
        execute(config_of(run), until="index", overwrite=True, progress=QUIET)
    assert file.read_text() == "mine"


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match="'prxy' is not one of index, seed"):
        raypipe.run({"run": "unused", "source": {"uri": "digits://"}}, redo=["prxy"])
