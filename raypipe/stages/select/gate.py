"""The gate: refuse keep-lists when the scores cannot be trusted.

That is when their fidelity or stability is too low, or the proxy hardly beats chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raypipe.assessment.stability import Stability
from raypipe.config import TrustSettings
from raypipe.errors import TrustError
from raypipe.runs.ledger import StageRecord
from raypipe.text import HeadlineFidelity, stability_for_cut, weak_proxy


@dataclass(frozen=True)
class ScoreFidelity:
    """The fidelity of a run's scores, as the ledger has it.

    Attributes
    ----------
    spearman : float or None
        Spearman correlation of predicted and measured scores, within classes where the lists are
        cut within them; None when it is unknown.
    interval : tuple of float or None
        Its 95 % interval.
    note : str
        Why the correlation is unknown.
    predicted : bool
        Whether any score is predicted, not measured.
    gain : float or None
        What the learning curve predicts that twice as many measured samples add.
    from_tables : bool
        Whether the scores were extrapolated from tables.
    stability : Stability
        How well another training would agree with the scores.
    overall : float or None
        The correlation over all classes, where `spearman` is that within them.
    accuracy : dict
        Accuracy of the proxy on unseen samples, and chance; see `raypipe.text.weak_proxy`.
    """

    spearman: float | None
    interval: tuple[float, float] | None
    note: str
    predicted: bool
    gain: float | None
    from_tables: bool
    stability: Stability
    overall: float | None = None
    accuracy: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, record: StageRecord, within_classes: bool = False) -> ScoreFidelity:
        """Read it from the record of the stage `extrapolate`."""
        detail = record.detail
        figures = detail.get("fidelity") or {}
        headline = HeadlineFidelity.of(figures, within_classes)
        doubled = (detail.get("learning_curve") or {}).get("doubled") or {}
        return cls(
            spearman=headline.spearman,
            interval=(
                (headline.low, headline.high)
                if headline.low is not None and headline.high is not None
                else None
            ),
            note=figures.get("note") or "it was not judged",
            predicted=record.samples > detail.get("measured", 0),
            gain=doubled.get("gain"),
            from_tables=bool(detail.get("tables")),
            stability=Stability.from_dict(
                stability_for_cut(detail.get("stability") or {}, within_classes)
            ),
            overall=headline.overall,
            accuracy=figures,
        )

    @property
    def lower_end(self) -> float | None:
        """The lower end of the interval, or the correlation where there is no interval."""
        return self.interval[0] if self.interval else self.spearman

    def suffices(self, trust: TrustSettings) -> bool:
        """Return whether keep-lists can be written. A threshold of -1 accepts every value."""
        return (
            self._fidelity_suffices(trust)
            and self._stability_suffices(trust)
            and not self._weak_proxy(trust)
        )

    def _weak_proxy(self, trust: TrustSettings) -> str:
        """Return a sentence if the proxy hardly beats chance; an unknown accuracy is no reason."""
        return weak_proxy(self.accuracy, trust.min_accuracy_over_chance)

    def _stability_suffices(self, trust: TrustSettings) -> bool:
        """Return whether the stability is high enough. An unknown one is no reason to refuse."""
        return (
            self.stability.interval is None
            or trust.min_stability == -1
            or self.stability.interval[0] >= trust.min_stability
        )

    def _fidelity_suffices(self, trust: TrustSettings) -> bool:
        if not self.predicted or trust.min_spearman == -1:
            return True
        return self.lower_end is not None and self.lower_end >= trust.min_spearman

    def shortfall(self, trust: TrustSettings) -> str:
        """Describe what is wrong."""
        proxy = self._weak_proxy(trust).rstrip(".")
        if self._fidelity_suffices(trust) and self._stability_suffices(trust):
            return f"{proxy[0].lower()}{proxy[1:]} (see trust.min_accuracy_over_chance)"
        proxy = f". {proxy}" if proxy else ""
        if self._fidelity_suffices(trust):
            low, high = self.stability.interval or (0.0, 0.0)
            return (
                "the scores of another training are expected to have a rank correlation of only "
                f"{self.stability.value:.2f} with these (95 % interval {low:.2f} to "
                f"{high:.2f}), and its lower end is below trust.min_stability "
                f"({trust.min_stability:g}){proxy}"
            )
        if self.lower_end is None:
            return f"the fidelity of the predicted scores is not known ({self.note})"
        interval = ""
        if self.interval:
            interval = f" (95 % interval {self.interval[0]:.2f} to {self.interval[1]:.2f})"
        within = overall = ""
        if self.overall is not None:
            within, overall = " within classes", f"; over all classes it is {self.overall:.2f}"
        return (
            f"predicted and measured scores have a Spearman correlation{within} of "
            f"{self.spearman:.2f}{interval}, and its lower end is below trust.min_spearman "
            f"({trust.min_spearman:g}){overall}{proxy}"
        )

    def remedy(self, trust: TrustSettings) -> str:
        """Describe what the user can do."""
        if self._fidelity_suffices(trust) and self._stability_suffices(trust):
            return "To write keep-lists anyway, use `raypipe select --force` or set select.force"
        if self._fidelity_suffices(trust):
            return (
                "More epochs of the proxies (proxy.epochs), a larger seed set (seed.fraction) or "
                "another score (measure.scores: loss is the most stable) can help. To write "
                "keep-lists anyway, use `raypipe select --force` or set select.force"
            )
        add = f"is predicted to add {self.gain:.2f}" if self.gain is not None else ""
        if self.from_tables:
            gain = f" (twice as many {add})" if add else ""
            return (
                f"More scored samples{gain} or other embeddings can help. To write keep-lists "
                "anyway, use `raypipe select --force`"
            )
        gain = f"; twice as large {add}" if add else ""
        return (
            f"A larger seed set (seed.fraction{gain}), more epochs of the proxy (proxy.epochs) or "
            "another score (measure.scores) can help. To write keep-lists anyway, use "
            "`raypipe select --force` or set select.force"
        )


def check_trust(
    record: StageRecord, trust: TrustSettings, force: bool, within_classes: bool = False
) -> dict[str, str]:
    """Check the fidelity of the scores that keep-lists rest on.

    It suffices when every sample was measured, or when the lower end of its interval is at least
    `trust.min_spearman`. With a threshold of -1, any fidelity suffices, even an unknown one. The
    stability, where it is known, suffices when the lower end of its interval is at least
    `trust.min_stability`. The accuracy of the proxy on unseen samples, where it is known, suffices
    when it beats chance (`trust.min_accuracy_over_chance`).

    Parameters
    ----------
    record
        The ledger's record of the stage `extrapolate`.
    trust
        The threshold.
    force
        Whether keep-lists are written in any case.
    within_classes
        Whether they are cut within classes: the correlation within classes then decides.

    Returns
    -------
    dict of str to str
        The fidelity, and whether the lists were forced, as metadata of a keep-list.

    Raises
    ------
    TrustError
        When the fidelity does not suffice and `force` is False.
    """
    fidelity = ScoreFidelity.of(record, within_classes)
    suffices = fidelity.suffices(trust)
    if not suffices and not force:
        raise TrustError(f"no keep-lists: {fidelity.shortfall(trust)}. {fidelity.remedy(trust)}")
    return {
        "spearman": _figure(fidelity.spearman),
        "spearman_low": _figure(fidelity.interval[0] if fidelity.interval else None),
        "forced": "false" if suffices else "true",
        **_known("spearman_all", fidelity.overall),
        **_known("stability", fidelity.stability.value),
    }


def _known(name: str, value: float | None) -> dict[str, str]:
    return {} if value is None else {name: _figure(value)}


def _figure(value: float | None) -> str:
    return f"{value:.4f}" if value is not None else "unknown"
