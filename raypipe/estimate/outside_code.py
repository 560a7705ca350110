"""What `raypipe inspect` shows of code from outside raypipe."""

from __future__ import annotations

from raypipe.config import Config
from raypipe.config.outside import named_code
from raypipe.plugins import allows_code, package_of


def described_code(config: Config) -> tuple[str, ...]:
    """Return a line for each piece of code that a configuration names.

    Where code can be imported, it is imported, with what it states about itself.

    Raises
    ------
    ConfigError
        If it cannot be imported, or options of a part are wrong.
    """
    if not allows_code():
        lines = []
        for item in named_code(config):
            package = package_of(item.kind, item.name) if item.kind is not None else ""
            origin = f" of {package}" if package else ""
            lines.append(f"{item.setting} {item.name}{origin} (not imported without --allow-code)")
        return tuple(lines)
    from raypipe.distributed.outside_code import import_code

    return tuple(item.text() for item in import_code(config))
