"""Numbers and settings as the report shows them."""

from __future__ import annotations

from raypipe.report.formats import number, seconds, setting, share


def test_numbers_and_settings() -> None:
    plain = [
        text.replace("\u202f", " ") for text in map(seconds, (0.04, 9.96, 59.7, 200, 3600, 90061))
    ]
    assert plain == ["0.0 s", "10.0 s", "1 min", "3 min 20 s", "1 h", "1 d 1 h"]
    assert [share(value, 0).replace("\u202f", " ") for value in (0, 0.001, 0.125, 0.999, 1)] == [
        "0 %",
        "<1 %",
        "12 %",
        ">99 %",
        "100 %",
    ]
    assert share(0.125).replace("\u202f", " ") == "12.5 %"
    assert [number(value) for value in (0.04, -1.5e-7, 123.0, 0.0)] == [
        "0.0400",
        "−1.50e−7",
        "123",
        "0.00",
    ]
    assert [setting(value) for value in (True, None, (0.3, 0.5), "x")] == [
        "true",
        "–",
        "0.3, 0.5",
        "x",
    ]
