"""`select.strategy: auto`: for each keep fraction the strategy that the pilot shows to be better.

That is the candidate which beats random lists within classes with a certainty of 95 %, corrected
for the number of candidates; without one, random lists within classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raypipe.assessment.gains import WORSE, Gain, best_choice
from raypipe.config import SelectSettings, TrustSettings
from raypipe.config.choices import AUTO, CUTTING_STRATEGIES, RANDOM_STRATEGIES
from raypipe.config.pilot import random_settings, settings_of_candidate
from raypipe.errors import ConfigError, TrustError
from raypipe.runs.ledger import extrapolated_tables
from raypipe.runs.pilot import Pilot
from raypipe.runs.run import Run
from raypipe.stages.select.gate import check_trust
from raypipe.text import points

RANDOM_WITHIN_CLASSES = "random within classes"


@dataclass(frozen=True)
class Choice:
    """How the list of a fraction is cut, and why.

    Attributes
    ----------
    fraction
        Keep fraction.
    settings
        With a strategy other than auto.
    reason
        A sentence without a full stop; empty if the strategy was set.
    candidate
        Name of the pilot's candidate; empty for random lists.
    """

    fraction: float
    settings: SelectSettings
    reason: str = ""
    candidate: str = ""

    @property
    def group(self) -> str:
        """Equal for choices whose lists are cut together."""
        return self.settings.model_dump_json()

    def metadata(self) -> dict[str, str]:
        """Return what the keep-list records about the choice."""
        if not self.reason:
            return {}
        candidate = {"candidate": self.candidate} if self.candidate else {}
        return {"chosen": AUTO, "reason": self.reason, **candidate}


def choose(run: Run, settings: SelectSettings, trust: TrustSettings, samples: int) -> list[Choice]:
    """Return how each list is cut.

    Parameters
    ----------
    run
        A run with scores.
    settings
        Of `select`, with the keep fractions.
    trust
        Scores that do not suffice are not used.
    samples
        Samples with a score.

    Raises
    ------
    ConfigError
        If the strategy is auto and the scores come from tables.
    """
    if settings.strategy != AUTO:
        return [Choice(fraction, settings) for fraction in settings.keep]
    if extrapolated_tables(run.ledger()):
        raise ConfigError(
            "select.strategy: auto needs a pilot, and scores from tables have no images to train "
            "on; name a strategy, such as top"
        )
    found = _Evidence.of(run, settings, trust, samples)
    return [found.choice(fraction) for fraction in settings.keep]


@dataclass(frozen=True, eq=False)
class _Evidence:
    """What is known about the candidates."""

    settings: SelectSettings
    pilot: Pilot | None
    obstacle: str
    samples: int

    @classmethod
    def of(
        cls, run: Run, settings: SelectSettings, trust: TrustSettings, samples: int
    ) -> _Evidence:
        pilot = Pilot.read(run)
        if run.config().unsupervised:
            obstacle = "the source has no labels, so there is no pilot"
        elif pilot is None:
            obstacle = "no pilot"
        elif not pilot.plan.repeats:
            obstacle = f"no evidence from the pilot: {pilot.plan.note}"
        else:
            obstacle = _distrust(run, settings, trust)
        return cls(settings, pilot, obstacle, samples)

    def choice(self, fraction: float) -> Choice:
        """Return the choice for a keep fraction."""
        if self.obstacle or self.pilot is None:
            return self._random(fraction, self.obstacle)
        gains = self.pilot.gains(fraction, self.samples)
        eligible = {
            name: settings
            for name, changes in self.pilot.plan.candidates
            if (settings := self._settings(changes, fraction)) is not None
        }
        best = best_choice({name: gains[name] for name in eligible})
        if best is None:
            return self._random(fraction, _no_evidence(gains))
        reason = f"the pilot predicts {described(best, gains[best])}"
        return Choice(fraction, eligible[best], reason, best)

    def _settings(self, changes: Any, fraction: float) -> SelectSettings | None:
        """Return how a candidate cuts lists of a fraction; None if it cannot."""
        settings = settings_of_candidate(self.settings, changes)
        cutoff = settings.hard_cutoff if settings.strategy in CUTTING_STRATEGIES else "auto"
        if cutoff != "auto" and fraction + cutoff > 1 + 1e-9:
            return None
        if settings.weights == "inclusion" and settings.strategy not in RANDOM_STRATEGIES:
            return None
        return settings

    def _random(self, fraction: float, reason: str) -> Choice:
        return Choice(
            fraction, random_settings(self.settings), f"{RANDOM_WITHIN_CLASSES}: {reason}"
        )


def _distrust(run: Run, settings: SelectSettings, trust: TrustSettings) -> str:
    """Return why the scores are not used; "" if they can be."""
    try:
        check_trust(
            run.ledger()["extrapolate"], trust, settings.force, settings.cuts_within_classes
        )
    except TrustError as error:
        return str(error).removeprefix("no keep-lists: ").partition(". ")[0]
    return ""


def _no_evidence(gains: dict[str, Gain]) -> str:
    """Return what the pilot found where nothing is better with certainty."""
    name = max(gains, key=lambda name: gains[name].mean)
    best = described(name, gains[name])
    if all(gain.verdict == WORSE for gain in gains.values()):
        return f"the pilot predicts that every candidate does harm; the best is {best}"
    return f"no candidate of the pilot is better with certainty; the best is {best}"


def described(name: str, gain: Gain) -> str:
    """Return "ccs at +2.1 points (95 % interval +0.4 to +3.8)"."""
    low, high = gain.interval
    return f"{name} at {points(gain.mean)} points (95 % interval {points(low)} to {points(high)})"
