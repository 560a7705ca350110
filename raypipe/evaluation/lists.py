"""What is trained on: keep-lists cut as those of the run, random lists, and everything. No Ray.

The pool is the samples of `scores/` that have a label, in the order of the shards. Samples without
a label can be in a keep-list, but cannot be trained on.
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
from raypipe.config.choices import AUTO
from raypipe.config.evaluate import EvaluateSettings
from raypipe.config.outside import outside_names
from raypipe.config.parts import part_names_accepted
from raypipe.errors import ConfigError, RunError, SourceError
from raypipe.evaluation.epoch_samples import BY_SCORE, EpochSamples
from raypipe.runs.ledger import scored_by
from raypipe.runs.measured_scores import MEASURED_FOLDERS, every_measured_score
from raypipe.runs.outside_code import is_difficulty
from raypipe.runs.run import Run
from raypipe.runs.score_stream import ScoreStream, mark_listed_ids
from raypipe.selection import (
    Chunk,
    SelectionOptions,
    hash64,
    needs_classes,
    needs_loss,
    needs_margin,
    select,
)
from raypipe.sources.classes import match_classes
from raypipe.stages.select.near_duplicates import mark_near_duplicates
from raypipe.stages.select.options import options_of

RANDOM_SEEDS = 10_000
"""First seed of random lists, so that none repeats a draw of `ccs` or `beta` by `select.seed`."""
RUN, MEASURED = "run", "measured:"
"""Origins of scores: the score shards, and `measured:NAME`."""
RANDOM, FULL = "random", "full"
"""Names of lists."""


@dataclass(frozen=True)
class Origin:
    """Scores that lists are cut from.

    Attributes
    ----------
    kind
        `run`, the score shards; `measured:NAME`; or the URI of another run.
    score
        Name of the score.
    values
        By sample id; None for those in the score shards.
    """

    kind: str
    score: str
    values: Mapping[str, float] | None = None

    @property
    def title(self) -> str:
        """How lists of these scores are called."""
        if self.kind == RUN:
            return self.score
        if self.kind.startswith(MEASURED):
            return f"{self.score} measured"
        return f"{self.score} of {storage.name(self.kind)}"


@dataclass(frozen=True, eq=False)
class ListedSamples:
    """A list to train on.

    Attributes
    ----------
    name
        Origin and strategy, such as "moso, top" or "el2n, ccs by class"; or random, full.
    fraction
        Keep fraction.
    rows
        Rows of the pool, int64, rising.
    origin, score, strategy, by_class
        How it was cut; empty for random and full.
    draw
        Of a random list, the seed of the trainings it is for; None if it is for all seeds.
    dynamic
        How the samples of each epoch are chosen from the rows; None if they are all rows.
    """

    name: str
    fraction: float
    rows: np.ndarray
    origin: str = ""
    score: str = ""
    strategy: str = ""
    by_class: bool = False
    draw: int | None = None
    dynamic: EpochSamples | None = None

    @property
    def samples(self) -> int:
        """Number of samples that the steps of an epoch follow from."""
        return len(self.rows) if self.dynamic is None else self.dynamic.count

    @property
    def digest(self) -> str:
        """Hash of the rows, and of how they are chosen."""
        key = self.rows.astype("<i8").tobytes()
        if self.dynamic is not None:
            key += self.dynamic.key()
        return hashlib.blake2b(key, digest_size=8).hexdigest()


@dataclass(frozen=True, eq=False)
class SamplePool:
    """The samples that can be trained on.

    Attributes
    ----------
    shards
        Name (without suffix) and number of samples of each score shard, labelled or not.
    label
        int64 [n], of the labelled samples.
    row
        int64 [all scored samples]: row in the pool, -1 for a sample without a label.
    digest
        Hash of ids and labels.
    """

    shards: tuple[tuple[str, int], ...]
    label: np.ndarray
    row: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.label)


def read_pool(scores: ScoreStream) -> SamplePool:
    """Read ids and labels of everything scored; raise RunError if nothing has a label."""
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
    labelled = label >= 0
    if not labelled.any():
        raise RunError(
            f"none of the {len(label):,} scored samples has a label, so there is nothing to train "
            "on"
        )
    row = np.where(labelled, np.cumsum(labelled) - 1, -1)
    return SamplePool(tuple(shards), label[labelled], row, digest.hexdigest())


def origins(
    run: Run, config: Config, settings: EvaluateSettings, pool_ids: Sequence[pa.Array]
) -> list[Origin]:
    """Return the scores that lists are cut from.

    Parameters
    ----------
    run, config, settings
        The run, its settings, and those of the evaluation.
    pool_ids
        Ids of every scored sample, shard by shard.

    Raises
    ------
    ConfigError
        If a score was not measured on every sample, or another run lacks the score of one.
    """
    score = scored_by(run.ledger(), config.score)
    kinds = settings.scores or (RUN, *_measured_everywhere(run, score, pool_ids))
    return [
        Origin(RUN, score) if kind == RUN else _measured_origin(run, kind, pool_ids)
        for kind in kinds
    ] + [_other_run(run, Run(uri), pool_ids) for uri in settings.beside]


def _measured_everywhere(run: Run, score: str, pool_ids: Sequence[pa.Array]) -> list[str]:
    """Return the kinds of all other scores that were measured on as many samples as are scored."""
    counts: dict[str, int] = {}
    for folder in MEASURED_FOLDERS.values():
        for _, table in storage.iter_tables(run.path(folder)):
            for name in table.column_names[2:]:
                counts[name] = counts.get(name, 0) + len(table)
    everything = sum(map(len, pool_ids))
    return [
        f"{MEASURED}{name}"
        for name, count in sorted(counts.items())
        if count >= everything and name != score
    ]


def _measured_origin(run: Run, kind: str, pool_ids: Sequence[pa.Array]) -> Origin:
    name = kind.removeprefix(MEASURED)
    values = every_measured_score(run, name)
    missing = _count_missing(pool_ids, values)
    if missing:
        raise ConfigError(
            f"scores: {kind} was measured on {len(values):,} samples, but not on {missing:,} "
            "others of this run. To cut lists from it, compare a run with seed.fraction 1 (see "
            "beside), or extrapolate it (extrapolate.score)"
        )
    return Origin(kind, name, values)


def _other_run(run: Run, other: Run, pool_ids: Sequence[pa.Array]) -> Origin:
    other.record("extrapolate")
    values: dict[str, float] = {}
    labels: dict[str, int | None] = {}
    for _, table in storage.iter_tables(other.scores_folder, ["sample_id", "label", "score"]):
        ids = table["sample_id"].to_pylist()
        values.update(zip(ids, table["score"].to_pylist(), strict=True))
        labels.update(zip(ids, table["label"].to_pylist(), strict=True))
    missing = _count_missing(pool_ids, values)
    if missing:
        raise ConfigError(
            f"beside: {other.uri} has no score for {missing:,} samples of this run; it must be "
            "over the same source, with the same ids"
        )
    _check_same_labels(run, other, labels)
    return Origin(other.uri, scored_by(other.ledger(), other.config().score), values)


def _check_same_labels(run: Run, other: Run, labels: Mapping[str, int | None]) -> None:
    """Raise ConfigError unless samples have the same class, by name, in both runs.

    Clusters, and labels replaced on purpose (`source.inject_noise`), are not compared.
    """
    own_classes, other_classes = run.classes(), other.classes()
    if any(item.clusters or item.noise is not None for item in (own_classes, other_classes)):
        return
    try:
        places = match_classes(own_classes, other_classes).places
    except SourceError as error:
        raise ConfigError(
            f"beside: {other.uri}: {error}; it must be over the same source"
        ) from None
    different, example = 0, ""
    for _, table in storage.iter_tables(run.scores_folder, ["sample_id", "label"]):
        for sample_id, label in zip(
            table["sample_id"].to_pylist(), table["label"].to_pylist(), strict=True
        ):
            stored = labels.get(sample_id)
            if label is not None and stored is not None and places[stored] != label:
                different, example = different + 1, example or sample_id
    if different:
        raise ConfigError(
            f"beside: {other.uri} has other labels for {different:,} samples of this run, such as "
            f"{example!r}; it must be over the same source"
        )


def _count_missing(shards: Sequence[pa.Array], values: Mapping[str, float]) -> int:
    """Return how many ids have no value."""
    scored = pa.array(list(values), pa.string())
    return sum(len(ids) - int(pc.sum(pc.is_in(ids, scored)).as_py() or 0) for ids in shards)


def settings_of_lists(config: Config, settings: EvaluateSettings) -> list[SelectSettings]:
    """Return the run's settings of `select` with each strategy, for the fractions to evaluate.

    Raises
    ------
    ConfigError
        If settings contradict one another.
    """
    sections = config.model_dump()
    result = []
    default = "ccs" if config.select.strategy == AUTO else config.select.strategy
    for strategy in settings.strategies or (default,):
        # weights in a keep-list are not used by these trainings
        sections["select"] |= {
            "keep": list(settings.keep),
            "strategy": strategy,
            "weights": "none",
        }
        with part_names_accepted(outside_names(config) | set(settings.strategies)):
            result.append(parse_config(sections).select)
    return result


def cut_lists(
    run: Run, config: Config, settings: EvaluateSettings
) -> tuple[SamplePool, list[ListedSamples]]:
    """Return the pool and every list.

    The lists are everything, random ones for each seed, and one for each origin, strategy and
    fraction. The gate of `trust` does not apply: the evaluation is to find out whether a list
    helps.

    Raises
    ------
    ConfigError, RunError
        If something cannot be compared.
    """
    selects = settings_of_lists(config, settings)
    by_strategy = {section.strategy: options_of(run, section) for section in selects}
    loss = any(
        needs_loss(strategy, dataclasses.replace(options, difficulty="loss"))
        for strategy, options in by_strategy.items()
    )
    margin = any(needs_margin(strategy, options) for strategy, options in by_strategy.items())
    scores = ScoreStream(run, loss, margin)
    pool = read_pool(scores)
    ids = [pa.array(chunk.sample_id, pa.string()) for _, chunk in scores.named_chunks(True)]
    score_origins = origins(run, config, settings, ids)
    _mark(run, scores, selects[0])
    cutter = _Cutter(scores, pool, settings.keep, len(run.classes().names))
    lists = [ListedSamples(FULL, 1.0, np.arange(len(pool)))]
    for seed in range(settings.seeds):
        lists += cutter.random_lists(seed)
    for kind in settings.dynamic:
        lists += _dynamic_lists(kind, scores, pool, config.score, settings.keep)
    for origin in score_origins:
        for section in selects:
            options = by_strategy[section.strategy]
            if section.difficulty == "auto":
                difficulty = "score" if is_difficulty(origin.score, run.ledger()) else "loss"
                options = dataclasses.replace(options, difficulty=difficulty)
            elif section.difficulty == "el2n" and origin.score != "el2n":
                raise ConfigError(
                    f"select.difficulty: el2n is not known with {origin.title}; set it to auto"
                )
            lists += cutter.lists(origin, section.strategy, options)
    return pool, lists


def _dynamic_lists(
    kind: str, scores: ScoreStream, pool: SamplePool, score: str, keep: Sequence[float]
) -> Iterator[ListedSamples]:
    """Yield the samples of the pool, of which each epoch takes others, for each fraction."""
    hashes, values = [], []
    for chunk in scores.chunks(True):
        labelled = chunk.label >= 0
        hashes.append(hash64(chunk.sample_id)[labelled])
        values.append(chunk.score[labelled])
    by_score = kind == BY_SCORE
    value = np.concatenate(values) if by_score else np.zeros(0, np.float32)
    for fraction in sorted(set(keep)):
        count = max(1, round(fraction * len(pool)))
        chosen = EpochSamples(kind, count, np.concatenate(hashes), value)
        yield ListedSamples(
            f"{score}, {kind}" if by_score else kind,
            fraction,
            np.arange(len(pool)),
            RUN if by_score else "",
            score if by_score else "",
            dynamic=chosen,
        )


def _mark(run: Run, scores: ScoreStream, settings: SelectSettings) -> None:
    """Mark samples that are always or never kept, as the stage `select` does."""
    mark_listed_ids(scores, settings.always_keep, settings.never_keep)
    if settings.near_duplicates is not None:
        mark_near_duplicates(run, scores, settings.near_duplicates)


class _Cutter:
    """Cuts lists at each of some fractions."""

    def __init__(
        self, scores: ScoreStream, pool: SamplePool, keep: Sequence[float], classes: int
    ) -> None:
        self._scores, self._pool, self._classes = scores, pool, classes
        self._keep = sorted(set(keep))

    def random_lists(self, seed: int) -> Iterator[ListedSamples]:
        """Yield the random lists for the trainings with a seed; marks do not apply."""
        stream = _Stream(self._scores, None, marks=False)
        options = SelectionOptions(seed=RANDOM_SEEDS + seed)
        for fraction, rows in self._cut(stream, RANDOM, options, marked=False):
            yield ListedSamples(RANDOM, fraction, rows, draw=seed)

    def lists(
        self, origin: Origin, strategy: str, options: SelectionOptions
    ) -> Iterator[ListedSamples]:
        """Yield the lists that a strategy cuts from some scores."""
        stream = _Stream(self._scores, origin.values)
        name = f"{origin.title}, {strategy}{' by class' * options.by_class}"
        for fraction, rows in self._cut(stream, strategy, options, bool(self._scores.marks)):
            yield ListedSamples(
                name, fraction, rows, origin.kind, origin.score, strategy, options.by_class
            )

    def _cut(
        self, stream: _Stream, strategy: str, options: SelectionOptions, marked: bool
    ) -> Iterator[tuple[float, np.ndarray]]:
        """Yield fraction and rows of the pool; one pass over the stream serves all fractions."""
        classes = self._classes if needs_classes(strategy, options) else 0
        cuts = select(
            stream, self._keep, strategy, classes, options, marked, embedded=stream.embedded
        )
        masks: list[list[np.ndarray]] = [[] for _ in cuts]
        for chunk in stream(True):
            for mask, cut in zip(masks, cuts, strict=True):
                mask.append(cut.mask(chunk))
        for cut, mask in zip(cuts, masks, strict=True):
            rows = self._pool.row[np.flatnonzero(np.concatenate(mask))]
            yield cut.fraction, rows[rows >= 0]


class _Stream:
    """The stream of the scored samples, with other scores if `values` has them."""

    def __init__(
        self, scores: ScoreStream, values: Mapping[str, float] | None, marks: bool = True
    ) -> None:
        self._scores, self._values, self._marks = scores, values, marks

    def __call__(self, with_ids: bool) -> Iterator[Chunk]:
        yield from map(self._changed, self._scores.chunks(with_ids or self._values is not None))

    def embedded(self) -> Iterator[tuple[Chunk, np.ndarray]]:
        """Yield the chunks with their embeddings."""
        for chunk, vectors in self._scores.embedded():
            yield self._changed(chunk), vectors

    def _changed(self, chunk: Chunk) -> Chunk:
        changed: dict[str, Any] = {} if self._marks else {"mark": None}
        if self._values is not None:
            names = pa.array(chunk.sample_id, pa.string()).to_pylist()
            changed["score"] = np.array([self._values[name] for name in names], np.float32)
        return chunk._replace(**changed)
