"""The settings of a run: one model per section, validated before any work starts.

`model` holds `Config`, every section has its own module, and `io` reads, overrides and writes
configurations. The descriptions of the fields are the comments that `raypipe init` prints, and the
settings reference in the docs.
"""

from __future__ import annotations

from raypipe.config.cluster import ClusterSettings
from raypipe.config.commented import commented_config
from raypipe.config.embed import EmbedSettings
from raypipe.config.extrapolate import ExtrapolateSettings
from raypipe.config.io import (
    absolute_paths,
    apply_overrides,
    demo_settings,
    dump_config,
    flat_settings,
    load_config,
    parse_config,
    parse_settings,
    read_config,
)
from raypipe.config.measure import SELF_TERM_BELOW, MeanSettings, MeasureSettings
from raypipe.config.model import Config
from raypipe.config.nightly import NightlySettings
from raypipe.config.pilot import PilotSettings
from raypipe.config.pool import PoolSettings
from raypipe.config.proxy import AdversarySettings, ProxySettings
from raypipe.config.pseudo_labels import PseudoLabelSettings
from raypipe.config.report import ReportSettings
from raypipe.config.seed import SeedSettings
from raypipe.config.select import SelectSettings
from raypipe.config.source import SourceSettings
from raypipe.config.trust import TrustSettings

__all__ = [
    "SELF_TERM_BELOW",
    "AdversarySettings",
    "ClusterSettings",
    "Config",
    "EmbedSettings",
    "ExtrapolateSettings",
    "MeanSettings",
    "MeasureSettings",
    "NightlySettings",
    "PilotSettings",
    "PoolSettings",
    "ProxySettings",
    "PseudoLabelSettings",
    "ReportSettings",
    "SeedSettings",
    "SelectSettings",
    "SourceSettings",
    "TrustSettings",
    "absolute_paths",
    "apply_overrides",
    "commented_config",
    "demo_settings",
    "dump_config",
    "flat_settings",
    "load_config",
    "parse_config",
    "parse_settings",
    "read_config",
]
