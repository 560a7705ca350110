"""The index of sources with many small files: its memory, and what it repeats. Without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET, stamps

from raypipe import storage
from raypipe.config import Config, parse_config
from raypipe.distributed.context import Context
from raypipe.errors import SourceError
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.sources import FileScan, SourceFile, filelist, imagefolder, open_source
from raypipe.stages.index import writer
from raypipe.stages.index.listing import RecordedListing
from raypipe.stages.index.stage import IndexStage


def config_of(folder: Path, uri: str, **source: Any) -> Config:
    return parse_config(
        {"run": f"{folder}/run", "source": {"uri": uri, "fragment_samples": 16, **source}}
    )


def is_complete(config: Config, record: StageRecord) -> bool:
    return IndexStage().complete(Context(config, Run(config.run), QUIET), record)


def make(config: Config, stage: IndexStage | None = None) -> StageRecord:
    stage = stage or IndexStage()
    record = StageRecord(detail=dict(stage.detail))
    stage.execute(Context(config, Run(config.run), QUIET), record)
    return record


def samples(run: str) -> list[str]:
    """Return the paths of all samples in the order of the index, and check its invariants."""
    fragments = Run(run).fragments()
    assert len({fragment.fragment_id for fragment in fragments}) == len(fragments)
    found = [Run(run).with_members(fragment) for fragment in fragments]
    assert all(len(fragment.members) == fragment.samples for fragment in found)
    return [member.partition("\0")[0] for fragment in found for member in fragment.members]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """20 folders of 60 empty images in data/, and a list of them."""
    monkeypatch.setattr(writer, "INDEX_FILE_MEMBERS", 100)
    names = [f"c{number % 20:02d}/{number:04d}.png" for number in range(1200)]
    for name in names:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "data" / "list.csv").write_text(
        "path,label\n" + "".join(f"{name},{name[1:3]}\n" for name in names)
    )
    return tmp_path


def images(folder: Path) -> Config:
    return config_of(folder, f"{folder}/data", format="imagefolder")


def of_list(folder: Path) -> Config:
    return config_of(folder, f"{folder}/data/list.csv", format="filelist", root=f"{folder}/data")


SOURCES = {"imagefolder": images, "filelist": of_list}


@pytest.mark.parametrize("name", SOURCES)
def test_everything_is_there_once_and_in_order(folder: Path, name: str) -> None:
    config = SOURCES[name](folder)
    record = make(config)
    found = samples(config.run)
    expected = [f"c{number % 20:02d}/{number:04d}.png" for number in range(1200)]
    assert found == (sorted(expected) if name == "imagefolder" else expected)
    assert (
        record.samples == 1200
        and record.detail["classes"] == 20
        and record.detail["files"] == record.detail["fragments"]
    )
    assert len(storage.names(f"{config.run}/index")) > 8
    assert is_complete(config, record)


@pytest.mark.parametrize("name", SOURCES)
def test_neither_listing_nor_index_is_held(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths of the listing are in index files soon: all but one index file and one block."""
    config = SOURCES[name](folder)
    held = 2 * 100 + 2 * 16
    drawn, most = 0, 0

    def written() -> int:
        tables = storage.iter_tables(f"{config.run}/index", ["start", "stop"])
        return sum(
            sum(table["stop"].to_pylist()) - sum(table["start"].to_pylist()) for _, table in tables
        )

    def counting(stream: Iterator[Any]) -> Iterator[Any]:
        nonlocal drawn, most
        for item in stream:
            drawn += 1
            if drawn % 50 == 0:
                most = max(most, drawn - written())
            yield item

    if name == "imagefolder":
        walk = storage.walk
        monkeypatch.setattr(storage, "walk", lambda uri: counting(walk(uri)))
    else:
        monkeypatch.setattr(filelist, "BLOCK_LINES", 32)
        held += 32
        lines = filelist.read_lines
        monkeypatch.setattr(
            filelist, "read_lines", lambda uri, settings: counting(lines(uri, settings))
        )
    make(config)
    assert drawn >= 1200 and 50 <= most <= held


