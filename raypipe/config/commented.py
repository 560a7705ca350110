"""Print every setting with its default and a comment, as `raypipe init` does."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import yaml

from raypipe.config.base import Settings
from raypipe.config.model import Config

MINIMAL = {"source": ("uri",), "seed": ("fraction",), "proxy": ("image_size",), "select": ("keep",)}
"""Sections and settings of the shortest useful configuration."""
WIDTH = 100
"""Columns of the printed configuration."""


def minimal_config() -> str:
    """Return a configuration in YAML with the settings that nearly every run sets."""
    lines = _comment(
        "A raypipe configuration. All other settings have their defaults; `raypipe init` prints "
        "them. `raypipe inspect --config FILE` shows what the source holds and what a run costs.",
        "",
    )
    fields = Config.model_fields
    result = [*lines, "", *_comment(str(fields["run"].description), ""), "run: runs/first"]
    for section, names in MINIMAL.items():
        kind = fields[section].annotation
        assert isinstance(kind, type) and issubclass(kind, Settings)
        result += ["", f"{section}:", *_settings(kind, "  ", names)]
    return "\n".join(result) + "\n"


def commented_config(parts: Mapping[str, Sequence[str]] = MappingProxyType({})) -> str:
    """Return a complete configuration in YAML, with a comment above every setting.

    Parameters
    ----------
    parts : Mapping
        Paragraphs about parts of other packages, by the setting that holds their options, such as
        "measure.options".
    """
    lines = [
        *_comment(
            "A raypipe configuration. Every value shown is the default. Only run and source.uri "
            "are required; delete the lines you don't need.",
            "",
        ),
        "",
        *_comment(str(Config.model_fields["run"].description), ""),
        "run: runs/first",
    ]
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Settings):
            lines += ["", *_comment(_summary(section), ""), f"{name}:"]
            about = {key: parts.get(f"{name}.{key}", ()) for key in section.model_fields}
            lines += _settings(section, "  ", about=about)
    return "\n".join(lines) + "\n"


def _settings(
    section: type[Settings],
    indent: str,
    names: Collection[str] | None = None,
    about: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Iterator[str]:
    for key, info in section.model_fields.items():
        if names is not None and key not in names:
            continue
        if isinstance(info.annotation, type) and issubclass(info.annotation, Settings):
            yield from _comment(_summary(info.annotation), indent)
            yield f"{indent}{key}:"
            yield from _settings(info.annotation, indent + "  ")
            continue
        default = "data/train" if info.is_required() else info.default
        value = yaml.safe_dump(
            list(default) if isinstance(default, tuple) else default, default_flow_style=True
        )
        yield from _comment(str(info.description), indent)
        for line in about.get(key, ()):
            yield from _comment(line, indent)
        yield f"{indent}{key}: {value.strip().removesuffix('...').strip()}"


def _summary(section: type[Settings]) -> str:
    """Return the first paragraph of a section's docstring."""
    return " ".join((section.__doc__ or "").strip().partition("\n\n")[0].split())


def _comment(text: str, indent: str) -> Iterable[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=prefix,
        subsequent_indent=prefix,
        break_long_words=False,
        break_on_hyphens=False,
    )
