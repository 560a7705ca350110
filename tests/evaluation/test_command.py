"""`raypipe evaluate`: what its options become."""

from __future__ import annotations

from typing import Any

import pytest

from raypipe import api, cli
from raypipe.config import parse_settings
from raypipe.config.evaluate import EvaluateSettings


def _main(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", *arguments])
    return int(ended.value.code or 0)


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        api, "evaluate", lambda uri, test, **options: given.update(uri=uri, test=test, **options)
    )
    monkeypatch.setattr(
        "raypipe.evaluation.summary.describe_evaluation", lambda summary: iter(["described"])
    )
    options = (
        "--test digits:// --test-set limit=9 --keep 0.3,0.5 --strategies top,ccs "
        "--scores run,measured:el2n --beside a --beside b --seeds 2 --protocol steps "
        "--use-gpu false --cpus-per-training 2 --lr 0.01 --attack"
    )
    assert _main("runs/x", *options.split()) == 0
    assert (given.pop("uri"), given.pop("test"), given.pop("test_settings")) == (
        "runs/x",
        "digits://",
        ("limit=9",),
    )
    del given["verbose"]
    settings = parse_settings(EvaluateSettings, given, "evaluate")
    assert settings == EvaluateSettings(
        keep=(0.3, 0.5),
        strategies=("top", "ccs"),
        scores=("run", "measured:el2n"),
        beside=("a", "b"),
        seeds=2,
        protocol="steps",
        use_gpu=False,
        cpus_per_training=2,
        lr=0.01,
        attack=True,
    )


def test_a_wrong_option_exits_with_2(
    finished_like: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(finished_like, "--test", "digits://", "--keep", "0.3,2") == 2
    assert "keep.1: 2" in capsys.readouterr().err


@pytest.fixture
def finished_like(scored: Any) -> str:
    return scored.uri
