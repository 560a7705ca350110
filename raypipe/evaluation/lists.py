"""What is trained on: keep-lists cut as those of the run, random lists and everything, as rows of the labelled scored samples. No Ray.

The pool are the samples of `scores/` that have a label, in the order of the shards; unlabelled ones can be in a keep-list, but not be
trained on.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe import storage
from raypipe.config import Config, SelectSettings, parse_config
from raypipe.config.choices import DIFFICULTIES
from raypipe.config.evaluate import EvaluateSettings
from raypipe.errors import ConfigError, RunError
from raypipe.runs.measured_scores import MEASURED_FOLDERS, every_measured_score
from raypipe.runs.run import Run
from raypipe.runs.score_stream import ScoreStream, mark_listed_ids
from raypipe.selection import Chunk, SelectionOptions, needs_classes, needs_loss, select
from raypipe.stages.select.near_duplicates import mark_near_duplicates
from raypipe.stages.select.options import options_of

RANDOM_SEEDS = 10_000
"""Seeds of random lists begin here, so that none has the luck of a list that `ccs` or `beta` drew with `select.seed`."""
RUN, MEASURED = "run", "measured:"
RANDOM, FULL = "random", "full"


@dataclass(frozen=True)
class Origin:
    """Scores that lists are cut from.

    kind    `run`, the score shards; `measured:NAME`; or the URI of another run
    score   name of the score
    values  by sample id; None: those in the score shards
    """

    kind: str
    score: str
    values: Mapping[str, float] | None = None

    @property
    def title(self) -> str:
        if self.kind == RUN:
            return self.score
        return (
            f"{self.score} measured"
            if self.kind.startswith(MEASURED)
            else f"{self.score} of {storage.name(self.kind)}"
        )


@dataclass(frozen=True, eq=False)
class ListedSamples:
    """A list to train on.

    name      origin and strategy, such as "moso, top" or "el2n, ccs by class"; or random, full
    fraction  keep fraction
    rows      of the pool, int64, rising
    draw      of a random list the seed of the trainings it is for; None: it is for those of all seeds
    """

    name: str
    fraction: float
    rows: np.ndarray
    origin: str = ""
    score: str = ""
    strategy: str = ""
    by_class: bool = False
    draw: int | None = None

    @property
    def digest(self) -> str:
        return hashlib.blake2b(self.rows.astype("<i8").tobytes(), digest_size=8).hexdigest()


@dataclass(frozen=True, eq=False)
class SamplePool:
    """What can be trained on.

    shards   name (without suffix) and samples of each score shard, labelled or not
    label    int64 [n] of the labelled
    row      int64 [all scored]: row in the pool, -1 of an unlabelled sample
    digest   hash of ids and labels
    """

    shards: tuple[tuple[str, int], ...]
    label: np.ndarray
    row: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.label)


def read_pool(scores: ScoreStream) -> SamplePool:
    """Ids and labels of everything scored. Raises RunError where nothing has a label."""
    digest, shards, labels = hashlib.blake2b(digest_size=8), [], []
    for name, chunk in scores.named_chunks(True):
        ids = "\0".join(pa.array(chunk.sample_id, pa.string()).to_pylist())
        digest.update(
            name.encode()
            + b"\0"
            + ids.encode("utf-8", "surrogateescape")
            + chunk.label.astype("<i4").tobytes()
        )
        shards.append((name.removesuffix(".parquet"), len(chunk.label)))
        labels.append(chunk.label.astype(np.int64))
    label = np.concatenate(labels) if labels else np.zeros(0, np.int64)
    known = label >= 0
    if not known.any():
        raise RunError(
            f"none of the {len(label):,} scored samples has a label, so there is nothing to train on"
        )
    return SamplePool(
        tuple(shards), label[known], np.where(known, np.cumsum(known) - 1, -1), digest.hexdigest()
    )


def origins(
    run: Run, config: Config, settings: EvaluateSettings, pool_ids: Sequence[pa.Array]
) -> list[Origin]:
    """The scores that lists are cut from.

    pool_ids  ids of every scored sample, shard by shard
    Raises ConfigError for a score that was not measured of every sample, or another run without a score for one.
    """
    everything = sum(map(len, pool_ids))
    wanted = settings.scores or (
        RUN,
        *(f"{MEASURED}{name}" for name in _measured_of(run, everything) if name != config.score),
    )
    found = []
    for kind in wanted:
        if kind == RUN:
            found.append(Origin(RUN, config.score))
            continue
        name = kind.removeprefix(MEASURED)
        values = every_measured_score(run, name)
        missing = _without(pool_ids, values)
        if missing:
            raise ConfigError(
                f"scores: {kind} was measured of {len(values):,} samples, but not of {missing:,} others of this run; a list of it takes a run "
                "with seed.fraction 1 (see beside), or extrapolate.score"
            )
        found.append(Origin(kind, name, values))
    for uri in settings.beside:
        other = Run(uri)
        other.record("extrapolate")
        values = {}
        for _, table in storage.iter_tables(other.scores_folder, ["sample_id", "score"]):
            values.update(
                zip(table["sample_id"].to_pylist(), table["score"].to_pylist(), strict=True)
            )
        missing = _without(pool_ids, values)
        if missing:
            raise ConfigError(
                f"beside: {other.uri} has no score of {missing:,} samples of this run; it must be over the same source, with the same ids"
            )
        found.append(Origin(other.uri, other.config().score, values))
    return found


def _measured_of(run: Run, everything: int) -> list[str]:
    """Scores that were measured of as many samples as there are."""
    counts: dict[str, int] = {}
    for folder in MEASURED_FOLDERS.values():
        for _, table in storage.iter_tables(run.path(folder)):
            for name in table.column_names[2:]:
                counts[name] = counts.get(name, 0) + len(table)
    return sorted(name for name, count in counts.items() if count >= everything)


def _without(shards: Sequence[pa.Array], values: Mapping[str, float]) -> int:
    known = pa.array(list(values), pa.string())
    return sum(len(ids) - int(pc.sum(pc.is_in(ids, known)).as_py() or 0) for ids in shards)


def settings_of_lists(config: Config, settings: EvaluateSettings) -> list[SelectSettings]:
    """The run's settings of `select` by each strategy, for the wanted fractions. Raises ConfigError for what does not go together."""
    given = config.model_dump()
    result = []
    for strategy in settings.strategies or (config.select.strategy,):
        fractions = list(settings.keep)
        # the weights of a list are for other trainings than these
        given["select"] |= {"keep": fractions, "strategy": strategy, "weights": "none"}
        result.append(parse_config(given).select)
    return result


