"""Check before a run whether `embed.from` has the samples of the source."""

from __future__ import annotations

from raypipe.distributed.context import Context
from raypipe.errors import ConfigError, SourceError
from raypipe.runs.embedding_table import check_table
from raypipe.runs.table_ids import PLACES, compare_ids, some_ids


def check_embeddings(context: Context) -> None:
    """Look up some samples of the source in the table of `embed.from`.

    Raises
    ------
    ConfigError
        If the table is not usable, or too many samples have no row in it for the run to finish.
    """
    config = context.config
    assert config.embed.table is not None
    check_table(config.embed.table)
    try:
        ids = some_ids(config.source)
    except SourceError:  # the index names what is wrong; a dataset has not been copied yet
        return
    comparison = compare_ids(config.embed.table, ids)
    text, stops = comparison.note(config.source.max_reject_fraction, PLACES)
    if stops:
        raise ConfigError(text)
    if text:
        context.progress.say(f"note: {text}")
