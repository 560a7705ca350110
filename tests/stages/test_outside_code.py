"""Code that a configuration names is part of the fingerprint of the first stage that uses it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET, small_config

from raypipe.config import Config
from raypipe.distributed.code_identity import code_identity
from raypipe.distributed.context import Context
from raypipe.distributed.outside_code import changes, of_stage
from raypipe.errors import ConfigError
from raypipe.pipeline import STAGE_NAMES, advance, make_stage
from raypipe.plugins import code_allowed
from raypipe.runs.ledger import StageRecord, fingerprint
from raypipe.runs.run import Run
from raypipe.stages.base import Stage

MODULE = "code_of_stages"
CODE = """
from pydantic import Field
from raypipe.config.base import Settings
from raypipe.scores.base import Score
from raypipe.selection import KeepStrategy

class Options(Settings):
    power: int = Field(1, ge=1, description="Exponent.")

class Late(Score):
    Options = Options
    summary = "late"
    def score(self, trajectory):
        return helper(trajectory.loss[-1])

def helper(values):
    return values * 1

class Kept(KeepStrategy):
    summary = "kept"
    def preference(self, chunk, options):
        return chunk.score

class Idle(KeepStrategy):
    summary = "idle"

def transform(image):
    return image

def augment(image, generator):
    return image

def network(classes, image_size, channels):
    return None
"""
NAMED = (
    f"measure.scores=[{MODULE}:Late]",
    f"select.strategy={MODULE}:Kept",
    f"source.transform={MODULE}:transform",
    f"proxy.augment={MODULE}:augment",
    f"proxy.model={MODULE}:network",
)


def _context(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: str = CODE, *overrides: str
) -> Context:
    sys.modules.pop(MODULE, None)
    (folder / f"{MODULE}.py").write_text(code)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    context = Context(
        small_config(f"{folder}/run", *NAMED, *overrides), Run(f"{folder}/run"), QUIET
    )
    with code_allowed():
        assert len(context.code) == 5
    return context


def _fingerprints(context: Context) -> dict[str, str]:
    config, stages = context.config, map(make_stage, STAGE_NAMES)
    return {
        stage.name: stage.fingerprint(config, context.code, [])
        for stage in stages
        if stage.applies_to(config)
    }


def test_a_change_shows_in_the_first_stage_that_uses_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _context(tmp_path, monkeypatch)
    before, code = _fingerprints(first), first.code
    assert _fingerprints(_context(tmp_path, monkeypatch)) == before
    assert _fingerprints(_context(tmp_path, monkeypatch, "# a comment\n" + CODE)) == before
    for old, new, stage in (
        ("values * 1", "values * 2", "measure"),
        ("return chunk.score", "return -chunk.score", "select"),
        ("def transform(image):\n    return image", "transform = abs", "seed"),
        ("generator):\n    return image", "generator):\n    return image + 1", "proxy"),
        ("return None", "return classes", "proxy"),
    ):
        changed = _context(tmp_path, monkeypatch, CODE.replace(old, new))
        after = _fingerprints(changed)
        assert {name for name in before if after[name] != before[name]} == {stage}
        record = StageRecord(detail={"code": of_stage(stage, code)})
        (line,) = changes(record, stage, changed.code)
        assert line.startswith("the code of ") and line.endswith("has changed")
        assert changes(record, stage, code) == []


def test_options_are_part_of_the_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _fingerprints(_context(tmp_path, monkeypatch))
    stated = f"measure.options={{{MODULE}:Late: {{power: 1}}}}"
    assert _fingerprints(_context(tmp_path, monkeypatch, CODE, stated)) == before
    other = f"measure.options={{{MODULE}:Late: {{power: 2}}}}"
    after = _fingerprints(_context(tmp_path, monkeypatch, CODE, other))
    assert {name for name in before if after[name] != before[name]} == {"measure"}


def test_wrong_options_are_one_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = f"measure.options={{{MODULE}:Late: {{power: 0, powr: 1}}}}"
    with pytest.raises(ConfigError) as caught:
        _context(tmp_path, monkeypatch, CODE, wrong)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith(f"  measure.options.{MODULE}:Late.power: 0 is not allowed")
    assert lines[2].endswith("unknown setting; did you mean 'power'?")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("measure.scores=[{}:Kept]", "'{}:Kept' is no score: expected a class derived from raypi"),
        ("select.strategy={}:helper", "'{}:helper' is no strategy: expected a class"),
        ("select.strategy={}:Idle", "'{}:Idle' does nothing: define preference, or plan"),
        ("extrapolate.method={}:Late", "'{}:Late' is no extrapolator"),
        ("measure.scores=[{}:Lat]", "has no 'Lat'; did you mean 'Late'?"),
        ("proxy.augment=no_such_module_z:f", "cannot import no_such_module_z on"),
    ],
)
def test_what_is_no_part_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        _context(tmp_path, monkeypatch, CODE, setting.format(MODULE))
    assert message.format(MODULE) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_outside_code_fingerprints_are_as_before(tmp_path: Path) -> None:
    context = Context(small_config(f"{tmp_path}/run"), Run(f"{tmp_path}/run"), QUIET)
    for name in STAGE_NAMES:
        stage = make_stage(name)
        expected = fingerprint(name, stage.settings(context.config), ["input"])
        assert stage.fingerprint(context.config, context.code, ["input"]) == expected


def test_the_code_of_an_installed_package_counts_by_its_version() -> None:
    import pydantic
    import yaml

    assert code_identity(yaml.safe_load) == code_identity(yaml.safe_load)
    assert code_identity(yaml.safe_load).hash != code_identity(yaml.safe_dump).hash
    assert code_identity(pydantic.BaseModel).unseen == ()


def test_a_setting_that_fails_after_the_start_is_not_one_of_which_nothing_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails(Stage):
        name = "embed"

        def settings(self, config: Config) -> dict[str, Any]:
            return {}

        def complete(self, context: Context, record: StageRecord) -> bool:
            return False

        def execute(self, context: Context, record: StageRecord) -> None:
            raise ConfigError("source.transform: mine:f returned float64; expected uint8")

    run, records = Run(f"{tmp_path}/run"), dict[str, StageRecord]()
    context = Context(small_config(run.uri), run, QUIET)
    monkeypatch.setattr("raypipe.pipeline.of_stage", lambda name, code: {"mine:f": "1"})
    with pytest.raises(ConfigError) as caught:
        advance(Fails(), context, records)
    # so that the next run names the code that was corrected
    assert records["embed"].detail["code"] == {"mine:f": "1"}
    assert caught.value.exit_code == 1 and ConfigError("other").exit_code == 2
    assert records["embed"].state == "failed"
