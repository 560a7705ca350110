"""Read, validate, override and write configurations.

A configuration is YAML (safe loading only). An unknown key or a bad value raises `ConfigError`,
which names the field, the value and what is allowed.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from raypipe.config.base import Settings
from raypipe.config.choices import WITHOUT_FILE
from raypipe.config.embed import EmbedSettings
from raypipe.config.model import Config
from raypipe.config.problems import problem_lines
from raypipe.errors import ConfigError

Section = TypeVar("Section", bound=Settings)


def parse_config(data: Mapping[str, Any]) -> Config:
    """Validate a mapping. Raises `ConfigError` with one line per wrong field."""
    try:
        return Config.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError("bad configuration\n" + "\n".join(problem_lines(error, Config))) from None


def parse_settings(section: type[Section], data: Mapping[str, Any], name: str) -> Section:
    """Validate settings that are not part of a configuration.

    Raises `ConfigError` with one line per wrong field.
    """
    try:
        return section.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(
            f"bad settings of {name}\n" + "\n".join(problem_lines(error, section))
        ) from None


def load_config(path: str, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply overrides and validate the result.

    Parameters
    ----------
    path : str
        Path or URI of the file.
    overrides : iterable of str
        `section.field=value`; values are YAML.

    Returns
    -------
    Config
        Local paths are absolute. Relative paths in the file (`run`, `source.uri`) are relative to
        the working directory.

    Raises
    ------
    ConfigError
        If the file cannot be read, or a setting is unknown or has a wrong value.
    """
    return absolute_paths(parse_config(apply_overrides(read_config(path), overrides)))


def demo_settings() -> dict[str, Any]:
    """Return the configuration of the demo, without `run`: the digits of scikit-learn."""
    from importlib.resources import files

    return yaml.safe_load(files("raypipe.config").joinpath("demo.yaml").read_bytes())


def read_config(path: str) -> dict[str, Any]:
    """Return the content of a YAML file without validating it. Raises `ConfigError`."""
    from raypipe.storage import read_bytes

    try:
        data = _UniqueKeys(read_bytes(path)).get_single_data()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `raypipe init > my.yaml` writes one") from None
    except IsADirectoryError:
        resumed = os.path.join(path, "config.yaml")
        hint = f"; of this run, that is {resumed}" if os.path.isfile(resumed) else ""
        raise ConfigError(f"{path}: a folder; give the YAML file of the settings{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: expected sections such as 'source:' and 'proxy:', found {type(data).__name__}"
        )
    return data


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that a mapping already has: the second section would replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping. Raises yaml.YAMLError for a repeated key."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(
                    f"{key.value!r} is in line {lines[key.value]} and again in line {line}; "
                    "merge the two"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of `data` with every `section.field=value` set; values are YAML.

    Raises `ConfigError` for a malformed override.
    """
    result = copy.deepcopy(dict(data))
    for item in overrides:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {item!r}: expected section.field=value")
        *sections, field = name.strip().split(".")
        target = result
        for section in sections:
            if target.get(section) is None:  # a section without content, as in `source:`
                target[section] = {}
            target = target[section]
            if not isinstance(target, dict):
                raise ConfigError(f"--set {item!r}: {section!r} is a value, not a section")
        try:
            target[field] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {item!r}: not a YAML value: {error}") from None
    return result


def absolute_paths(config: Config) -> Config:
    """Return the configuration with absolute paths: workers have other working directories."""

    def absolute(uri: str) -> str:
        return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))

    def absolute_in(section: Section, *names: str) -> Section:
        uris = {name: vars(section)[name] for name in names}
        return section.model_copy(
            update={
                name: absolute(uri)
                for name, uri in uris.items()
                if uri is not None and not (name == "weights" and uri in WITHOUT_FILE)
            }
        )

    def absolute_features(embed: EmbedSettings) -> EmbedSettings:
        library, _, rest = embed.model.partition(":")
        if library == "transformers" and os.path.isdir(os.path.expanduser(rest)):
            embed = embed.model_copy(update={"model": f"{library}:{absolute(rest)}"})
        return absolute_in(embed, "weights", "from")

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
            "proxy": absolute_in(config.proxy, "weights"),
            "embed": absolute_features(config.embed),
            "select": select,
        }
    )


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as section.field: value."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            result |= flat_settings(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result


def dump_config(config: Config, sections: Mapping[str, Any] | None = None) -> str:
    """Return the resolved configuration, or some of its sections, as YAML for `load_config`."""
    return yaml.safe_dump(
        config.model_dump(mode="json", include=sections), sort_keys=False, allow_unicode=True
    )
