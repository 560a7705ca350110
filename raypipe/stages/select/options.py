"""Options of a strategy: from the settings and the run, and as a keep-list records them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from raypipe.config import SelectSettings
from raypipe.config.choices import STRATEGY_NAMES
from raypipe.errors import ConfigError
from raypipe.runs.ledger import extrapolated_tables
from raypipe.runs.outside_code import is_difficulty
from raypipe.runs.proxy_roles import ProxyRoles
from raypipe.runs.run import Run
from raypipe.selection import Parts, SelectionOptions, find_strategy, needs_embeddings, needs_loss
from raypipe.stages.select.recall import held_out_recall

STRATEGY_OPTIONS = {
    "mixed": ["easy_fraction"],
    "ccs": ["hard_cutoff", "strata"],
    "beta": ["beta_exponent"],
    "band": ["hard_cutoff"],
    "d2": ["hard_cutoff"],
    "infomax": ["hard_cutoff"],
    "coverage": ["hard_cutoff", "strata"],
}
"""Options that not all strategies use."""


def options_of(run: Run, settings: SelectSettings) -> SelectionOptions:
    """Return the options of the strategy.

    Raises
    ------
    ConfigError
        When the strategy needs something of the proxy that the run does not have.
    """
    from_tables = bool(extrapolated_tables(run.ledger()))
    values = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(SelectionOptions)
        if field.name not in ("recall", "own", "parts")
    }
    values["own"] = settings.options
    if needs_embeddings(settings.strategy) and not from_tables:
        roles = ProxyRoles.of(run.config())
        if roles.cross_fits:
            values["parts"] = Parts(roles.parts, roles.part_of)
    if find_strategy(settings.strategy).uses_difficulty:
        values["difficulty"] = _difficulty(run, settings)
    # balanced works within classes anyway
    balances = find_strategy(settings.strategy).balances_classes
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
    if from_tables and needs_embeddings(settings.strategy):
        raise ConfigError(
            f"select.strategy {settings.strategy} needs embeddings/, which scores from tables do "
            "not have; choose another strategy"
        )
    if options.quotas == "recall":
        options = dataclasses.replace(options, recall=held_out_recall(run))
    return options


def _difficulty(run: Run, settings: SelectSettings) -> str:
    """Return `SelectionOptions.difficulty`: score, loss or aum.

    Raises
    ------
    ConfigError
        When the run does not have the difficulty that the settings name, of proxies that were not
        trained on the sample.
    """
    config, from_tables = run.config(), bool(extrapolated_tables(run.ledger()))
    cross_fits = config.proxy.cross_fits and not from_tables
    score = run.ledger()["extrapolate"].detail.get("score")
    if settings.difficulty == "auto":
        hard = is_difficulty(str(score), run.ledger()) and not from_tables
        return "score" if hard else "loss"
    if settings.difficulty == "el2n":
        held_out = cross_fits and config.measure.resolved(True).el2n.at != "trajectory"
        if score != "el2n" or not held_out:
            raise ConfigError(
                "select.difficulty: el2n needs a run whose score is el2n, of proxies that were not "
                f"trained on the sample (measure.el2n.at: embeddings); the score of this run is "
                f"{score}. Use loss or score"
            )
        return "score"
    if settings.difficulty == "aum" and not cross_fits:
        raise ConfigError(
            "select.difficulty: aum needs the margins of proxies that were not trained on the "
            "sample, which this run does not have; use loss or score, or rerun with proxy.cross_fit"
        )
    return settings.difficulty


def refuse_unused_options(settings: SelectSettings, given: Collection[str]) -> None:
    """Raise ConfigError for an option that is given and that the strategy does not use.

    What `auto` and strategies from outside use is not known here, so they refuse none.
    """
    if settings.strategy not in STRATEGY_NAMES:
        return
    specific = {"difficulty"}.union(*STRATEGY_OPTIONS.values())
    unused = sorted(specific & set(given) - set(_options_of_strategy(settings.strategy)))
    if unused:
        raise ConfigError(
            f"select.{unused[0]} has no effect on the strategy {settings.strategy}; leave it out, "
            "or choose another strategy"
        )


def _options_of_strategy(name: str) -> list[str]:
    """Return the options that the strategy uses and not all others do."""
    strategy = find_strategy(name)
    return [
        *["seed"] * strategy.draws_at_random,
        *["difficulty"] * strategy.uses_difficulty,
        *STRATEGY_OPTIONS.get(name, []),
    ]


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
    names = _options_of_strategy(settings.strategy)
    recorded = {name: getattr(options, name) for name in names}
    recorded |= settings.options.get(settings.strategy, {})
    if "difficulty" in recorded and settings.difficulty != "auto":
        recorded["difficulty"] = settings.difficulty
    if options.by_class:
        recorded["by_class"] = True
    if options.quotas != "proportional":
        recorded["quotas"] = options.quotas
    if options.min_per_class:
        recorded["min_per_class"] = options.min_per_class
    if options.weights != "none":
        recorded["weights"] = options.weights
    if settings.near_duplicates is not None:
        recorded["near_duplicates"] = settings.near_duplicates
        recorded["near_duplicates_left_out"] = marked["near_duplicates"]
    lists = ("always_keep", "never_keep", "always_keep_unknown", "never_keep_unknown")
    return recorded | {name: marked[name] for name in lists if name in marked}
