"""Names and single sentences of the report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from raypipe.config.choices import STRATEGY_TEXTS
from raypipe.report.formats import SPACE, count, fixed, share
from raypipe.report.schema import KeepListFigures, SetFigures
from raypipe.text import counted


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
