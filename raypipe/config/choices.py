"""Names that the command line and the validation need without importing torch, which is slow."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from raypipe.config.parts import OrPart
from raypipe.plugins import STRATEGY, is_reference

PROXY_MODELS = (
    "small",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "wide_resnet50_2",
    "resnext50_32x4d",
)
"""Networks of raypipe's own, known by their name alone. All but `small` are ResNets of torchvision
with a stem for small images."""

TORCHVISION_PREFIX = "torchvision"
"""Prefix of a network as torchvision builds it: `torchvision:convnext_tiny`."""
TIMM_PREFIX = "timm"
"""Prefix of a network of timm: `timm:vit_tiny_patch16_224`."""

WITHOUT_FILE = ("none", "pretrained")
"""Values of `proxy.weights` and `embed.weights` that name no file."""

FEATURES_OF_PROXY = "proxy"
"""`embed.model` without a network of its own."""
NO_NETWORK = "none"
"""`embed.model` where all embeddings come from a table."""
FEATURE_LIBRARIES = (TORCHVISION_PREFIX, TIMM_PREFIX, "open_clip", "transformers")
"""Prefixes of `embed.model`."""

DIFFICULTIES = frozenset({"aum", "el2n", "entropy", "forgetting", "grand", "loss"})
"""Scores that are high for hard samples, including mislabelled ones. For all other scores, a low
value is suspicious."""

EXPERIMENTAL_SCORES = {
    "moso": "two trainings agreed to less than 0.6 on CIFAR-10 and CIFAR-100, in every variant "
    "that was tried",
    "aum": "two complete runs agreed to 0.68 on CIFAR-10, 0.34 on CIFAR-100",
    "dual": "two complete runs agreed to 0.55 on CIFAR-10, 0.54 on CIFAR-100",
    "dynamic-uncertainty": "two complete runs agreed to 0.71 on CIFAR-10, 0.51 on CIFAR-100",
    "forgetting": "two complete runs agreed to 0.48 on CIFAR-10, 0.37 on CIFAR-100",
    "tdds": "two complete runs agreed to 0.30 on CIFAR-10, 0.59 on CIFAR-100",
}
"""Scores whose values another training would not confirm, and the evidence
(benchmarks/results/agreement-cpu.txt)."""

PROXY_STATISTICS = ("loss", "margin", "entropy")
"""Statistics of the proxy's output for a sample, in the order that the extrapolators expect."""

ScoreStrategyName = Literal[
    "top",
    "balanced",
    "normalized",
    "moderate",
    "mixed",
    "ccs",
    "beta",
    "band",
    "d2",
    "infomax",
    "coverage",
    "typical",
]
"""Strategies that the pilot and `raypipe evaluate` compare with `random`: all others."""

StrategyName = Literal["random", ScoreStrategyName]
"""Strategies of `select.strategy`. `raypipe.selection.STRATEGIES` maps a name to its function."""

STRATEGY_NAMES: tuple[StrategyName, ...] = get_args(StrategyName)

StrategyChoice = Annotated[str, OrPart(STRATEGY, Literal[StrategyName, "auto"])]
"""Values of `select.strategy`: these, or a strategy from outside."""

CandidateName = Annotated[str, OrPart(STRATEGY, ScoreStrategyName)]
"""Strategies to compare with `random`: raypipe's own, or one from outside."""

AUTO: Literal["auto"] = "auto"
"""The one that leaves the choice to the pilot."""


def is_model(name: str) -> bool:
    """Return whether a name has the form of a network; whether it exists is checked by a run."""
    library, _, rest = name.partition(":")
    of_library = library in (TORCHVISION_PREFIX, TIMM_PREFIX) and rest != ""
    return name in PROXY_MODELS or of_library or is_own(name)


def library_of(model: str) -> str | None:
    """Return the package that builds a network of `proxy.model` or `embed.model`.

    None for `small`, and for networks of users.
    """
    if model in PROXY_MODELS:
        return None if model == "small" else TORCHVISION_PREFIX
    library = model.partition(":")[0]
    return library if library in FEATURE_LIBRARIES else None


