"""Describe Parquet shards in Croissant 1.0, the metadata format that `mlcroissant` reads."""

from __future__ import annotations

import json
from typing import Any

from raypipe.exports.finished import FinishedExport

CROISSANT_FILE = "croissant.json"
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The context that Croissant 1.0 prescribes."""


def croissant_files(export: FinishedExport) -> dict[str, bytes]:
    """Return the metadata: the files, a record set of samples, and one of the classes."""
    columns = {
        "label": ("sc:Integer", "Index of the class; empty for an unlabelled sample"),
        "sample_id": ("sc:Text", "Id of the sample in the keep-list"),
        "score": ("sc:Float", "Importance score; higher means keep"),
        **({"weight": ("sc:Float", "Training weight")} if export.weighted else {}),
    }
    image = _field("samples", "image", "sc:ImageObject", "The encoded image")
    image["source"] |= {"transform": {"jsonPath": "bytes"}}
    fields = [image, *(_field("samples", name, *about) for name, about in columns.items())]
    files = {
        "@type": "cr:FileSet",
        "@id": "shards",
        "encodingFormat": "application/x-parquet",
        "includes": "train-*.parquet",
    }
    classes = {
        "@type": "cr:RecordSet",
        "@id": "classes",
        "description": "Names of the classes",
        "key": {"@id": "classes/label"},
        "field": [
            {"@type": "cr:Field", "@id": "classes/label", "dataType": "sc:Integer"},
            {"@type": "cr:Field", "@id": "classes/name", "dataType": "sc:Text"},
        ],
        "data": [
            {"classes/label": label, "classes/name": name}
            for label, name in enumerate(export.classes)
        ],
    }
    metadata = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": "raypipe-keep-list",
        "description": f"{export.samples} samples that raypipe kept of a dataset, with scores",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "distribution": [files],
        "recordSet": [
            {"@type": "cr:RecordSet", "@id": "samples", "field": fields},
            *([classes] if export.classes else []),
        ],
    }
    return {CROISSANT_FILE: (json.dumps(metadata, indent=2, ensure_ascii=False) + "\n").encode()}


def _field(record_set: str, name: str, kind: str, description: str) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"{record_set}/{name}",
        "description": description,
        "dataType": kind,
        "source": {"fileSet": {"@id": "shards"}, "extract": {"column": name}},
    }