def cut_lists(
    run: Run, config: Config, settings: EvaluateSettings
) -> tuple[SamplePool, list[ListedSamples]]:
    """The pool and every list: everything, random ones for each seed, and one for each origin, strategy and fraction.

    The gate of `trust` does not hold: whether a list helps is what is to be found out. Raises ConfigError and RunError.
    """
    chosen = settings_of_lists(config, settings)
    by_strategy = {select.strategy: options_of(run, select) for select in chosen}
    loss = any(
        needs_loss(strategy, dataclasses.replace(options, difficulty="loss"))
        for strategy, options in by_strategy.items()
    )
    scores = ScoreStream(run, loss)
    pool = read_pool(scores)
    ids = [pa.array(chunk.sample_id, pa.string()) for _, chunk in scores.named_chunks(True)]
    found = origins(run, config, settings, ids)
    marked = chosen[0]
    mark_listed_ids(scores, marked.always_keep, marked.never_keep)
    if marked.near_duplicates is not None:
        mark_near_duplicates(run, scores, marked.near_duplicates)
    classes = len(run.classes().names)
    lists = [ListedSamples(FULL, 1.0, np.arange(len(pool)))]
    for seed in range(settings.seeds):
        stream = _Stream(scores, None, marks=False)
        options = SelectionOptions(seed=RANDOM_SEEDS + seed)
        for fraction, rows in _cut(stream, pool, settings.keep, RANDOM, classes, options, False):
            lists.append(ListedSamples(RANDOM, fraction, rows, draw=seed))
    for origin in found:
        stream = _Stream(scores, origin.values)
        for select_settings in chosen:
            strategy, options = select_settings.strategy, by_strategy[select_settings.strategy]
            if select_settings.difficulty == "auto":
                options = dataclasses.replace(
                    options, difficulty="score" if origin.score in DIFFICULTIES else "loss"
                )
            for fraction, rows in _cut(
                stream, pool, settings.keep, strategy, classes, options, bool(scores.marks)
            ):
                name = f"{origin.title}, {strategy}{' by class' * options.by_class}"
                lists.append(
                    ListedSamples(
                        name, fraction, rows, origin.kind, origin.score, strategy, options.by_class
                    )
                )
    return pool, lists


class _Stream:
    """The stream of the scored samples, with other scores where these are given."""

    def __init__(
        self, scores: ScoreStream, values: Mapping[str, float] | None, marks: bool = True
    ) -> None:
        self._scores, self._values, self._marks = scores, values, marks

    def __call__(self, with_ids: bool) -> Iterator[Chunk]:
        for chunk in self._scores.chunks(with_ids or self._values is not None):
            changed: dict[str, Any] = {} if self._marks else {"mark": None}
            if self._values is not None:
                names = pa.array(chunk.sample_id, pa.string()).to_pylist()
                changed["score"] = np.array([self._values[name] for name in names], np.float32)
            yield chunk._replace(**changed)


def _cut(
    stream: _Stream,
    pool: SamplePool,
    keep: Sequence[float],
    strategy: str,
    classes: int,
    options: SelectionOptions,
    marked: bool,
) -> Iterator[tuple[float, np.ndarray]]:
    """Fraction and rows of the pool of each list, one pass over the stream for all of them."""
    count = classes if needs_classes(strategy, options) else 0
    cuts = select(stream, sorted(set(keep)), strategy, count, options, marked)
    kept: list[list[np.ndarray]] = [[] for _ in cuts]
    for chunk in stream(True):
        for masks, cut in zip(kept, cuts, strict=True):
            masks.append(cut.mask(chunk))
    for cut, masks in zip(cuts, kept, strict=True):
        rows = pool.row[np.flatnonzero(np.concatenate(masks))]
        yield cut.fraction, rows[rows >= 0]
