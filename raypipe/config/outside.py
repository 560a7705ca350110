"""Which code from outside raypipe a configuration names, and which stage depends on it first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, get_args

from raypipe.config.choices import STRATEGY_NAMES, is_own, is_own_features
from raypipe.config.extrapolate import OwnMethod
from raypipe.config.measure import OWN_SCORES
from raypipe.config.model import Config
from raypipe.config.source import OwnFormat
from raypipe.plugins import EXTRAPOLATOR, SCORE, SOURCE, STRATEGY, PartKind


class NamedCode(NamedTuple):
    """Code from outside raypipe.

    Attributes
    ----------
    setting : str
        The setting that names it.
    name : str
        `module:name`, or the name of an entry point.
    stage : str
        The first stage whose results depend on it.
    kind : PartKind, optional
        The kind of part that it is; None for a function.
    """

    setting: str
    name: str
    stage: str
    kind: PartKind | None = None


def outside_names(config: Config) -> set[str]:
    """Return all names of parts in a configuration that are not those of raypipe's own parts."""
    own = {
        *OWN_SCORES,
        *get_args(OwnMethod),
        *STRATEGY_NAMES,
        *get_args(OwnFormat),
        "auto",
    }
    tried = [changes["strategy"] for _, changes in config.pilot.named_candidates()]
    named = [config.source.format, config.extrapolate.method, config.select.strategy, *tried]
    return {*named, *config.measure.scores} - own


def named_code(config: Config) -> Iterator[NamedCode]:
    """Yield all code from outside raypipe that a configuration names, each once per stage."""
    if config.source.format not in get_args(OwnFormat):
        yield NamedCode(SOURCE.setting, config.source.format, "index", SOURCE)
    if config.source.transform is not None:
        yield NamedCode("source.transform", config.source.transform, "seed")
    if is_own(config.proxy.model):
        yield NamedCode("proxy.model", config.proxy.model, "proxy")
    if config.proxy.augment is not None:
        yield NamedCode("proxy.augment", config.proxy.augment, "proxy")
    if is_own_features(config.embed.model):
        yield NamedCode("embed.model", config.embed.model, "embed")
    for score in config.measure.scores:
        if score not in OWN_SCORES:
            yield NamedCode(SCORE.setting, score, "measure", SCORE)
    if config.extrapolate.method not in get_args(OwnMethod) and not config.scores_embeddings:
        yield NamedCode(
            EXTRAPOLATOR.setting, config.extrapolate.method, "extrapolate", EXTRAPOLATOR
        )
    if config.pilots:
        if is_own(config.pilot.model):
            yield NamedCode("pilot.model", config.pilot.model, "pilot")
        tried = [changes["strategy"] for _, changes in config.pilot.named_candidates()]
        for strategy in dict.fromkeys(tried):
            if strategy not in STRATEGY_NAMES:
                yield NamedCode("pilot.candidates", strategy, "pilot", STRATEGY)
    if config.select.strategy not in (*STRATEGY_NAMES, "auto"):
        yield NamedCode(STRATEGY.setting, config.select.strategy, "select", STRATEGY)
