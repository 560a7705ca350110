"""Nights of a source that grows, changes and shrinks; without Ray."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers import QUIET, by_id, digit_pngs, score_files, stamps
from nights import Place, in_process, inverted

import raypipe
from raypipe import storage
from raypipe.config import Config
from raypipe.config.measure import MeasureSettings
from raypipe.errors import ConfigError, RunError, SourceError, StageError
from raypipe.nightly import Night
from raypipe.nightly import night as nights
from raypipe.pipeline import execute
from raypipe.runs.run import Run
from raypipe.runs.snapshots import load_snapshot, snapshot_names
from raypipe.stages.index.stage import IndexStage


def test_the_first_night_of_an_unchanged_source_is_a_snapshot_and_nothing_else(
    growing: Place,
) -> None:
    before = {
        folder: stamps(growing.run.uri, folder)
        for folder in ("scores", "embeddings", "keep", "index", "extrapolator")
    }
    first, second = growing.night(0), growing.night(1)
    assert (first.wrote_snapshot, first.snapshot, first.exit_code) == (
        True,
        "2026-11-22T020000Z",
        0,
    )
    assert (second.wrote_snapshot, second.snapshot, second.exit_code) == (False, first.snapshot, 0)
    assert {folder: stamps(growing.run.uri, folder) for folder in before} == before
    manifest = load_snapshot(growing.run, first.snapshot)
    assert manifest["samples"] == {"new": 0, "changed": 0, "removed": 0, "total": 600}
    assert {entry["file"] for entry in manifest["scores"]} == set(score_files(growing.run.uri))
    assert [entry["file"] for entry in manifest["keep"]] == ["keep-0.50.parquet"]
    # on a local disk, a file that a snapshot names takes no extra space
    stored, original = (
        manifest["scores"][0],
        growing.run.path("scores", manifest["scores"][0]["file"]),
    )
    assert os.path.samefile(
        growing.run.path("snapshots/files", f"{stored['hash']}.parquet"), original
    )


def test_only_what_is_new_is_scored_and_what_is_gone_is_removed(
    growing: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing.night(0)
    before, fitted, kept = (
        score_files(growing.run.uri),
        stamps(growing.run.uri, "extrapolator"),
        by_id(growing.run.uri),
    )
    trained = {folder: stamps(growing.run.uri, folder) for folder in ("proxy", "seed", "measured")}
    old = stamps(growing.run.uri, "scores")
    growing.add(4)
    growing.add(0, rows=100)
    growing.remove(3)
    read: list[str] = []
    embed = nights.make_stage("embed")
    monkeypatch.setattr(
        "raypipe.stages.embed.stage._read", _recording(read, type(embed).__module__)
    )
    night = growing.night(1)
    assert night.wrote_snapshot and night.exit_code == 0, night.advice
    assert night.manifest["files"] == {"new": 1, "changed": 1, "removed": 1}
    # 100 samples of the rewritten file are the same as before
    assert night.manifest["samples"] == {"new": 150, "changed": 0, "removed": 200, "total": 550}
    assert sorted(set(read)) == ["part-00.parquet", "part-04.parquet"]
    after, rows = score_files(growing.run.uri), by_id(growing.run.uri)
    same = before.keys() & after.keys()
    assert len(same) == 4 and all(before[name] == after[name] for name in same)
    new = stamps(growing.run.uri, "scores")
    assert all(old[name] == new[name] for name in same), "written again"
    assert stamps(growing.run.uri, "extrapolator") == fitted
    assert {folder: stamps(growing.run.uri, folder) for folder in trained} == trained
    assert len(rows) == 550 and not any(sample_id.startswith("part-03") for sample_id in rows)
    assert rows["part-00.parquet#7"]["score"] == kept["part-00.parquet#7"]["score"]
    keep = raypipe.KeepList(growing.run.uri)
    assert len(keep) == 275 and set(keep) <= rows.keys()
    # fidelity compares measured with predicted scores of new samples
    fidelity = night.manifest["fidelity"]
    assert fidelity["n"] == 40 and fidelity["spearman"] > 0.5 and fidelity["first"] is not None
    pairs = storage.read_table(_state(growing, night.snapshot, "audit"))
    assert all(row["sample_id"].startswith("part-04") for row in pairs.to_pylist())
    for row in pairs.to_pylist():
        assert (
            rows[row["sample_id"]]["score"] == pytest.approx(row["predicted"])
            and not rows[row["sample_id"]]["measured"]
        )
    assert growing.night(1).wrote_snapshot is False


def _recording(read: list[str], module: str) -> Any:
    import importlib

    original = importlib.import_module(module)._read

    def recording(config: Any, uri: str, aside: bool, fragment: Any) -> Any:
        read.append(fragment.path)
        return original(config, uri, aside, fragment)

    return recording


def _state(growing: Place, snapshot: str, name: str) -> str:
    entry = next(
        entry
        for entry in load_snapshot(growing.run, snapshot)["state"]
        if entry["file"] == f"{name}.parquet"
    )
    return growing.run.path("snapshots/files", f"{entry['hash']}.parquet")


def test_audited_scores_are_those_of_the_proxy_at_its_checkpoint(growing: Place) -> None:
    import torch

    from raypipe.runs.checkpoints import load_checkpoint
    from raypipe.sources import open_source
    from raypipe.vision.decode import decode

    growing.night(0)
    growing.add(4)
    pairs = storage.read_table(_state(growing, growing.night(1).snapshot, "audit")).to_pylist()
    source = open_source(growing.config().source)
    samples = {
        sample.sample_id: sample
        for fragment in growing.run.fragments()
        for sample in source.read(
            growing.run.with_members(fragment), {row["sample_id"] for row in pairs}.__contains__
        )
    }
    model = load_checkpoint(growing.run, "epoch-0000.safetensors")
    for row in pairs[:5]:
        pixels = torch.from_numpy(
            np.asarray(decode(samples[row["sample_id"]].image, 8, 1000))[None].copy()
        )
        loss = torch.nn.functional.cross_entropy(model(pixels), torch.tensor([row["label"]])).item()
        assert row["measured"] == pytest.approx(loss, rel=1e-4)


def test_other_images_are_drift_and_a_refresh_is_advised_until_the_settings_allow_it(
    growing: Place,
) -> None:
    growing.night(0)
    growing.add(4, invert=True)
    night = growing.night(1)
    assert night.exit_code == 4 and any(
        reason.startswith("drift: the samples of this night") for reason in night.advice
    )
    assert any("first audit" in reason for reason in night.advice)
    again = growing.night(1)
    assert (again.wrote_snapshot, again.advice) == (False, night.advice), (
        "the same answer for the same run"
    )
    allowed = ["nightly.max_drift=1", "nightly.max_new_share=1"]
    assert not any(reason.startswith("drift") for reason in growing.night(1, *allowed).advice)
    grown = growing.night(1, "nightly.max_drift=1", "nightly.max_new_share=0.1")
    assert any("20 % of the samples came after the seed set" in reason for reason in grown.advice)


def test_drift_is_told_of_all_nights_together_as_well(growing: Place) -> None:
    growing.night(0)
    for number in (4, 5):
        growing.add(number)
        night = growing.night(number, "nightly.drift_samples=120")
    found = night.manifest["drift"]
    assert found["tonight"]["n_new"] < 120 and found["since"]["n_new"] == 120
    sample = storage.read_table(_state(growing, night.snapshot, "arrivals"))
    assert {fragment[:2] for fragment in sample["sample_id"].to_pylist()} == {"pa"} and len(
        sample
    ) == 120
    assert {row["sample_id"][:7] for row in sample.to_pylist()} == {"part-04", "part-05"}
    growing.remove(4)
    night = growing.night(6, "nightly.drift_samples=120")
    left = storage.read_table(_state(growing, night.snapshot, "arrivals"))
    assert {row["sample_id"][:7] for row in left.to_pylist()} == {"part-05"}


def test_a_score_that_cannot_be_audited_is_said_to_rest_on_drift(
    growing: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing.night(0)
    growing.add(4)
    monkeypatch.setattr(MeasureSettings, "at_checkpoints", property(lambda self: ()))
    night = growing.night(1)
    assert (
        night.manifest["fidelity"]["spearman"] is None
        and "drift alone" in night.manifest["fidelity"]["note"]
    )
    assert night.manifest["drift"]["tonight"]["auc"] is not None


def test_no_audit_where_none_is_asked_for(growing: Place) -> None:
    growing.night(0)
    growing.add(4)
    night = growing.night(1, "nightly.audit=0")
    assert (
        night.manifest["fidelity"]["n"] == 0
        and "nightly.audit is 0" in night.manifest["fidelity"]["note"]
    )


def test_scores_too_unfaithful_leave_a_snapshot_without_keep_lists(growing: Place) -> None:
    growing.night(0)
    growing.add(4)
    night = growing.night(1, "trust.min_spearman=0.999")
    assert (
        night.exit_code == 3
        and "no keep-lists" in night.refused
        and night.manifest["refused"] == night.refused
    )
    assert load_snapshot(growing.run, night.snapshot)["keep"] == []
    again = growing.night(1, "trust.min_spearman=0.999")
    assert (again.wrote_snapshot, again.exit_code) == (False, 3)


def test_the_report_is_written_where_it_is_asked_for(growing: Place) -> None:
    growing.night(0)
    growing.add(4)
    before = stamps(growing.run.uri, "report")
    growing.night(1)
    assert stamps(growing.run.uri, "report") == before
    growing.night(2, "nightly.report=true")
    assert raypipe.api.summary_of(growing.run)["counts"]["samples"] == 750


def test_settings_that_would_train_or_rescore_are_refused(growing: Place) -> None:
    growing.night(0)
    before = score_files(growing.run.uri)
    for change in (
        "seed.fraction=0.5",
        "proxy.epochs=2",
        "extrapolate.neighbours=3",
        "embed.dtype=float16",
    ):
        with pytest.raises(
            RunError, match=rf"settings of stage {change.split('.')[0]} have changed.*jobs/run\.py"
        ):
            growing.night(1, change)
    with pytest.raises(
        RunError, match=r"embed\.from names a table, .* no embeddings of new samples"
    ):
        growing.night(1, "embed.from=table.parquet")
    assert score_files(growing.run.uri) == before
    # keep-lists follow the settings
    assert growing.night(1, "select.keep=[0.25]").wrote_snapshot
    assert len(raypipe.KeepList(growing.run.uri, keep=0.25)) == 150


def test_a_run_that_is_not_finished_is_refused(growing: Place, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run here"):
        Place(growing.folder, tmp_path / "nowhere").night(0)
    assert not (tmp_path / "nowhere").exists()
    storage.delete(growing.run.path("scores", min(storage.names(growing.run.path("scores")))))
    with pytest.raises(RunError, match="not every sample of its index has a score"):
        growing.night(0)
    records = growing.run.ledger()
    del records["measure"]
    growing.run.write_ledger(records)
    with pytest.raises(RunError, match="stage measure is not finished"):
        growing.night(0)


def test_a_source_that_was_empty_and_comes_back_with_other_classes_is_refused(
    growing: Place,
) -> None:
    growing.night(0)
    before = score_files(growing.run.uri)
    for number in range(4):
        growing.remove(number)
    with pytest.raises(SourceError, match=str(growing.folder)):
        growing.night(1)
    assert score_files(growing.run.uri) == before
    for number in range(4):
        growing.add(number)
    about = growing.run.path(
        "nightly", storage.folders(growing.run.path("nightly"))[0], "baseline.json"
    )
    noted = storage.read_json(about)
    storage.write_json(about, {**noted, "classes": [*noted["classes"], "11"]})
    with pytest.raises(RunError, match="the classes of the source differ"):
        growing.night(2)
    storage.write_json(about, noted)
    night = growing.night(3)  # every file has a new time of change, and the same samples
    assert night.exit_code == 0 and night.manifest["files"]["changed"] == 4
    assert night.manifest["samples"] == {"new": 0, "changed": 0, "removed": 0, "total": 600}
    assert night.manifest["drift"] == {} and night.manifest["share_since_seed"] == 0


def test_a_file_rewritten_with_other_images_has_changed_samples(growing: Place) -> None:
    growing.night(0)
    growing.add(0, invert=True)  # the same ids
    night = growing.night(1)
    samples = night.manifest["samples"]
    # those of the seed set keep their measured score
    assert samples["new"] == samples["removed"] == 0 and 60 < samples["changed"] < 150
    assert night.exit_code == 4 and any("samples of this night" in item for item in night.advice)


class FolderPlace(Place):
    """The same run over a folder for each class; a fragment could hold them all."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.paths: dict[int, Path] = {}
        self._images, self._labels = digit_pngs(700)

    def config(self, *overrides: str) -> Config:
        return super().config(
            "source.format=imagefolder", "source.fragment_samples=1024", *overrides
        )

    def write(self, number: int, *, invert: bool = False) -> None:
        image = self._images[number]
        path = self.folder / "data" / str(self._labels[number]) / f"{number * 7919 % 1797:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(inverted(image) if invert else image)
        self.paths[number] = path


