"""Numbers and findings in words, the same in the page and in `summary.json`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from raypipe.config.choices import STRATEGY_TEXTS

SPACE = "\u202f"  # narrow and unbreakable, between a number and its unit
VERDICTS = (
    (
        0.8,
        "strong",
        "The order of the extrapolated scores can be trusted almost like that of measured ones.",
    ),
    (
        0.5,
        "good",
        "Trust the keep-lists as a whole, not the place of a single sample near their edge.",
    ),
    (
        0.2,
        "modest",
        "Better than chance, but many samples are on the wrong side of the edge: compare with a random list first.",
    ),
    (-math.inf, "weak", "Do not prune by these scores."),
)
"""Least Spearman correlation, its name, and how far to trust the scores."""
JUDGED_ON = {
    "audit": "audit samples from outside the seed set",
    "rehearsal": "seed samples that a second proxy was not trained on",
}


def count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def share(value: float | None, digits: int = 1) -> str:
    """0.125 -> 12.5 %; zeros at the end are left out, and what is neither nothing nor all is not rounded to it."""
    if value is None:
        return "–"
    least = 0.5 * 0.1 ** (digits + 2)
    if 0 < value < least or 1 - least < value < 1:
        return f"{'<' if value < least else '>'}{1 if value < least else 99}{SPACE}%"
    text = f"{100 * value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + SPACE + "%"


def number(value: float | None, digits: int = 3) -> str:
    """A score, to so many significant digits."""
    if value is None:
        return "–"
    text = f"{value:#.{digits}g}".rstrip(".").replace(".e", "e")
    return text.replace("-", "−").replace("e−0", "e−").replace("e+0", "e")


def fixed(value: float | None, digits: int = 2) -> str:
    """A correlation."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def accuracy(found: Mapping[str, Any] | None, digits: int = 1) -> str:
    """A share of right answers with the half-width of its interval: 61.3 ± 0.8 %."""
    return "–" if found is None else _with_reach(found, f"{{:.{digits}f}}") + SPACE + "%"


def points(found: Mapping[str, Any] | None) -> str:
    """A difference of two accuracies in points: +1.3 ± 0.8."""
    return "–" if found is None else _with_reach(found, "{:+.1f}")


def _with_reach(found: Mapping[str, Any], form: str) -> str:
    text = form.format(100 * found["mean"]).replace("-", "−")
    return text if found["low"] is None else f"{text} ± {100 * (found['mean'] - found['low']):.1f}"


def money(value: float | None) -> str:
    """Dollars: cents where there are few."""
    if value is None:
        return "–"
    return "<$0.01" if 0 < value < 0.005 else f"${value:,.2f}" if value < 100 else f"${value:,.0f}"


def price(value: float) -> str:
    """Dollars for an hour."""
    return f"${value:,g}"


def seconds(value: float | None) -> str:
    """A duration in the two largest units that matter."""
    if value is None:
        return "–"
    if value < 10:
        return f"{value:.1f}{SPACE}s"
    whole = round(value)
    for size, unit, below, part in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size}{SPACE}{unit}" + (f" {rest}{SPACE}{part}" if rest else "")
    return f"{whole}{SPACE}s"