def is_own(name: str) -> bool:
    """Return whether a network is code of the user's own, `module:function`."""
    return name.partition(":")[0] not in (TORCHVISION_PREFIX, TIMM_PREFIX) and is_reference(name)


def is_features(name: str) -> bool:
    """Return whether a name has the form of `embed.model`."""
    library, _, rest = name.partition(":")
    if library in FEATURE_LIBRARIES:
        return rest != ""
    return name in (FEATURES_OF_PROXY, NO_NETWORK) or is_reference(name)


def is_own_features(name: str) -> bool:
    """Return whether `embed.model` is code of the user's own, `module:function`."""
    return name.partition(":")[0] not in FEATURE_LIBRARIES and is_reference(name)


def unknown_features(name: str) -> str:
    """Return the message about an `embed.model` that does not exist."""
    names = ", ".join(
        [FEATURES_OF_PROXY, NO_NETWORK, *(f"{library}:NAME" for library in FEATURE_LIBRARIES)]
    )
    return f"choose one of {names}, module:function"


def unknown_model(name: str) -> str:
    """Return the message about a network that does not exist."""
    near = difflib.get_close_matches(name, PROXY_MODELS, n=1)
    suggestion = f"; did you mean {near[0]!r}?" if near else ""
    names = ", ".join([*PROXY_MODELS, "torchvision:NAME", "timm:NAME", "module:function"])
    return f"model: {name!r} is not one of {names}{suggestion}"


@dataclass(frozen=True)
class StrategyText:
    """How a strategy is described to users.

    Attributes
    ----------
    summary : str
        The rule in a few words, for the settings; "" where the name says it.
    kept : str
        What a keep-list contains, for the report.
    """

    summary: str
    kept: str


STRATEGY_TEXTS: dict[str, StrategyText] = {
    "random": StrategyText("", "drawn at random, whatever the score"),
    "top": StrategyText("highest scores", "the highest scores"),
    "balanced": StrategyText(
        "the same share of each class",
        "the highest scores of each class, the same share of every class",
    ),
    "normalized": StrategyText(
        "highest within the class",
        "the highest scores relative to the mean of the class, in its standard deviations",
    ),
    "moderate": StrategyText("around the median", "the scores around the median"),
    "mixed": StrategyText("both ends", "the hardest and the easiest samples"),
    "ccs": StrategyText(
        "over the range of scores",
        "drawn evenly over the range of the scores, without the hardest samples",
    ),
    "beta": StrategyText(
        "easier samples the more is pruned",
        "drawn by score and ease; the more is pruned, the easier the samples",
    ),
    "band": StrategyText(
        "neither hardest nor easiest",
        "neither the hardest samples nor the easiest",
    ),
    "d2": StrategyText(
        "high scores, spread over the embeddings",
        "high scores spread over the embedding space, without the hardest samples",
    ),
    "infomax": StrategyText(
        "high scores less redundancy",
        "high scores that are least redundant, without the hardest samples",
    ),
    "coverage": StrategyText(
        "representatives of each range of scores",
        "the best representatives of each range of scores, without the hardest samples",
    ),
    "typical": StrategyText(
        "densest regions of the embeddings",
        "from the densest regions of the embedding space, whatever the score",
    ),
}
"""Texts of raypipe's own strategies; the settings, the command line and the report use them."""

CUTTING_STRATEGIES: tuple[str, ...] = ("ccs", "band", "d2", "infomax", "coverage")
"""Strategies that leave out the hardest samples first (`select.hard_cutoff`)."""

CLASSWISE_STRATEGIES: tuple[str, ...] = (*CUTTING_STRATEGIES, "typical")
"""Strategies that are applied within each class unless `select.by_class` is false."""

RANDOM_STRATEGIES: tuple[str, ...] = ("random", "ccs", "beta")
"""Strategies that draw samples at random, so that inclusion probabilities exist."""


def strategy_summaries() -> str:
    """Return all strategies with their summaries, in one line."""
    return "; ".join(
        f"{name}: {text.summary}" if text.summary else name for name, text in STRATEGY_TEXTS.items()
    )
