"""Compare two runs: how far their scores and keep-lists agree, and which settings differ.

Of large runs, the same random samples are compared: those whose hash is lowest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raypipe import storage
from raypipe.assessment.rank_agreement import spearman
from raypipe.config import flat_settings
from raypipe.errors import RunError
from raypipe.runs.ledger import TABLE_SECTIONS, extrapolated_tables
from raypipe.runs.run import Run
from raypipe.selection.hashing import hash64, uniform
from raypipe.text import counted, percent

MAX_SAMPLES = 1_000_000
"""Samples of each run that are compared, about."""
HASH_SEED = 0xC0DE
"""Not that of a seed set, which would be a biased sample."""
MAX_SETTINGS = 40
"""Settings that differ which the text lists."""


@dataclass(frozen=True)
class ListOverlap:
    """Two keep-lists of the same name.

    Attributes
    ----------
    file : str
        Name of the file in both runs.
    first, second, both : int
        Compared samples in the list of the first run, of the second run, and of both.
    samples : int
        Samples compared.
    """

    file: str
    first: int
    second: int
    both: int
    samples: int

    @property
    def share(self) -> float:
        """Share of a list that is in the other one too."""
        return self.both / max(1.0, (self.first + self.second) / 2)

    @property
    def chance(self) -> float:
        """What `share` would be for lists that have nothing to do with one another."""
        expected = self.first * self.second / max(1, self.samples)
        return expected / max(1.0, (self.first + self.second) / 2)


@dataclass(frozen=True)
class RunComparison:
    """How far two runs agree.

    Attributes
    ----------
    uris : tuple of str
        The two runs.
    samples : tuple of int
        Samples with a score in the first run, in the second run, and in both, as far as compared.
    part : float
        Share of the samples that was compared.
    spearman : float or None
        Rank correlation of the scores of the samples in both; None if it is undefined.
    lists : tuple of ListOverlap
        Keep-lists that both runs have.
    settings : dict of str to tuple
        Settings that differ, by name: the value in each run. `run` is left out.
    """

    uris: tuple[str, str]
    samples: tuple[int, int, int]
    part: float
    spearman: float | None
    lists: tuple[ListOverlap, ...]
    settings: dict[str, tuple[Any, Any]]


def compare_runs(first: Run, second: Run) -> RunComparison:
    """Compare two runs with scores. Raises RunError if one has none, or they share no sample."""
    sizes = [run.record("extrapolate").samples for run in (first, second)]
    part = min(1.0, MAX_SAMPLES / max(1, *sizes))
    scores = [_scores(run, part) for run in (first, second)]
    common = scores[0].join(scores[1], "sample_id", join_type="inner", right_suffix="_other")
    if not len(common):
        raise RunError(
            f"{first.uri} and {second.uri} have no sample in common; ids are such as "
            f"{_example(scores[0])} and {_example(scores[1])}"
        )
    pair = [common[name].to_numpy().astype(np.float64) for name in ("score", "score_other")]
    finite = np.isfinite(pair[0]) & np.isfinite(pair[1])
    files = storage.names(first.keep_folder) & storage.names(second.keep_folder)
    ids = common["sample_id"].combine_chunks()
    lists = [
        _overlap(file, ids, [_kept(run, file, part) for run in (first, second)])
        for file in sorted(files)
        if file.endswith(".parquet")
    ]
    return RunComparison(
        (first.uri, second.uri),
        (len(scores[0]), len(scores[1]), len(common)),
        part,
        spearman(pair[0][finite], pair[1][finite]),
        tuple(lists),
        _differences(first, second),
    )


def describe_comparison(found: RunComparison) -> Iterator[str]:
    """Return lines of text about a comparison."""
    first, second, both = found.samples
    yield f"first       {found.uris[0]}"
    yield f"second      {found.uris[1]}"
    drawn = "" if found.part == 1 else f" (a random {percent(found.part)} of them)"
    yield (
        f"samples     {both:,} in both, {first - both:,} only in the first, "
        f"{second - both:,} only in the second{drawn}"
    )
    value = "undefined" if found.spearman is None else f"{found.spearman:.3f}"
    yield f"scores      Spearman correlation {value}"
    for item in found.lists:
        yield (
            f"{item.file}  {item.share:.1%} of one list is in the other (by chance "
            f"{item.chance:.1%})"
        )
    if not found.lists:
        yield "keep-lists  no fraction is in both runs"
    if not found.settings:
        yield "settings    the same"
        return
    yield f"settings    {counted(len(found.settings), 'difference')}:"
    for name, (one, other) in list(found.settings.items())[:MAX_SETTINGS]:
        yield f"            {name}: {one} | {other}"
    if len(found.settings) > MAX_SETTINGS:
        yield f"            and {len(found.settings) - MAX_SETTINGS} more"


def _scores(run: Run, part: float) -> pa.Table:
    tables = [
        _drawn(table, part)
        for _, table in storage.iter_tables(run.scores_folder, ["sample_id", "score"])
    ]
    if not tables:
        raise RunError(f"{run.uri}: has no scores; finish the run first")
    return pa.concat_tables(tables)


def _kept(run: Run, file: str, part: float) -> pa.Array:
    table = storage.read_table(run.keep_list(file), ["sample_id"])
    return _drawn(table, part)["sample_id"].combine_chunks()


def _drawn(table: pa.Table, part: float) -> pa.Table:
    """Return the samples with the lowest hashes, a share of about `part`."""
    if part == 1:
        return table
    hashes = hash64(table["sample_id"].combine_chunks(), HASH_SEED)
    return table.filter(pa.array(uniform(hashes) < part))


def _overlap(file: str, ids: pa.Array, kept: list[pa.Array]) -> ListOverlap:
    first, second = (pc.is_in(ids, value_set=names) for names in kept)
    counts = [pc.sum(mask).as_py() or 0 for mask in (first, second, pc.and_(first, second))]
    return ListOverlap(file, counts[0], counts[1], counts[2], len(ids))


def _differences(*runs: Run) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, in the order of the configuration."""
    # of scores from tables, the other sections have defaults that mean nothing
    tables = any(extrapolated_tables(run.ledger()) for run in runs)
    sections = set(TABLE_SECTIONS) if tables else None
    first, second = (
        flat_settings(run.config().model_dump(mode="json", include=sections)) for run in runs
    )
    return {
        name: (first.get(name), second.get(name))
        for name in {**first, **second}
        if name != "run" and first.get(name) != second.get(name)
    }


def _example(table: pa.Table) -> str:
    return repr(table["sample_id"][0].as_py()) if len(table) else "none"
