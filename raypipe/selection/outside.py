"""`KeepStrategy`, the base class of strategies from outside raypipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from raypipe.config.base import Settings
from raypipe.config.parts import NoOptions, validated_options
from raypipe.errors import ConfigError, StageError
from raypipe.plugins import STRATEGY, find, named_failures
from raypipe.selection.base import SelectionOptions, SelectionPlan, Strategy, one_group_quota
from raypipe.selection.radix_select import Chunk, Ranking, ValidatedStream, order_key


class KeepStrategy:
    """A rule that chooses keep-lists.

    A package declares a subclass as an entry point of the group `raypipe.strategies`, or
    `select.strategy` names it as `module:Class`. `raypipe.testing.check_strategy` checks one.

    A simple strategy defines `preference`, a number for each sample. Any other defines `plan`.

    Parameters
    ----------
    options : Settings
        An instance of `Options`.

    Attributes
    ----------
    Options : type of Settings
        The options, which stand in `select.options` under the name of the strategy.
    summary : str
        The rule in a few words.
    kept : str
        What a keep-list contains, for the report.
    nested, draws_at_random, uses_classes, balances_classes, needs_loss, uses_difficulty, \
uses_scores, needs_embeddings : bool
        See `raypipe.selection.base.Strategy`.

    Examples
    --------
    The samples whose scores are nearest to 0.5:

    >>> class Middle(KeepStrategy):
    ...     summary = "nearest to the middle"
    ...     kept = "the scores nearest to 0.5"
    ...
    ...     def preference(self, chunk, options):
    ...         return -abs(chunk.score - 0.5)
    """

    Options: ClassVar[type[Settings]] = NoOptions
    summary: ClassVar[str]
    kept: ClassVar[str] = ""
    nested: ClassVar[bool] = True
    draws_at_random: ClassVar[bool] = False
    uses_classes: ClassVar[bool] = False
    balances_classes: ClassVar[bool] = False
    needs_loss: ClassVar[bool] = False
    uses_difficulty: ClassVar[bool] = False
    uses_scores: ClassVar[bool] = True
    needs_embeddings: ClassVar[bool] = False

    def __init__(self, options: Settings) -> None:
        self.options: Any = options

    def preference(self, chunk: Chunk, options: SelectionOptions) -> np.ndarray:
        """Return a number for each sample of a part of the stream, float [n]; the highest are kept.

        It depends on the sample alone: the stream is divided into chunks arbitrarily.
        """
        raise NotImplementedError

    def plan(
        self,
        stream: ValidatedStream,
        keep: Sequence[float],
        classes: int,
        options: SelectionOptions,
    ) -> list[SelectionPlan]:
        """Return how the list of each keep fraction is computed.

        Parameters
        ----------
        stream : ValidatedStream
            The scores; it can be read several times, for statistics.
        keep : sequence of float
            Keep fractions.
        classes : int
            Number of classes; 0 unless they matter.
        options : SelectionOptions
            The other settings of `select`.
        """
        return [SelectionPlan(_ByPreference(self, options), one_group_quota)] * len(keep)


class _ByPreference(Ranking):
    """Highest preference first; all samples form one group."""

    def __init__(self, strategy: KeepStrategy, options: SelectionOptions) -> None:
        self._strategy, self._options = strategy, options

    def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        samples = len(chunk.score)
        values = np.asarray(self._strategy.preference(chunk, self._options))
        if values.dtype.kind not in "fiu":
            raise ValueError(f"preference has the type {values.dtype}; expected float32")
        if values.shape != (samples,):
            raise ValueError(
                f"preference has shape {list(values.shape)}; expected {[samples]}, one number "
                "per sample"
            )
        bad = int((~np.isfinite(values)).sum())
        if bad:
            raise ValueError(f"{bad} of {samples} preferences are not finite")
        return order_key(values), np.zeros(samples, np.int64)


class _Named(Ranking):
    """The ranking of a strategy from outside, with the name of the strategy in its errors."""

    def __init__(self, name: str, inner: Ranking) -> None:
        self._name, self._inner = name, inner
        self.groups, self.needs_ids = inner.groups, inner.needs_ids

    def compute(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        with named_failures(STRATEGY, self._name):
            key, group = self._inner.compute(chunk)
            _check_array("key", key, np.uint32, len(chunk.score))
            _check_array("group", group, np.int64, len(chunk.score))
            if len(group) and not -1 <= group.min() <= group.max() < self.groups:
                raise ValueError(
                    f"groups from {group.min()} to {group.max()}; expected -1 to {self.groups - 1}"
                )
            return key, group


def _check_array(what: str, values: Any, dtype: type[np.generic], length: int) -> None:
    """Raise ValueError unless values are an array of a type and length."""
    if not isinstance(values, np.ndarray) or (values.dtype, values.shape) != (dtype, (length,)):
        found = f"{getattr(values, 'dtype', type(values).__name__)} {list(np.shape(values))}"
        raise ValueError(f"{what} is {found}; expected {dtype.__name__} {[length]}")


def _checked(name: str, plan: SelectionPlan, ranking: Ranking) -> SelectionPlan:
    """Return a plan of a strategy from outside whose errors name the strategy."""

    def quotas(size: np.ndarray, total: int) -> np.ndarray:
        with named_failures(STRATEGY, name):
            result = plan.quotas(size, total)
            _check_array("quotas", result, np.int64, len(size))
        return result

    return replace(plan, ranking=ranking, quotas=quotas)


def outside_strategy(name: str) -> Strategy:
    """Return a strategy from outside.

    Raises
    ------
    ConfigError
        If it cannot be imported, or must not be.
    """
    return strategy_of_class(name, find(STRATEGY, name, KeepStrategy))


def strategy_of_class(name: str, kind: type[KeepStrategy]) -> Strategy:
    """Return a class as a strategy; errors call it `name`, and it finds its options under it.

    Raises
    ------
    ConfigError
        If it defines neither `preference` nor `plan`.
    """
    if kind.preference is KeepStrategy.preference and kind.plan is KeepStrategy.plan:
        raise ConfigError(f"{STRATEGY.setting}: {name!r} does nothing: define preference, or plan")

    def plan(
        stream: ValidatedStream, keep: Sequence[float], classes: int, options: SelectionOptions
    ) -> list[SelectionPlan]:
        own = validated_options(kind, STRATEGY, name, options.own)
        with named_failures(STRATEGY, name):
            plans: Any = kind(own).plan(stream, keep, classes, options)
        good = isinstance(plans, list | tuple) and all(
            isinstance(item, SelectionPlan) and isinstance(item.ranking, Ranking) for item in plans
        )
        if not good or len(plans) != len(keep):
            returned = f"{len(plans)} plans" if good else f"a {type(plans).__name__}"
            raise StageError(
                f"{STRATEGY.setting}: {name} returned {returned} for {len(keep)} keep "
                "fractions; expected a list with a SelectionPlan for each"
            )
        # plans that share a ranking are computed in one pass
        rankings = {id(item.ranking): _Named(name, item.ranking) for item in plans}
        return [_checked(name, item, rankings[id(item.ranking)]) for item in plans]

    flags = {item: getattr(kind, item) for item in Strategy.__dataclass_fields__ if item != "plan"}
    return Strategy(plan, **flags)
