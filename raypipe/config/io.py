"""The settings of a run: one model per stage (`raypipe.settings`), validated before any work starts.

A configuration is YAML (safe loading only). An unknown key or a bad value raises `ConfigError`, naming the field, the
value and what is allowed. Descriptions of the fields are also the comments `raypipe init` prints.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from raypipe.config.base import Settings
from raypipe.config.model import Config
from raypipe.config.problems import problem_lines
from raypipe.errors import ConfigError

Section = TypeVar("Section", bound=Settings)


def parse_config(data: Mapping[str, Any]) -> Config:
    """Validate a mapping. Raises `ConfigError` with one line for each wrong field."""
    try:
        return Config.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError("bad configuration\n" + "\n".join(problem_lines(error))) from None


def parse_settings(section: type[Section], data: Mapping[str, Any], name: str) -> Section:
    """Validate settings that are no part of a configuration. Raises `ConfigError` with one line for each wrong field."""
    try:
        return section.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(
            f"bad settings of {name}\n" + "\n".join(problem_lines(error, section))
        ) from None


def load_config(path: str, overrides: Iterable[str] = ()) -> Config:
    """Read YAML from a path or URI and apply `section.field=value` overrides. Raises `ConfigError`.

    Relative paths in the file (`run`, `source.uri`) are relative to the working directory, as on any command line.
    """
    return absolute_paths(parse_config(apply_overrides(read_config(path), overrides)))


def read_config(path: str) -> dict[str, Any]:
    """The sections of a YAML file as they stand there, not validated. Raises `ConfigError`."""
    from raypipe.storage import read_bytes

    try:
        data = yaml.safe_load(read_bytes(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: expected sections such as 'source:' and 'proxy:', found {type(data).__name__}"
        )
    return data


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `data` with every `section.field=value` set; values are YAML. Raises `ConfigError` on a malformed one."""
    result = copy.deepcopy(dict(data))
    for item in overrides:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {item!r}: expected section.field=value")
        *sections, field = name.strip().split(".")
        target = result
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {item!r}: {section!r} is a value, not a section")
        try:
            target[field] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {item!r}: not a YAML value: {error}") from None
    return result


def absolute_paths(config: Config) -> Config:
    """Make local paths absolute, since workers have other working directories."""

    def absolute(uri: str) -> str:
        return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))

    def absolute_in(section: Section, *names: str) -> Section:
        given = {name: getattr(section, name) for name in names}
        return section.model_copy(
            update={name: absolute(uri) for name, uri in given.items() if uri is not None}
        )

    source = absolute_in(config.source, "uri", "root", "class_map")
    select, labels = (
        absolute_in(config.select, "always_keep", "never_keep"),
        absolute_in(config.pseudo_labels, "weights"),
    )
    return config.model_copy(
        update={
            "run": absolute(config.run),
            "source": source,
            "pseudo_labels": labels,
            "select": select,
        }
    )


def dump_config(config: Config, sections: Mapping[str, Any] | None = None) -> str:
    """The resolved configuration, or some sections of it, as YAML that `load_config` reads back."""
    return yaml.safe_dump(
        config.model_dump(mode="json", include=sections), sort_keys=False, allow_unicode=True
    )
