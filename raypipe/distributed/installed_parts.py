"""Parts that installed packages add: scores, extrapolators, strategies and sources."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from raypipe.errors import ConfigError
from raypipe.plugins import (
    EXTRAPOLATOR,
    SCORE,
    SOURCE,
    STRATEGY,
    PartKind,
    declared,
    find,
    package_of,
)

_BASES = {
    SCORE: ("raypipe.scores.base", "Score"),
    EXTRAPOLATOR: ("raypipe.extrapolators.base", "Extrapolator"),
    STRATEGY: ("raypipe.selection", "KeepStrategy"),
    SOURCE: ("raypipe.sources", "Source"),
}
"""Module and name of the class that parts of each kind are derived from."""


def find_part(kind: PartKind, name: str, setting: str = "") -> Any:
    """Return the class of a part; see `raypipe.plugins.find`."""
    module, base = _BASES[kind]
    return find(kind, name, getattr(import_module(module), base), setting)


def installed_parts(kind: PartKind) -> Iterator[tuple[str, Any]]:
    """Yield name and class of each part that an installed package declares.

    In place of a class that cannot be imported, there is the error.
    """
    for name in declared(kind):
        try:
            yield name, find_part(kind, name)
        except ConfigError as error:
            yield name, error


def described_parts() -> dict[str, list[str]]:
    """Return paragraphs about all installed parts and their options, by the setting of options."""
    result: dict[str, list[str]] = {}
    for kind in _BASES:
        for name, part in installed_parts(kind):
            lines = result.setdefault(kind.options, [])
            if isinstance(part, Exception):
                lines.append(f"{name} cannot be used: {part}")
                continue
            lines.append(f"{name} ({package_of(kind, name)}): {part.summary}.")
            lines += [
                f"{name}: {option}: {field.get_default()}  {field.description or ''}".rstrip()
                for option, field in part.Options.model_fields.items()
            ]
    return result
