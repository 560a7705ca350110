"""How the test set of an evaluation is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from raypipe.config import Config, SourceSettings, absolute_paths, apply_overrides, parse_config
from raypipe.config.outside import outside_names
from raypipe.config.parts import part_names_accepted
from raypipe.errors import SourceError
from raypipe.runs.run import Run
from raypipe.sources import open_source
from raypipe.sources.used_settings import refuse_unused_settings, unused_settings


@contextmanager
def options_named() -> Iterator[None]:
    """Let errors name the options of `raypipe evaluate`, which the settings of a test set are."""
    try:
        yield
    except SourceError as error:
        text = re.sub(r"source\.uri", "--test", str(error))
        raise SourceError(re.sub(r"source\.(\w+)", r"--test-set \1", text)) from None


def source_of_test_set(config: Config, uri: str, overrides: Sequence[str]) -> SourceSettings:
    """Return the source settings of a test set: those of the run with another URI.

    Settings of the run that have no effect on the test set's format are left out. Raises
    ConfigError if one is among the overrides.
    """
    data = config.model_dump(mode="json")
    reset = ("format", "include", "split", "limit")
    data["source"] |= {name: SourceSettings.model_fields[name].default for name in reset}
    data["source"]["uri"] = uri
    if Run(uri).uri == Run(config.source.uri).uri:  # another part of the run's own source
        data["source"]["format"] = config.source.format
    dotted = [item if "." in item.partition("=")[0] else f"source.{item}" for item in overrides]
    with part_names_accepted(outside_names(config)):
        source = absolute_paths(parse_config(apply_overrides(data, dotted))).source
    with options_named():
        format = open_source(source).format
    given = {item.partition("=")[0].removeprefix("source.") for item in dotted}
    inherited = set(unused_settings(source, format)) - given
    source = source.model_copy(
        update={name: SourceSettings.model_fields[name].default for name in inherited}
    )
    refuse_unused_settings(source, format)
    return source