def test_new_images_in_folders_are_the_only_new_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 600 images in one fragment, 30 new ones among them make all 630 be scored again."""
    in_process(monkeypatch)
    place = FolderPlace(tmp_path)
    for number in range(600):
        place.write(number)
    execute(place.config(), progress=QUIET)
    place.night(0)

    def added(numbers: range) -> set[str]:
        for number in numbers:
            place.write(number)
        return {place.paths[n].relative_to(place.folder / "data").as_posix() for n in numbers}

    def drawn(night: Night, name: str) -> set[str]:
        return set(storage.read_table(_state(place, night.snapshot, name))["sample_id"].to_pylist())

    ids = added(range(600, 630))
    night = place.night(1)
    assert night.manifest["samples"] == {"new": 30, "changed": 0, "removed": 0, "total": 630}
    assert night.exit_code == 0, night.advice
    assert night.manifest["share_since_seed"] == pytest.approx(30 / 630)
    assert night.manifest["fidelity"]["n"] == len(drawn(night, "audit")) == 30
    assert drawn(night, "audit") == ids and drawn(night, "arrivals") <= ids
    first = len(drawn(night, "arrivals"))
    assert first > 10  # those that the rule of the seed set would not have drawn

    ids |= added(range(630, 650))
    night = place.night(2)
    assert night.manifest["samples"] == {"new": 20, "changed": 0, "removed": 0, "total": 650}
    assert night.manifest["share_since_seed"] == pytest.approx(50 / 650)
    assert first < len(drawn(night, "arrivals")) and drawn(night, "arrivals") <= ids
    assert night.manifest["drift"]["since"]["n_new"] == len(drawn(night, "arrivals"))

    place.write(640, invert=True)
    for number in (0, 1, 645):
        place.paths[number].unlink()
    night = place.night(3)
    assert night.manifest["samples"] == {"new": 0, "changed": 1, "removed": 3, "total": 647}
    assert night.manifest["share_since_seed"] == pytest.approx(49 / 647)
    assert night.exit_code == 0, night.advice


def test_cuts_of_folders_change_neither_seed_set_nor_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of 0.2.0 keeps its fragments, and has the scores of one that is cut as today."""
    in_process(monkeypatch)
    old, new = FolderPlace(tmp_path), FolderPlace(tmp_path)
    old.run, new.run = Run(f"{tmp_path}/old"), Run(f"{tmp_path}/new")
    for number in range(300):
        old.write(number)
    small = "source.fragment_samples=32"
    with monkeypatch.context() as patch:
        patch.setattr(IndexStage, "detail", {})
        execute(old.config(small), progress=QUIET)
    execute(new.config(small), progress=QUIET)
    assert not old.run.done("scores") <= new.run.done("scores")
    first, second = (
        [table for _, table in storage.iter_tables(place.run.seed_folder)] for place in (old, new)
    )
    assert len(first) == 2 and all(map(pa.Table.equals, first, second))  # seed set, audit set
    assert by_id(old.run.uri) == by_id(new.run.uri)

    before = stamps(old.run.uri, "scores")
    execute(old.config(small), progress=QUIET)
    assert stamps(old.run.uri, "scores") == before  # with the code of today, nothing is redone
    old.night(0, small)
    old.write(300)
    night = old.night(1, small)
    assert night.manifest["samples"] == {"new": 1, "changed": 0, "removed": 0, "total": 301}
    after = stamps(old.run.uri, "scores")
    assert len({name for name in after if after[name] != before.get(name)}) <= 4


