"""Select: write keep-lists from the scores of a run.

A few passes over `scores/` and no rescoring. Memory does not grow with the source, except for near
duplicates; see `raypipe.stages.select.near_duplicates`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raypipe import storage
from raypipe.config import Config, SelectSettings, TrustSettings
from raypipe.config.choices import AUTO
from raypipe.distributed.context import Context
from raypipe.errors import ConfigError, RunError, TrustError
from raypipe.runs.keep_files import choice_lines, keep_file, keep_metadata
from raypipe.runs.ledger import StageRecord, content_hash, extrapolated_tables, injected_noise
from raypipe.runs.run import Run
from raypipe.runs.score_stream import ScoreStream, mark_listed_ids, unknown_id_notes
from raypipe.selection import (
    Selection,
    SelectionOptions,
    find_strategy,
    needs_classes,
    needs_loss,
    needs_margin,
    select,
)
from raypipe.stages.base import Stage
from raypipe.stages.select.auto import Choice, choose
from raypipe.stages.select.gate import check_trust
from raypipe.stages.select.near_duplicates import mark_near_duplicates
from raypipe.stages.select.options import options_of, recorded_options
from raypipe.stages.select.writer import KeepListWriter

log = logging.getLogger("raypipe")


class SelectStage(Stage):
    """Write the keep-lists of the settings."""

    name = "select"
    needs = ("extrapolate", "pilot")

    def settings(self, config: Config) -> dict[str, Any]:
        trust = config.trust.model_dump(mode="json")
        for name in ("min_stability", "min_accuracy_over_chance"):  # older runs did not have them
            if trust[name] == getattr(TrustSettings(), name):
                del trust[name]
        select = config.select.model_dump(mode="json", exclude={"options"})
        if select["quotas"] == SelectSettings().quotas:
            del select["quotas"]  # nor this
        return {**select, **trust}

    def complete(self, context: Context, record: StageRecord) -> bool:
        run, settings = context.run, context.config.select
        try:
            id_lists = _stamps(settings)
        except FileNotFoundError:
            return False
        # shards are named after their content, so new files in the source show here
        same = (
            record.detail.get("shards") == content_hash(run.done("scores"))
            and record.detail.get("given", {}) == id_lists
        )
        files = {keep_file(fraction) for fraction in settings.keep}
        return same and files <= storage.names(run.keep_folder)

    def execute(self, context: Context, record: StageRecord) -> None:
        started = time.process_time()
        config = context.config
        written = make_keep_lists(context.run, config.select, config.trust)
        for line in unknown_id_notes(written.marked):
            context.progress.say(f"note: {line}")
        for line in choice_lines(written.chosen):
            context.progress.say(f"{self.name:<11} {line}")
        record.detail = written.ledger_detail()
        record.samples = written.samples
        record.cpu_seconds += time.process_time() - started


@dataclass(frozen=True)
class WrittenKeepLists:
    """Keep-lists that were written.

    Attributes
    ----------
    metadata : dict of str to str
        What every list records: strategy, options, hash of the scores, fidelity.
    samples : int
        Samples with a score.
    shards : str
        Hash of the names of the score shards.
    lists : dict of str to int
        Kept samples by file name.
    marked : dict
        Counts for `always_keep`, `never_keep` and near duplicates.
    id_lists : dict of str to str
        Size and stamp of the files of `always_keep` and `never_keep`.
    chosen : dict of str to dict
        With strategy auto, strategy and reason by file name.
    """

    metadata: dict[str, str]
    samples: int
    shards: str
    lists: dict[str, int]
    marked: dict[str, Any]
    id_lists: dict[str, str]
    chosen: dict[str, dict[str, str]]

    def ledger_detail(self) -> dict[str, Any]:
        """Return what the ledger records."""
        return {
            **self.metadata,
            "samples": self.samples,
            "shards": self.shards,
            "lists": self.lists,
            "marked": self.marked,
            "given": self.id_lists,
            **({"chosen": self.chosen} if self.chosen else {}),
        }


def write_keep_lists(
    run: Run, settings: SelectSettings, trust: TrustSettings | None = None
) -> dict[str, int]:
    """Write `RUN/keep/keep-<fraction>.parquet` for every fraction of the settings, in seconds.

    Parameters
    ----------
    run
        A run with scores.
    settings
        Fractions, strategy and options.
    trust
        The thresholds of the gate; the default settings if None.

    Returns
    -------
    dict of str to int
        Kept samples by file name.

    Raises
    ------
    RunError
        When the scores are not complete.
    TrustError
        When their fidelity is too low; see `raypipe.stages.select.gate.check_trust`.
    ConfigError
        When a fraction is invalid, or options do not fit one another or these scores.
    StageError
        When scores cannot be ordered.

    Notes
    -----
    The columns are sample_id, label, score and, with `select.weights`, weight, in the order of the
    score shards. The schema metadata has the strategy and its options, the number of samples, the
    hash of the scores and their fidelity. Lists of outdated scores are removed; lists of other
    fractions stay.
    """
    run.record("extrapolate")
    written = make_keep_lists(run, settings, trust)
    for line in (*unknown_id_notes(written.marked), *choice_lines(written.chosen)):
        log.warning("note: %s", line)
    return written.lists


def make_keep_lists(
    run: Run, settings: SelectSettings, trust: TrustSettings | None = None
) -> WrittenKeepLists:
    """Write keep-lists as `write_keep_lists` does, from the scores that exist."""
    trust = trust or TrustSettings()
    choices = choose(run, settings, trust, run.ledger()["extrapolate"].samples)
    groups: dict[str, list[Choice]] = {}
    for choice in choices:
        groups.setdefault(choice.group, []).append(choice)
    rules = [(group, options_of(run, group[0].settings)) for group in groups.values()]
    scores = ScoreStream(
        run,
        any(needs_loss(group[0].settings.strategy, options) for group, options in rules),
        any(needs_margin(group[0].settings.strategy, options) for group, options in rules),
    )
    fidelity = [_check_trust(run, scores, group[0].settings, trust) for group, _ in rules]
    marked = _mark_samples(run, scores, settings)
    lists: dict[str, int] = {}
    metadata: dict[str, str] = {}
    for (group, options), of_group in zip(rules, fidelity, strict=True):
        own, counts = _write_group(run, scores, group, options, marked, of_group)
        lists |= counts
        metadata = metadata or own
    if settings.strategy == AUTO:
        metadata = {**metadata, "strategy": AUTO}
        metadata.pop("options", None)
    _remove_outdated(run, scores.digest, set(lists))
    return WrittenKeepLists(
        metadata,
        scores.samples,
        content_hash(run.done("scores")),
        lists,
        marked,
        _stamps(settings),
        {
            keep_file(choice.fraction): {
                "strategy": choice.settings.strategy,
                "reason": choice.reason,
            }
            for choice in choices
            if choice.reason
        },
    )


def kept_samples(run: Run, settings: SelectSettings, trust: TrustSettings) -> np.ndarray:
    """Return which samples the first list of the settings would hold, and write nothing.

    Returns
    -------
    numpy.ndarray
        bool [n], in the order of the score shards.

    Raises
    ------
    RunError, TrustError, ConfigError, StageError
        As `write_keep_lists`.
    """
    choice = choose(run, settings, trust, run.record("extrapolate").samples)[0]
    options = options_of(run, choice.settings)
    scores = ScoreStream(
        run,
        needs_loss(choice.settings.strategy, options),
        needs_margin(choice.settings.strategy, options),
    )
    _trusted(run, choice.settings, trust)
    _mark_samples(run, scores, settings)
    (cut,) = _select(run, scores, choice.settings, options, [choice.fraction])
    return np.concatenate([cut.mask(chunk) for chunk in scores.chunks(True)])


def _write_group(
    run: Run,
    scores: ScoreStream,
    choices: Sequence[Choice],
    options: SelectionOptions,
    marked: dict[str, Any],
    fidelity: dict[str, str],
) -> tuple[dict[str, str], dict[str, int]]:
    """Write the lists that are cut alike. Returns their common metadata, and samples by file."""
    settings = choices[0].settings
    cuts = _select(run, scores, settings, options, [choice.fraction for choice in choices])
    metadata = {
        "strategy": settings.strategy,
        "samples": str(scores.samples),
        "scores": scores.digest,
        **fidelity,
    }
    if noise := injected_noise(run.ledger()):
        metadata["inject_noise"] = f"{noise.share:g}"
    if recorded := recorded_options(settings, options, marked):
        metadata["options"] = json.dumps(recorded, sort_keys=True)
    reasons = {choice.fraction: choice.metadata() for choice in choices}
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(KeepListWriter(run, cut, {**metadata, **reasons[cut.fraction]}))
            for cut in cuts
        ]
        for chunk in scores.chunks(True):
            for writer in writers:
                writer.add(chunk)
    return metadata, {writer.file: writer.selection.count for writer in writers}


def _check_trust(
    run: Run, scores: ScoreStream, settings: SelectSettings, trust: TrustSettings
) -> dict[str, str]:
    """Return the result of `_trusted`, and remove outdated lists if it is an error."""
    try:
        return _trusted(run, settings, trust)
    except TrustError:
        # lists that were forced earlier stay as long as their scores do
        if storage.names(run.keep_folder):
            for _ in scores.chunks(False):
                pass  # computes the digest
            _remove_outdated(run, scores.digest, set())
        raise


def _trusted(run: Run, settings: SelectSettings, trust: TrustSettings) -> dict[str, str]:
    """Check the fidelity of the scores; a strategy that does not use scores needs none.

    Returns the fidelity as metadata of a keep-list.
    """
    if not find_strategy(settings.strategy).uses_scores:
        trust = TrustSettings(min_spearman=-1, min_stability=-1, min_accuracy_over_chance=-1)
    within_classes = settings.cuts_within_classes
    return check_trust(run.ledger()["extrapolate"], trust, settings.force, within_classes)


def _mark_samples(run: Run, scores: ScoreStream, settings: SelectSettings) -> dict[str, Any]:
    """Mark samples that are always or never kept, and near duplicates. Returns counts."""
    marked = mark_listed_ids(scores, settings.always_keep, settings.never_keep)
    if settings.near_duplicates is None:
        return marked
    if extrapolated_tables(run.ledger()):
        raise ConfigError(
            "select.near_duplicates: scores extrapolated from tables have no embeddings/ to search"
        )
    return marked | mark_near_duplicates(run, scores, settings.near_duplicates)


def _select(
    run: Run,
    scores: ScoreStream,
    settings: SelectSettings,
    options: SelectionOptions,
    keep: Sequence[float],
) -> list[Selection]:
    """Decide which samples each list keeps.

    Raises
    ------
    ConfigError
        If a list would be empty.
    RunError
        If there are no samples.
    """
    classes = len(run.classes().names) if needs_classes(settings.strategy, options) else 0
    cuts = select(
        scores.chunks,
        sorted(set(keep)),
        settings.strategy,
        classes,
        options,
        marked=bool(scores.marks),
        embedded=scores.embedded,
    )
    if not scores.samples:
        scored = run.ledger()["extrapolate"].samples
        cause = (
            f"although {scored:,} samples were scored: its files were removed. Rerun `raypipe run`"
            if scored
            else "so there is nothing to keep; see rejects/ for what went wrong"
        )
        raise RunError(f"{run.uri}: scores/ holds no sample, {cause}")
    for cut in cuts:
        if not cut.count:
            raise ConfigError(
                f"select.keep: {cut.fraction:g} of {scores.samples:,} samples is less than one; "
                "raise it"
            )
    return cuts


def _stamps(settings: SelectSettings) -> dict[str, str]:
    """Return size and stamp of the files of ids, which show a change of a file."""
    files = {name: getattr(settings, name) for name in ("always_keep", "never_keep")}
    infos = {name: storage.info(uri) for name, uri in files.items() if uri is not None}
    return {name: f"{info.size} {info.stamp}" for name, info in infos.items()}


def _remove_outdated(run: Run, digest: str, current: set[str]) -> None:
    """Remove keep-lists of outdated scores. The `current` files are not."""
    for file in sorted(storage.names(run.keep_folder) - current):
        if file.endswith(".parquet") and keep_metadata(run.keep_list(file)).get("scores") != digest:
            storage.delete(run.keep_list(file))
