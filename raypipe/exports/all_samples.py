"""Exports that describe all scored samples of a run, for tools that look at data and labels.

- `fiftyone`: a folder in FiftyOne's own JSON layout; see `raypipe.exports.fiftyone`.
- `cleanlab`: the table that `cleanlab.classification.CleanLearning` calls label issues.
- `label-studio`: a CSV of tasks for Label Studio, the likely label errors first.

All are written one score shard after another. In memory are the rank of each label of the run, at
about 8 bytes per sample, and with `label-studio` the samples whose label is contradicted.
"""

from __future__ import annotations

import csv
import io
import operator
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.config.export import ExportSettings
from raypipe.distributed.context import Context
from raypipe.errors import ConfigError, RunError
from raypipe.exports import fiftyone
from raypipe.exports.cells import guarded
from raypipe.exports.index_files import ONE_FILE_PER_SAMPLE
from raypipe.exports.written_files import FileWriter, write_files
from raypipe.keeplists.file import KeepFile, Located
from raypipe.report.label_doubt import doubt_ranks, stored_doubt
from raypipe.runs.run import Run
from raypipe.runs.score_stream import read_embedding_columns
from raypipe.sources import open_source

CLEANLAB_EXTENSIONS = (".csv", ".parquet")
URL_STARTS = ("http://", "https://", "/data/local-files/?")
"""Starts of image paths in which characters have to be quoted. The last one is Label Studio's
address of files on its own disk."""
CSV_ROWS = 10_000
"""Rows that are formatted at a time."""
_SCORES = ["sample_id", "label", "score", "lower", "upper", "measured"]
_STATISTICS = ["prediction", "confidence", "loss"]
_ISSUES = pa.schema(
    {
        "sample_id": pa.string(),
        "is_label_issue": pa.bool_(),
        "label_quality": pa.float64(),
        "given_label": pa.int64(),
        "predicted_label": pa.int64(),
        "label_error_rank": pa.int64(),
    }
)
_LABEL_STUDIO = ("image", "sample_id", "label", "predicted", "rank", "confidence", "score", "kept")


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
    if settings.format == "cleanlab":
        extension = _extension(settings, CLEANLAB_EXTENSIONS)
    elif settings.format == "label-studio":
        extension = _extension(settings, (".csv",))
    image = image_uri(context, settings) if settings.format != "cleanlab" else None
    samples, classes = DescribedSamples.of(run, keep_list, located), run.classes().names
    written = len(samples.ranks)
    files: dict[str, FileWriter]
    if image is None:
        write = _write_cleanlab_parquet if extension == ".parquet" else _write_cleanlab_csv
        files = {to: lambda file: write(file, samples)}
    elif settings.format == "label-studio":
        written = int((samples.ranks > 0).sum())
        tasks = samples.contradicted()
        files = {to: lambda file: _write_label_studio(file, tasks, classes, image)}
    else:
        others = storage.names(to) - {fiftyone.SAMPLES_FILE, fiftyone.METADATA_FILE}
        if others and not settings.force:
            raise RunError(
                f"{to}: contains other files, such as {min(others)}; give a new folder "
                "(--force writes here)"
            )
        files = {
            storage.join(to, fiftyone.SAMPLES_FILE): lambda file: fiftyone.write_samples(
                file, samples.tables(), classes, image
            ),
            storage.join(to, fiftyone.METADATA_FILE): operator.methodcaller(
                "write", fiftyone.metadata(classes)
            ),
        }
    size = write_files(files, settings.force)
    return {
        "format": settings.format,
        "to": to,
        "samples": written,
        "shards": len(files),
        "bytes": size,
        "missing": 0,
    }


