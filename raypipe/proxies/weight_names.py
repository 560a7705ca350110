"""How a state dict differs from the network that it is loaded into, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SHOWN = 3
"""Names of each kind that a message shows."""


def differences(names: Mapping[str, Sequence[str]]) -> str:
    """Return numbers and some names, such as "2 missing (a, b) and 1 unexpected (c)".

    Parameters
    ----------
    names : Mapping[str, Sequence[str]]
        By kind of difference. A kind without names is left out.
    """
    return " and ".join(
        f"{len(found)} {kind} ({', '.join(found[:SHOWN])}{', ...' * (len(found) > SHOWN)})"
        for kind, found in names.items()
        if found
    )
