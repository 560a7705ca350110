"""A setting that a format does not use is refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from source_helpers import picture

from raypipe import storage
from raypipe.config import Config, SourceSettings, parse_config
from raypipe.errors import ConfigError
from raypipe.estimate import inspect_source
from raypipe.evaluation.held_out import source_of_test_set
from raypipe.pipeline import execute
from raypipe.sources import _SOURCES
from raypipe.sources.used_settings import _USED, refuse_unused_settings, unused_settings


@pytest.mark.parametrize(
    ("format", "given", "unused"),
    [
        ("parquet", {"split": "train"}, "split"),
        ("parquet", {"class_map": "x"}, "class_map"),
        ("imagefolder", {"id_column": "uid"}, "id_column"),
        ("imagefolder", {"label_column": "kind"}, "label_column"),
        ("webdataset", {"id_column": "key"}, "id_column"),
        ("filelist", {"image_column": "img"}, "image_column"),
        ("torchvision", {"include": "*.png"}, "include"),
        ("digits", {"root": "/data"}, "root"),
    ],
)
def test_a_setting_without_effect(format: str, given: dict[str, Any], unused: str) -> None:
    settings = SourceSettings(uri="x", **given)
    words = f"source.{unused}: {next(iter(given.values()))!r} has no effect on the format {format}"
    with pytest.raises(ConfigError, match=words.replace("*", r"\*")):
        refuse_unused_settings(settings, format)


def test_every_format_is_listed_and_its_settings_pass() -> None:
    assert set(_USED) == set(_SOURCES)
    values: dict[str, Any] = {"download": False, "verify": False}
    for format, names in _USED.items():
        given = {name: values.get(name, "x") for name in names}
        refuse_unused_settings(SourceSettings(uri="x", **given), format)
        refuse_unused_settings(SourceSettings(uri="x", label_column=None), format)
    # a format from elsewhere says nothing about its settings
    assert unused_settings(SourceSettings(uri="x", split="y"), "another") == []


def test_where_settings_are_refused(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/data/a/1.png", picture(0))
    uri = f"{tmp_path}/data"
    config = parse_config({"run": f"{tmp_path}/run", "source": {"uri": uri, "split": "train"}})
    words = r"source.split: 'train' has no effect on the format imagefolder; .* source.include"
    with pytest.raises(ConfigError, match=words):
        inspect_source(config.source)
    with pytest.raises(ConfigError, match=words):
        execute(config)
    assert not storage.exists(config.run)


def test_a_test_set_of_another_format(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/test/a/1.png", picture(0))
    run: Config = parse_config(
        {"run": "run", "source": {"uri": "s3://b/set", "format": "parquet", "id_column": "uid"}}
    )
    test = source_of_test_set(run, f"{tmp_path}/test", ["limit=5"])
    assert (test.id_column, test.limit, test.uri) == (None, 5, f"{tmp_path}/test")
    with pytest.raises(ConfigError, match=r"source.id_column: 'key' has no effect"):
        source_of_test_set(run, f"{tmp_path}/test", ["id_column=key"])
