"""Print every setting with its default and a comment, as `raypipe init` does."""

from __future__ import annotations

from collections.abc import Iterable

import yaml

from raypipe.config.base import Settings
from raypipe.config.model import Config


def commented_config() -> str:
    """A complete configuration with a comment on every field, for `raypipe init`."""
    lines = [
        "# A raypipe configuration. Every value shown is the default; only run and source.uri are required.",
        "",
    ]
    lines += ["run: runs/first              # " + str(Config.model_fields["run"].description)]
    for name, field in Config.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, Settings)):
            continue
        lines += ["", f"# {(section.__doc__ or '').strip()}", f"{name}:"]
        lines += _commented(section, "  ")
    return "\n".join(lines) + "\n"


def _commented(section: type[Settings], indent: str) -> Iterable[str]:
    for key, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Settings):
            yield f"{indent}{key}:".ljust(29) + f"# {(info.annotation.__doc__ or '').strip()}"
            yield from _commented(info.annotation, indent + "  ")
            continue
        default = "data/train" if info.is_required() else info.default
        value = yaml.safe_dump(
            list(default) if isinstance(default, tuple) else default, default_flow_style=True
        )
        value = value.removesuffix("\n").removesuffix("\n...").strip()
        yield f"{indent}{key}: {value}".ljust(29) + f"# {info.description}"
