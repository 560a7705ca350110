"""How far to trust the scores of a run, in a word and in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from raypipe.config.choices import EXPERIMENTAL_SCORES
from raypipe.report.formats import SPACE, count, fixed
from raypipe.text import JUDGED_ON, HeadlineFidelity, proxy_accuracy, weak_proxy

VERDICTS = (
    (
        0.8,
        "strong",
        "You can trust the order of the scores: another training would hardly change it.",
    ),
    (
        0.5,
        "good",
        "Trust the keep-lists as a whole, but not the rank of a single sample near the cut.",
    ),
    (
        0.2,
        "modest",
        "The scores are better than chance, but many samples are on the wrong side of the cut: "
        "compare with a random list first.",
    ),
    (-math.inf, "weak", "Do not prune by these scores."),
)
"""Least Spearman correlation, its name, and how far to trust the scores."""
BEST_UNSTABLE = 0.79
"""Correlation that counts at most where the stability is unknown: not strong."""


def trust_verdict(
    fidelity: Mapping[str, Any], stability: Mapping[str, Any], extrapolated: int | None
) -> tuple[str, str]:
    """Return a one-word verdict, and sentences on how far to trust the scores.

    The verdict is that of the lower of fidelity and stability, and "weak" where the proxy hardly
    beats chance. Without a known stability, it is "good" at best: a score that another training may
    not agree with is never called strong.

    Parameters
    ----------
    fidelity
        The section `fidelity` of `summary.json`, as far as it is known.
    stability
        The section `stability`, see `raypipe.assessment.stability.Stability`; may be empty.
    extrapolated
        Samples whose score was extrapolated; None if that is not known.
    """
    headline = HeadlineFidelity.of(fidelity, bool(fidelity.get("within_classes")))
    spearman, stable = headline.spearman, stability.get("value")
    proxy, accuracy = weak_proxy(fidelity), _proxy_accuracy(fidelity)
    if extrapolated == 0:
        return _verdict_of_measured(stability, proxy, accuracy)
    if spearman is None:
        return (
            "unknown",
            "The fidelity of the extrapolated scores is not known. Do not prune by them until it "
            "is.",
        )
    lowest = min(spearman, stable) if stable is not None else min(spearman, BEST_UNSTABLE)
    name, advice = _verdict(lowest, proxy)
    sentence = (
        f"Trust in these scores is {name}. Fidelity {fixed(spearman)}"
        f"{_interval(headline.low, headline.high)}: the Spearman correlation of extrapolated and "
        f"measured scores on {judged_samples(fidelity)}"
    )
    if headline.within:
        overall = f" ({fixed(headline.overall)} over all classes)" if headline.overall else ""
        sentence += f", within classes, as the keep-lists are cut{overall}"
    sentence += f". {_stability(stability)} {advice}"
    sentence += f" {proxy or accuracy}".rstrip()
    rival = _best_baseline(fidelity, headline.within)
    if rival is not None and rival[0] >= spearman:
        sentence += f" The simpler baseline “{rival[1]}” does as well here ({fixed(rival[0])})."
    return name, sentence


def _verdict(correlation: float, weak_proxy: str) -> tuple[str, str]:
    """Return the name and the advice of a correlation; "weak" for a weak proxy."""
    return next(
        (name, advice)
        for smallest, name, advice in VERDICTS
        if correlation >= smallest and not (weak_proxy and smallest > -math.inf)
    )


def _verdict_of_measured(
    stability: Mapping[str, Any], weak_proxy: str, accuracy: str
) -> tuple[str, str]:
    """Return the verdict where every sample has a measured score: the stability decides."""
    measured, value = "Every sample was scored directly.", stability.get("value")
    if value is None and not weak_proxy:
        return "measured", f"{measured} {_stability(stability)} {accuracy}".rstrip()
    name, advice = _verdict(value if value is not None else -math.inf, weak_proxy)
    sentence = f"Trust in these scores is {name}. {measured} {_stability(stability)} {advice}"
    return name, f"{sentence} {weak_proxy or accuracy}".rstrip()


def _proxy_accuracy(fidelity: Mapping[str, Any]) -> str:
    accuracy = proxy_accuracy(fidelity)
    return f"Proxy: {accuracy}." if accuracy else ""


def _stability(stability: Mapping[str, Any]) -> str:
    value = stability.get("value")
    if value is None:
        reason = stability.get("note") or "it was not measured"
        return f"Stability is unknown: {reason}."
    within = " within classes" if stability.get("within_classes") else ""
    seed_set = " on the same seed set" if stability.get("same_samples") else ""
    low, high = stability.get("interval") or (None, None)
    return (
        f"Stability {fixed(value)}{_interval(low, high)}: the correlation{within} to expect with "
        f"the scores of another training{seed_set}."
    )


def _interval(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return f" (95{SPACE}% interval {fixed(low)} to {fixed(high)})"


def _best_baseline(fidelity: Mapping[str, Any], within: bool) -> tuple[float, str] | None:
    """Return the Spearman correlation and the name of the best baseline."""
    spearman = "spearman_within" if within else "spearman"
    method = str(fidelity.get("method")).replace("-", "_")  # a method can be its own baseline
    return max(
        (
            (figures[spearman], name)
            for name, figures in fidelity.get("baselines", {}).items()
            if name.replace("-", "_") != method and figures.get(spearman) is not None
        ),
        default=None,
    )


def judged_samples(fidelity: Mapping[str, Any]) -> str:
    """Return what fidelity was measured on: 54 audit samples outside the seed set."""
    kind = JUDGED_ON.get(str(fidelity.get("judged_on")), JUDGED_ON["seed"])
    held_out = fidelity.get("n_held")
    return f"{count(held_out)} {kind}" if held_out else kind


def experimental(score: str | None) -> str:
    """Return a sentence about an experimental score, after a space; empty for other scores."""
    if score not in EXPERIMENTAL_SCORES:
        return ""
    return f" {score} is an experimental score: {EXPERIMENTAL_SCORES[score]}."
