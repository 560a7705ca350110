"""Keep-lists from the scores of a run: a few passes over `scores/`, no rescoring, memory that does not grow with the source.

(Near duplicates are the exception: see `raypipe.stages.select.near_duplicates`.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.config import Config, SelectSettings, TrustSettings
from raypipe.config.choices import DIFFICULTIES
from raypipe.distributed.context import Context
from raypipe.errors import ConfigError, RunError, StageError, TrustError
from raypipe.runs.keep_files import keep_file, keep_metadata
from raypipe.runs.ledger import StageRecord, content_hash, extrapolated_tables, injected_noise
from raypipe.runs.run import Run
from raypipe.runs.score_stream import ScoreStream, mark_listed_ids, unknown_id_notes
from raypipe.selection import (
    STRATEGIES,
    Chunk,
    Selection,
    SelectionOptions,
    needs_classes,
    needs_loss,
    select,
)
from raypipe.selection.hashing import string_array
from raypipe.stages.base import Stage
from raypipe.stages.select.gate import check_trust
from raypipe.stages.select.near_duplicates import mark_near_duplicates

log = logging.getLogger("raypipe")
GROUP_ROWS = 1 << 16
"""Rows of a keep-list that are held before they are written."""
SCHEMA = pa.schema([("sample_id", pa.string()), ("label", pa.int32()), ("score", pa.float32())])
WEIGHT = pa.field("weight", pa.float32())
"""One more column, where `select.weights` asks for it."""
OF_STRATEGY = {
    "mixed": ["easy_fraction"],
    "ccs": ["hard_cutoff", "strata"],
    "beta": ["beta_exponent"],
}
"""Settings that only one strategy looks at."""


class SelectStage(Stage):
    name = "select"
    needs = ("extrapolate",)

    def settings(self, config: Config) -> dict[str, Any]:
        return {**config.select.model_dump(mode="json"), **config.trust.model_dump(mode="json")}

    def complete(self, context: Context, record: StageRecord) -> bool:
        run, wanted = context.run, {keep_file(fraction) for fraction in context.config.select.keep}
        try:
            given = _given(context.config.select)
        except FileNotFoundError:
            return False
        # shards are named after their content, so that new files in the source show here
        same = (
            record.detail.get("shards") == content_hash(run.done("scores"))
            and record.detail.get("given", {}) == given
        )
        return same and wanted <= storage.names(run.keep_folder)

    def execute(self, context: Context, record: StageRecord) -> None:
        started = time.process_time()
        config = context.config
        record.detail = make_keep_lists(
            context.run, config.select, config.select.keep, config.trust
        )
        for line in unknown_id_notes(record.detail["marked"]):
            context.progress.say(f"note: {line}")
        record.samples = record.detail["samples"]
        record.cpu_seconds += time.process_time() - started


def write_keep_lists(
    run: Run,
    settings: SelectSettings,
    keep: Sequence[float] | None = None,
    trust: TrustSettings | None = None,
) -> dict[str, int]:
    """Write `RUN/keep/keep-<fraction>.parquet` for every fraction of `keep` (default: the settings'). Seconds, no rescoring.

    Columns sample_id, label, score, and weight where it is asked for, in the order of the score shards; the file's schema metadata
    says by which strategy and options it was made, from how many samples, the hash of the scores it was made from, and the fidelity
    of these. Lists made from
    other scores than those of now are removed; lists of other fractions stay. Returns the samples kept by file name.
    Raises RunError when the scores are not complete, TrustError when they are too unfaithful (see `check_trust`), ConfigError
    for a bad fraction and for options that do not go together or with these scores, StageError for scores without order.
    """
    run.record("extrapolate")
    detail = make_keep_lists(run, settings, settings.keep if keep is None else keep, trust)
    for line in unknown_id_notes(detail["marked"]):
        log.warning("note: %s", line)
    return detail["lists"]


def make_keep_lists(
    run: Run, settings: SelectSettings, keep: Sequence[float], trust: TrustSettings | None = None
) -> dict[str, Any]:
    """As `write_keep_lists`, from the scores that are there.

    Returns samples, strategy, hash of the scores, hash of their shards' names, lists (samples kept by file name), marked (what became
    of `always_keep`, `never_keep` and near duplicates) and given (stamps of the files of ids).
    """
    options = options_of(run, settings)
    scores = ScoreStream(run, needs_loss(settings.strategy, options))
    try:
        needed = (
            trust or TrustSettings()
            if STRATEGIES[settings.strategy].uses_scores
            else TrustSettings(min_spearman=-1)
        )
        fidelity = check_trust(run.ledger()["extrapolate"], needed, settings.force)
    except TrustError:
        if storage.names(run.keep_folder):  # forced once, from the scores of now or of then
            for _ in scores.chunks(False):
                pass
            _remove_stale(run, scores.digest, set())
        raise
    marked = mark_listed_ids(scores, settings.always_keep, settings.never_keep)
    if settings.near_duplicates is not None:
        if extrapolated_tables(run.ledger()):
            raise ConfigError(
                "select.near_duplicates: scores extrapolated from tables have no embeddings/ to look into"
            )
        marked |= mark_near_duplicates(run, scores, settings.near_duplicates)
    classes = len(run.classes().names) if needs_classes(settings.strategy, options) else 0
    cuts = select(
        scores.chunks,
        sorted(set(keep)),
        settings.strategy,
        classes,
        options,
        marked=bool(scores.marks),
    )
    if not scores.samples:
        raise RunError(
            f"{run.uri}: scores/ holds no sample, so there is nothing to keep; see rejects/ for what went wrong"
        )
    about = {
        "strategy": settings.strategy,
        "samples": str(scores.samples),
        "scores": scores.digest,
        **fidelity,
    }
    if noise := injected_noise(run.ledger()):
        about["inject_noise"] = f"{noise.share:g}"
    if stated := _stated(settings, options, marked):
        about["options"] = json.dumps(stated, sort_keys=True)
    with contextlib.ExitStack() as files:
        lists = [files.enter_context(_KeepList(run, cut, about)) for cut in cuts]
        for chunk in scores.chunks(True):
            for item in lists:
                item.add(chunk)
    _remove_stale(run, scores.digest, {item.file for item in lists})
    counts = {item.file: item.cut.count for item in lists}
    shards = content_hash(run.done("scores"))
    return {
        **about,
        "samples": scores.samples,
        "shards": shards,
        "lists": counts,
        "marked": marked,
        "given": _given(settings),
    }


def options_of(run: Run, settings: SelectSettings) -> SelectionOptions:
    """What the strategies go by. Raises ConfigError where the strategy needs the proxy's loss and the scores came from tables."""
    fields = {
        field.name: getattr(settings, field.name) for field in dataclasses.fields(SelectionOptions)
    }
    difficulty, own = settings.difficulty, extrapolated_tables(run.ledger())
    if difficulty == "auto":
        score = run.ledger()["extrapolate"].detail.get("score")
        difficulty = "score" if score in DIFFICULTIES and not own else "loss"
    by_class = (
        settings.within_classes and not STRATEGIES[settings.strategy].balances_classes
    )  # balanced is so by itself
    options = SelectionOptions(**{**fields, "difficulty": difficulty, "by_class": by_class})
    if own and needs_loss(settings.strategy, options):
        other = (
            "; if a high score means a hard sample, say select.difficulty: score"
            if settings.strategy != "beta"
            else ""
        )
        raise ConfigError(
            f"select.strategy {settings.strategy} needs the proxy's loss, which scores from tables do not have{other}"
        )
    return options


