"""Lineage of a keep-list: the event of OpenLineage, and that its own classes accept it."""

from __future__ import annotations

import importlib
import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET
from scored import add_weights, scored_run

import raypipe
from raypipe import storage
from raypipe.errors import ConfigError, RunError
from raypipe.exports import lineage
from raypipe.runs.run import Run

PARENT = "airflow/nightly.night/0198f0aa-0000-7000-8000-000000000001"
FACETS = {
    "schema": "schema_dataset.SchemaDatasetFacet",
    "version": "dataset_version_dataset.DatasetVersionDatasetFacet",
    "dataSource": "datasource_dataset.DatasourceDatasetFacet",
    "dataQualityMetrics": "data_quality_metrics_dataset.DataQualityMetricsDatasetFacet",
    "processing_engine": "processing_engine_run.ProcessingEngineRunFacet",
    "parent": "parent_run.ParentRunFacet",
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in (lineage.PARENT_VARIABLE, lineage.NAMESPACE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    run = scored_run(f"{tmp_path}/run", "digits://", limit=40, fragment_samples=16)
    add_weights(run, 0.5)
    return run


def event_of(run: Run, to: str, **options: Any) -> dict[str, Any]:
    done = raypipe.export(run.uri, 0.5, "openlineage", to, progress=QUIET, **options)
    assert (done["samples"], done["shards"], done["bytes"]) == (20, 1, storage.info(to).size)
    return storage.read_json(to)


def test_an_event_names_the_source_the_list_and_how_it_was_cut(run: Run, tmp_path: Path) -> None:
    event = event_of(run, f"{tmp_path}/event.json")
    keep = raypipe.KeepList(run.uri)
    assert (event["eventType"], event["job"]) == (
        "COMPLETE",
        {"namespace": "raypipe", "name": run.uri},
    )
    (source,), (kept,) = event["inputs"], event["outputs"]
    assert (source["namespace"], source["name"]) == ("digits", "digits")
    assert source["inputFacets"]["dataQualityMetrics"]["rowCount"] == 40
    assert (kept["namespace"], kept["name"]) == ("file", keep.uri)
    facets = kept["facets"]
    assert facets["dataSource"]["uri"] == Path(keep.uri).as_uri()
    assert [(field["name"], field["type"]) for field in facets["schema"]["fields"]] == [
        ("sample_id", "string"), ("label", "int32"), ("score", "float"), ("weight", "float"),
    ]  # fmt: skip
    score = facets["dataQualityMetrics"]["columnMetrics"]["score"]
    assert score == {
        "count": 20,
        "sum": pytest.approx(float(keep.scores.astype(float).sum())),
        "min": float(keep.scores.min()),
        "max": float(keep.scores.max()),
    }
    assert facets["raypipe_keepList"]["cut"]["strategy"] == "top"
    assert kept["outputFacets"]["outputStatistics"]["size"] == storage.info(keep.uri).size
    assert event["eventTime"] == storage.modified(keep.uri).isoformat()


def test_the_same_list_gives_the_same_event_and_another_list_another(
    run: Run, tmp_path: Path
) -> None:
    to = f"{tmp_path}/event.json"
    first = event_of(run, to)
    assert event_of(run, to) == first
    raypipe.select(run.uri, 0.5, "random", seed=5)
    with pytest.raises(RunError, match="already exists with other content"):
        event_of(run, to)
    again = event_of(run, to, force=True)
    assert again["run"]["runId"] != first["run"]["runId"] and again["job"] == first["job"]
    version = [event["outputs"][0]["facets"]["version"] for event in (first, again)]
    assert version[0] != version[1]
    with pytest.raises(ConfigError, match=r"ends in \.json"):
        event_of(run, f"{tmp_path}/event.txt")


def test_the_parent_comes_from_the_environment(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(lineage.PARENT_VARIABLE, PARENT)
    monkeypatch.setenv(lineage.NAMESPACE_VARIABLE, "team")
    event = event_of(run, f"{tmp_path}/event.json")
    parent = event["run"]["facets"]["parent"]
    assert parent["job"] == {"namespace": "airflow", "name": "nightly.night"}
    assert parent["run"]["runId"] == PARENT.rpartition("/")[2]
    assert event["job"]["namespace"] == "team"
    for wrong in ("airflow", f"/{uuid.uuid4()}", "a/b/c"):
        monkeypatch.setenv(lineage.PARENT_VARIABLE, wrong)
        with pytest.raises(ConfigError, match="is not namespace/job/run id"):
            event_of(run, f"{tmp_path}/wrong.json")


@pytest.mark.parametrize(
    ("uri", "namespace", "name"),
    [
        ("/data/train", "file", "/data/train"),
        ("file:///data/train", "file", "/data/train"),
        ("s3://bucket/a/b/", "s3://bucket", "a/b"),
        ("s3a://bucket", "s3://bucket", "/"),
        ("gcs://bucket/a", "gs://bucket", "a"),
        ("huggingface://user/name", "huggingface", "user/name"),
    ],
)
def test_names_of_datasets(uri: str, namespace: str, name: str) -> None:
    assert lineage._dataset(uri) == {"namespace": namespace, "name": name}


def test_no_secret_is_in_an_event(run: Run, tmp_path: Path) -> None:
    config = run.config()
    source = config.source.model_copy(update={"uri": "s3://me:hunter2@bucket/x?token=hunter2"})
    run.write_config(config.model_copy(update={"source": source}))
    located = raypipe.keeplists.file.locate(run, raypipe.KeepList(run.uri).uri)
    event = lineage.lineage_event(run, raypipe.KeepList(run.uri).uri, located)
    assert "hunter2" not in json.dumps(event) and "bucket" in json.dumps(event)


def test_the_classes_of_openlineage_accept_the_event(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They refuse unknown fields, and give each object the address of its schema."""
    pytest.importorskip("openlineage.client")
    from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent
    from openlineage.client.event_v2 import RunState as State
    from openlineage.client.serde import Serde

    monkeypatch.setenv(lineage.PARENT_VARIABLE, PARENT)
    event = event_of(run, f"{tmp_path}/event.json")

    def facets(found: dict[str, Any], kinds: dict[str, str] = FACETS) -> dict[str, Any]:
        result = {}
        for name, facet in found.items():
            if name.startswith("raypipe_"):  # of our own
                result[name] = facet
                continue
            module, _, kind = kinds[name].partition(".")
            of = getattr(importlib.import_module(f"openlineage.client.generated.{module}"), kind)
            content = {key: value for key, value in facet.items() if not key.startswith("_")}
            result[name] = of(**content, producer=facet["_producer"])
        return result

    (source,), (kept,) = event["inputs"], event["outputs"]
    inputs = {
        "dataQualityMetrics": "data_quality_metrics_input_dataset.DataQualityMetricsInputDatasetFacet"
    }
    outputs = {
        "outputStatistics": "output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet"
    }
    rebuilt = RunEvent(
        eventType=State(event["eventType"]),
        eventTime=event["eventTime"],
        run=Run(event["run"]["runId"], facets(event["run"]["facets"])),
        job=Job(**event["job"]),
        inputs=[
            InputDataset(
                source["namespace"],
                source["name"],
                facets=facets(source["facets"]),
                inputFacets=facets(source["inputFacets"], inputs),
            )
        ],
        outputs=[
            OutputDataset(
                kept["namespace"],
                kept["name"],
                facets=facets(kept["facets"]),
                outputFacets=facets(kept["outputFacets"], outputs),
            )
        ],
        producer=event["producer"],
    )

    def plain(value: Any) -> Any:
        """Without objects that are empty."""
        if isinstance(value, dict):
            pairs = {key: plain(item) for key, item in value.items()}
            return {key: item for key, item in pairs.items() if item not in ({}, [])}
        return [plain(item) for item in value] if isinstance(value, list) else value

    assert plain(Serde.to_dict(rebuilt)) == plain(event)


def test_the_recipe_for_mlflow_logs_the_list(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow.tracking")  # a folder called mlflow is a module, too
    import mlflow

    page = (Path(__file__).parents[2] / "docs/guides/schedulers.md").read_text(encoding="utf-8")
    recipe = page.split("```python\n", 1)[1].split("```", 1)[0]
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    exec(recipe.replace('"runs/first", keep', f"{run.uri!r}, keep"), {})
    (logged,) = mlflow.MlflowClient().search_runs(["0"])
    (found,) = logged.inputs.dataset_inputs
    keep = raypipe.KeepList(run.uri)
    assert json.loads(found.dataset.source) == {"uri": keep.uri}
    tags = {tag.key: tag.value for tag in found.tags}
    assert tags["mlflow.data.context"] == "training"
    assert {name: tags[name] for name in keep.metadata} == {
        name: str(value)[:500] for name, value in keep.metadata.items()
    }