# -- pinned -----------------------------------------------------------------------------


def test_a_pinned_snapshot_stays_as_it_was_until_it_expires(growing: Place, tmp_path: Path) -> None:
    growing.night(0)
    pin = snapshot_names(growing.run)[0]
    keep, scores = raypipe.KeepList(growing.run.uri, keep=0.5), raypipe.load_scores(growing.run.uri)
    metadata = keep.metadata
    growing.remove(3)
    growing.add(0, rows=100)
    growing.add(4)
    growing.night(1)
    pinned = raypipe.KeepList(growing.run.uri, keep=0.5, snapshot=pin)
    assert pinned.ids == keep.ids and pinned.metadata == metadata
    assert raypipe.KeepList(growing.run.uri, snapshot=pin).ids == keep.ids
    assert raypipe.KeepList(growing.run.uri, keep=0.5).ids != keep.ids
    assert raypipe.load_scores(growing.run.uri, snapshot=pin).equals(scores)
    with pytest.raises(
        RunError,
        match=r"no keep-list of fraction 0\.7 in snapshot 2026-11-22T020000Z; available: keep-0\.50",
    ):
        raypipe.KeepList(growing.run.uri, keep=0.7, snapshot=pin)
    # changed and removed samples cannot be exported, and are not read from the current source
    lost = [name for name in keep.ids if name.startswith(("part-00", "part-03"))]
    with pytest.raises(
        StageError,
        match=f"{len(lost)} of the {len(keep)} samples of the keep-list are missing "
        ".*changed or went away",
    ):
        raypipe.export(
            growing.run.uri, 0.5, "parquet", str(tmp_path / "out"), snapshot=pin, progress=QUIET
        )
    options: dict[str, Any] = {"snapshot": pin, "progress": QUIET, "allow_missing": True}
    done = raypipe.export(growing.run.uri, 0.5, "parquet", str(tmp_path / "out"), **options)
    assert (done["samples"], done["missing"]) == (len(keep) - len(lost), len(lost))
    there = storage.read_table(str(tmp_path / "out" / "train-00000-of-00001.parquet"))
    assert sorted(there["sample_id"].to_pylist()) == sorted(set(keep.ids) - set(lost))
    with pytest.raises(ConfigError, match="is not allowed: Input should be 'indices'"):
        raypipe.export(growing.run.uri, 0.5, "csv", str(tmp_path / "other"), snapshot=pin)
    # the last snapshot that names these files expires
    files = set(storage.names(growing.run.path("snapshots/files")))
    growing.add(5)
    night = growing.night(2, "nightly.keep_snapshots=2")
    assert night.expired == [pin]
    with pytest.raises(
        RunError,
        match=f"no snapshot '{pin}'; the newest are: 2026-11-23T020000Z, 2026-11-24T020000Z",
    ):
        raypipe.KeepList(growing.run.uri, keep=0.5, snapshot=pin)
    left = set(storage.names(growing.run.path("snapshots/files")))
    assert files - left and left == _named(growing.run)