@pytest.mark.parametrize("name", SOURCES)
def test_a_new_file_changes_its_own_part_and_the_source_is_listed_once(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SOURCES[name](folder)
    record = make(config)
    before = stamps(config.run, "index")
    (folder / "data" / "c19/0600a.png").touch()
    listed = (
        (folder / "data/list.csv")
        .read_text()
        .replace("c19/0639.png", "c19/0600a.png,19\nc19/0639.png")
    )
    (folder / "data" / "list.csv").write_text(listed)
    scanned: list[str] = []
    source = type(open_source(config.source))
    files, scan, listings = source.files, source.scan, 0

    def counting(self: Any) -> Iterator[SourceFile]:
        nonlocal listings
        listings += 1
        return files(self)

    def noting(self: Any, file: SourceFile) -> FileScan:
        scanned.extend(file.members)
        return scan(self, file)

    monkeypatch.setattr(source, "files", counting)
    monkeypatch.setattr(source, "scan", noting)
    stage, context = IndexStage(), Context(config, Run(config.run), QUIET)
    assert not stage.complete(context, record)
    record = make(config, stage)
    assert listings == 1 and record.samples == 1201 and len(samples(config.run)) == 1201
    assert len(scanned) <= 3 * 16 and any("c19/0600a.png" in member for member in scanned)
    after = stamps(config.run, "index")
    unchanged = {name for name in before if after.get(name) == before[name]}
    assert (
        "classes.json" in unchanged and len(unchanged) >= len(before) // 2
    )  # index files before it, unchanged by their stamps
    assert is_complete(config, record)


@pytest.mark.parametrize("name", SOURCES)
def test_an_index_of_an_older_version_keeps_its_fragments(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger of 0.2.0 names no rule; with the one of today, other fragments would result."""
    config = SOURCES[name](folder)
    with monkeypatch.context() as patch:
        patch.setattr(IndexStage, "detail", {})
        record = make(config)
    assert "cuts" not in record.detail and is_complete(config, record)
    new = config.model_copy(update={"run": f"{folder}/new"})
    assert make(new).detail["cuts"] == "lowest-hash"
    before, today = (
        {fragment.fragment_id for fragment in Run(run).fragments()} for run in (config.run, new.run)
    )
    assert len(today - before) > 20 and samples(config.run) == samples(new.run)

    (folder / "data" / "c19/0600a.png").touch()
    listed = (folder / "data/list.csv").read_text()
    (folder / "data/list.csv").write_text(f"{listed}c19/0600a.png,19\n")
    assert not is_complete(config, record)
    IndexStage().execute(Context(config, Run(config.run), QUIET), record)
    after = {fragment.fragment_id for fragment in Run(config.run).fragments()}
    assert len(after - before) <= 4 and len(samples(config.run)) == 1201
    assert "cuts" not in record.detail and is_complete(config, record)


def test_an_attempt_that_was_cut_off_is_taken_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = images(folder)
    write, left = storage.write_table, 3

    def failing(uri: str, table: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        write(uri, table)

    make(config)
    expected, names = samples(config.run), storage.names(f"{config.run}/index")
    changed = [folder / "data" / path for path in expected[::131]]
    # the existing index is of another state of the source, and its files are cut elsewhere
    storage.delete(f"{config.run}/index")
    for path in changed:
        path.rename(path.with_suffix(".b.png"))
    make(config)
    for path in changed:
        path.with_suffix(".b.png").rename(path)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_table", failing)
        with pytest.raises(OSError, match="No space left"):
            make(config)
    scanned: list[SourceFile] = []
    scan = imagefolder.ImageFolderSource.scan
    monkeypatch.setattr(
        imagefolder.ImageFolderSource,
        "scan",
        lambda self, file: scanned.append(file) or scan(self, file),
    )
    make(config)
    assert samples(config.run) == expected and storage.names(f"{config.run}/index") == names
    assert 0 < sum(len(file.members) for file in scanned) < 200


@pytest.mark.parametrize("name", SOURCES)
def test_a_limit_ends_the_listing(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SOURCES[name](folder)
    make(config)
    whole = samples(config.run)
    limited = config.model_copy(
        update={
            "run": f"{folder}/limited",
            "source": config.source.model_copy(update={"limit": 333, "num_classes": 20}),
        }
    )
    source = type(open_source(config.source))
    files, drawn = source.files, 0

    def counting(self: Any) -> Iterator[SourceFile]:
        nonlocal drawn
        for file in files(self):
            drawn += len(file.members)
            yield file

    monkeypatch.setattr(source, "files", counting)
    record = make(limited)
    assert record.samples == 333 and samples(limited.run) == whole[:333]
    assert 333 <= drawn <= 333 + 16 and is_complete(limited, record)
    # nothing beyond the limit matters, and a file that was cut is read whole when needed
    (folder / "data" / "c19/9999.png").touch()
    (folder / "data" / "list.csv").open("a").write("c19/9999.png,19\n")
    assert is_complete(limited, record)
    first = whole[0]
    (folder / "data" / first).unlink()
    listed = (folder / "data/list.csv").read_text()
    (folder / "data/list.csv").write_text(listed.replace(f"{first},{first[1:3]}\n", ""))
    assert not is_complete(limited, record)
    make(limited)
    assert samples(limited.run) == whole[1:334]


def test_nothing_to_read_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("path,label\n")
    config = config_of(tmp_path, f"{tmp_path}/empty.csv", format="filelist")
    with pytest.raises(SourceError, match=r"empty.csv: no line"):
        make(config)
    assert not storage.names(f"{config.run}/index")


def test_recorded_files_are_asked_for_once() -> None:
    drawn = 0

    def files() -> Iterator[SourceFile]:
        nonlocal drawn
        for number in range(100):
            drawn += 1
            yield SourceFile(f"{number} ü\n", number, "x", (f"{number}\0{number}\0why",))

    whole = list(files())
    drawn, recorded = 0, RecordedListing(files())
    part = iter(recorded)
    assert [next(part) for _ in range(30)] == whole[:30] and drawn == 30
    assert list(recorded) == whole == list(recorded) and drawn == 100
