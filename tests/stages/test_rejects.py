"""When a run stops because too much of its source cannot be read: the rule, and its stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import digit_pngs, small_config, stamps
from serial import index, seed
from test_duplicates import put

import raypipe
from raypipe import storage
from raypipe.config import Config
from raypipe.errors import RejectError, SourceError
from raypipe.runs.rejects import (
    MIN_REJECTS,
    RejectCounter,
    UnreadableFiles,
    foreseen_rejects,
    hash_order,
    reason_kind,
    summarize_rejects,
)
from raypipe.runs.run import Run
from raypipe.sources import ClassMap
from raypipe.stages.index.classes import settle_classes, write_classes


def counter(fraction: float, total: int, units: list[tuple[int, int]]) -> RejectCounter:
    """Count units, given (samples, rejects) of each."""
    result = RejectCounter(fraction, total)
    for samples, rejects in units:
        result.add(
            samples,
            summarize_rejects((f"{number}.png", "empty: 0 bytes") for number in range(rejects)),
        )
    return result


def stops(*arguments: object, all_read: bool = False) -> bool:
    try:
        counter(*arguments).check(all_read)  # type: ignore[arg-type]
    except RejectError:
        return True
    return False


@pytest.mark.parametrize(
    ("fraction", "total", "units", "expected"),
    [
        (0.01, 100, [(100, 9)], False),  # a small source with a few bad ones
        (0.01, 100, [(100, 10)], True),
        (
            0.01,
            100_000,
            [(1000, 900)],
            False,
        ),  # one bad fragment of a hundred says nothing about the others
        (0.01, 100_000, [(1000, 900), (1000, 101)], True),  # more than a hundredth of all
        (0.01, 1_000_000, [(1000, 100)] * 7, False),
        (0.01, 1_000_000, [(1000, 100)] * 8, True),  # far from certain, but clear
        (0.01, 1_000_000, [(1000, 11)] * 20, False),
        (0.01, 1_000_000, [(1000, 1000)] + [(1000, 0)] * 20, False),  # one cluster is no share
        (0.5, 1_000_000, [(1000, 1000)] * 8, False),  # all of eight fragments
        (0.5, 1_000_000, [(1000, 1000)] * 40, True),
        (0.0, 100, [(10, 0)], False),
        (0.0, 100, [(10, 1)], True),
        (1.0, 100, [(100, 100)], False),
    ],
)
def test_a_run_stops_when_it_is_certain_or_clear(
    fraction: float, total: int, units: list[tuple[int, int]], expected: bool
) -> None:
    assert stops(fraction, total, units) == expected


def test_samples_drawn_one_by_one_need_no_clusters() -> None:
    assert stops(0.01, 1_000_000, [(2000, 60)], all_read=True)
    assert not stops(0.01, 1_000_000, [(2000, 60)])
    assert not stops(
        0.01, 1_000_000, [(2000, 30)], all_read=True
    )  # 1.5 % of 2,000 may be 1 % of all
    assert not stops(0.01, 1_000_000, [(400, 40)], all_read=True)


def test_a_source_within_the_fraction_is_seldom_stopped_and_a_rotten_one_soon() -> None:
    """Simulation with clustered rejects, checked after every fragment. Seeded."""
    generator = np.random.default_rng(0)

    def read_until_stopped(share: float, fragments: int = 120, size: int = 200) -> int | None:
        rates = generator.beta(
            share * 2, (1 - share) * 2, fragments
        )  # variance between fragments far above the binomial
        rejects = generator.binomial(size, rates)
        rejects = (
            rejects
            if share > 0.05 or rejects.sum() <= 0.05 * size * fragments
            else np.zeros(fragments, int)
        )
        found = RejectCounter(0.05, fragments * size)
        for number, count in enumerate(rejects):
            found.add(size, json.dumps([["bad", int(count), "x", "bad"]] if count else []))
            try:
                found.check()
            except RejectError:
                return number + 1
        return None

    assert [read_until_stopped(0.045) for _ in range(40)] == [None] * 40
    assert all((found := read_until_stopped(0.3)) is not None and found <= 30 for _ in range(40))


def test_the_words_count_the_reasons_and_say_what_helps() -> None:
    found = RejectCounter(0.01, 5000)
    found.add(
        600,
        summarize_rejects(
            [(f"{n}.png", f"cannot be decoded: {n} bytes missing") for n in range(100)]
            + [("l", "label 'x' is odd")]
        ),
    )
    with pytest.raises(RejectError) as error:
        found.check()
    assert str(error.value) == (
        "101 of 600 samples read so far were rejected (16.8 %); source.max_reject_fraction allows 1 % of 5,000. "
        "100 x cannot be decoded: N bytes missing (such as 0.png); 1 x label 'x' is odd (such as l). Fix the source and rerun, or continue "
        "without these samples: set source.max_reject_fraction to more than 0.17; finished work is kept"
    )
    assert error.value.exit_code == 1
    with pytest.raises(RejectError, match="Fix the source and rerun; finished work is kept"):
        counter(0.01, 5000, [(600, 600)]).check()


def test_kinds_of_reasons() -> None:
    assert (
        reason_kind("label 'it\\'s' is not one of the 10 classes")
        == "label '...' is not one of the N classes"
    )
    assert (
        reason_kind("30000x30000 pixels are more than max_pixels = 1000")
        == "N pixels are more than max_pixels = N"
    )
    assert (
        reason_kind("../a b/x.png: a link or special file")
        == "../a b/x.png: a link or special file"
    )
    assert reason_kind("source.transform: KeyError: 7") == "source.transform: KeyError: N"
    assert reason_kind("../x.png: a link or special file") == "a link or special file"
    assert (
        reason_kind("duplicate id: also in a/b-1.parquet") == "duplicate id: also in another file"
    )
    many = json.loads(
        summarize_rejects((str(number), chr(0x4E00 + number)) for number in range(500))
    )
    assert len(many) <= 101 and sum(count for _, count, *_ in many) == 500


def test_the_order_of_reading_is_fixed_and_not_that_of_the_source() -> None:
    names = [f"shard-{number:04d}" for number in range(200)]
    order = hash_order(names, str)
    assert sorted(order) == names and order != names and order == hash_order(names[::-1], str)
    assert abs(np.corrcoef(np.arange(200), [names.index(name) for name in order])[0, 1]) < 0.2


def files(*items: tuple[int, int, str]) -> UnreadableFiles:
    """Count files, given (bytes, samples, reason why it cannot be read) of each."""
    result = UnreadableFiles()
    for number, (size, samples, error) in enumerate(items):
        result.add(size, [{"start": 0, "stop": samples, "error": error, "path": f"{number}.tar"}])
    return result


def test_files_count_by_their_bytes_and_when_there_are_many_by_number() -> None:
    good, cut, empty = (1000, 100, ""), (500, 0, "not a tar file"), (0, 0, "empty: 0 bytes")
    files(*[good] * 9, (90, 0, "cut")).check(0.01)  # 1.0 % of the bytes, but nine samples
    with pytest.raises(
        RejectError,
        match=r"1 of 3 files cannot be read, 20 % of the bytes; .* 1 x not a tar file \(such as 2.tar\)",
    ):
        files(good, good, cut).check(0.01)
    files(good, good, cut).check(0.2)
    files(good, empty).check(0.01)
    files(*[good] * 50, *[empty] * (MIN_REJECTS - 1)).check(0.01)
    with pytest.raises(
        RejectError, match=r"10 of 60 files .* 10 x empty: 0 bytes .* to more than 0.17"
    ):
        files(*[good] * 50, *[empty] * MIN_REJECTS).check(0.01)
    with pytest.raises(RejectError):
        files(*[good] * 500, empty).check(0)
    files(cut, cut).check(1)


def folder_config(tmp_path: Path, *more: str) -> Config:
    where = [
        f"source.uri={tmp_path}/data",
        "source.format=imagefolder",
        "source.limit=null",
        "seed.fraction=0.5",
        "seed.audit=20",
    ]
    return small_config(f"{tmp_path}/run", *where, *more)


def test_the_seed_stage_stops_and_goes_on_when_more_is_allowed(
    tmp_path: Path, no_ray: None
) -> None:
    for number, (image, label) in enumerate(zip(*digit_pngs(80), strict=True)):
        path = tmp_path / "data" / f"class-{label}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image if number % 3 else image[:40])
    config = folder_config(tmp_path)
    index(config)
    with pytest.raises(
        RejectError, match=r"of \d+ samples read so far were rejected .* 2[0-9] x not a readable"
    ):
        seed(config)
    drawn = stamps(config.run, "drawn")
    assert drawn and not stamps(config.run, "seed")
    with pytest.raises(RejectError):
        seed(config)  # rejects of the files on disk count
    assert stamps(config.run, "drawn") == drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("raypipe.stages.seed.draw.write_drawn")  # nothing is drawn again
        record = seed(folder_config(tmp_path, "source.max_reject_fraction=0.5"))
    assert "manifest.json" in stamps(config.run, "seed") and not stamps(config.run, "drawn")
    assert 10 <= record.detail["rejects"] <= 27 and record.samples + record.detail["rejects"] < 80


def test_half_of_the_files_cut_off_stop_the_index(tmp_path: Path, no_ray: None) -> None:
    for name in "abcd":
        put(tmp_path / "data", name, [f"{name}{number}" for number in range(50)])
    whole = (tmp_path / "data" / "c.parquet").read_bytes()
    (tmp_path / "data" / "c.parquet").write_bytes(whole[: len(whole) // 2])
    where = [f"source.uri={tmp_path}/data", "source.format=parquet", "source.limit=null"]
    with pytest.raises(
        RejectError, match=r"1 of 4 files cannot be read, .* not a readable Parquet file"
    ):
        index(small_config(f"{tmp_path}/run", *where))
    assert len(Run(f"{tmp_path}/run").fragments()) == 4, "the index is kept"
    assert (
        index(small_config(f"{tmp_path}/run", *where, "source.max_reject_fraction=0.2")).samples
        == 150
    )


def test_later_classes_do_not_renumber_those_of_the_run(
    tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, image in enumerate(digit_pngs(80)[0]):
        path = tmp_path / "data" / ("bee", "cow")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    config, run = folder_config(tmp_path), Run(f"{tmp_path}/run")
    index(config)
    (tmp_path / "data" / "ape").mkdir()
    (tmp_path / "data" / "ape" / "1.png").write_bytes(image)
    index(config)
    assert run.classes().names == ("ape", "bee", "cow"), "nothing is drawn yet"
    (tmp_path / "data" / "ape" / "1.png").rename(tmp_path / "data" / "bee" / "1a.png")
    index(config)
    assert run.classes().names == ("bee", "cow")
    seed(config)
    (tmp_path / "data" / "ape" / "1.png").write_bytes(image)
    said: list[str] = []
    monkeypatch.setattr("raypipe.progress.Progress.say", lambda self, text: said.append(text))
    index(config)
    assert run.classes().names == ("bee", "cow")
    assert said == [
        "note: 1 class is new in the source (ape). The proxy of this run was not trained on it, so its samples are rejected; "
        "a new run folder includes it"
    ]
    assert run.classes().index("ape") == (-1, "label 'ape' is not one of the 2 classes")
    for path in (tmp_path / "data" / "bee").iterdir():
        path.unlink()
    index(config)
    assert run.classes().index("cow") == (1, ""), "nor does a class that goes away"


def test_classes_that_are_numbers_or_named_by_the_source(tmp_path: Path) -> None:
    run, nothing = Run(str(tmp_path)), frozenset[int | str]()

    def settle(*arguments: Any) -> tuple[ClassMap, str]:
        classes, note = settle_classes(run, *arguments)
        write_classes(run, classes)
        return classes, note

    assert len(settle(None, frozenset({0, 4}), None)[0].names) == 5
    storage.write_bytes(run.path("seed", "seed-00000.parquet"), b"")
    classes, note = settle(None, frozenset({0, 4, 7, 9, -1, "cat"}), None)
    assert len(classes.names) == 5 and note.startswith(
        "3 classes are new in the source (7, 9, cat). "
    )
    assert classes.index(7) == (-1, "label 7 is outside 0..4")
    assert settle(None, frozenset({9}), 5)[1] == "", (
        "with source.num_classes a larger number is a wrong label"
    )
    write_classes(run, ClassMap(("ox", "pig"), numeric=True))
    assert settle(("ox", "pig"), nothing, None)[1] == ""
    classes, note = settle(("ox", "pig", "rat"), nothing, None)
    assert classes.names == ("ox", "pig") and "1 class is new in the source (rat)" in note
    with pytest.raises(SourceError, match="class names that the source states differ"):
        settle(("ant", "ox", "pig"), nothing, None)
    storage.delete(
        run.path("index")
    )  # as other settings of the source do: the seed set is drawn again as well
    assert settle(("ant", "ox"), nothing, None)[0].names == ("ant", "ox")


@pytest.mark.parametrize(
    "rejects, drawn, total, fraction, expected",
    [
        (15, 215, 215, 0.01, "15 of 215 samples drawn cannot be read (7 %), and "),
        (2, 22, 215, 0.01, "the run probably stops in the stage embed"),
        (15, 215, 215, 0.01, "the run stops in the stage embed"),
        (9, 215, 215, 0.01, ""),  # fewer than 10 never stop a run
        (1, 22, 215, 0.05, ""),
        (0, 22, 215, 0.0, ""),
        (1, 200, 100_000, 0.0, "set source.max_reject_fraction to more than 0.005"),
    ],
)
def test_too_many_rejects_are_foreseen(
    rejects: int, drawn: int, total: int, fraction: float, expected: str
) -> None:
    found = foreseen_rejects(rejects, drawn, total, fraction)
    assert expected in found and bool(found) == bool(expected)


def test_inspection_and_seed_foresee_a_run_that_stops(
    no_ray: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """15 of 215 images are broken; the seed set has so few of them that it does not stop."""
    for number, image in enumerate(digit_pngs(215)[0]):
        content = b"broken" if number % 15 == 0 else image
        path = tmp_path / "data" / str(number % 3) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    where = [f"source.uri={tmp_path}/data", "source.format=imagefolder", "source.limit=null"]
    config = small_config(f"{tmp_path}/run", *where, "seed.fraction=0.3")
    cost = raypipe.inspect(config=config).cost
    assert cost is not None and any("15 of 215 samples" in line for line in cost.warnings)
    caplog.set_level("INFO", "raypipe")
    index(config)
    seed(config)
    assert "the run probably stops in the stage embed" in caplog.text
