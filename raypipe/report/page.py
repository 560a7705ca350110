"""The report as one HTML file, without network and scripts."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from raypipe import storage
from raypipe.config.embed import EmbedSettings
from raypipe.errors import RunError
from raypipe.report import formats, text
from raypipe.report.evaluation import curves
from raypipe.report.pilot import gain_curves
from raypipe.report.schema import Agreement, ClassFigures, HeldOutFidelity, Summary, Tile
from raypipe.report.score_scan import MAX_LISTED_CLASSES
from raypipe.report.summary import Findings, collect
from raypipe.report.thumbnails import Thumbnails, load_thumbnails
from raypipe.report.verdict import judged_samples
from raypipe.runs.ledger import without_images
from raypipe.runs.outside_code import code_text
from raypipe.runs.run import Run
from raypipe.text import counted, plural

IMAGE_BYTES = 6 << 20
"""Bytes of images on the page; further samples are listed without their image."""
TITLES = {
    "highest": "Highest scores",
    "lowest": "Lowest scores",
    "uncertain": "Most uncertain",
    "suspects": "Labels to check",
}
"""Title of each image grid, in the order of the page."""
HARD_SAMPLES = "Atypical, hard or wrongly labelled samples gather here."
BY_STRATEGY = "The strategy decides which of these a keep-list {verb}."
SUSPECTS = (
    "The proxy predicts another class for these than their label. The samples that it contradicts "
    "most are shown, whatever their score. Check before you relabel: hard samples with a correct "
    "label gather here as well."
)
CONTRADICTED_CLUSTERS = (
    "Labels are pseudo-labels, so none of them is an error. The proxy predicts another cluster for "
    "these than theirs: they lie between clusters. The samples that it contradicts most are shown."
)
ORDERED_BY_SCORE = {"top", "balanced", "normalized", None}
"""Strategies that keep the highest scores and drop the lowest."""
FILTERS = (
    "accuracy",
    "count",
    "fixed",
    "money",
    "number",
    "plain_points",
    "points",
    "price",
    "seconds",
    "setting",
    "share",
)
"""Functions of `raypipe.report.formats` that the templates use."""

Baselines = list[tuple[str, Agreement]]
"""Names of the baselines and their figures."""


def build(run: Run) -> str:
    """Write `summary.json`, `map.parquet` and `index.html` to `RUN/report/`.

    The page itself reports what the run lacks: an unfinished stage, or a source that is gone.

    Returns
    -------
    str
        The URI of the page.

    Raises
    ------
    RunError
        If there is no run, or if it was extrapolated from tables and has no images.
    """
    if without_images(run.ledger()):
        raise RunError(
            f"{run.uri}: was extrapolated from tables, so there are no images to show; "
            f"its figures are in {run.table_summary}. For a report, make a run over the images "
            f"with `raypipe attach {run.uri} --images URI --to FOLDER`"
        )
    findings = collect(run)
    grids = [findings.grids.get(name, []) for name in TITLES]
    small = [pick for grid in findings.class_grids for picks in grid.values() for pick in picks]
    thumbnails = load_thumbnails(run, run.config().source, grids, small)
    page = render(findings, thumbnails)
    storage.write_json(run.report_summary, findings.summary)
    if findings.map is not None:
        storage.write_table(run.report_map, findings.map.table())
    else:
        storage.delete(run.report_map)
    storage.write_bytes(run.report_page, page.encode("utf-8", "replace"))
    return run.report_page


def render(findings: Findings, thumbnails: Thumbnails) -> str:
    """Return the page.

    The template escapes everything that comes from the run; only the plots are trusted markup.
    """
    folder = Path(__file__).parent
    summary, tiles = findings.summary, Tiles(thumbnails)
    baselines = _baselines(summary["fidelity"])
    shown = {item["label"] for item in summary["shown_classes"]}
    present = [item for item in summary["classes"] if item["samples"]]
    by_label = {item["label"]: item for item in summary["classes"]}
    # the image budget is spent in this order: grids first, then classes
    grids = _grids(summary, tiles)
    class_grids = [
        {
            **grid,
            "lowest": tiles.with_images(grid["lowest"]),
            "highest": tiles.with_images(grid["highest"]),
        }
        for grid in summary["class_grids"]
    ]
    return (
        _environment(folder)
        .get_template("page.html")
        .render(
            s=summary,
            style=Markup((folder / "page.css").read_text("utf-8")),
            name=storage.name(summary["run"]),
            plots=draw_plots(findings, baselines),
            minis=_small_histograms(summary),
            strategies=text.strategies(summary["keep"], summary["code"]),
            code=[code_text(item) for item in summary["code"]],
            grids=grids,
            class_grids=class_grids,
            image_notes=tiles.notes(),
            baselines=baselines,
            balance=[by_label[item["label"]] for item in summary["shown_classes"]],
            hidden_classes=sum(item["label"] not in shown for item in present),
            present_classes=len(present),
            all_classes=text.classes([item["label"] for item in present]),
            features=EmbedSettings.model_validate(summary["settings"].get("embed", {})),
            wall=summary["cost"]["total"]["wall_seconds"] or 1.0,
        )
    )


@functools.cache
def _environment(folder: Path) -> Environment:
    """Return the environment of the templates, which are compiled once per process."""
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(formats, name) for name in FILTERS}
    others = (breakable, counted, judged_samples, plural)
    environment.filters |= {function.__name__: function for function in others}
    return environment


def breakable(name: str) -> Markup:
    """Return a name that can be broken into lines after an underscore, hyphen or slash."""
    return Markup(re.sub(r"([_/-])", r"\1<wbr>", str(escape(name))))


# -- images --------------------------------------------------------------------------------------


class Tiles:
    """Adds images to samples, until the images take IMAGE_BYTES together."""

    def __init__(self, thumbnails: Thumbnails) -> None:
        self._thumbnails, self._bytes, self._left_out = thumbnails, 0, 0

    def with_images(self, tiles: Sequence[Tile]) -> list[dict[str, Any]]:
        """Return the samples with `image`, `pixelated` and `reason`.

        `image` is a data: URI; without an image it is empty, and `reason` tells why.
        """
        return [{**tile, **self._image(tile["sample_id"])} for tile in tiles]

    def notes(self) -> list[str]:
        """Return sentences about what is missing."""
        notes = [self._thumbnails.note] if self._thumbnails.note else []
        if self._left_out:
            notes.append(
                f"{self._left_out} images are left out: the page already holds "
                f"{IMAGE_BYTES >> 20} MB of images."
            )
        return notes

    def _image(self, sample_id: str) -> dict[str, Any]:
        thumbnail = self._thumbnails.images.get(sample_id)
        if thumbnail is None or not thumbnail.uri:
            reason = thumbnail.reason if thumbnail else ""
            return {"image": "", "pixelated": False, "reason": reason}
        if self._bytes + len(thumbnail.uri) > IMAGE_BYTES:
            self._left_out += 1
            return {"image": "", "pixelated": False, "reason": "left out"}
        self._bytes += len(thumbnail.uri)
        return {"image": thumbnail.uri, "pixelated": thumbnail.pixelated, "reason": ""}


def _grids(summary: Summary, tiles: Tiles) -> dict[str, dict[str, Any]]:
    """Return the image grids by name."""
    about = _explanations(summary)
    titles = TITLES
    if summary["source"]["pseudo_labels"]:
        titles = TITLES | {"suspects": "Between clusters"}
    return {
        name: {
            "name": name,
            "title": title,
            "about": about[name],
            "tiles": tiles.with_images(summary["grids"].get(name, [])),
        }
        for name, title in titles.items()
    }


def _explanations(summary: Summary) -> dict[str, str]:
    """Return what each grid shows; that depends on the score and on the strategies."""
    hard = summary["high_is_hard"]
    about = {
        "uncertain": "Extrapolated scores with the widest intervals.",
        "suspects": CONTRADICTED_CLUSTERS if summary["source"]["pseudo_labels"] else SUSPECTS,
    }
    holds, drops = BY_STRATEGY.format(verb="holds"), BY_STRATEGY.format(verb="drops")
    if hard:
        return about | {
            "highest": f"The hardest samples. {HARD_SAMPLES} {holds}",
            "lowest": f"The easiest samples. {holds}",
        }
    if {item["strategy"] for item in summary["keep"]} <= ORDERED_BY_SCORE:
        return about | {
            "highest": "Every keep-list holds these.",
            "lowest": f"Every keep-list drops these. {HARD_SAMPLES}",
        }
    return about | {"highest": holds, "lowest": f"{HARD_SAMPLES} {drops}"}


# -- plots ---------------------------------------------------------------------------------------


def draw_plots(findings: Findings, baselines: Baselines) -> dict[str, Markup]:
    """Return every plot for which the run has the figures, by its name in the template."""
    summary = findings.summary
    drawn = {
        "fidelity": _fidelity_plot(summary, baselines),
        "curve": _learning_curve_plot(summary),
        "histogram": _histogram_plot(summary),
        "classes": _class_plot(summary),
        "balance": _balance_plot(summary),
        "pilot": _pilot_plot(findings),
        "evaluation": _evaluation_plot(summary),
        "map": _score_map(findings),
        "kept": _kept_map(findings),
    }
    return {name: Markup(svg) for name, svg in drawn.items() if svg is not None}


def _baselines(fidelity: HeldOutFidelity) -> Baselines:
    """Return the baselines, the best first."""
    return sorted(
        fidelity["baselines"].items(),
        key=lambda row: (row[1]["spearman"] is None, -(row[1]["spearman"] or 0)),
    )


def _fidelity_plot(summary: Summary, baselines: Baselines) -> str | None:
    from raypipe.report import plots

    fidelity = summary["fidelity"]
    if fidelity["spearman"] is None:
        return None
    rows: Baselines = [(fidelity["method"] or "extrapolator", fidelity), *baselines]
    return plots.fidelity_chart(
        [
            (name, figures["spearman"], figures["spearman_low"], figures["spearman_high"])
            for name, figures in rows
            if figures["spearman"] is not None
        ]
    )


def _learning_curve_plot(summary: Summary) -> str | None:
    from raypipe.report import plots

    curve = summary["learning_curve"]
    if summary["fidelity"]["spearman"] is None or curve is None:
        return None
    if any(point["spearman"] is None for point in curve["points"]):
        return None
    return plots.learning_curve(curve["points"], curve["doubled"])


def _histogram_plot(summary: Summary) -> str | None:
    from raypipe.report import plots

    histogram = summary["scores"]["histogram"]
    return plots.score_histogram(histogram, _cuts(summary)) if histogram else None


def _class_plot(summary: Summary) -> str | None:
    from raypipe.report import plots

    scored = [item for item in summary["classes"] if item["q50"] is not None]
    if len(scored) < 2:
        return None
    if len(scored) <= MAX_LISTED_CLASSES:
        return plots.class_spread(summary["shown_classes"])
    return plots.class_bands(sorted(scored, key=lambda item: item["q50"] or 0.0))


def _balance_plot(summary: Summary) -> str | None:
    from raypipe.report import plots

    present = [item for item in summary["classes"] if item["samples"]]
    if not summary["keep"] or len(present) < 2:
        return None
    if len(present) > MAX_LISTED_CLASSES:
        return plots.kept_shares(
            [
                (item["fraction"], [row["kept"][item["file"]] / row["samples"] for row in present])
                for item in summary["keep"]
            ]
        )
    rows = _in_shown_order(summary, present)
    return plots.class_shares(
        [row["name"] for row in rows],
        [row["samples"] / summary["counts"]["samples"] for row in rows],
        [
            (
                item["fraction"],
                [row["kept"][item["file"]] / max(item["samples"], 1) for row in rows],
            )
            for item in summary["keep"]
        ],
    )


def _in_shown_order(summary: Summary, present: Sequence[ClassFigures]) -> list[ClassFigures]:
    by_label = {item["label"]: item for item in present}
    return [by_label[item["label"]] for item in summary["shown_classes"] if item["samples"]]


def _pilot_plot(findings: Findings) -> str | None:
    from raypipe.report import plots

    leading, pilot = findings.summary["headline"], findings.pilot
    if pilot is None or not pilot.plan.repeats or leading is None:
        return None
    curves = gain_curves(
        pilot, leading["fraction"], findings.summary["counts"]["samples"], leading["candidate"]
    )
    return plots.gain_curve(*curves)


def _evaluation_plot(summary: Summary) -> str | None:
    from raypipe.report import plots

    evaluation = summary["evaluation"]
    if not evaluation:
        return None
    full = evaluation["full"]["accuracy"]
    return plots.evaluation_curves(curves(evaluation), (full["mean"], full["low"], full["high"]))


def _score_map(findings: Findings) -> str | None:
    from raypipe.report import plots

    return plots.score_map(findings.map) if findings.map is not None else None


def _kept_map(findings: Findings) -> str | None:
    from raypipe.report import plots

    leading = findings.summary["headline"]
    if findings.map is None or findings.map.kept is None or leading is None:
        return None
    return plots.kept_map(findings.map, leading["fraction"])


def _cuts(summary: Summary) -> list[tuple[float, float]]:
    """Return fraction and lowest score of the keep-lists that end at a score."""
    return [
        (item["fraction"], item["lowest_score"])
        for item in summary["keep"]
        if item["strategy"] == "top" and item["lowest_score"] is not None
    ]


def _small_histograms(summary: Summary) -> list[dict[str, Any]]:
    """Return the classes that have a histogram of their own, each with its `svg`."""
    from raypipe.report import plots

    histogram, leading = summary["scores"]["histogram"], summary["headline"]
    if not histogram or len(summary["class_histograms"]) < 2:
        return []
    first, last = histogram["edges"][0], histogram["edges"][-1]
    cuts = [
        (cut - first) / (last - first)
        for fraction, cut in _cuts(summary)
        if leading and fraction == leading["fraction"]
    ]
    return [
        {**item, "svg": Markup(plots.small_histogram(item["measured"], item["extrapolated"], cuts))}
        for item in summary["class_histograms"]
    ]