def setting(value: Any) -> str:
    """A value as it stands in YAML, near enough."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {setting(item)}" for name, item in value.items())
    return ", ".join(map(setting, value)) if isinstance(value, list | tuple) else str(value)


def without_secrets(text: str) -> str:
    """Without user and password of an address, and without the values of its parameters that look like keys, tokens or signatures."""
    text = re.sub(r"(\w+://)[^/@\s]*@", r"\1", text)
    return re.sub(
        r"(?i)([?&][\w.%-]*(?:auth|credential|key|passw|secret|sig|token)[\w.%-]*)=[^&\s\"']+",
        r"\1=…",
        text,
    )


def strategies(keep: list[dict[str, Any]]) -> list[str]:
    """What the keep-lists hold, in a line for each strategy."""
    found = sorted(
        {
            (item["strategy"], item["by_class"])
            for item in keep
            if item["strategy"] in STRATEGY_TEXTS
        }
    )
    return [
        f"{name} by class: {STRATEGY_TEXTS[name].kept}, within each class"
        if by_class
        else f"{name}: {STRATEGY_TEXTS[name].kept}"
        for name, by_class in found
    ]


def label_name(names: list[str] | tuple[str, ...], label: int | None) -> str:
    """The name of a class; numbers stand for themselves."""
    if label is None or label < 0:
        return "unlabelled"
    return names[label] if label < len(names) else str(label)


def classes(labels: Sequence[int | None]) -> str:
    """How many there are, in words; None is the label of the unlabelled."""
    known = sum(label is not None for label in labels)
    text = f"{count(known)} {'class' if known == 1 else 'classes'}"
    return f"{text} and the unlabelled" if None in labels else text


def pseudo_labels(settings: Mapping[str, Any]) -> str:
    """What stands for labels, by the section `pseudo_labels` of the settings, in a sentence; "" where the source has labels."""
    if settings["clusters"] is None:
        return ""
    features = (
        "a self-supervised network"
        if settings["features"] == "self-supervised"
        else f"a given {settings['model']}"
    )
    return f"Labels are pseudo-labels from {count(settings['clusters'])} clusters of features of {features}; no true labels were used."


def judged_samples(fidelity: Mapping[str, Any]) -> str:
    """What a fidelity was judged on: 54 audit samples, or 500 held-out seed samples."""
    kind = JUDGED_ON.get(str(fidelity.get("judged_on")), "held-out seed samples")
    held = fidelity.get("n_held")
    return f"{count(held)} {kind}" if held else kind


def gain(curve: Mapping[str, Any]) -> str:
    """What doubling the seed set is predicted to give, in a sentence."""
    doubled = curve["doubled"]
    added, bounds = doubled.get("gain"), doubled.get("gain_interval")
    if added is None:
        return "What a larger seed set would give cannot be told."
    between = (
        f" (95{SPACE}% range {fixed(bounds[0], 3)} to {fixed(bounds[1], 3)})" if bounds else ""
    )
    return f"Twice the seed set is predicted to raise the Spearman correlation by {fixed(added, 3)}{between}."


def saved(found: Mapping[str, Any]) -> list[str]:
    """What a keep-list saves of each training, and what it was found to give; see `raypipe.report.cost.headline`."""
    part = share(found["saved_share"], 0)
    if found["saved_share"] <= 0:
        return [
            "It holds every sample, so that a training on it costs what one on everything does."
        ]
    sentences = [
        f"A training on it of as many epochs takes {part} fewer steps, and so costs about {part} less."
    ]
    if found["trainings"]:
        epochs = f"{count(found['epochs'])} {'epoch' if found['epochs'] == 1 else 'epochs'}"
        when = (
            "with the first such training"
            if found["trainings"] == 1
            else f"after {count(found['trainings'])} such trainings"
        )
        sentences.append(
            f"Of a network like the proxy ({epochs}) that is about {seconds(found['saved_seconds'])} of "
            f"{seconds(found['training_seconds'])} CPU + GPU time; the scores took {seconds(found['scores_seconds'])}, paid {when}, or "
            "sooner where a training costs more."
        )
    least, most = found["least_kept"], found["most_kept"]
    if least and least["share"] < found["fraction"] / 2:
        sentences.append(
            f"Classes are thinned out unevenly: from {share(least['share'], 0)} of “{least['name']}” to {share(most['share'], 0)} of "
            f"“{most['name']}” are kept."
        )
    trained = found["trained"]
    if trained:
        sentences.append(
            f"Trained on it here, {trained['model']} reached an accuracy of {accuracy(trained['list'])}; on random lists of the same "
            f"size {accuracy(trained['random'])}, on everything {accuracy(trained['everything'])}."
        )
    return sentences


def fidelity_verdict(fidelity: Mapping[str, Any], extrapolated: int | None) -> tuple[str, str]:
    """A one-word verdict and one or two plain sentences that say how far the extrapolated scores can be trusted."""
    rho = fidelity.get("spearman")
    if extrapolated == 0:
        return "measured", "Every sample was measured; nothing had to be extrapolated."
    if rho is None:
        return (
            "unknown",
            "The fidelity of the extrapolated scores is not known. Do not prune by them before it is.",
        )
    name, advice = next((name, advice) for least, name, advice in VERDICTS if rho >= least)
    low, high = fidelity.get("spearman_low"), fidelity.get("spearman_high")
    interval = (
        f", 95{SPACE}% interval {fixed(low)} to {fixed(high)}"
        if low is not None and high is not None
        else ""
    )
    where = f"on {judged_samples(fidelity)}"
    correlation = (
        f"extrapolated and measured scores have a Spearman correlation of {fixed(rho)}{interval}"
    )
    text = f"Fidelity is {name}: {where}, {correlation}. {advice}"
    own = str(fidelity.get("method")).replace("-", "_")  # a method may be its own baseline
    baselines = {
        rival: figures
        for rival, figures in fidelity.get("baselines", {}).items()
        if rival.replace("-", "_") != own
    }
    rivals = [
        (figures["spearman"], rival)
        for rival, figures in baselines.items()
        if figures.get("spearman") is not None
    ]
    if rivals and max(rivals)[0] >= rho:
        best, rival = max(rivals)
        text += f" The simpler baseline “{rival}” does as well here ({fixed(best)})."
    return name, text
