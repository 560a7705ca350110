"""Settings of the Ray cluster."""

from __future__ import annotations

from pydantic import Field

from raypipe.config.base import Positive, Settings


class ClusterSettings(Settings):
    """The Ray cluster."""

    address: str = Field(
        "auto",
        min_length=1,
        description="Ray address. auto: RAY_ADDRESS or the cluster of the Ray job, otherwise this "
        "machine. local: this machine.",
    )
    patience_seconds: Positive = Field(
        600,
        description="Seconds without progress after which a stage fails. Raise it if new machines "
        "take longer to start.",
    )
    keep_off_spot: bool = Field(
        False,
        description="Keep long trainings (proxies, pseudo-labels, fits of extrapolators, "
        "raypipe evaluate) off spot machines: nodes with Ray's label ray.io/market-type=spot. "
        "Needs other nodes, or an autoscaler that can add them.",
    )
    preload: bool = Field(
        True,
        description="Fork workers from one process that has imported torch and Ray, instead of "
        "importing them in every worker. Only on a cluster that the command starts on this "
        "machine, and only on Linux.",
    )
