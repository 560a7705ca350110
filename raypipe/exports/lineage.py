"""Describe where a keep-list comes from, as an event of OpenLineage 2.

The event is a complete run of a job: its input is the source, its output the keep-list. It can be
sent to any collector of OpenLineage, such as Marquez or DataHub.
"""

from __future__ import annotations

import json
import operator
import os
import urllib.parse
import uuid
from typing import Any

import numpy as np
import pyarrow.compute as pc

from raypipe import storage
from raypipe._version import __version__
from raypipe.config.export import ExportSettings
from raypipe.errors import ConfigError
from raypipe.exports.written_files import write_files
from raypipe.keeplists.file import KeepFile, Located
from raypipe.report.text import without_secrets
from raypipe.runs.keep_files import keep_metadata
from raypipe.runs.run import Run

PARENT_VARIABLE = "OPENLINEAGE_PARENT_ID"
"""Environment variable with the run of the scheduler: namespace/job/run id, as the macro
`lineage_parent_id` of Airflow's provider gives it."""
NAMESPACE_VARIABLE = "OPENLINEAGE_NAMESPACE"
"""Environment variable with the namespace of the job."""
_PRODUCER = f"urn:raypipe:{__version__}"
_SPEC = "https://openlineage.io/spec"
_CORE = "2-0-2/OpenLineage.json#/$defs"
_STORES = {"s3a": "s3", "gcs": "gs"} | {
    scheme: scheme for scheme in ("s3", "gs", "az", "abfs", "abfss", "hf", "http", "https")
}
"""Scheme -> scheme of the namespace, for stores in which a URI names a bucket and a path."""


