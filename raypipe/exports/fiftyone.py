"""Describe samples in the layout of `fiftyone.types.FiftyOneDataset`: two JSON files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Any

import pyarrow as pa

SAMPLES_FILE, METADATA_FILE = "samples.json", "metadata.json"
VERSION = "1.0.0"
"""The version of FiftyOne whose layout this is. Newer ones migrate it when they import it."""
_FIELDS = "fiftyone.core.fields."
_LABEL = "fiftyone.core.labels.Classification"


def write_samples(
    file: IO[bytes], tables: Iterable[pa.Table], classes: Sequence[str], image: Callable[[str], str]
) -> None:
    """Write the documents of all samples, one table after another.

    Parameters
    ----------
    file : binary file
    tables : iterable of pyarrow.Table
        Parts of what `raypipe.exports.all_samples.described_samples` yields.
    classes : sequence of str
        Names of the classes.
    image : callable
        Returns the path or URL of the image of a sample id.
    """
    file.write(b'{"samples": [')
    separator = b""
    for table in tables:
        rows = table.to_pylist()
        documents = (_json(_sample(image(row["sample_id"]), row, classes)) for row in rows)
        if rows:
            file.write(separator + b", ".join(documents))
            separator = b", "
    file.write(b"]}")


def metadata(classes: Sequence[str]) -> bytes:
    """Return the content of the file that describes the dataset."""
    return _json(_metadata(classes))


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _sample(image: str, row: dict[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    number = hashlib.blake2b(row["sample_id"].encode(), digest_size=12)
    key = number.hexdigest()

    def label(index: int | None, suffix: str, **more: Any) -> dict[str, Any] | None:
        if index is None or not 0 <= index < len(classes):
            return None
        identity = {"_id": {"$oid": key[:-1] + suffix}, "_cls": "Classification"}
        return {**identity, "tags": [], "label": classes[index], **more}

    return {
        "_id": {"$oid": key},
        "_media_type": "image",
        "_rand": int(key[:13], 16) / 16**13,
        "filepath": image,
        "tags": [],
        "metadata": None,
        "sample_id": row["sample_id"],
        "ground_truth": label(row["label"], "0"),
        "prediction": label(row["prediction"], "1", confidence=_finite(row["confidence"])),
        **{name: _finite(row[name]) for name in ("score", "lower", "upper")},
        **{name: row[name] for name in ("measured", "kept", "label_error_rank")},
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < float("inf") else None


def _metadata(classes: Sequence[str]) -> dict[str, Any]:
    """Return the dataset document: the fields of the samples and the names of the classes."""
    kinds = {
        "sample_id": "StringField",
        "score": "FloatField",
        "lower": "FloatField",
        "upper": "FloatField",
        "measured": "BooleanField",
        "kept": "BooleanField",
        "label_error_rank": "IntField",
    }
    label_fields = [
        _field("id", "ObjectIdField", db_field="_id"),
        _field("tags", "ListField", subfield=f"{_FIELDS}StringField"),
        _field("label", "StringField"),
        _field("confidence", "FloatField"),
        _field("logits", "VectorField"),
    ]
    fields = [
        _field("id", "ObjectIdField", db_field="_id"),
        _field("filepath", "StringField"),
        _field("tags", "ListField", subfield=f"{_FIELDS}StringField"),
        _field(
            "metadata",
            "EmbeddedDocumentField",
            embedded_doc_type="fiftyone.core.metadata.ImageMetadata",
        ),
        *(
            _field(name, "EmbeddedDocumentField", embedded_doc_type=_LABEL, fields=label_fields)
            for name in ("ground_truth", "prediction")
        ),
        *(_field(name, kind) for name, kind in kinds.items()),
    ]
    return {
        "name": "raypipe",
        "version": VERSION,
        "persistent": False,
        "media_type": "image",
        "tags": [],
        "info": {},
        "app_config": {},
        "classes": {"ground_truth": list(classes), "prediction": list(classes)},
        "default_classes": list(classes),
        "mask_targets": {},
        "default_mask_targets": {},
        "skeletons": {},
        "sample_fields": fields,
        "frame_fields": [],
        "saved_views": [],
        "workspaces": [],
        "annotation_runs": {},
        "brain_methods": {},
        "evaluations": {},
        "runs": {},
    }


def _field(name: str, kind: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "ftype": _FIELDS + kind,
        "embedded_doc_type": None,
        "subfield": None,
        "fields": [],
        "db_field": name,
        "description": None,
        "info": None,
        "read_only": False,
        **more,
    }
