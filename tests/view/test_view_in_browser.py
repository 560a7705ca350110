from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chromium
import pytest

from raypipe.runs.run import Run
from raypipe.view.answers import Answers
from raypipe.view.server import ViewServer

LONG = "an_extraordinarily_long_class_name_without_any_place_to_break_it"
SCRIPT = "<img src=x onerror=document.title='broken'>"


def until(page: chromium.Page, condition: str) -> Any:
    """Wait until an expression is true, and return it."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if value := page.evaluate(condition):
            return value
        time.sleep(0.02)
    raise AssertionError(f"never true: {condition}")


def press(page: chromium.Page, key: str, text: str = "") -> None:
    code = {"Escape": 27, "Enter": 13}.get(key, 0)
    for kind in ("keyDown", "keyUp"):
        page.call(
            "Input.dispatchKeyEvent",
            type=kind,
            key=key,
            text=text if kind == "keyDown" else "",
            windowsVirtualKeyCode=code,
        )


def click(page: chromium.Page, selector: str) -> None:
    """Click in the middle of an element, as a mouse does."""
    box = page.evaluate(
        f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}}); "
        "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        page.call(
            "Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1
        )


@pytest.mark.skipif(chromium.PROGRAM is None, reason="needs Chromium (apt-get install chromium)")
def test_search_open_and_mark_by_mouse_and_by_keys(
    viewed: Callable[..., Run], tmp_path: Path
) -> None:
    never = tmp_path / "never.txt"
    run = viewed(names=("cat", LONG, SCRIPT), path=SCRIPT + "-{}")
    with ViewServer(Answers(run, never=str(never))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with chromium.Page(server.address, 1280) as page:
            by_mouse(page, never)
            by_keys(page, never)
            reset_and_input_at_once(page)
            page_that_marks_leave_empty(page)
            sample_whose_answer_is_late(page)
            for width in (390, 1280):
                page.call(
                    "Emulation.setDeviceMetricsOverride",
                    width=width, height=800, deviceScaleFactor=1, mobile=width < 600,
                )  # fmt: skip
                page.evaluate("document.getElementById('filters').open = true")
                assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.complaints == []
            assert page.evaluate("document.title") == "raypipe view: run"
            assert "token" not in page.evaluate("location.href")
        server.shutdown()


def by_mouse(page: chromium.Page, never: Path) -> None:
    until(page, "document.querySelectorAll('#grid img').length == 60")
    page.evaluate("document.querySelector('[name=label]').value = '2'")
    page.evaluate(
        "document.querySelector('[name=label]').dispatchEvent(new Event('input', {bubbles: true}))"
    )
    until(page, "!document.querySelector('#status').textContent.startsWith('199')")
    names = page.evaluate(
        "[...new Set([...document.querySelectorAll('#grid .line')].filter(e => e.title)"
        ".map(e => e.textContent))]"
    )
    assert names == [SCRIPT]
    click(page, "#grid figure:nth-child(2) .open")
    until(page, "document.querySelector('#detail').open")
    until(page, "document.querySelectorAll('#similar img').length == 12")
    assert page.evaluate(
        "document.querySelector('#detail-id').textContent.startsWith('<img src=x')"
    )
    click(page, "#close")
    until(page, "!document.querySelector('#detail').open")
    click(page, "#grid figure:nth-child(2) .choose")
    click(page, "#grid figure:nth-child(3) .choose")
    assert until(page, "document.querySelector('#chosen').textContent") == "2 chosen"
    assert page.evaluate("document.querySelector('#always').hidden")
    click(page, "#never")
    until(page, "document.querySelectorAll('#grid .flag.never').length == 2")
    assert len(never.read_text().splitlines()) == 2


def by_keys(page: chromium.Page, never: Path) -> None:
    page.evaluate("document.activeElement.blur()")
    press(page, "ArrowRight")
    assert page.evaluate("document.activeElement.matches('#grid figure:nth-child(1) .open')")
    press(page, "ArrowRight")
    assert page.evaluate("document.activeElement.matches('#grid figure:nth-child(2) .open')")
    press(page, "u")
    until(page, "document.querySelectorAll('#grid .flag').length == 1")
    until(page, "document.activeElement.matches('#grid figure:nth-child(2) .open')")
    press(page, "Enter", "\r")
    until(page, "document.querySelector('#detail').open")
    press(page, "Escape")
    until(page, "!document.querySelector('#detail').open")
    press(page, "/")
    assert page.evaluate("document.activeElement.name") == "text"
    assert len(never.read_text().splitlines()) == 1


def reset_and_input_at_once(page: chromium.Page) -> None:
    """Two searches would race: the second could take back a page that was turned after the first."""
    page.evaluate(
        "(() => { const real = window.fetch; window.searches = 0; window.fetch = (...given) => {"
        "if (String(given[0]).includes('api/samples?')) window.searches += 1;"
        "return real(...given); }; })()"
    )
    page.evaluate(
        "(() => { document.querySelector('form').reset();"
        "const e = document.querySelector('[name=mark]'); e.value = 'none';"
        "e.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    until(page, "document.querySelector('#status').textContent.startsWith('198 ')")
    time.sleep(0.3)
    assert page.evaluate("window.searches") == 1


def page_that_marks_leave_empty(page: chromium.Page) -> None:
    for first in (61, 121, 181):
        page.evaluate("document.querySelector('#next').click()")
        until(page, f"document.querySelector('#page').textContent.startsWith('{first}–')")
    for name in ("choose-page", "never"):
        page.evaluate(f"document.querySelector('#{name}').click()")
    until(page, "document.querySelector('#page').textContent == '121–180'")
    assert page.evaluate("document.querySelectorAll('#grid figure').length") == 60


def sample_whose_answer_is_late(page: chromium.Page) -> None:
    page.evaluate(
        "(() => { const real = window.fetch; let first = true; window.fetch = async (...given) => {"
        "const answer = await real(...given);"
        "if (first && String(given[0]).includes('api/sample?')) { first = false;"
        "await new Promise(done => setTimeout(done, 300)); setTimeout(() => { window.late = 1 }); }"
        "return answer; }; })()"
    )
    page.evaluate("(() => { detail(0); detail(1); })()")
    until(page, "document.querySelectorAll('#similar img').length == 12")
    shown = page.evaluate("document.querySelector('#detail-id').textContent")
    until(page, "window.late")
    time.sleep(0.1)
    assert page.evaluate("document.querySelector('#detail-id').textContent") == shown
    press(page, "Escape")
    until(page, "!document.querySelector('#detail').open")
