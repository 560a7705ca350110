"""Names that must be known without importing torch: command line and validation stay fast."""

from __future__ import annotations

PROXY_MODELS = (
    "small",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "wide_resnet50_2",
    "resnext50_32x4d",
)
"""Networks `raypipe.vision.networks.build` can make."""

DIFFICULTIES = frozenset({"aum", "el2n", "entropy", "forgetting", "grand", "loss"})
"""Scores that are high for hard samples, wrong labels among them; of others a low one is suspicious."""

PROXY_STATISTICS = ("loss", "margin", "entropy")
"""What the proxy says of a sample, in the order the extrapolators see it."""
