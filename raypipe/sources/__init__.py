"""Sources: one module per format, registered in `_SOURCES`.

To add a format, see `raypipe.sources.base.Source`. A package can add its own: a subclass of
`Source` that it declares as an entry point of the group `raypipe.sources`, or that `source.format`
names as `module:Class`.
"""

from __future__ import annotations

from importlib import import_module

from raypipe.config import SourceSettings
from raypipe.plugins import SOURCE, find
from raypipe.sources.base import Source
from raypipe.sources.classes import ClassMap, StatedNames, class_map
from raypipe.sources.location import refuse_web_folder
from raypipe.sources.types import FileScan, Fragment, IdFilter, RawSample, SourceFile

__all__ = [
    "ClassMap",
    "FileScan",
    "Fragment",
    "IdFilter",
    "RawSample",
    "Source",
    "SourceFile",
    "StatedNames",
    "class_map",
    "open_source",
    "source_class",
]

_SOURCES = {
    "parquet": "raypipe.sources.parquet.source:ParquetSource",
    "imagefolder": "raypipe.sources.imagefolder:ImageFolderSource",
    "filelist": "raypipe.sources.filelist:FileListSource",
    "webdataset": "raypipe.sources.webdataset:WebDatasetSource",
    "tfrecord": "raypipe.sources.tfrecord:TFRecordSource",
    "mds": "raypipe.sources.mds:MdsSource",
    "lance": "raypipe.sources.lance:LanceSource",
    "huggingface": "raypipe.sources.huggingface:HuggingFaceSource",
    "digits": "raypipe.sources.digits:DigitsSource",
    "torchvision": "raypipe.sources.torchvision_sets:TorchvisionSource",
    "synthetic": "raypipe.sources.synthetic:SyntheticSource",
}
"""Format -> "module:class". A module is imported when its format is first used."""


def open_source(settings: SourceSettings) -> Source:
    """Return the source that the settings describe.

    Raises
    ------
    SourceError
        If `format` is `auto` and the format cannot be determined, or for a folder on the web.
    ConfigError
        If a source from outside raypipe cannot be imported, or must not be.
    """
    refuse_web_folder(settings.uri)
    format: str = settings.format
    if format == "auto":
        from raypipe.sources.detect import detect_format

        format = detect_format(settings)
    return source_class(format)(settings)


def source_class(format: str) -> type[Source]:
    """Return the class of a format other than `auto`."""
    if format not in _SOURCES:
        kind = find(SOURCE, format, Source)
        kind.format = format
        return kind
    module, _, name = _SOURCES[format].partition(":")
    return getattr(import_module(module), name)
