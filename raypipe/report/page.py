"""The report as one HTML file: no network, no script, nothing that could change what it shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from raypipe import storage
from raypipe.config.choices import DIFFICULTIES
from raypipe.errors import RunError
from raypipe.report import text
from raypipe.report.evaluation import curves
from raypipe.report.score_scan import MOST_CLASSES
from raypipe.report.summary import Findings, collect
from raypipe.report.thumbnails import Thumbnails, load_thumbnails
from raypipe.runs.layout import Run
from raypipe.runs.ledger import tables_of

GRIDS = {
    "highest": ("Highest scores", "What every keep-list holds."),
    "lowest": ("Lowest scores", "What every keep-list drops: atypical, hard or wrongly labelled samples gather here."),
    "uncertain": ("Most uncertain", "Extrapolated scores with the widest intervals."),
    "suspects": (
        "Likely label errors",
        "Among the lowest 20 % of the scores, and the proxy sees another class: those that it contradicts most. Look before you relabel: "
        "hard but rightly labelled samples gather here as well.",
    ),
}  # fmt: skip
"""Title and explanation of each image grid, in the order of the page."""
IMAGE_BYTES = 6 << 20
"""Bytes of images on the page; what is beyond is listed without its image."""
HARD_ABOUT = {
    "highest": "The hardest: atypical, hard or wrongly labelled samples gather here. Which of these a keep-list holds is for its strategy to say.",
    "lowest": "The easiest. Which of these a keep-list holds is for its strategy to say.",
    "suspects": GRIDS["suspects"][1].replace("lowest", "highest"),
}
"""Explanations where a high score means a hard sample."""
BY_SCORE = {"top", "balanced", "normalized", None}
"""Strategies by which the two ends of the scores are kept and dropped, as these explanations say."""
OTHER_ABOUT = {
    "highest": "Which of these a keep-list holds is for its strategy to say.",
    "lowest": "Atypical, hard or wrongly labelled samples gather here. Which of these a keep-list drops is for its strategy to say.",
}


def build(run: Run) -> str:
    """Write `RUN/report/summary.json`, `map.parquet` and `index.html`; returns the URI of the page.

    What the run lacks (an unfinished stage, a source that is gone) is said on the page. Raises RunError without a run, and for what
    `raypipe extrapolate` made.
    """
    if tables_of(run.ledger()):
        raise RunError(
            f"{run.uri}: was made from tables, without images to show; its figures are in {run.path('summary.json')}"
        )
    findings = collect(run)
    grids = [findings.grids.get(name, []) for name in GRIDS]
    small = [pick for grid in findings.class_grids for picks in grid.values() for pick in picks]
    thumbnails = load_thumbnails(run, run.config().source, grids, small)
    page = render(findings, thumbnails)
    storage.write_json(run.path("report", "summary.json"), findings.summary)
    if findings.map is not None:
        storage.write_table(run.path("report", "map.parquet"), findings.map.table())
    else:
        storage.delete(run.path("report", "map.parquet"))
    storage.write_bytes(run.path("report", "index.html"), page.encode("utf-8", "replace"))
    return run.path("report", "index.html")


def render(findings: Findings, thumbnails: Thumbnails) -> str:
    """The page. Everything that comes from the run is escaped by the template; only the plots are markup of our own."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        name: getattr(text, name)
        for name in (
            "count", "share", "number", "fixed", "seconds", "money", "price", "setting", "judged_samples", "accuracy", "points",
        )
    }  # fmt: skip
    summary = findings.summary
    baselines = _baselines(summary["fidelity"])
    shown = {item["label"] for item in summary["shown_classes"]}
    by_label = {item["label"]: item for item in summary["classes"]}
    hard = str(summary["fidelity"]["score"]) in DIFFICULTIES
    by_score = {item["strategy"] for item in summary["keep"]} <= BY_SCORE
    tiles = Tiles(thumbnails)
    grids = {}
    for name, (title, about) in GRIDS.items():
        about = (HARD_ABOUT if hard else {} if by_score else OTHER_ABOUT).get(name, about)
        grids[name] = {
            "name": name,
            "title": title,
            "about": about,
            "tiles": tiles.of(summary["grids"].get(name, [])),
        }
    class_grids = [
        {**grid, "lowest": tiles.of(grid["lowest"]), "highest": tiles.of(grid["highest"])}
        for grid in summary["class_grids"]
    ]
    return environment.get_template("page.html").render(
        s=summary,
        style=Markup((folder / "page.css").read_text("utf-8")),
        name=storage.name(summary["run"]),
        plots={name: Markup(svg) for name, svg in _plots(findings, baselines)},
        minis=_minis(summary),
        strategies=text.strategies(summary["keep"]),
        grids=grids,
        class_grids=class_grids,
        image_notes=tiles.notes(),
        baselines=baselines,
        balance=[by_label[item["label"]] for item in summary["shown_classes"]],
        hidden_classes=sum(
            item["samples"] > 0 and item["label"] not in shown for item in summary["classes"]
        ),
        present_classes=sum(item["samples"] > 0 for item in summary["classes"]),
        all_classes=text.classes([item["label"] for item in summary["classes"] if item["samples"]]),
        wall=summary["cost"]["total"]["wall_seconds"] or 1.0,
    )


