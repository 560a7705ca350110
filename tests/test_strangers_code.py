"""Reading a run of unknown origin imports nothing that its files name."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from test_intermediate import trained

import raypipe
from raypipe import storage
from raypipe.cli import cli
from raypipe.errors import RaypipeError
from raypipe.plugins import allows_code
from raypipe.runs.run import Run
from raypipe.view.answers import Answers

_SPEC = importlib.util.spec_from_file_location(
    "report_fixtures_of_strangers", Path(__file__).parent / "report" / "conftest.py"
)
assert _SPEC is not None and _SPEC.loader is not None
_FIXTURES = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_FIXTURES)
make_run, source = _FIXTURES.make_run, _FIXTURES.source

MODULE = "leaves_a_mark"
NAMED: dict[str, Any] = {
    "source": {"format": f"{MODULE}:Source", "transform": f"{MODULE}:transform"},
    "proxy": {"model": f"{MODULE}:network", "augment": f"{MODULE}:augment"},
    "embed": {"model": f"{MODULE}:features"},
    "measure": {
        "scores": [f"{MODULE}:Score", "package-of-nobody"],
        "options": {f"{MODULE}:Score": {"a": 1}},
    },
    "extrapolate": {"method": f"{MODULE}:Extrapolator"},
    "pilot": {"candidates": [f"{MODULE}:Candidate", "ccs"]},
    "select": {"strategy": f"{MODULE}:Strategy"},
}


@pytest.fixture
def stranger(make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose configuration names a module in the current folder that leaves a mark."""
    run = make_run()
    monkeypatch.undo()  # the source of the fixture: this one is opened as it is
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / f"{MODULE}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
    config = yaml.safe_load(storage.read_bytes(run.config_file))
    for section, settings in NAMED.items():
        config[section] |= settings
    storage.write_bytes(run.config_file, yaml.safe_dump(config).encode())
    return run


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["status", "{run}"], ""),
        (["report", "{run}"], ""),
        (["select", "{run}"], "select.strategy: 'leaves_a_mark:Strategy' is code from outside"),
        (["select", "{run}", "--strategy", "top"], ""),
        (["compare", "{run}", "{run}"], ""),
        (
            ["export", "{run}", "--format", "webdataset", "--to", "{run}-shards", "--keep", "0.5"],
            "source.format: 'leaves_a_mark:Source' is code from outside",
        ),
        (["inspect", "--config", "{run}/config.yaml"], "package-of-nobody"),
        (["inspect", "digits://", "--config", "{mine}"], ""),
        (["plan", "{mine}", "--samples", "1000"], ""),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_nothing_is_imported(
    stranger: Run, tmp_path: Path, arguments: list[str], refused: str
) -> None:
    named = {**NAMED, "source": {"transform": f"{MODULE}:transform"}}
    named["measure"] = {"scores": [f"{MODULE}:Score"]}
    mine = {"run": "r", **named}
    mine["source"] = {"uri": "digits://", **mine["source"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    filled = [item.format(run=stranger.uri, mine=tmp_path / "mine.yaml") for item in arguments]
    done = CliRunner().invoke(cli, filled)
    assert not (tmp_path / "mark").exists() and MODULE not in sys.modules
    if refused:
        assert isinstance(done.exception, RaypipeError), (done.output, done.exception)
        assert refused in str(done.exception)
    else:
        assert done.exception is None, (done.output, repr(done.exception))


@pytest.mark.parametrize(
    ("strategy", "allowed"),
    [(None, False), ("top", False), ("auto", False), (f"{MODULE}:Mine", True)],
)
def test_a_strategy_that_the_caller_names_allows_no_other_code(
    stranger: Run, monkeypatch: pytest.MonkeyPatch, strategy: str | None, allowed: bool
) -> None:
    """With auto, the run's files could name the strategy that is taken."""
    seen = []
    monkeypatch.setattr(
        "raypipe.stages.select.stage.write_keep_lists",
        lambda *_, **__: seen.append(allows_code()) or {},
    )
    raypipe.select(stranger.uri, 0.5, strategy)
    assert seen == [allowed]


def test_the_viewer_imports_nothing_either(stranger: Run, tmp_path: Path) -> None:
    answers = Answers(stranger)
    assert "source.format" in answers.run({})["note"]
    assert answers.search({})["total"] == 199
    assert "source.format" in answers.images({"rows": "0"})["0"]["reason"]
    assert answers.sample({"row": "0"})["nearest"]
    with pytest.raises(RaypipeError, match=r"select\.strategy: .* is code from outside"):
        answers.search({"keep": "0.42"})
    assert not (tmp_path / "mark").exists() and MODULE not in sys.modules


def test_reading_scores_and_keep_lists_imports_nothing(stranger: Run, tmp_path: Path) -> None:
    assert len(raypipe.load_scores(stranger.uri)) == 199
    assert 0 < len(raypipe.KeepList(stranger.uri, 0.5).ids) < 199
    assert not (tmp_path / "mark").exists() and MODULE not in sys.modules


def test_cleaning_imports_nothing(stranger: Run, tmp_path: Path) -> None:
    trained(stranger, stranger.config())
    done = CliRunner().invoke(cli, ["clean", stranger.uri, "--yes"])
    assert done.exit_code == 0 and "removed " in done.output, (done.output, done.exception)
    assert not (tmp_path / "mark").exists() and MODULE not in sys.modules


def test_the_module_would_leave_a_mark(stranger: Run, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["select", stranger.uri, "--allow-code"])
    assert "has no 'Strategy'" in str(done.exception)
    assert (tmp_path / "mark").exists()
    sys.modules.pop(MODULE, None)


def test_inspect_says_what_it_did_not_import(stranger: Run, tmp_path: Path) -> None:
    config = {"run": "r", "source": {"uri": "digits://"}, "proxy": {"augment": f"{MODULE}:augment"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    done = CliRunner().invoke(cli, ["inspect", "--config", str(tmp_path / "mine.yaml")])
    line = "code        proxy.augment leaves_a_mark:augment (not imported without --allow-code)"
    assert line in done.output
    assert not (tmp_path / "mark").exists()
