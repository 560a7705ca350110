"""What `raypipe inspect` warns of in a table of `embed.from`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from raypipe.config import Config
from raypipe.estimate.facts import Survey
from raypipe.estimate.sampling import NEIGHBOURS
from raypipe.runs.embedding_table import check_table
from raypipe.runs.table_ids import compare_ids, some_ids


def table_warnings(config: Config, ids: Sequence[str], survey: Survey) -> Iterator[str]:
    """Yield sentences on samples without a row, and on rows without a sample.

    Parameters
    ----------
    config : Config
        `embed.from` is set.
    ids : sequence of str
        Ids of drawn samples.
    survey : Survey
        The source that they are from.

    Raises
    ------
    ConfigError
        If the table is not usable.
    """
    assert config.embed.table is not None
    check_table(config.embed.table)
    samples = min(survey.samples, survey.limit or survey.samples)
    if samples < survey.samples:
        ids = some_ids(config.source)
    comparison = compare_ids(config.embed.table, ids)
    text, stops = comparison.note(config.source.max_reject_fraction, len(ids) // NEIGHBOURS)
    if text:
        yield text + (". The run stops before any training" if stops else "")
    if foreign := comparison.foreign(samples):
        exact = survey.counted and comparison.drawn >= samples
        yield (
            f"embed.from: {'' if exact else 'about '}{foreign:,} of its {comparison.rows:,} rows "
            "belong to no sample of the source; they are ignored"
        )
