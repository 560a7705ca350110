"""Which settings each format uses. One that has no effect is refused, not ignored."""

from __future__ import annotations

from raypipe.config import SourceSettings
from raypipe.errors import ConfigError

_USED = {
    "parquet": {"include", "image_column", "label_column", "id_column"},
    "imagefolder": {"include", "class_map"},
    "filelist": {"include", "root", "path_column", "label_column", "class_map"},
    "webdataset": {"include", "image_column", "label_column"},
    "tfrecord": {"include", "image_column", "label_column", "id_column"},
    "mds": {"include", "image_column", "label_column", "id_column"},
    "lance": {"version", "image_column", "label_column", "id_column"},
    "huggingface": {
        "include",
        "split",
        "config_name",
        "image_column",
        "label_column",
        "id_column",
    },
    "torchvision": {"root", "split", "download", "verify"},
    "synthetic": set[str](),
    "digits": set[str](),
}
"""Format -> settings that not every format uses."""
_ADVICE = {"split": "; choose the files of a split with source.include"}


def unused_settings(settings: SourceSettings, format: str) -> list[str]:
    """Return the settings that are given and that the format does not use.

    `label_column: null` counts as used: it leaves out the labels of any format.
    """
    specific = sorted(set().union(*_USED.values()))
    given = [
        name
        for name in specific
        if getattr(settings, name) != SourceSettings.model_fields[name].default
        and (name, getattr(settings, name)) != ("label_column", None)
    ]
    return [name for name in given if name not in _USED.get(format, specific)]


def refuse_unused_settings(settings: SourceSettings, format: str) -> None:
    """Raise ConfigError for a setting that the format does not use."""
    for name in unused_settings(settings, format):
        advice = _ADVICE.get(name, "") if "include" in _USED[format] else ""
        raise ConfigError(
            f"source.{name}: {getattr(settings, name)!r} has no effect on the format {format}; "
            f"leave it out{advice}"
        )
