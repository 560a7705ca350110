"""Progress in a terminal and in a log."""

from __future__ import annotations

import io
from types import SimpleNamespace

from raypipe import progress
from raypipe.progress import Progress


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
