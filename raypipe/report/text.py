"""Figures in words, the same on the page and in `summary.json`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from raypipe.config.choices import EXPERIMENTAL_SCORES, STRATEGY_TEXTS
from raypipe.report.schema import (
    ClassShare,
    Difference,
    HeadlineFigures,
    KeepListFigures,
    SetFigures,
    Trained,
)
from raypipe.text import (
    JUDGED_ON,
    HeadlineFidelity,
    counted,
    mean_and_margin,
    plural,
    proxy_accuracy,
    weak_proxy,
)
from raypipe.text import points as points_of

SPACE = "\u202f"
"""Narrow and non-breaking, between a number and its unit."""
MINUS = "−"
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


def count(value: float | None) -> str:
    """Return a whole number with thousands separators."""
    return "–" if value is None else f"{value:,.0f}"


def share(value: float | None, digits: int = 1) -> str:
    """Return a share in percent: 0.125 -> 12.5 %.

    Trailing zeros are dropped. A share between nothing and everything is rounded to neither.
    """
    if value is None:
        return "–"
    smallest = 0.5 * 0.1 ** (digits + 2)
    if 0 < value < smallest or 1 - smallest < value < 1:
        return f"{'<' if value < smallest else '>'}{1 if value < smallest else 99}{SPACE}%"
    text = f"{100 * value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + SPACE + "%"


def number(value: float | None, digits: int = 3) -> str:
    """Return a score to `digits` significant digits."""
    if value is None:
        return "–"
    text = f"{value:#.{digits}g}".rstrip(".").replace(".e", "e")
    return text.replace("-", MINUS).replace(f"e{MINUS}0", f"e{MINUS}").replace("e+0", "e")


def fixed(value: float | None, digits: int = 2) -> str:
    """Return a correlation."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def accuracy(figure: Mapping[str, Any] | None, digits: int = 1) -> str:
    """Return an accuracy with the half-width of its interval: 61.3 ± 0.8 %."""
    if figure is None:
        return "–"
    return mean_and_margin(figure, f"{{:.{digits}f}}", MINUS) + SPACE + "%"


def points(figure: Mapping[str, Any] | None) -> str:
    """Return the difference of two accuracies in percentage points: +1.3 ± 0.8."""
    return "–" if figure is None else mean_and_margin(figure, "{:+.1f}", MINUS)


def plain_points(share: float) -> str:
    """Return a difference of accuracies in percentage points: +1.3."""
    return points_of(share, MINUS)


def money(value: float | None) -> str:
    """Return dollars, with cents for small amounts."""
    if value is None:
        return "–"
    return "<$0.01" if 0 < value < 0.005 else f"${value:,.2f}" if value < 100 else f"${value:,.0f}"


def price(value: float) -> str:
    """Return dollars an hour."""
    return f"${value:,g}"


def seconds(value: float | None) -> str:
    """Return a duration in its two largest units."""
    if value is None:
        return "–"
    if value < 10:
        return f"{value:.1f}{SPACE}s"
    whole = round(value)
    for size, unit, part_size, part in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // part_size
            return f"{whole // size}{SPACE}{unit}" + (f" {rest}{SPACE}{part}" if rest else "")
    return f"{whole}{SPACE}s"