def _named(run: Run) -> set[str]:
    return {
        f"{entry['hash']}.parquet"
        for name in snapshot_names(run)
        for kind in ("scores", "keep", "state")
        for entry in load_snapshot(run, name)[kind]
    }


def test_export_of_a_pinned_list_from_a_shell(
    growing: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from raypipe.cli import main

    growing.night(0)
    growing.add(4)
    growing.night(1)
    pin = snapshot_names(growing.run)[0]
    arguments = [
        "export",
        growing.run.uri,
        "--keep",
        "0.5",
        "--format",
        "indices",
        "--snapshot",
        pin,
    ]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--to", str(tmp_path / "rows.json")])
    assert ended.value.code == 0 and "300 samples" in capsys.readouterr().out
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert kept["sample_ids"] and len(kept["indices"]) == 300 and max(kept["indices"]) < 600


# -- killed -----------------------------------------------------------------------------


class Killed(BaseException):
    """Simulates SIGKILL: nothing is written any more."""


def _count_down(patch: pytest.MonkeyPatch, moment: int) -> list[int]:
    """Raise Killed at the `moment`-th change of storage and after. The list counts the changes."""
    count = [0]

    def guarded(function: Any, where: int) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            uri = str(arguments[where])
            if "/logs/" not in uri and not uri.endswith("driver.json"):
                count[0] += 1
                if count[0] >= moment:
                    raise Killed
            return function(*arguments, **options)

        return call

    for name in ("write_bytes", "create_bytes", "delete"):
        function = guarded(getattr(storage, name), 0)
        for module in (storage, storage.content, storage.files):
            if hasattr(module, name):
                patch.setattr(module, name, function)
    patch.setattr(os, "link", guarded(os.link, 1))
    entering = storage.Upload.__enter__
    patch.setattr(
        storage.Upload,
        "__enter__",
        lambda self: guarded(lambda path: entering(self), 0)(self._path),
    )
    return count


def _outcome(growing: Place) -> dict[str, Any]:
    """Everything that a night writes, without times and time stamps."""
    run = growing.run
    manifests = [load_snapshot(run, name) for name in snapshot_names(run)]
    for manifest in manifests:
        for entry in [*manifest["scores"], *manifest["keep"]]:
            del entry["stamp"]
        del manifest["made"], manifest["judging_cpu_seconds"]
    files = {
        kind: sorted(storage.names(run.path(kind)))
        for kind in ("snapshots/files", "seed", "index", "embeddings")
    }
    content = {
        name: storage.read_bytes(run.path("keep", name)) for name in storage.names(run.path("keep"))
    }
    return {"manifests": manifests, "files": files, "keep": content, "scores": score_files(run.uri)}


def test_killed_at_any_moment_the_same_command_ends_as_if_nothing_had_happened(
    growing: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raypipe.runs.lease._alive", lambda holder: False)
    growing.night(0)
    growing.add(4)
    growing.add(0, rows=100)
    growing.remove(3)
    limits = ["nightly.keep_snapshots=1"]

    def attempt(moment: int) -> tuple[int, dict[str, Any]]:
        other = growing.copy(tmp_path / str(moment))
        with pytest.MonkeyPatch.context() as patch:
            count = _count_down(patch, moment)
            with contextlib.suppress(Killed):
                other.night(1, *limits)
        other.night(1, *limits)
        return count[0], _outcome(other)

    moments, expected = attempt(10**6)
    assert moments > 40 and len(expected["manifests"]) == 1
    step = int(os.environ.get("RAYPIPE_TEST_EVERY_MOMENT", "9"))
    for moment in range(1 + moments % step, moments + 1, step):
        assert attempt(moment)[1] == expected, moment


def test_killed_before_the_first_snapshot(
    growing: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raypipe.runs.lease._alive", lambda holder: False)
    expected = growing.copy(tmp_path / "whole")
    expected.night(0)
    for moment in (2, 4, 8):
        other = growing.copy(tmp_path / str(moment))
        with pytest.MonkeyPatch.context() as patch:
            _count_down(patch, moment)
            with pytest.raises(Killed):
                other.night(0)
        assert other.night(0).wrote_snapshot
        assert _outcome(other) == _outcome(expected)
