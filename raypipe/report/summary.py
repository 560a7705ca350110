"""Every figure of the report, from the files of a run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from raypipe._version import __version__
from raypipe.config import Config
from raypipe.report import text
from raypipe.report.classes import ClassPicks, pick_class_samples
from raypipe.report.cost import cost_figures, headline, trained_epochs
from raypipe.report.embeddings import EmbeddingMap, EmbeddingScan, scan_embeddings
from raypipe.report.evaluation import read_evaluation
from raypipe.report.fidelity import (
    fidelity_figures,
    learning_curve,
    neighbour_search,
    read_assessment,
    seed_fidelity,
)
from raypipe.report.json_values import clean
from raypipe.report.keep_lists import (
    class_figures,
    class_name,
    even_classes,
    in_keep_list,
    keep_list_figures,
    quantiles_of,
    scan_keep_lists,
)
from raypipe.report.label_noise import noise_figures
from raypipe.report.pilot import pilot_figures
from raypipe.report.rejects import reject_figures
from raypipe.report.schema import (
    ClassGrid,
    ClassHistogram,
    ClassName,
    Counts,
    Embeddings,
    Headline,
    Rejects,
    Scores,
    ShownClass,
    SourceSection,
    Summary,
    Tile,
)
from raypipe.report.score_scan import (
    END_CLASSES,
    MAX_LISTED_CLASSES,
    Pick,
    ScoreScan,
    both_ends,
    scan_scores,
    shown_classes,
)
from raypipe.report.set_shares import sample_sets, set_share_figures
from raypipe.runs.layout import OPTIONAL_STAGES, STAGE_FOLDERS
from raypipe.runs.ledger import (
    TABLE_SECTIONS,
    StageRecord,
    extrapolated_tables,
    injected_noise,
    now,
)
from raypipe.runs.outside_code import all_code, is_difficulty
from raypipe.runs.pilot import Pilot
from raypipe.runs.run import Run
from raypipe.text import stability_for_cut
from raypipe.vision.bit_depth import BitsInUse

FORMAT = 1
"""Version of `summary.json`."""
BEFORE_REPORT = tuple(itertools.takewhile(lambda stage: stage != "report", STAGE_FOLDERS))
ENDED = ("done", "refused")
"""States of a finished stage; refused: fidelity is too low for keep-lists."""

Ledger = Mapping[str, StageRecord]


@dataclass
class Findings:
    """What the page shows.

    Attributes
    ----------
    summary
        The content of `summary.json`.
    grids
        Samples by the name of their grid.
    class_grids
        Lowest and highest samples of each class in `summary["class_grids"]`, in that order.
    map
        The embedding map; None without one.
    pilot
        The result of the pilot; None without one.
    """

    summary: Summary
    grids: dict[str, list[Pick]]
    class_grids: list[dict[str, list[Pick]]]
    map: EmbeddingMap | None
    pilot: Pilot | None = None


def summarize(run: Run) -> Summary:
    """Return all figures of the report; one that the run does not have is None.

    Raises
    ------
    RunError
        If there is no run.
    """
    return collect(run).summary


def collect(run: Run) -> Findings:
    """Return what the page shows, in memory that does not grow with the number of samples.

    Raises
    ------
    RunError
        If there is no run.
    """
    ledger, config = run.ledger(), run.config()
    names = _class_names(run)
    noise = injected_noise(ledger)
    assessment = read_assessment(run)
    scan = scan_scores(run, len(names), config.report.images)
    within_classes = config.select.cuts_within_classes
    stability = stability_for_cut(assessment.get("stability") or {}, within_classes)
    fidelity = fidelity_figures(assessment, scan, stability, within_classes)
    embeddings = scan_embeddings(run, config.report.images, noise)
    keep_lists = scan_keep_lists(run, len(names), sample_sets(run, config))
    keep = [keep_list_figures(names, scan, keep_list) for keep_list in keep_lists]
    cost = cost_figures(ledger, BEFORE_REPORT, scan.samples, scan.measured, config.report)
    evaluation = read_evaluation(run, ledger.get("extrapolate"))
    pilot = Pilot.read(run)
    piloted = pilot_figures(pilot, config.pilot.model, keep, scan.samples)
    leading = headline(
        keep,
        scan.samples,
        ledger.get("proxy"),
        trained_epochs(ledger.get("proxy"), config.proxy.passes),
        cost["saving"]["spent"],
        evaluation,
        piloted,
    )
    embedding_map = _with_keep_list(run, embeddings.map, leading)
    rejects = reject_figures(run)
    labels = shown_classes(scan, config.report.classes)
    class_picks = pick_class_samples(
        run, scan, labels, config.report.class_images if config.report.images else 0
    )
    grids = {**scan.picks, "suspects": embeddings.suspects}
    summary: Summary = {
        "format": FORMAT,
        "raypipe": __version__,
        "made": now(),
        "run": run.uri,
        "unfinished": [stage for stage in _stages(ledger) if not _ended(ledger, stage)],
        "refused": _refusal(ledger),
        "source": _source(config, names, ledger),
        "counts": _counts(scan, rejects, ledger),
        "headline": leading,
        "high_is_hard": is_difficulty(str(fidelity["score"]), ledger),
        "code": list(all_code(ledger)),
        "fidelity": fidelity,
        "fidelity_seed": seed_fidelity(assessment),
        "stability": stability or None,
        "learning_curve": learning_curve(assessment),
        "neighbour_search": neighbour_search(assessment),
        "label_noise": (
            dict(noise_figures(run, noise, embeddings.noise, [item["file"] for item in keep]))
            if noise and embeddings.noise
            else None
        ),
        "scores": _scores(scan),
        "keep": keep,
        "sets": set_share_figures(run, scan.samples, keep_lists),
        "even_classes": even_classes(scan.class_samples),
        "classes": class_figures(names, scan, keep_lists),
        "shown_classes": [_shown_class(names, scan, label) for label in _listed_classes(scan)],
        "class_histograms": [_class_histogram(names, scan, label) for label in labels],
        "cost": cost,
        "pilot": piloted,
        "evaluation": evaluation,
        "embeddings": _embeddings(embeddings, embedding_map),
        "grids": {name: [_tile(pick, names) for pick in picks] for name, picks in grids.items()},
        "class_grids": [
            _class_grid(names, scan, class_picks, label) for label in class_picks.lowest
        ],
        "class_fragments": {"read": class_picks.fragments_read, "there": class_picks.fragments},
        "rejects": rejects,
        "settings": _without_secrets(_settings(config, ledger)),
    }
    class_grids = [
        {"lowest": class_picks.lowest[label], "highest": class_picks.highest[label]}
        for label in class_picks.lowest
    ]
    return Findings(clean(summary), grids, class_grids, embedding_map, pilot)


def _settings(config: Config, ledger: Ledger) -> dict[str, Any]:
    """Return the settings of the run; with scores from tables, those that have a meaning."""
    sections = set(TABLE_SECTIONS) if extrapolated_tables(ledger) else None
    return config.model_dump(mode="json", include=sections)


def _without_secrets(value: Any) -> Any:
    """Remove what could be a secret from the settings: a page is passed on."""
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return text.without_secrets(value) if isinstance(value, str) else value


def _class_names(run: Run) -> list[str]:
    try:
        return list(run.classes().names)
    except (FileNotFoundError, KeyError, TypeError):
        return []


# -- stages, source, counts ----------------------------------------------------------------------


def _stages(ledger: Ledger) -> Sequence[str]:
    """Return the stages of the run before the report."""
    return ("index", "extrapolate") if extrapolated_tables(ledger) else BEFORE_REPORT


def _ended(ledger: Ledger, stage: str) -> bool:
    return ledger[stage].state in ENDED if stage in ledger else stage in OPTIONAL_STAGES


def _refusal(ledger: Ledger) -> str | None:
    """Return why the stage `select` refused to write keep-lists."""
    record = ledger.get("select")
    return record.error if record is not None and record.state == "refused" else None


def _source(config: Config, names: Sequence[str], ledger: Ledger) -> SourceSection:
    detail = ledger["index"].detail if "index" in ledger else {}
    return {
        "uri": text.without_secrets(config.source.uri),
        "format": config.source.format,
        "classes": len(names),
        "pseudo_labels": text.pseudo_labels(config.pseudo_labels.model_dump()) or None,
        "files": detail.get("files"),
        "fragments": detail.get("fragments"),
        "bytes": detail.get("bytes"),
        "depth_note": _depth_note(config, ledger),
        "tables": {
            name: text.without_secrets(value) for name, value in extrapolated_tables(ledger).items()
        }
        or None,
    }


def _depth_note(config: Config, ledger: Ledger) -> str | None:
    """Return what is lost of 16-bit images; None if nothing is."""
    detail = ledger["seed"].detail if "seed" in ledger else {}
    bits = BitsInUse(**detail.get("bits_in_use", {}))
    return bits.note(config.source.bit_depth) or None


def _counts(scan: ScoreScan, rejects: Rejects, ledger: Ledger) -> Counts:
    indexed = (ledger["index"].samples if "index" in ledger else 0) or None
    return {
        "indexed": indexed,
        "samples": scan.samples,
        "measured": scan.measured,
        "extrapolated": scan.samples - scan.measured,
        "unlabelled": int(scan.class_samples[-1]),
        "not_finite": scan.not_finite,
        "rejects": rejects["samples"],
        "unreadable_files": rejects["files"],
        "accounted": scan.samples + rejects["samples"] == indexed if indexed else None,
    }


# -- scores and classes --------------------------------------------------------------------------


def _scores(scan: ScoreScan) -> Scores:
    finite = scan.samples - scan.not_finite
    return {
        "low": scan.low,
        "high": scan.high,
        "mean": scan.total / finite if finite else None,
        "histogram": scan.histogram,
    }


def _listed_classes(scan: ScoreScan) -> list[int]:
    """Return the classes that the page lists one by one, the lowest median first."""
    order = scan.by_median()
    return order if len(order) <= MAX_LISTED_CLASSES else both_ends(order, 2 * END_CLASSES)


def _class(names: Sequence[str], scan: ScoreScan, label: int) -> ClassName:
    return {
        "label": label if label < scan.classes else None,
        "name": class_name(names, scan, label),
        "samples": int(scan.class_samples[label]),
    }


def _shown_class(names: Sequence[str], scan: ScoreScan, label: int) -> ShownClass:
    return cast(ShownClass, {**_class(names, scan, label), **quantiles_of(scan, label)})


def _class_histogram(names: Sequence[str], scan: ScoreScan, label: int) -> ClassHistogram:
    measured, extrapolated = scan.class_histogram(label)
    return {**_class(names, scan, label), "measured": measured, "extrapolated": extrapolated}


def _class_grid(names: Sequence[str], scan: ScoreScan, picks: ClassPicks, label: int) -> ClassGrid:
    return {
        **_class(names, scan, label),
        "lowest": [_tile(pick, names) for pick in picks.lowest[label]],
        "highest": [_tile(pick, names) for pick in picks.highest[label]],
    }


def _tile(pick: Pick, names: Sequence[str]) -> Tile:
    tile = cast(Tile, dataclasses.asdict(pick))
    tile["label_name"] = text.label_name(names, pick.label)
    if pick.prediction is not None:
        tile["prediction_name"] = text.label_name(names, pick.prediction)
    return tile


# -- embeddings ----------------------------------------------------------------------------------


def _with_keep_list(
    run: Run, embedding_map: EmbeddingMap | None, leading: Headline | None
) -> EmbeddingMap | None:
    """Add to the map which samples the leading keep-list holds."""
    if embedding_map is None or leading is None:
        return embedding_map
    kept = in_keep_list(run, leading["file"], embedding_map.sample_id)
    return dataclasses.replace(embedding_map, kept=kept)


def _embeddings(scan: EmbeddingScan, embedding_map: EmbeddingMap | None) -> Embeddings:
    kept = embedding_map.kept if embedding_map is not None else None
    return {
        "shards_read": scan.shards_read,
        "shards": scan.shards,
        "suspects": scan.suspect_count,
        "proxy_agrees": scan.agreement,
        "mapped": len(embedding_map.score) if embedding_map is not None else 0,
        "explained": embedding_map.explained if embedding_map is not None else None,
        "kept": int(kept.sum()) if kept is not None else None,
    }
