from __future__ import annotations

from collections.abc import Callable

import chromium
import pytest

from raypipe.report import build
from raypipe.rundir import Run

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason="needs Chromium on the PATH (apt-get install chromium)")

LONG = "an_extraordinarily_long_class_name_without_any_place_to_break_it"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_and_is_quiet(make_run: Callable[..., Run], width: int, scheme: str) -> None:
    run = make_run(
        names=("cat", LONG, LONG.upper()), path="folder/" * 20 + "part-{}", select={"keep": [0.1, 0.125, 0.3, 0.5, 0.7, 0.9, 1]}
    )
    with chromium.Page("file://" + build(run), width, scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.images.length") > 24
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert page.complaints == []
        assert [uri for uri in page.requests if not uri.startswith(("data:", "file:"))] == []
        # text must stand out from the page: WCAG asks for a contrast of 4.5
        assert page.evaluate(CONTRAST) >= 4.5


CONTRAST = """
(() => {
  const light = text => {
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const page = light(getComputedStyle(document.body).backgroundColor);
  const texts = [...document.querySelectorAll("p, td, th, figcaption span, .badge, svg text")];
  const ratio = element => {
    const style = getComputedStyle(element);
    const ink = light(element instanceof SVGElement ? style.fill : style.color);
    return (Math.max(ink, page) + .05) / (Math.min(ink, page) + .05);
  };
  return Math.min(...texts.map(ratio));
})()
"""
