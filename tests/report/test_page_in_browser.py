from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import chromium
import pytest

from raypipe import storage
from raypipe.report import build, page
from raypipe.runs.run import Run

needs_chromium = pytest.mark.skipif(
    chromium.PROGRAM is None, reason="needs Chromium on the PATH (apt-get install chromium)"
)

LONG = "an_extraordinarily_long_class_name_without_any_place_to_break_it"
SHOWN = """
(() => {
  const wide = document.documentElement.clientWidth + 1;
  const seen = [...document.querySelectorAll("main *")].filter(
    e => !e.closest(".scroll, svg, .line") && e.getBoundingClientRect().right > wide);
  const plots = [...document.querySelectorAll(".plot svg")];
  return {
    width: document.documentElement.scrollWidth, images: document.images.length,
    beyond: seen.map(e => e.outerHTML.slice(0, 80)),
    broken: [...document.images].filter(image => !image.naturalWidth).length,
    minis: document.querySelectorAll(".minis svg").length,
    plots: plots.filter(svg => svg.getBoundingClientRect().height < 80).length,
  };
})()
"""


def shows(opened: chromium.Page, width: int) -> dict:
    """Return what the page shows with every <details> open.

    Nothing may overflow, be broken, complain or be fetched.
    """
    opened.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    found = opened.evaluate(SHOWN)
    assert found["width"] <= width and found["beyond"] == []
    assert found["broken"] == 0 and found["plots"] == 0
    assert opened.complaints == []
    assert [uri for uri in opened.requests if not uri.startswith(("data:", "file:"))] == []
    return found


def looked_at(opened: chromium.Page, width: int, scheme: str = "light", media: str = "") -> None:
    opened.call(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=800,
        deviceScaleFactor=1,
        mobile=width < 600,
    )
    opened.call(
        "Emulation.setEmulatedMedia",
        media=media,
        features=[{"name": "prefers-color-scheme", "value": scheme}],
    )


@needs_chromium
def test_the_page_fits_and_is_quiet(make_run: Callable[..., Run]) -> None:
    run = make_run(
        names=("cat", LONG, LONG.upper()),
        path="folder/" * 20 + "part-{}",
        select={"keep": [0.1, 0.125, 0.3, 0.5, 0.7, 0.9, 1]},
    )
    with chromium.Page("file://" + build(run), 720) as opened:
        looked_at(opened, 720, media="print")
        assert not opened.evaluate("document.querySelector('details').open")
        assert (
            opened.evaluate("document.querySelector('details img').getBoundingClientRect().height")
            > 20
        ), "printed although folded"
        for width, scheme in ((360, "dark"), (390, "light"), (1280, "light"), (1280, "dark")):
            looked_at(opened, width, scheme)
            found = shows(opened, width)
            assert found["images"] > 24 * 4 and found["minis"] == 4
            # text must stand out from the page: WCAG asks for a contrast of 4.5
            assert opened.evaluate(CONTRAST) >= 4.5, (width, scheme)


@needs_chromium
def test_the_page_of_many_classes_fits(make_run: Callable[..., Run]) -> None:
    run = make_run(names=[f"{LONG} {number}" for number in range(1000)], fragments=5, size=400)
    with chromium.Page("file://" + build(run), 390) as opened:
        for width in (390, 1280):
            looked_at(opened, width)
            found = shows(opened, width)
            assert found["minis"] == 12 and found["images"] > 24 * 4 + 12 * 2


def test_the_page_stays_small(
    make_run: Callable[..., Run], source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst case: 1,000 classes, and large images of noise, which JPEG cannot compress.

    Photographs take about a third of it.
    """
    source.size, source.noise = 128, True
    run = make_run(names=[f"class {number}" for number in range(1000)], fragments=5, size=400)
    text = Path(build(run)).read_text("utf-8")
    assert text.count("data:image/jpeg") > 150 and len(text.encode()) < 4 << 20
    assert len(storage.read_bytes(run.path("report", "summary.json"))) < 1 << 20
    monkeypatch.setattr(page, "IMAGE_BYTES", 1 << 20)
    bounded = Path(build(run)).read_text("utf-8")
    images = sum(len(part.split('"', 1)[0]) for part in bounded.split('src="data:image')[1:])
    assert 0.95 * (1 << 20) < images < 1 << 20
    left_out = bounded.count('<div class="none">left out</div>')
    assert left_out == text.count("data:image/jpeg") - bounded.count("data:image/jpeg") > 0
    assert f"{left_out} images are left out: the page already holds 1 MB of images." in bounded


CONTRAST = """
(() => {
  const light = text => {
    const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const page = light(getComputedStyle(document.body).backgroundColor);
  const texts = [...document.querySelectorAll(
    "p, td, th, a, figcaption, figcaption span, .badge, svg text")];
  const ratio = element => {
    const style = getComputedStyle(element);
    const ink = light(element instanceof SVGElement ? style.fill : style.color);
    return (Math.max(ink, page) + .05) / (Math.min(ink, page) + .05);
  };
  return Math.min(...texts.map(ratio));
})()
"""