def _stated(
    settings: SelectSettings, options: SelectionOptions, marked: dict[str, Any]
) -> dict[str, Any]:
    """What a keep-list says of how it was made, beyond its strategy: options of the strategy and those that are not the default."""
    strategy = STRATEGIES[settings.strategy]
    names = (
        ["seed"] * strategy.draws_at_random
        + ["difficulty"] * strategy.uses_difficulty
        + OF_STRATEGY.get(settings.strategy, [])
    )
    stated = {name: getattr(options, name) for name in names}
    if options.by_class:
        stated["by_class"] = True
    if options.min_per_class:
        stated["min_per_class"] = options.min_per_class
    if options.weights != "none":
        stated["weights"] = options.weights
    if settings.near_duplicates is not None:
        stated |= {
            "near_duplicates": settings.near_duplicates,
            "near_duplicates_left_out": marked["near_duplicates"],
        }
    lists = ("always_keep", "never_keep", "always_keep_unknown", "never_keep_unknown")
    return stated | {name: marked[name] for name in lists if name in marked}


def _given(settings: SelectSettings) -> dict[str, str]:
    """Size and stamp of the lists of ids, so that a list that changed is noticed."""
    files = {name: getattr(settings, name) for name in ("always_keep", "never_keep")}
    infos = {name: storage.info(uri) for name, uri in files.items() if uri is not None}
    return {name: f"{info.size} {info.stamp}" for name, info in infos.items()}


