"""Copy a Ray Data dataset to `RUN/source/` as Parquet, which the run then reads like any source.

The blocks of a dataset have no lasting names, so that the share of a lost worker could not be
requested again. The files of the copy have names. Tasks on the cluster encode images and rename
columns. The driver receives the rows in order, a bounded number at a time, and writes them.
`manifest.json` is written last and describes the copy: a copy without it is unfinished, and is
started again.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from PIL import Image
from ray.data.block import BlockAccessor

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.distributed.context import Context
from raypipe.distributed.failures import as_raypipe_error
from raypipe.distributed.ray_data.identity import identity
from raypipe.errors import ConfigError, RunError, SourceError
from raypipe.runs.run import Run
from raypipe.sources.arrow_types import (
    ID_TYPES,
    described,
    holds_ids,
    id_texts,
    storage_array,
)
from raypipe.sources.columns import AUTO, IMAGE_NAMES, LABEL_NAMES
from raypipe.sources.splits import SPLIT_COLUMN, split_column, split_of
from raypipe.sources.values import printable, stored_label

FOLDER, MANIFEST = "source", "manifest.json"
BATCH_ROWS = 64
"""Rows that the driver requests at a time."""
GROUP_ROWS, GROUP_BYTES = 256, 32 << 20
"""Rows or bytes at which a row group ends; the driver holds as much."""
FILE_ROWS, FILE_BYTES = 65_536, 512 << 20
"""Rows or bytes at which a file ends."""


def settings_of_copy(settings: SourceSettings, run: Run) -> SourceSettings:
    """Return the settings that read the copy."""
    label = None if settings.label_column is None else "label"
    columns = {"image_column": "image", "label_column": label, "id_column": "sample_id"}
    return settings.model_copy(
        update={"uri": run.path(FOLDER), "format": "parquet", "include": "*.parquet", **columns}
    )


def changed_dataset(dataset: Any, settings: SourceSettings, context: Context) -> list[str]:
    """Return how a dataset differs from the finished copy of the run; the names of what differs.

    Empty without a finished copy. Another limit makes no other dataset.
    """
    _require_dataset(dataset)
    context.start_ray()  # before the dataset is inspected
    run, progress = context.run, context.progress
    given, manifest = identity(dataset), _manifest(run)
    if given.unseen:
        progress.say(
            f"{FOLDER:<11} changes to {', '.join(given.unseen)} cannot be seen. After such a "
            f"change, delete {run.path(FOLDER)}; otherwise the run continues with the old copy"
        )
    if manifest is None:
        return []
    known = manifest["dataset"]
    if "reached" not in manifest:
        # copies of 0.2.0 hashed less of the functions, so their steps cannot be compared
        known = {**known, "steps": given.hashes["steps"]}
        progress.say(
            f"{FOLDER:<11} copied by an older version: changes to the steps of the dataset cannot "
            f"be seen. After such a change, delete {run.path(FOLDER)}"
        )
    columns = {name: value for name, value in _selection(settings).items() if name != "limit"}
    return [
        *(f"source.{name}" for name, value in columns.items() if manifest["asked"][name] != value),
        *(name for name, value in given.hashes.items() if known.get(name) != value),
    ]


def copy_dataset(dataset: Any, settings: SourceSettings, context: Context) -> None:
    """Copy a dataset, unless a finished copy exists.

    Parameters
    ----------
    dataset : ray.data.Dataset
        The dataset.
    settings : SourceSettings
        The user's settings: columns of the dataset, and the limit of rows.
    context : Context
        The run, and Ray.

    Raises
    ------
    ConfigError
        If `dataset` is not a dataset.
    RunError
        If the finished copy is of another dataset, or of other columns.
    SourceError
        For columns that cannot be used.
    """
    changed = changed_dataset(dataset, settings, context)
    run, progress, manifest = context.run, context.progress, _manifest(context.run)
    if changed:
        raise RunError(
            f"{run.path(FOLDER)}: holds a copy of another dataset ({' and '.join(changed)} "
            "differ); choose another run folder, or pass overwrite=True to replace the run"
        )
    selection = _selection(settings)
    if manifest is not None and manifest["asked"] == selection:
        progress.say(f"{FOLDER:<11} copied before: {manifest['rows']:,} samples")
        return
    hashes = identity(dataset).hashes
    storage.delete(run.path(FOLDER))
    started = time.monotonic()
    with (
        progress.meter(FOLDER, 0) as meter,
        _in_order(dataset, context.config.cluster.patience_seconds),
    ):

        def count(rows: int) -> None:
            # the total is unknown: counting the rows would compute them
            meter.expect(meter.count + rows)
            meter.add(rows)

        written = _write(dataset, settings, run, count)
    storage.write_json(
        run.path(FOLDER, MANIFEST),
        {"asked": selection, "dataset": hashes, "reached": True, **written},
    )
    progress.say(
        f"{FOLDER:<11} {written['rows']:,} samples copied in {time.monotonic() - started:.1f} s"
    )


def _require_dataset(dataset: Any) -> None:
    if not isinstance(dataset, ray.data.Dataset):
        raise ConfigError(
            f"source is {type(dataset).__name__}, not a ray.data.Dataset; "
            "for files, set source.uri instead"
        )


def _selection(settings: SourceSettings) -> dict[str, Any]:
    """Return the settings that choose columns and rows of a dataset."""
    names = ("image_column", "label_column", "id_column", "limit")
    return {name: getattr(settings, name) for name in names}


def _manifest(run: Run) -> dict[str, Any] | None:
    """Return the manifest of a finished copy; None without one, or if a file is missing."""
    try:
        manifest = storage.read_json(run.path(FOLDER, MANIFEST))
    except FileNotFoundError:
        return None
    files = {entry["name"] for entry in manifest["files"]}
    return manifest if files <= storage.names(run.path(FOLDER)) else None


@contextmanager
def _in_order(dataset: Any, patience: float) -> Iterator[None]:
    """Make Ray Data pass on the blocks in the order of the dataset while the block runs.

    By default it passes on whichever block is ready first.
    """
    context = dataset.context
    options = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "execution_no_progress_timeout_s": patience,
    }
    saved = {name: getattr(context, name) for name in options}
    ordered = context.execution_options.preserve_order
    for name, value in options.items():
        setattr(context, name, value)
    context.execution_options.preserve_order = True
    try:
        yield
    finally:
        context.execution_options.preserve_order = ordered
        for name, value in saved.items():
            setattr(context, name, value)


def _write(
    dataset: Any, settings: SourceSettings, run: Run, on_rows: Callable[[int], None]
) -> dict[str, Any]:
    """Write the files of the copy; return their part of the manifest."""
    if settings.limit is not None:
        dataset = dataset.limit(settings.limit)
    # without a batch size, a batch is a block
    columns = dataset.map_batches(
        _columns,
        fn_kwargs={
            "image": settings.image_column,
            "label": settings.label_column,
            "identity": settings.id_column,
        },
        batch_format=None,  # as Ray Data holds them: as NumPy, numbers next to a null are floats
        batch_size=None,
    )
    files = _Files(run)
    rows, splits = 0, set[str]()
    try:
        for batch in columns.iter_batches(
            batch_format="pyarrow", batch_size=BATCH_ROWS, prefetch_batches=2
        ):
            if settings.id_column is None:
                names = pa.array(
                    [f"row-{row:010d}" for row in range(rows, rows + len(batch))], pa.string()
                )
                batch = batch.append_column("sample_id", names)
            if SPLIT_COLUMN in batch.column_names:
                splits |= set(batch[SPLIT_COLUMN].unique().to_pylist()) - {""}
                _check_splits(splits)
                batch = batch.drop_columns([SPLIT_COLUMN])
            files.add(batch)
            rows += len(batch)
            on_rows(len(batch))
    except BaseException as error:
        files.discard(error)
        if isinstance(error, OSError) or not isinstance(error, Exception):
            raise
        raise as_raypipe_error(error) from error
    files.close()
    if not rows:
        raise SourceError("the dataset has no rows")
    return {"rows": rows, "files": files.written}


def _check_splits(splits: set[str]) -> None:
    """Raise SourceError if the rows of a dataset are of several splits."""
    if len(splits) > 1:
        raise SourceError(
            f"column {SPLIT_COLUMN!r} of the dataset has several splits "
            f"({', '.join(sorted(splits))}); choose the rows of one with dataset.filter, or drop "
            "the column to read all as one"
        )


def _columns(block: Any, image: str, label: str | None, identity: str | None) -> pa.Table:
    """Return the columns of the copy. Runs in a task.

    Returns
    -------
    pyarrow.Table
        image (encoded bytes), label (JSON, because labels are numbers or names), with an id column
        sample_id (text; null for a missing id), and with a column of splits split (the split that
        it names, or "").
    """
    accessor = BlockAccessor.for_block(block)
    names = accessor.column_names()
    image = _resolved(names, image, IMAGE_NAMES)
    label = _resolved(names, label, LABEL_NAMES) if label is not None else None
    for setting, column in (
        ("image_column", image),
        ("label_column", label),
        ("id_column", identity),
    ):
        if column is not None and column not in names:
            raise SourceError(
                f"the dataset has no column {column!r}; it has {', '.join(names)}; "
                f"set source.{setting}"
            )
    images = accessor.to_numpy(image)
    values = [None] * len(images)
    if label is not None:
        values = [
            value
            for part in _arrow_column(block, label).chunks
            for value in storage_array(part).to_pylist()
        ]
    labels = [stored_label(value) for value in values]
    wrong = next((reason for _, reason in labels if reason), "")
    if wrong:
        raise SourceError(f"column {label!r}: {wrong}; set source.label_column")
    result = {
        "image": pa.array([_encoded(value, image) for value in images], pa.large_binary()),
        "label": pa.array([json.dumps(value) for value, _ in labels], pa.string()),
    }
    if identity is not None:
        result["sample_id"] = _ids(_arrow_column(block, identity), identity)
    split = split_column(names, (image, label, identity))
    if split is not None:
        named = storage_array(_arrow_column(block, split).combine_chunks()).to_pylist()
        result[SPLIT_COLUMN] = pa.array([split_of(str(name)) for name in named], pa.string())
    return pa.table(result)


def _arrow_column(block: Any, column: str) -> pa.ChunkedArray:
    """Return a column of a block, which is an Arrow table or a data frame of pandas."""
    if isinstance(block, pa.Table):
        return block[column]
    try:
        return pa.chunked_array([pa.Array.from_pandas(block[column])])
    except pa.ArrowException as error:
        raise SourceError(f"column {column!r} holds values of several types: {error}") from None


def _ids(values: pa.ChunkedArray, column: str) -> pa.Array:
    """Return ids as text, as a Parquet file with the same column gives them."""
    field = pa.field(column, values.type)
    if not holds_ids(field) and not pa.types.is_null(values.type):
        raise SourceError(
            f"column {column!r} is {described(field)}; expected {ID_TYPES}. pandas and NumPy turn "
            "whole numbers into floating-point ones, which lose digits, where one is missing. Set "
            "source.id_column to another column"
        )
    texts = [text for part in values.chunks for text in id_texts(part, field).to_pylist()]
    return pa.array([text and printable(text) for text in texts], pa.string())


def _resolved(names: Sequence[str], column: str, usual: Sequence[str]) -> str:
    """Return the column of a setting; for `auto`, the first usual name, ignoring case."""
    if column != AUTO:
        return column
    return next(
        (name for candidate in usual for name in names if name.lower() == candidate), usual[0]
    )


def _encoded(value: Any, column: str) -> bytes | None:
    """Return the encoded bytes of an image; pixels become PNG, which is lossless."""
    if isinstance(value, dict):  # the format of Hugging Face
        value = value.get("bytes")
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, Image.Image):
        value = np.asarray(
            value if value.mode in {"L", "LA", "RGB", "RGBA"} else value.convert("RGB")
        )
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.size:
        if value.ndim == 3 and value.shape[2] == 1:
            value = value[:, :, 0]
        if value.ndim == 2 or (value.ndim == 3 and value.shape[2] in {2, 3, 4}):
            buffer = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(value)).save(buffer, "PNG", compress_level=1)
            return buffer.getvalue()
    shown = (
        f"{value.dtype} {list(value.shape)}"
        if isinstance(value, np.ndarray)
        else type(value).__name__
    )
    raise SourceError(
        f"column {column!r} holds {shown}; expected encoded images (bytes), or pixels: uint8 "
        "[height, width] or [height, width, 3]. Set source.image_column, or convert the "
        "values with map_batches"
    )


class _Files:
    """Writes rows to part-000000.parquet and so on.

    The files depend only on the rows, not on how Ray Data divided them.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self.written: list[dict[str, Any]] = []
        self._waiting: list[pa.Table] = []
        self._open: tuple[storage.Upload, pq.ParquetWriter, pa.Schema] | None = None

    def add(self, batch: pa.Table) -> None:
        self._waiting.append(batch)
        if (
            sum(map(len, self._waiting)) >= GROUP_ROWS
            or sum(part.nbytes for part in self._waiting) >= GROUP_BYTES
        ):
            self._write_group()

    def close(self) -> None:
        if self._waiting:
            self._write_group()
        self._end_file()

    def discard(self, error: BaseException) -> None:
        """Drop the unfinished file; an interrupted copy starts again."""
        if self._open is not None:
            self._open[0].__exit__(type(error), error, None)
            self._open = None

    def _write_group(self) -> None:
        batch, self._waiting = pa.concat_tables(self._waiting), []
        labels = [json.loads(value) for value in batch["label"].to_pylist()]
        kinds = {type(value) for value in labels if value is not None}
        if len(kinds) > 1:
            raise SourceError("some labels are numbers and some are names; use one kind")
        kind = pa.string() if kinds == {str} else pa.int64()
        if self._open is not None and kinds and self._open[2].field("label").type != kind:
            # numbers after names, or labels after a file without any; the index refuses a mixture,
            # naming the files
            self._end_file()
        if self._open is not None:
            kind = self._open[2].field("label").type
        columns = {
            "sample_id": batch["sample_id"].cast(pa.string()),
            "label": pa.array(labels, kind),
            "image": batch["image"].cast(pa.large_binary()),
        }
        table = pa.table(columns)
        if self._open is None:
            self._start_file(table.schema)
        assert self._open is not None
        self._open[1].write_table(table, row_group_size=len(table))
        entry = self.written[-1]
        entry["rows"] += len(table)
        entry["bytes"] += table.nbytes
        if entry["rows"] >= FILE_ROWS or entry["bytes"] >= FILE_BYTES:
            self._end_file()

    def _start_file(self, schema: pa.Schema) -> None:
        name = f"part-{len(self.written):06d}.parquet"
        upload = storage.Upload(self._run.path(FOLDER, name))
        writer = pq.ParquetWriter(
            upload.__enter__(),
            schema,
            compression={"sample_id": "zstd", "label": "zstd", "image": "none"},
            use_dictionary=["label"],
            write_statistics=["label"],
            write_page_checksum=True,
        )
        self._open = (upload, writer, schema)
        self.written.append(
            {"name": name, "rows": 0, "bytes": 0, "label": str(schema.field("label").type)}
        )

    def _end_file(self) -> None:
        if self._open is not None:
            upload, writer, _ = self._open
            writer.close()
            self._open = None
            upload.__exit__(None, None, None)
