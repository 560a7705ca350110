"""Normalisation of a proxy's input."""

from __future__ import annotations

from collections.abc import Sequence

from raypipe.config import ProxySettings


def input_statistics(
    settings: ProxySettings, mean: Sequence[float], std: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of the channels, as `proxy.normalize` chooses them.

    Parameters
    ----------
    settings : ProxySettings
        The settings.
    mean, std : sequence of float
        The measured values, for pixels from 0 to 1. They also serve a network that states none.
    """
    if settings.normalize == "network":
        from raypipe.proxies.registry import find

        network = find(settings.model)
        mean_of, std_of = network.mean, network.std
        if mean_of is not None and std_of is not None and len(mean_of) == settings.channels:
            return list(mean_of), list(std_of)
    return settings.statistics(mean, std)
