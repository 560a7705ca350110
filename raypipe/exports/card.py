"""Write the dataset card of an export: how the list was cut, and how far to trust its scores.

A run can come from somebody you do not trust. Its values are only ever written into the Markdown
below the front matter: names and paths as code, sentences with all markup escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from raypipe._version import __version__
from raypipe.exports.finished import FinishedExport
from raypipe.report import formats
from raypipe.report.schema import Summary
from raypipe.report.summary import summarize
from raypipe.runs.keep_files import keep_file, keep_metadata
from raypipe.runs.untrusted import printable

_MARKUP = re.compile(r"[\\`*_{}\[\]<>|~@&$]|:(?=//)|(?<=\b[wW]{3})\.|^[-+=#]|(?<=^\d)[.)]")
"""Characters that Markdown, HTML or an address in a line of text begin with."""
_HEAD = """\
---
pretty_name: Samples of a raypipe keep-list
task_categories:
- image-classification
tags:
- raypipe
- data-pruning
---
"""


def dataset_card(export: FinishedExport) -> str:
    """Return the card, in Markdown with front matter as the Hugging Face Hub reads it."""
    summary, cut = summarize(export.run), keep_metadata(export.keep_list)
    sections: dict[str, Iterable[str]]
    if export.snapshot is None:
        sections = {
            "Cut": _cut(summary, cut),
            "Score": _score(summary),
            "Fidelity and stability": [escaped(summary["fidelity"]["sentence"])],
            "Benefit": _benefit(summary, cut),
            "Seeds": _seeds(summary, cut),
        }
    else:  # the run may have been scored again since
        sections = {"Cut": _cut(summary, cut), "Score": _score_of_snapshot(export.snapshot, cut)}
    sections["Columns"] = _columns(export)
    lines = [
        _HEAD,
        "# Samples of a raypipe keep-list",
        "",
        f"{export.samples:,} samples that raypipe {__version__} kept of "
        f"{code(summary['source']['uri'])}.",
    ]
    for title, content in sections.items():
        lines += ["", f"## {title}", "", *content]
    return "\n".join(lines) + "\n"


def escaped(value: object) -> str:
    """Return a text as one line of Markdown that shows it literally: no markup, HTML or link."""
    line = " ".join(printable(str(value)).split())
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", line)


def code(value: object) -> str:
    """Return a text as inline code of Markdown, on one line."""
    line = " ".join(printable(str(value)).split()).replace("`", "'")
    return f"`{line}`" if line else "(empty)"


def _cut(summary: Summary, cut: Mapping[str, str]) -> Iterator[str]:
    if not cut:
        yield "How the list was cut is not recorded."
        return
    yield f"- Kept: {code(cut.get('count'))} of {code(cut.get('samples'))} scored samples"
    yield f"- Keep fraction: {code(cut.get('fraction'))}"
    chosen = " (chosen by `auto`)" if cut.get("chosen") == "auto" else ""
    yield f"- Strategy: {code(cut.get('strategy'))}{chosen}"
    if cut.get("options"):
        yield f"- Options: {code(cut['options'])}"
    if cut.get("reason"):
        yield f"- Reason: {escaped(cut['reason'])}"
    if cut.get("forced") == "true":
        yield "- **Forced:** fidelity or stability was too low, and `select.force` overrode that."


def _score(summary: Summary) -> Iterator[str]:
    counts, fidelity = summary["counts"], summary["fidelity"]
    yield f"- Score: {code(fidelity['score'] or 'unknown')}; higher means keep"
    yield (
        f"- Measured directly: {counts['measured']:,} samples; extrapolated: "
        f"{counts['extrapolated']:,}"
        + (f", by {code(fidelity['method'])}" if counts["extrapolated"] else "")
    )
    if summary["source"]["pseudo_labels"]:
        yield f"- Labels: {escaped(summary['source']['pseudo_labels'])}"


def _score_of_snapshot(snapshot: str, cut: Mapping[str, str]) -> Iterator[str]:
    yield f"- Snapshot of a nightly run: {code(snapshot)}"
    yield f"- Fidelity (rank correlation): {code(cut.get('spearman', 'not recorded'))}"


def _benefit(summary: Summary, cut: Mapping[str, str]) -> Iterator[str]:
    """Yield what trainings on lists of this fraction showed, or what the pilot predicts."""
    fraction = float(cut.get("fraction", "nan"))
    evaluation = summary["evaluation"]
    if evaluation and not evaluation["outdated"]:
        lines = list(_evaluated(evaluation, fraction))
        if lines:
            yield (
                "Accuracy of lists of this fraction against random lists of the same size, in "
                "percentage points, by score and strategy:"
            )
            yield ""
            yield from lines
            return
    file = keep_file(fraction) if cut.get("fraction") else ""
    figures = next((item for item in summary["keep"] if item["file"] == file), None)
    pilot = summary["pilot"]
    expected = next(
        (
            item["expected"]
            for item in (pilot["lists"] if pilot and figures else [])
            if item["fraction"] == fraction
        ),
        None,
    )
    if expected and expected["against_random"]:
        gain = expected["against_random"]
        yield (
            f"Predicted by trainings of {code(expected['model'])} on smaller lists: "
            f"{formats.plain_points(gain['mean'])} percentage points of accuracy against random "
            f"lists (95 % interval {formats.plain_points(gain['low'])} to "
            f"{formats.plain_points(gain['high'])}). Not measured on this list."
        )
        return
    yield "Not measured. `raypipe evaluate` compares trainings on the list with random lists."


def _evaluated(evaluation: Mapping[str, Any], fraction: float) -> Iterator[str]:
    """Yield a line for each evaluated list of a keep fraction."""
    for listed in evaluation["lists"]:
        for point in listed["fractions"]:
            gain = point.get("difference")
            if point["fraction"] != fraction or gain is None:
                continue
            yield (
                f"- {code(listed['name'])}: {formats.plain_points(gain['mean'])}"
                + (
                    f" (95 % interval {formats.plain_points(gain['low'])} to "
                    f"{formats.plain_points(gain['high'])})"
                    if gain.get("low") is not None
                    else " (one seed, no interval)"
                )
                + f", {evaluation['seeds']} seeds, network {code(evaluation['training']['model'])}"
            )


def _seeds(summary: Summary, cut: Mapping[str, str]) -> Iterator[str]:
    """Yield every seed of the settings. That of the selection is the one the list was cut with."""
    for section, settings in summary["settings"].items():
        if section == "select" or (
            section == "pseudo_labels" and not summary["source"]["pseudo_labels"]
        ):
            continue
        if isinstance(settings, dict) and "seed" in settings:
            yield f"- {code(section + '.seed')}: {code(settings['seed'])}"
    try:
        options = json.loads(cut.get("options", "{}"))
    except ValueError:
        options = {}
    if isinstance(options, dict) and "seed" in options:
        yield f"- `select.seed`: {code(options['seed'])}"


def _columns(export: FinishedExport) -> Iterator[str]:
    yield "- `image`: the image as the source has it; pixels without a file became PNG"
    yield "- `label`: the class; empty for an unlabelled sample"
    yield "- `sample_id`: the id in the keep-list and in the run"
    yield "- `score`: higher means keep"
    if export.weighted:
        yield "- `weight`: training weight"
