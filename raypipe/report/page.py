"""The report as one HTML file: no network, no script, nothing that could change what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from raypipe import storage
from raypipe.errors import RunError
from raypipe.report import words
from raypipe.report.evaluation import curves
from raypipe.report.scores import END_CLASSES, MOST_CLASSES, Pick
from raypipe.report.summary import Findings, collect
from raypipe.report.thumbnails import Thumbnails, load_thumbnails
from raypipe.rundir import Run, tables_of

GRIDS = {
    "highest": ("Highest scores", "What every keep-list holds."),
    "lowest": ("Lowest scores", "What every keep-list drops: atypical, hard or wrongly labelled samples gather here."),
    "uncertain": ("Most uncertain", "Extrapolated scores with the widest intervals."),
    "suspects": ("Likely label errors", "Low scores where the proxy contradicts the label most: label, then → what it sees."),
}  # fmt: skip
"""Title and explanation of each image grid, in the order of the page."""
BY_SCORE = {"top", "balanced", "normalized", None}
"""Strategies by which the two ends of the scores are kept and dropped, as these explanations say."""
OTHER_ABOUT = {
    "highest": "Which of these a keep-list holds is for its strategy to say.",
    "lowest": "Atypical, hard or wrongly labelled samples gather here. Which of these a keep-list drops is for its strategy to say.",
}


def build(run: Run) -> str:
    """Write `RUN/report/summary.json` and `RUN/report/index.html`; returns the URI of the page.

    What the run lacks (an unfinished stage, a source that is gone) is said on the page. Raises RunError without a run, and for what
    `raypipe extrapolate` made.
    """
    if tables_of(run.ledger()):
        raise RunError(f"{run.uri}: was made from tables, without images to show; its figures are in {run.path('summary.json')}")
    findings = collect(run)
    thumbnails = load_thumbnails(run, run.config().source, [findings.grids.get(name, []) for name in GRIDS])
    page = render(findings, thumbnails)
    storage.write_json(run.path("report", "summary.json"), findings.summary)
    storage.write_bytes(run.path("report", "index.html"), page.encode("utf-8", "replace"))
    return run.path("report", "index.html")


def render(findings: Findings, thumbnails: Thumbnails) -> str:
    """The page. Everything that comes from the run is escaped by the template; only the plots are markup of our own."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        name: getattr(words, name)
        for name in ("count", "share", "number", "fixed", "seconds", "setting", "judged_samples", "accuracy", "points")
    }
    summary = findings.summary
    baselines = _baselines(summary["fidelity"])
    shown = {item["label"] for item in summary["shown_classes"]}
    by_label = {item["label"]: item for item in summary["classes"]}
    by_score = {item["strategy"] for item in summary["keep"]} <= BY_SCORE
    return environment.get_template("page.html").render(
        s=summary,
        style=Markup((folder / "page.css").read_text("utf-8")),
        name=storage.name(summary["run"]),
        headline=min(summary["keep"], key=lambda item: abs(item["fraction"] - 0.5), default=None),
        plots={name: Markup(svg) for name, svg in _plots(findings, baselines).items()},
        strategies=words.strategies(summary["keep"]),
        grids=[_grid(name, by_score, findings.grids.get(name, []), summary["grids"].get(name, []), thumbnails) for name in GRIDS],
        image_note=thumbnails.note,
        baselines=baselines,
        balance=[by_label[item["label"]] for item in summary["shown_classes"]],
        hidden_classes=sum(item["samples"] > 0 and item["label"] not in shown for item in summary["classes"]),
        wall=summary["cost"]["total"]["wall_seconds"] or 1.0,
    )


def _baselines(fidelity: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name and figures of each baseline, the best first."""
    return sorted(fidelity["baselines"].items(), key=lambda row: (row[1]["spearman"] is None, -(row[1]["spearman"] or 0)))


def _plots(findings: Findings, baselines: list[tuple[str, dict[str, Any]]]) -> dict[str, str]:
    """Every plot for which the run has the figures."""
    from raypipe.report import plots

    summary, result = findings.summary, {}
    fidelity, histogram = summary["fidelity"], summary["scores"]["histogram"]
    if fidelity["spearman"] is not None:
        rows = [(fidelity["method"] or "extrapolator", fidelity), *baselines]
        keys = ("spearman", "spearman_low", "spearman_high")
        result["fidelity"] = plots.fidelity_chart(
            [(name, *(found[key] for key in keys)) for name, found in rows if found["spearman"] is not None]
        )
    if histogram:
        cuts = [(item["fraction"], item["lowest_score"]) for item in summary["keep"] if item["strategy"] == "top"]
        result["histogram"] = plots.score_histogram(histogram, [cut for cut in cuts if cut[1] is not None])
    classes = summary["shown_classes"]
    if len(classes) > 1:
        present = sum(item["samples"] > 0 for item in summary["classes"])
        result["classes"] = plots.class_spread(classes, END_CLASSES if present > MOST_CLASSES else None)
    if summary["evaluation"]:
        everything = summary["evaluation"]["full"]["accuracy"]
        result["evaluation"] = plots.evaluation_curves(
            curves(summary["evaluation"]), (everything["mean"], everything["low"], everything["high"])
        )
    if findings.map is not None:
        result["map"] = plots.embedding_map(findings.map)
    return result


def _grid(
    name: str, by_score: bool, picks: Sequence[Pick], described: Sequence[dict[str, Any]], thumbnails: Thumbnails
) -> dict[str, Any]:
    title, about = GRIDS[name]
    about = about if by_score else OTHER_ABOUT.get(name, about)
    tiles = []
    for pick, words_of in zip(picks, described, strict=True):
        image = thumbnails.images.get(pick.sample_id)
        tiles.append({**words_of, "image": image.uri if image else "", "pixelated": bool(image and image.pixelated)})
        tiles[-1]["reason"] = image.reason if image else ""
    return {"name": name, "title": title, "about": about, "tiles": tiles}