@dataclass(frozen=True, eq=False)
class DescribedSamples:
    """All scored samples in the order of the score shards, read one shard at a time.

    Attributes
    ----------
    run : Run
        The run.
    keep_list : str
        URI of the keep-list.
    located : Located
        Its rows by fragment.
    files : sequence of str
        Names of the score shards.
    ranks : numpy.ndarray
        Rank of the label among those that the proxies contradict, the most doubtful first, int32
        [n]; 0 for labels that they do not contradict.
    """

    run: Run
    keep_list: str
    located: Located
    files: Sequence[str]
    ranks: np.ndarray

    @classmethod
    def of(cls, run: Run, keep_list: str, located: Located) -> DescribedSamples:
        """Read the labels and the margins of a run.

        Raises
        ------
        RunError
            If the run has no scores or no embeddings, or if they hold different samples.
        """
        files = sorted(storage.names(run.scores_folder))
        if not files:
            raise RunError(f"{run.uri}: no scores; finish it with `raypipe run`")
        doubts = []
        for file in files:
            scores = storage.read_table(
                storage.join(run.scores_folder, file), ["sample_id", "label"]
            )
            columns = ["sample_id", "prediction", "margin"]
            statistics = read_embedding_columns(run, file, columns)
            if not statistics["sample_id"].equals(scores["sample_id"]):
                raise RunError(
                    f"{run.uri}: embeddings/{file} and scores/{file} hold different samples; "
                    "rerun `raypipe run`"
                )
            doubts.append(stored_doubt(scores["label"], statistics))
        return cls(run, keep_list, located, files, doubt_ranks(np.concatenate(doubts)))

    def tables(self) -> Iterator[pa.Table]:
        """Yield a table for each score shard.

        Columns are those of the scores (sample_id, label, score, lower, upper, measured); kept,
        whether the keep-list holds the sample; prediction, confidence and loss of the proxies; and
        label_error_rank, null for labels that the proxies do not contradict.
        """
        start = 0
        with KeepFile(self.keep_list) as kept:
            for file in self.files:
                table = storage.read_table(storage.join(self.run.scores_folder, file), _SCORES)
                statistics = read_embedding_columns(self.run, file, _STATISTICS)
                rows = self.located.rows.get(file.removesuffix(".parquet"))
                ids = kept.rows(*rows)["sample_id"] if rows else pa.array([], pa.string())
                rank = self.ranks[start : start + len(table)].astype(np.int64)
                start += len(table)
                added = {
                    "kept": pc.is_in(table["sample_id"], pa.array(ids)),
                    **{name: statistics[name] for name in _STATISTICS},
                    "label_error_rank": pa.array(rank, mask=rank == 0),
                }
                for name, values in added.items():
                    table = table.append_column(name, values)
                yield table.replace_schema_metadata(None)

    def contradicted(self) -> pa.Table:
        """Return the samples whose label the proxies contradict, by rank."""
        tables = (table.filter(table["label_error_rank"].is_valid()) for table in self.tables())
        return pa.concat_tables(tables).sort_by("label_error_rank")


def image_uri(context: Context, settings: ExportSettings) -> Callable[[str], str]:
    """Return the function that gives the path or URL of the image of a sample id.

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
    if prefix.startswith(URL_STARTS):
        return lambda sample_id: f"{prefix}/{urllib.parse.quote(sample_id)}"
    return lambda sample_id: f"{prefix}/{sample_id}"


def _extension(settings: ExportSettings, extensions: Sequence[str]) -> str:
    """Return the extension of the file to write, or raise ConfigError if it is another."""
    for extension in extensions:
        if settings.to.lower().endswith(extension):
            return extension
    raise ConfigError(
        f"{settings.to}: format {settings.format} writes a single file; give it a name that ends "
        f"in {' or '.join(extensions)}"
    )


def _label_issues(samples: pa.Table) -> pa.Table:
    """Return the label issues of a part of the samples.

    label_quality is exp(-loss), cleanlab's self-confidence: the probability of the given label. A
    label is an issue if it is not the predicted class. Samples without a label have -1.
    """
    issues = {
        "sample_id": samples["sample_id"],
        "is_label_issue": samples["label_error_rank"].is_valid(),
        "label_quality": np.exp(-samples["loss"].to_numpy().astype(np.float64)),
        "given_label": samples["label"].fill_null(-1),
        "predicted_label": samples["prediction"].fill_null(-1),
        "label_error_rank": samples["label_error_rank"],
    }
    return pa.table(issues).cast(_ISSUES)


def _write_cleanlab_parquet(file: IO[bytes], samples: DescribedSamples) -> None:
    with pq.ParquetWriter(file, _ISSUES, compression="zstd") as writer:
        for table in samples.tables():
            writer.write_table(_label_issues(table))


def _write_cleanlab_csv(file: IO[bytes], samples: DescribedSamples) -> None:
    file.write(_csv([_ISSUES.names]))
    for table in samples.tables():
        file.write(_csv(zip(*(column.to_pylist() for column in _label_issues(table).columns))))


def _write_label_studio(
    file: IO[bytes], tasks: pa.Table, classes: Sequence[str], image: Callable[[str], str]
) -> None:
    """Write one task per row: the image, its label, the predicted class and the figures."""
    file.write(_csv([_LABEL_STUDIO]))
    for start in range(0, len(tasks), CSV_ROWS):
        rows = (
            [
                image(row["sample_id"]),
                row["sample_id"],
                classes[row["label"]],
                classes[row["prediction"]],
                row["label_error_rank"],
                row["confidence"],
                row["score"],
                row["kept"],
            ]
            for row in tasks.slice(start, CSV_ROWS).to_pylist()
        )
        file.write(_csv(rows))


def _csv(rows: Iterable[Iterable[Any]]) -> bytes:
    """Return lines of a CSV file in which no text is a formula for a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow([guarded(cell) if isinstance(cell, str) else cell for cell in row])
    return text.getvalue().encode()