class Tiles:
    """Samples with their images, until the images are IMAGE_BYTES together."""

    def __init__(self, thumbnails: Thumbnails) -> None:
        self._thumbnails, self._bytes, self._left_out = thumbnails, 0, 0

    def of(self, picks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Samples as `summary.json` describes them, each with `image` ("": none, for a `reason`) and `pixelated`."""
        return [{**pick, **self._image(pick["sample_id"])} for pick in picks]

    def notes(self) -> list[str]:
        """What is missing, in sentences."""
        found = [self._thumbnails.note] if self._thumbnails.note else []
        if self._left_out:
            found.append(
                f"{self._left_out} images are left out, since those of the page have {IMAGE_BYTES >> 20} MB already."
            )
        return found

    def _image(self, sample_id: str) -> dict[str, Any]:
        found = self._thumbnails.images.get(sample_id)
        if found is None or not found.uri:
            return {"image": "", "pixelated": False, "reason": found.reason if found else ""}
        if self._bytes + len(found.uri) > IMAGE_BYTES:
            self._left_out += 1
            return {"image": "", "pixelated": False, "reason": "left out"}
        self._bytes += len(found.uri)
        return {"image": found.uri, "pixelated": found.pixelated, "reason": ""}


def _baselines(fidelity: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name and figures of each baseline, the best first."""
    return sorted(
        fidelity["baselines"].items(),
        key=lambda row: (row[1]["spearman"] is None, -(row[1]["spearman"] or 0)),
    )


def _plots(
    findings: Findings, baselines: list[tuple[str, dict[str, Any]]]
) -> Iterator[tuple[str, str]]:
    """Every plot for which the run has the figures, by its name in the template."""
    from raypipe.report import plots

    summary, leading = findings.summary, findings.summary["headline"]
    fidelity, curve, histogram = (
        summary["fidelity"],
        summary["learning_curve"],
        summary["scores"]["histogram"],
    )
    if fidelity["spearman"] is not None:
        rows = [(fidelity["method"] or "extrapolator", fidelity), *baselines]
        keys = ("spearman", "spearman_low", "spearman_high")
        known = [
            (name, *(found[key] for key in keys))
            for name, found in rows
            if found["spearman"] is not None
        ]
        yield "fidelity", plots.fidelity_chart(known)
        if curve and all(point["spearman"] is not None for point in curve["points"]):
            yield "curve", plots.learning_curve(curve["points"], curve["doubled"])
    if histogram:
        yield "histogram", plots.score_histogram(histogram, _cuts(summary))
    everyone = [item for item in summary["classes"] if item["q50"] is not None]
    if 1 < len(everyone) <= MOST_CLASSES:
        yield "classes", plots.class_spread(summary["shown_classes"])
    elif everyone[1:]:
        yield "classes", plots.class_bands(sorted(everyone, key=lambda item: item["q50"]))
    present = [item for item in summary["classes"] if item["samples"]]
    if summary["keep"] and 1 < len(present) <= MOST_CLASSES:
        order = [item for item in summary["shown_classes"] if item["samples"]]
        by_label = {item["label"]: item for item in present}
        rows_of = [by_label[item["label"]] for item in order]
        after = [
            (
                item["fraction"],
                [row["kept"][item["file"]] / max(item["samples"], 1) for row in rows_of],
            )
            for item in summary["keep"]
        ]
        before = [row["samples"] / summary["counts"]["samples"] for row in rows_of]
        yield "balance", plots.class_shares([row["name"] for row in rows_of], before, after)
    elif summary["keep"] and present[1:]:
        kept = [
            (item["fraction"], [row["kept"][item["file"]] / row["samples"] for row in present])
            for item in summary["keep"]
        ]
        yield "balance", plots.kept_shares(kept)
    if summary["evaluation"]:
        everything = summary["evaluation"]["full"]["accuracy"]
        full = (everything["mean"], everything["low"], everything["high"])
        yield "evaluation", plots.evaluation_curves(curves(summary["evaluation"]), full)
    if findings.map is not None:
        yield "map", plots.score_map(findings.map)
        if findings.map.kept is not None and leading:
            yield "kept", plots.kept_map(findings.map, leading["fraction"])


def _cuts(summary: dict[str, Any]) -> list[tuple[float, float]]:
    """Fraction and lowest score of the keep-lists that end at a score."""
    cuts = [
        (item["fraction"], item["lowest_score"])
        for item in summary["keep"]
        if item["strategy"] == "top"
    ]
    return [cut for cut in cuts if cut[1] is not None]


def _minis(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The classes that have a histogram of their own, with it."""
    from raypipe.report import plots

    if not summary["scores"]["histogram"] or len(summary["class_histograms"]) < 2:
        return []
    first, last = (summary["scores"]["histogram"]["edges"][place] for place in (0, -1))
    leading = summary["headline"]
    cuts = [
        (cut - first) / (last - first)
        for fraction, cut in _cuts(summary)
        if leading and fraction == leading["fraction"]
    ]
    return [
        {**item, "svg": Markup(plots.small_histogram(item["measured"], item["extrapolated"], cuts))}
        for item in summary["class_histograms"]
    ]
