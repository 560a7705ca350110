"""Options of a strategy: from the settings and the run, and as a keep-list records them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from raypipe.config import SelectSettings
from raypipe.config.choices import DIFFICULTIES
from raypipe.errors import ConfigError
from raypipe.runs.ledger import extrapolated_tables
from raypipe.runs.run import Run
from raypipe.selection import STRATEGIES, SelectionOptions, needs_loss

STRATEGY_OPTIONS = {
    "mixed": ["easy_fraction"],
    "ccs": ["hard_cutoff", "strata"],
    "beta": ["beta_exponent"],
}
"""Options that only one strategy uses."""


def options_of(run: Run, settings: SelectSettings) -> SelectionOptions:
    """Return the options of the strategy.

    Raises
    ------
    ConfigError
        When the strategy needs the proxy's loss and the scores came from tables.
    """
    from_tables = bool(extrapolated_tables(run.ledger()))
    values = {
        field.name: getattr(settings, field.name) for field in dataclasses.fields(SelectionOptions)
    }
    if settings.difficulty == "auto":
        score = run.ledger()["extrapolate"].detail.get("score")
        values["difficulty"] = "score" if score in DIFFICULTIES and not from_tables else "loss"
    # balanced works within classes anyway
    balances = STRATEGIES[settings.strategy].balances_classes
    values["by_class"] = settings.within_classes and not balances
    options = SelectionOptions(**values)
    if from_tables and needs_loss(settings.strategy, options):
        remedy = ""
        if settings.strategy != "beta":
            remedy = "; if a high score means a hard sample, set select.difficulty: score"
        raise ConfigError(
            f"select.strategy {settings.strategy} needs the proxy's loss, which scores from tables "
            f"do not have{remedy}"
        )
    return options


def recorded_options(
    settings: SelectSettings, options: SelectionOptions, marked: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a keep-list records beyond its strategy.

    Parameters
    ----------
    settings, options
        Settings of the selection, and the options of its strategy. Recorded are those that the
        strategy uses and those that differ from the default.
    marked
        Counts of marked samples.
    """
    strategy = STRATEGIES[settings.strategy]
    names = (
        ["seed"] * strategy.draws_at_random
        + ["difficulty"] * strategy.uses_difficulty
        + STRATEGY_OPTIONS.get(settings.strategy, [])
    )
    recorded = {name: getattr(options, name) for name in names}
    if options.by_class:
        recorded["by_class"] = True
    if options.min_per_class:
        recorded["min_per_class"] = options.min_per_class
    if options.weights != "none":
        recorded["weights"] = options.weights
    if settings.near_duplicates is not None:
        recorded["near_duplicates"] = settings.near_duplicates
        recorded["near_duplicates_left_out"] = marked["near_duplicates"]
    lists = ("always_keep", "never_keep", "always_keep_unknown", "never_keep_unknown")
    return recorded | {name: marked[name] for name in lists if name in marked}
