"""Exports that describe all scored samples of a run, for tools that look at data and labels.

- `fiftyone`: a folder in FiftyOne's own JSON layout; see `raypipe.exports.fiftyone`.
- `cleanlab`: the table that `cleanlab.classification.CleanLearning` calls label issues.
- `label-studio`: a CSV of tasks for Label Studio, the likely label errors first.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.config.export import ExportSettings
from raypipe.distributed.context import Context
from raypipe.errors import ConfigError, RunError
from raypipe.exports.cells import guarded
from raypipe.exports.fiftyone import fiftyone_files
from raypipe.exports.index_files import ONE_FILE_PER_SAMPLE, write_files
from raypipe.keeplists.file import KeepFile, Located
from raypipe.report.embeddings import label_doubt
from raypipe.runs.run import Run
from raypipe.runs.score_stream import read_embedding_columns
from raypipe.sources import open_source

CLEANLAB_EXTENSIONS = (".csv", ".parquet")
_SCORES = ["sample_id", "label", "score", "lower", "upper", "measured"]
_STATISTICS = ["sample_id", "prediction", "confidence", "loss", "margin"]


def export_all_samples(
    context: Context, keep_list: str, located: Located, settings: ExportSettings
) -> dict[str, Any]:
    """Write the description of all samples; see `raypipe.export`."""
    run, to = context.run, settings.to
    if run.classes().clusters and settings.format != "fiftyone":
        raise ConfigError(
            f"{run.uri}: labels are clusters that raypipe formed, so there are no label errors to "
            f"export as {settings.format}"
        )
    samples, classes = read_samples(run, keep_list, located), run.classes().names
    if settings.format == "cleanlab":
        extension = _extension(settings, CLEANLAB_EXTENSIONS)
        written = len(samples)
        files = {to: _cleanlab(samples, extension)}
    elif settings.format == "label-studio":
        _extension(settings, (".csv",))
        tasks = samples.filter(samples["label_error_rank"].is_valid())
        tasks = tasks.sort_by("label_error_rank")
        written = len(tasks)
        files = {to: _label_studio(tasks, classes, image_uris(context, settings, tasks))}
    else:
        contents = fiftyone_files(samples, classes, image_uris(context, settings, samples))
        others = storage.names(to) - set(contents)
        if others and not settings.force:
            raise RunError(
                f"{to}: contains other files, such as {min(others)}; give a new folder "
                "(--force writes here)"
            )
        written = len(samples)
        files = {storage.join(to, name): content for name, content in contents.items()}
    write_files(files, settings.force)
    return {
        "format": settings.format,
        "to": to,
        "samples": written,
        "shards": len(files),
        "bytes": sum(map(len, files.values())),
        "missing": 0,
    }


def read_samples(run: Run, keep_list: str, located: Located) -> pa.Table:
    """Return all scored samples in the order of the score shards.

    Columns are those of the scores (sample_id, label, score, lower, upper, measured); kept, whether
    the keep-list holds the sample; prediction, confidence and loss of the proxies; and
    label_error_rank: 1 for the label that the proxies contradict most, null where they do not.

    Raises
    ------
    RunError
        If the run has no embeddings, or if they hold other samples than the scores.
    """
    tables = []
    with KeepFile(keep_list) as kept:
        for file in sorted(storage.names(run.scores_folder)):
            scores = storage.read_table(storage.join(run.scores_folder, file), _SCORES)
            statistics = read_embedding_columns(run, file, _STATISTICS)
            if not statistics["sample_id"].equals(scores["sample_id"]):
                raise RunError(
                    f"{run.uri}: embeddings/{file} and scores/{file} hold different samples; "
                    "rerun `raypipe run`"
                )
            rows = located.rows.get(file.removesuffix(".parquet"))
            ids = kept.rows(*rows)["sample_id"] if rows else pa.array([], pa.string())
            scores = scores.append_column("kept", pc.is_in(scores["sample_id"], pa.array(ids)))
            for name in _STATISTICS[1:]:
                scores = scores.append_column(name, statistics[name])
            tables.append(scores.replace_schema_metadata(None))
    if not tables:
        raise RunError(f"{run.uri}: no scores; finish it with `raypipe run`")
    table = pa.concat_tables(tables)
    doubt = label_doubt(
        table["label"].fill_null(-1).to_numpy(),
        table["prediction"].fill_null(-1).to_numpy(),
        table["margin"].to_numpy().astype(np.float64),
    )
    contradicted = np.isfinite(doubt)
    rank = np.zeros(len(table), np.int64)
    rank[np.argsort(np.where(contradicted, -doubt, np.inf), kind="stable")] = 1 + np.arange(
        len(table)
    )
    ranks = pa.array(rank, pa.int64(), mask=~contradicted)
    return table.drop_columns("margin").append_column("label_error_rank", ranks)


def image_uris(context: Context, settings: ExportSettings, samples: pa.Table) -> list[str]:
    """Return the path or URI of the image of each sample.

    Raises ConfigError if the source stores several images in a file.
    """
    source = context.config.source
    if source.format not in ONE_FILE_PER_SAMPLE:
        raise ConfigError(
            f"format {settings.format} needs a source in which every sample is a file; this one is "
            f"{source.format}: export it as webdataset or parquet first, or use cleanlab"
        )
    root = settings.image_root
    if root is None and source.format == "filelist":
        root = open_source(source).resolved_settings().root
    elif root is None:
        root = source.uri if storage.exists(source.uri) else storage.glob_root(source.uri)
    prefix = (root or "").rstrip("/")
    return [f"{prefix}/{sample_id}" for sample_id in samples["sample_id"].to_pylist()]


def _extension(settings: ExportSettings, extensions: Sequence[str]) -> str:
    """Return the extension of the file to write, or raise ConfigError if it is another."""
    for extension in extensions:
        if settings.to.lower().endswith(extension):
            return extension
    raise ConfigError(
        f"{settings.to}: format {settings.format} writes a single file; give it a name that ends "
        f"in {' or '.join(extensions)}"
    )


def _cleanlab(samples: pa.Table, extension: str) -> bytes:
    """Return the label issues.

    label_quality is exp(-loss), cleanlab's self-confidence: the probability of the given label. A
    label is an issue if it is not the predicted class. Samples without a label have -1.
    """
    quality = np.exp(-samples["loss"].to_numpy().astype(np.float64))
    table = pa.table(
        {
            "sample_id": samples["sample_id"],
            "is_label_issue": samples["label_error_rank"].is_valid(),
            "label_quality": quality,
            "given_label": samples["label"].fill_null(-1).cast(pa.int64()),
            "predicted_label": samples["prediction"].fill_null(-1).cast(pa.int64()),
            "label_error_rank": samples["label_error_rank"],
        }
    )
    if extension == ".parquet":
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        return sink.getvalue()
    return _csv(table.column_names, zip(*(table[name].to_pylist() for name in table.column_names)))


def _label_studio(tasks: pa.Table, classes: Sequence[str], images: Sequence[str]) -> bytes:
    """Return one task per row: the image, its label, the predicted class and the figures."""
    rows = (
        [
            image,
            row["sample_id"],
            classes[row["label"]],
            classes[row["prediction"]],
            row["label_error_rank"],
            row["confidence"],
            row["score"],
            row["kept"],
        ]
        for image, row in zip(images, tasks.to_pylist(), strict=True)
    )
    header = ["image", "sample_id", "label", "predicted", "rank", "confidence", "score", "kept"]
    return _csv(header, rows)


def _csv(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> bytes:
    """Return a CSV file in which no text is a formula for a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([guarded(cell) if isinstance(cell, str) else cell for cell in row])
    return text.getvalue().encode()