def setting(value: Any) -> str:
    """Return a setting roughly as YAML has it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {setting(item)}" for name, item in value.items())
    return ", ".join(map(setting, value)) if isinstance(value, list | tuple) else str(value)


def without_secrets(text: str) -> str:
    """Remove what could be a secret from a text with addresses.

    That is user and password, and the values of parameters that are named like keys, tokens or
    signatures.
    """
    text = re.sub(r"(\w+://)[^/@\s]*@", r"\1", text)
    return re.sub(
        r"(?i)([?&][\w.%-]*(?:auth|credential|key|passw|secret|sig|token)[\w.%-]*)=[^&\s\"']+",
        r"\1=…",
        text,
    )


def strategies(
    keep: Sequence[KeepListFigures], code: Sequence[Mapping[str, Any]] = ()
) -> list[str]:
    """Return what the keep-lists hold, a line for each strategy.

    `code` describes strategies from outside raypipe.
    """
    used = {(item["strategy"], item["by_class"]) for item in keep}
    kept = {name: item.kept for name, item in STRATEGY_TEXTS.items()}
    kept |= {item["name"]: str(item["kept"]) for item in code if item.get("kept")}
    return [
        f"{name} by class: {kept[name]}, within each class" if by_class else f"{name}: {kept[name]}"
        for name, by_class in sorted((name, by_class) for name, by_class in used if name)
        if name in kept
    ]


def label_name(names: Sequence[str], label: int | None) -> str:
    """Return the name of a class, or its number if it has no name."""
    if label is None or label < 0:
        return "unlabelled"
    return names[label] if label < len(names) else str(label)


def classes(labels: Sequence[int | None]) -> str:
    """Return how many classes these are; the label None stands for the unlabelled."""
    text = counted(sum(label is not None for label in labels), "class", "classes")
    return f"{text} and the unlabelled" if None in labels else text


def pseudo_labels(settings: Mapping[str, Any]) -> str:
    """Return a sentence about pseudo-labels, from the section `pseudo_labels` of the settings.

    It is empty if the source has labels.
    """
    if settings["clusters"] is None:
        return ""
    features = (
        "a self-supervised network"
        if settings["features"] == "self-supervised"
        else f"an existing {settings['model']}"
    )
    return (
        f"Labels are pseudo-labels from {count(settings['clusters'])} clusters of the features of "
        f"{features}; no true labels were used."
    )


def judged_samples(fidelity: Mapping[str, Any]) -> str:
    """Return what fidelity was measured on: 54 audit samples outside the seed set."""
    kind = JUDGED_ON.get(str(fidelity.get("judged_on")), JUDGED_ON["seed"])
    held_out = fidelity.get("n_held")
    return f"{count(held_out)} {kind}" if held_out else kind


def uneven_sets(lists: Mapping[str, Mapping[str, SetFigures]], cross_fits: bool) -> str:
    """Return which lists hold more of a set than chance allows; empty if none does."""
    uneven = [
        (file, sets)
        for file, sets in lists.items()
        if not all(figures["within_chance"] for figures in sets.values())
    ]
    if not uneven:
        return ""
    file, sets = max(
        uneven, key=lambda item: abs(item[1]["seed"]["share"] - item[1]["rest"]["share"])
    )
    seed, audit, rest = (share(sets[name]["share"], 0) for name in ("seed", "audit", "rest"))
    return (
        f"{len(uneven)} of {counted(len(lists), 'keep-list')} treat measured samples differently: "
        f"{file} holds {seed} of the seed set, {audit} of the audit set and {rest} of the rest, "
        "which chance does not explain."
        + ("" if cross_fits else " Set proxy.parts to 3 for cross-fitting.")
    )


def larger_seed_set(curve: Mapping[str, Any]) -> str:
    """Return a sentence about what doubling the seed set is predicted to gain."""
    doubled = curve["doubled"]
    gain, bounds = doubled.get("gain"), doubled.get("gain_interval")
    if gain is None:
        return "The learning curve does not show how much a larger seed set would gain."
    between = (
        f" (95{SPACE}% range {fixed(bounds[0], 3)} to {fixed(bounds[1], 3)})" if bounds else ""
    )
    return (
        "Doubling the seed set is predicted to raise the Spearman correlation by "
        f"{fixed(gain, 3)}{between}."
    )


def savings_sentences(headline: HeadlineFigures) -> list[str]:
    """Return what a keep-list saves of each training, and how trainings on it turned out."""
    if headline["saved_share"] <= 0:
        return ["It holds every sample, so training on it costs as much as training on everything."]
    saved = share(headline["saved_share"], 0)
    sentences = [
        f"Training on it for the same number of epochs takes {saved} fewer steps, and so costs "
        f"about {saved} less.",
        _accuracy(headline),
    ]
    if headline["trainings"]:
        sentences.append(_payback(headline, headline["trainings"]))
    least, most = headline["least_kept"], headline["most_kept"]
    if least and most and least["share"] < headline["fraction"] / 2:
        sentences.append(_uneven_classes(least, most))
    return sentences


def _accuracy(headline: HeadlineFigures) -> str:
    """Return what is known about the accuracy that goes with the saving."""
    if headline["trained"]:
        return _trained(headline["trained"])
    expected = headline["expected"]
    if expected is None:
        known = "What it does to the accuracy is not known: raypipe evaluate measures it."
        return f"{_as_sentence(headline['reason'])}{known}"
    random, everything = expected["against_random"], expected["against_everything"]
    less = f"{_difference(everything)} against everything"
    if random is None:
        prediction = f"Its expected accuracy, by the pilot, is {less}."
    else:
        prediction = (
            f"Its expected accuracy, by the pilot, is {_difference(random)} against a random list "
            f"of the same size, and {less}."
        )
    return (
        f"{_as_sentence(headline['reason']) if random is None else ''}{prediction} This is for a "
        f"network like that of the pilot ({expected['model']}), extrapolated from "
        f"{count(expected['tried'])} to {count(headline['of'])} samples."
    )


def _as_sentence(reason: str) -> str:
    """Return a reason as a sentence, before a space; empty without one."""
    return f"{reason[0].upper()}{reason[1:]}. " if reason else ""


def _difference(figure: Difference) -> str:
    """Return "+2.1 points (95 % interval +0.4 to +3.8)"."""
    mean, low, high = (points_of(figure[name], MINUS) for name in ("mean", "low", "high"))
    return f"{mean} points (95{SPACE}% interval {low} to {high})"


def _payback(headline: HeadlineFigures, trainings: int) -> str:
    epochs = f"{count(headline['epochs'])} {plural(headline['epochs'], 'epoch')}"
    spent = "The scores and the pilot" if headline["expected"] else "The scores"
    when = (
        "with the first such training"
        if trainings == 1
        else f"after {count(trainings)} such trainings"
    )
    return (
        f"For a network like the proxy ({epochs}) this saves about "
        f"{seconds(headline['saved_seconds'])} of the {seconds(headline['training_seconds'])} "
        f"CPU + GPU time of a training. {spent} took "
        f"{seconds(headline['scores_seconds'])}; they pay off {when}, or sooner if a training "
        "costs more."
    )


def _uneven_classes(least: ClassShare, most: ClassShare) -> str:
    return (
        f"Classes are thinned out unevenly: the list keeps from {share(least['share'], 0)} of "
        f"“{least['name']}” to {share(most['share'], 0)} of “{most['name']}”."
    )


def _trained(trained: Trained) -> str:
    return (
        f"Trained on it here, {trained['model']} reached an accuracy of "
        f"{accuracy(trained['list'])}; on random lists of the same size "
        f"{accuracy(trained['random'])}, on everything {accuracy(trained['everything'])}."
    )


def trust_verdict(
    fidelity: Mapping[str, Any], stability: Mapping[str, Any], extrapolated: int | None
) -> tuple[str, str]:
    """Return a one-word verdict, and sentences on how far to trust the scores.

    The verdict is that of the lower of fidelity and stability, and "weak" where the proxy hardly
    beats chance. Without a known stability, it is
    "good" at best: a score that another training may not agree with is never called strong.

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


def experimental(score: str | None) -> str:
    """Return a sentence about an experimental score, after a space; empty for other scores."""
    if score not in EXPERIMENTAL_SCORES:
        return ""
    return f" {score} is an experimental score: {EXPERIMENTAL_SCORES[score]}."


def _interval(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return f" (95{SPACE}% interval {fixed(low)} to {fixed(high)})"


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
