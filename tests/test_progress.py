"""Progress in a terminal and in a log."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from raypipe import progress, storage
from raypipe.progress import Progress
from raypipe.runs.lease import Lease
from raypipe.runs.ledger import StageRecord
from raypipe.runs.run import Run
from raypipe.runs.status import describe_run


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_come_now_and_then(monkeypatch) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    stream = io.StringIO()
    with Progress(stream).meter("embed", 1000) as meter:
        meter.already(400)
        for _ in range(6):
            meter.add(100)
    lines = stream.getvalue().splitlines()
    assert 1 <= len(lines) < 6, "not one line for every step"
    assert lines[0].startswith("embed ") and "/1,000 samples" in lines[0] and "left" in lines[0]
    assert meter.count == 1000


def test_what_was_done_before_does_not_enter_the_rate(monkeypatch) -> None:
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    meter = progress.Meter("embed", 1000, "samples", io.StringIO())
    meter.already(900)
    meter.count += 50
    line = meter.line()
    assert "5.00/s" in line and "00:10 left" in line


def test_a_terminal_has_one_live_line() -> None:
    stream = _Terminal()
    shown = Progress(stream)
    with shown.meter("fit", 0, "epochs") as meter:
        meter.expect(4)
        meter.add(4)
    shown.say("done")
    assert "\r" in stream.getvalue() and "fit " in stream.getvalue()
    assert stream.getvalue().endswith("done\n")


def test_quiet_says_nothing(capsys) -> None:
    shown = Progress(quiet=True)
    with shown.meter("embed", 10) as meter:
        meter.add(10)
    shown.say("words")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_fragments_rejects_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    shown, heard = Progress(quiet=True), []
    shown.listeners.append(
        lambda meter, samples, rejects: heard.append(
            (meter.name, samples, rejects, meter.fragments, meter.queued)
        )
    )
    assert shown.about() == {}
    with shown.meter("embed", 300) as meter:
        meter.queue(3)
        meter.add(100, "f0")
        meter.add(100, "f1", rejects=2)
        meter.add(0)
        about = shown.about()
        assert {key: about[key] for key in ("stage", "count", "total", "fragments", "queued", "rejects")} == {
            "stage": "embed", "count": 200, "total": 300, "fragments": 2, "queued": 1, "rejects": 2,
        }  # fmt: skip
        assert (
            "200/300 samples" in meter.line()
            and "2 rejects, 2 fragments done, 1 queued" in meter.line()
        )
    assert heard == [("embed", 100, 0, 1, 2), ("embed", 100, 2, 2, 1), ("embed", 0, 0, 2, 1)], (
        "once a unit, never a sample"
    )
    assert shown.about() == {}


def test_a_line_for_every_fragment_only_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "raypipe")
    for verbose in (False, True):
        stream = io.StringIO()
        with Progress(stream, verbose=verbose).meter("embed", 30) as meter:
            meter.add(20, "train-0007", rejects=1)
            meter.add(10)
        said = [line for line in stream.getvalue().splitlines() if "train-0007" in line]
        assert said == (["embed       train-0007: 20 samples, 1 rejects"] if verbose else [])
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


def test_how_far_of_anything() -> None:
    assert (
        progress.describe_progress({"count": 5, "total": 10, "unit": "samples", "rate": 0.5})
        == "5/10 samples, 0.50/s, 00:10 left"
    )
    for nonsense in (
        {},
        {"count": "x", "rate": None, "total": [1]},
        {"count": -1, "rate": float("nan"), "total": 1e300, "unit": {"a": 1}},
    ):
        assert progress.describe_progress(nonsense).startswith("0/0 ")


def test_metrics_of_ray_are_counted_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.util.metrics

    from raypipe.distributed.metrics import RayMetrics

    values: dict[tuple[str, str], float] = {}

    class Fake:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert description and tag_keys == ("stage",)
            self.name = name

        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert value > 0, "Ray refuses 0"
            values[self.name, tags["stage"]] = values.get((self.name, tags["stage"]), 0) + value

        def set(self, value: float, tags: dict[str, str]) -> None:
            values[self.name, tags["stage"]] = value

    monkeypatch.setattr(ray.util.metrics, "Counter", Fake)
    monkeypatch.setattr(ray.util.metrics, "Gauge", Fake)
    shown = Progress(quiet=True)
    shown.listeners.append(RayMetrics())
    for stage, samples in (("seed", 10), ("embed", 7)):
        with shown.meter(stage, 20) as meter:
            meter.queue(2)
            meter.add(samples, "a")
            meter.add(0, "b", rejects=3)
    for stage, samples in (("seed", 10), ("embed", 7)):
        found = {name: value for (name, where), value in values.items() if where == stage}
        expected = {"samples": samples, "rejects": 3, "fragments_done": 2, "fragments_queued": 0}
        assert found == {f"raypipe_{name}": value for name, value in expected.items()}


def test_lines_about_fragments_do_not_each_store_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    from raypipe.runs import log_file

    stored: list[str] = []
    lines = log_file._LogHandler()
    lines.store = stored.append
    logger = logging.Logger("x")
    logger.addHandler(lines)
    logger.info("start")
    for number in range(100):
        logger.debug("fragment %d", number)
    assert len(stored) == 1
    logger.info("end")
    assert len(stored) == 2 and stored[-1].splitlines() == [
        "start",
        *(f"fragment {number}" for number in range(100)),
        "end",
    ]
    logger.debug("one more")
    lines.save()
    lines.save()
    assert len(stored) == 3 and stored[-1].endswith("one more\n"), "once, at the end of the run"


def test_status_of_a_run_under_way(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    record = StageRecord("running", samples=0, cpu_seconds=7.0, attempts=2)
    failed = StageRecord("failed", error="embed: storage is full", attempts=1)
    run.write_ledger(
        {
            "index": StageRecord("done", samples=300, cpu_seconds=1.0, attempts=1),
            "seed": record,
            "embed": failed,
        }
    )
    shown = Progress(quiet=True)
    with Lease(run) as lease, shown.meter("seed", 300) as meter:
        lease.about = lambda: {**shown.about(), "cpu_seconds": 100.0, "gpu_seconds": 0.0}
        meter.queue(3)
        meter.add(120, "f0", rejects=4)
        lease._written = lease._content()
        storage.write_bytes(run.path("driver.json"), lease._written)
        text = "\n".join(describe_run(run.uri))
    assert (
        "now         seed 120/300 samples" in text
        and "4 rejects, 1 fragment done, 2 queued" in text
        and " left" in text
    )
    assert (
        "embed: storage is full" in text
        and "spent       1.7 min CPU, in 4 attempts at 3 stages" in text
    )
    after = "\n".join(describe_run(run.uri))
    assert "now " not in after and "spent       8 s CPU, in 4 attempts" in after


@pytest.mark.ray
def test_a_finished_run_has_its_log_and_its_cost(finished: str) -> None:
    log = min(storage.names(f"{finished}/logs"))
    text = storage.read_bytes(f"{finished}/logs/{log}").decode()
    assert "INFO embed" in text and "INFO select" in text
    assert any(line.startswith("spent ") and " CPU" in line for line in describe_run(finished))


def test_functions_side_by_side_have_a_total_that_does_not_grow() -> None:
    from raypipe.distributed.step_tasks import SHOWN_STEPS, StepReport

    reports = [StepReport(), StepReport(1, 7), StepReport(521, 521), StepReport(1, 1)]
    assert [report.shown for report in reports] == [0, SHOWN_STEPS // 7, SHOWN_STEPS, SHOWN_STEPS]
