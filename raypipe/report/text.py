"""Names, classes and strategies as the report calls them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from raypipe.config.choices import STRATEGY_TEXTS
from raypipe.report.formats import count
from raypipe.report.schema import KeepListFigures
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