def _remove_stale(run: Run, digest: str, new: set[str]) -> None:
    """Remove keep-lists that were made from other scores; `new` ones were not."""
    for file in sorted(storage.names(run.keep_folder) - new):
        if file.endswith(".parquet") and keep_metadata(run.keep_list(file)).get("scores") != digest:
            storage.delete(run.keep_list(file))


class _KeepList:
    """One keep-list being written; the file appears only when it is whole."""

    def __init__(self, run: Run, cut: Selection, metadata: dict[str, str]) -> None:
        self.cut, self.file = cut, keep_file(cut.fraction)
        self._uri = run.keep_list(self.file)
        about = {"fraction": repr(cut.fraction), "count": str(cut.count), **metadata}
        schema = SCHEMA if cut.weights is None else SCHEMA.append(WEIGHT)
        self._schema = schema.with_metadata(
            {f"raypipe.{key}": value for key, value in sorted(about.items())}
        )
        self._held: list[pa.Table] = []
        self._rows = self._written = 0

    def __enter__(self) -> _KeepList:
        self._upload = storage.Upload(self._uri)
        file: IO[bytes] = self._upload.__enter__()
        self._writer = pq.ParquetWriter(file, self._schema, compression="zstd")
        return self

    def add(self, chunk: Chunk) -> None:
        kept = np.flatnonzero(self.cut.mask(chunk))
        label = pa.array(chunk.label[kept], pa.int32(), mask=chunk.label[kept] < 0)
        columns = [
            string_array(chunk.sample_id).take(pa.array(kept)),
            label,
            pa.array(chunk.score[kept]),
        ]
        weight = self.cut.weight(chunk, kept)
        if weight is not None:
            columns.append(pa.array(weight))
        self._held.append(pa.table(columns, schema=self._schema))
        self._rows += len(kept)
        if self._rows >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.concat_tables(self._held), row_group_size=GROUP_ROWS)
        self._written += self._rows
        self._held, self._rows = [], 0

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: object
    ) -> None:
        if kind is not None:
            with contextlib.suppress(Exception):  # what broke is already on its way up
                self._writer.close()
            self._upload.__exit__(kind, value, trace)
            return
        try:
            self._flush()
            self._writer.close()
            if self._written != self.cut.count:
                raise StageError(
                    f"{self._uri}: {self._written} samples where {self.cut.count} are due; "
                    "are there sample_ids that occur twice in scores/? Score the source again"
                )
        except BaseException as error:
            self._upload.__exit__(type(error), error, error.__traceback__)
            raise
        self._upload.__exit__(None, None, None)