def export_lineage(
    run: Run, keep_list: str, located: Located, settings: ExportSettings
) -> dict[str, Any]:
    """Write the event of a keep-list to a JSON file; see `raypipe.export`."""
    if not settings.to.lower().endswith(".json"):
        raise ConfigError(
            f"{settings.to}: format openlineage writes a single file; give it a name that ends in "
            ".json"
        )
    event = lineage_event(run, keep_list, located, settings.snapshot)
    content = json.dumps(event, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    files = {settings.to: operator.methodcaller("write", content.encode())}
    return {
        "format": settings.format,
        "to": settings.to,
        "samples": located.samples,
        "shards": 1,
        "bytes": write_files(files, settings.force),
        "missing": 0,
    }


def lineage_event(
    run: Run, keep_list: str, located: Located, snapshot: str | None = None
) -> dict[str, Any]:
    """Return the event. It is the same for the same keep-list and parent.

    Parameters
    ----------
    run : Run
        The run.
    keep_list : str
        URI of the keep-list.
    located : Located
        Its fingerprint, which is the version of the dataset, and its number of samples.
    snapshot : str, optional
        The snapshot of a nightly run that the keep-list is of.

    Raises
    ------
    ConfigError
        If the environment variable of the parent is not namespace/job/run id.
    """
    source, uri, written = (
        without_secrets(uri) for uri in (run.config().source.uri, run.uri, keep_list)
    )
    cut = {name: without_secrets(value) for name, value in keep_metadata(keep_list).items()}
    with KeepFile(keep_list) as kept:
        fields = [{"name": field.name, "type": str(field.type)} for field in kept.schema]
        metrics = _score_metrics(kept)
    about: dict[str, Any] = {"run": uri, "cut": cut}
    if snapshot is not None:
        about["snapshot"] = snapshot
    output_facets = {
        "schema": _facet("1-2-0", "SchemaDatasetFacet", fields=fields),
        "version": _facet(
            "1-0-1", "DatasetVersionDatasetFacet", datasetVersion=located.fingerprint
        ),
        "dataSource": _data_source(written),
        "dataQualityMetrics": _facet(
            "1-0-1",
            "DataQualityMetricsDatasetFacet",
            rowCount=located.samples,
            columnMetrics={"score": metrics},
        ),
        "raypipe_keepList": _described(f"{_CORE}/DatasetFacet", **about),
    }
    statistics = _facet(
        "1-0-2",
        "OutputStatisticsOutputDatasetFacet",
        rowCount=located.samples,
        size=storage.info(keep_list).size,
        fileCount=1,
    )
    samples = {"rowCount": int(cut["samples"])} if "samples" in cut else {}
    scored = _facet("1-0-3", "DataQualityMetricsInputDatasetFacet", columnMetrics={}, **samples)
    engine = _facet("1-1-1", "ProcessingEngineRunFacet", name="raypipe", version=__version__)
    identity = f"{uri}#{storage.name(keep_list)}#{located.fingerprint}"
    return {
        "eventType": "COMPLETE",
        "eventTime": storage.modified(keep_list).isoformat(),
        "run": {
            "runId": str(uuid.uuid5(uuid.NAMESPACE_URL, identity)),
            "facets": {"processing_engine": engine, **_parent()},
        },
        "job": {"namespace": os.environ.get(NAMESPACE_VARIABLE) or "raypipe", "name": uri},
        "inputs": [
            {
                **_dataset(source),
                "facets": {"dataSource": _data_source(source)},
                "inputFacets": {"dataQualityMetrics": scored},
            }
        ],
        "outputs": [
            {
                **_dataset(written),
                "facets": output_facets,
                "outputFacets": {"outputStatistics": statistics},
            }
        ],
        "producer": _PRODUCER,
        "schemaURL": f"{_SPEC}/{_CORE}/RunEvent",
    }


def _facet(version: str, facet: str, /, **content: Any) -> dict[str, Any]:
    """Return a facet that the specification defines."""
    return _described(f"facets/{version}/{facet}.json#/$defs/{facet}", **content)


def _described(schema: str, /, **content: Any) -> dict[str, Any]:
    return {"_producer": _PRODUCER, "_schemaURL": f"{_SPEC}/{schema}", **content}


def _score_metrics(kept: KeepFile) -> dict[str, float | int]:
    """Return count, sum, smallest and largest of the scores of a keep-list."""
    count, total, low, high = 0, 0.0, np.inf, -np.inf
    for batch in kept.batches():
        scores = pc.drop_null(batch.column("score")).to_numpy().astype(np.float64)
        scores = scores[np.isfinite(scores)]
        if len(scores):
            count, total = count + len(scores), total + float(scores.sum())
            low, high = min(low, float(scores.min())), max(high, float(scores.max()))
    return {"count": count, **({"sum": total, "min": low, "max": high} if count else {})}


def _parent() -> dict[str, Any]:
    """Return the facet of the run that started this one, if the environment names it."""
    given = os.environ.get(PARENT_VARIABLE, "")
    if not given:
        return {}
    namespace, _, rest = given.partition("/")
    job, _, run_id = rest.rpartition("/")
    try:
        parent = str(uuid.UUID(run_id))
    except ValueError:
        parent = ""
    if not (namespace and job and parent):
        raise ConfigError(
            f"{PARENT_VARIABLE}={given!r} is not namespace/job/run id, where the run id is a UUID; "
            "correct or unset it"
        )
    facet = _facet(
        "1-2-0",
        "ParentRunFacet",
        run={"runId": parent},
        job={"namespace": namespace, "name": job},
    )
    return {"parent": facet}


def _dataset(uri: str) -> dict[str, str]:
    """Return namespace and name of a dataset, as OpenLineage names files and objects."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return {"namespace": "file", "name": rest or uri}
    if scheme not in _STORES:  # such as digits:// and huggingface://user/name
        return {"namespace": scheme, "name": rest or scheme}
    bucket, _, path = rest.partition("/")
    return {"namespace": f"{_STORES[scheme]}://{bucket}", "name": path.rstrip("/") or "/"}


def _data_source(uri: str) -> dict[str, Any]:
    name = _dataset(uri)["namespace"]
    uri = uri if "://" in uri else f"file://{urllib.parse.quote(uri)}"
    return _facet("1-0-1", "DatasourceDatasetFacet", name=name, uri=uri)
