"""Exports to a single file: row numbers for `torch.utils.data.Subset`, or paths with labels."""

from __future__ import annotations

import csv
import functools
import io
import json
import operator
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config
from raypipe.config.export import ExportSettings
from raypipe.distributed.context import Context
from raypipe.errors import ConfigError
from raypipe.exports.cells import guarded, guarded_path
from raypipe.exports.missing import MissingSample, report_missing
from raypipe.exports.written_files import write_files
from raypipe.keeplists.file import KeepFile, Located, first_positions, ids_in_order
from raypipe.runs.keep_files import keep_metadata
from raypipe.runs.run import Run
from raypipe.sources import Fragment, open_source

EXTENSIONS = {"indices": (".npy", ".json"), "list": (".txt", ".csv")}
ONE_FILE_PER_SAMPLE = {"imagefolder", "filelist"}
"""Source formats in which every sample is a file, and its id is the path of that file."""
LOCAL_FRAGMENTS = 64
"""Up to this many fragments, the driver reads the ids, which is faster than starting Ray."""
TASK_FRAGMENTS = 16
"""Fragments per task."""
TORCHVISION_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Extensions that `torchvision.datasets.ImageFolder` treats as images: its IMG_EXTENSIONS."""


def export_single_file(
    context: Context, keep_list: str, located: Located, settings: ExportSettings
) -> dict[str, Any]:
    """Write the indices or the list of a keep-list; see `raypipe.export`."""
    config, run, to = context.config, context.run, settings.to
    extensions = EXTENSIONS[settings.format]
    extension = next((item for item in extensions if to.lower().endswith(item)), None)
    if extension is None:
        raise ConfigError(
            f"{to}: format {settings.format} writes a single file; give it a name that ends in "
            f"{' or '.join(extensions)}"
        )
    if settings.format == "list" and config.source.format not in ONE_FILE_PER_SAMPLE:
        raise ConfigError(
            "format list needs a source in which every sample is a file; this one is "
            f"{config.source.format}: use indices, webdataset or parquet"
        )
    with KeepFile(keep_list) as file:
        table = (
            file.rows(0, len(file)) if len(file) else pa.table({name: [] for name in file.columns})
        )
    ids = table["sample_id"].to_pylist()
    position, order = _positions(context, keep_list, located, ids, settings.format)
    absent = np.flatnonzero(position < 0)
    missing = [
        MissingSample(sample_id, f"not among {order}")
        for sample_id in table["sample_id"].take(absent).to_pylist()
    ]
    base = to.removesuffix(to[-len(extension) :])
    report_missing(f"{base}.missing.json", missing, located.samples, settings.allow_missing)
    rows = np.argsort(position, kind="stable")[len(absent) :]
    kept = table.take(rows)
    if settings.format == "list":
        files = {to: _list(kept, run.classes().names, extension)}
    else:
        about = {
            "order": order,
            "source": config.source.uri,
            "run": run.uri,
            "keep_list": keep_metadata(keep_list),
        }
        files = _indices(kept, position[rows], about, base, extension)
    writers = {uri: operator.methodcaller("write", content) for uri, content in files.items()}
    written = write_files(writers, settings.force)
    return {
        "format": settings.format,
        "to": to,
        "samples": len(kept),
        "shards": len(files),
        "bytes": written,
        "missing": len(missing),
    }


def _indices(
    kept: pa.Table, position: np.ndarray, about: dict[str, Any], base: str, extension: str
) -> dict[str, bytes]:
    """Return the files of format indices: .npy and a .json next to it, or one .json."""
    columns = {"sample_ids": "sample_id", "labels": "label", "scores": "score", "weights": "weight"}
    data = {**about, "indices": position.tolist()} if extension == ".json" else dict(about)
    data |= {
        name: kept[column].to_pylist()
        for name, column in columns.items()
        if column in kept.column_names
    }
    files = {f"{base}.json": (json.dumps(data, ensure_ascii=False) + "\n").encode()}
    if extension == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, position)
        files[f"{base}.npy"] = buffer.getvalue()
    return files


def _list(kept: pa.Table, classes: Sequence[str], extension: str) -> bytes:
    """Return the file of format list.

    CSV has the columns path, label (class index), class, score and, if the keep-list has them,
    weight. A spreadsheet takes no cell for a formula: see `raypipe.exports.cells`. Text has path
    and label on each line, or the path only for unlabelled samples.
    """
    rows, text = kept.to_pylist(), io.StringIO()
    if extension == ".txt":
        for row in rows:
            if "\n" in row["sample_id"]:
                raise ConfigError(
                    f"{row['sample_id']!r} has a line break in its name; use a .csv file"
                )
            text.write(
                row["sample_id"] + ("" if row["label"] is None else f" {row['label']}") + "\n"
            )
        return text.getvalue().encode()
    weight = ["weight"] * ("weight" in kept.column_names)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "class", "score", *weight])
    for row in rows:
        name = "" if row["label"] is None else classes[row["label"]]
        writer.writerow(
            [
                guarded_path(row["sample_id"]),
                row["label"],
                guarded(name),
                row["score"],
                *(row[column] for column in weight),
            ]
        )
    return text.getvalue().encode()


def _positions(
    context: Context, keep_list: str, located: Located, ids: list[str], format: str
) -> tuple[np.ndarray, str]:
    """Return the index of each kept sample, int64 [k], and a description of the order it refers to.

    The index is -1 for samples that are not in that order.
    """
    source = context.config.source
    if (
        format == "indices"
        and source.format == "imagefolder"
        and any("/" in sample_id for sample_id in ids)
    ):
        root = storage.glob_root(source.uri) if not storage.exists(source.uri) else source.uri
        order = image_folder_order(root)
        position = np.array([order.get(sample_id, -1) for sample_id in ids], np.int64)
        return position, f"torchvision.datasets.ImageFolder({root!r})"
    return _source_positions(context, keep_list, located), _source_order(context)


def _source_order(context: Context) -> str:
    """Describe the order of the source."""
    fragments, format = context.run.fragments(), context.config.source.format
    paths = {fragment.path for fragment in fragments}
    if format == "parquet" and len(paths) == 1:
        return f"the rows of {paths.pop()}, from 0"
    orders = {
        "parquet": "rows of the source's files, sorted by path",
        "webdataset": "samples of the source's tars, sorted by path",
    }
    return f"the {orders.get(format, 'samples of the source in its own order')}, from 0"


def image_folder_order(root: str) -> dict[str, int]:
    """Return the index in `torchvision.datasets.ImageFolder(root)` of every relative path.

    Classes are sorted by name, folders within a class by path, and files within a folder by name.
    A plain sort of all paths would put "a-b/x" before "a/x", and "a/b/x" before "a/c". Hidden files
    count, and so do formats that raypipe does not read. Links are followed, as by the source.
    """
    images = [
        file.path
        for file in storage.walk(root, with_hidden=True)
        if "/" in file.path and file.path.lower().endswith(TORCHVISION_EXTENSIONS)
    ]

    def key(path: str) -> tuple[str, str, str]:
        folder, _, file = path.rpartition("/")
        return folder.split("/", 1)[0], folder, file

    return {path: number for number, path in enumerate(sorted(images, key=key))}


def _source_positions(context: Context, keep_list: str, located: Located) -> np.ndarray:
    """Return the number of each kept sample in source order, int64 [k]; -1 if it is missing."""
    config, run = context.config, context.run
    fragments = run.fragments()
    first = first_positions(fragments)
    units = [
        (fragment, *located.rows[fragment.fragment_id])
        for fragment in fragments
        if fragment.fragment_id in located.rows
    ]
    groups = [
        units[start : start + TASK_FRAGMENTS] for start in range(0, len(units), TASK_FRAGMENTS)
    ]
    result = np.full(located.samples, -1, np.int64)

    def collect(positions: list[FragmentPositions]) -> None:
        for item in positions:
            result[item.start : item.start + len(item.inside)] = np.where(
                item.inside < 0, -1, item.inside + first[item.fragment_id]
            )

    locate_in = functools.partial(_positions_in, config, run.uri, keep_list)
    if len(units) <= LOCAL_FRAGMENTS:
        with ThreadPoolExecutor(8) as threads:
            for positions in threads.map(locate_in, groups):
                collect(positions)
    else:
        context.run_tasks(groups, locate_in, collect)
    return result


class FragmentPositions(NamedTuple):
    """Positions of the kept samples within a fragment.

    Attributes
    ----------
    fragment_id : str
        The fragment.
    start : int
        Its first row in the keep-list.
    inside : np.ndarray
        Position of each kept sample in the fragment, int64 [k]; -1 if it is missing.
    """

    fragment_id: str
    start: int
    inside: np.ndarray


def _positions_in(
    config: Config, run_uri: str, keep_list: str, units: Sequence[tuple[Fragment, int, int]]
) -> list[FragmentPositions]:
    """Find the kept samples in some fragments. Runs in a task."""
    run, source, result = Run(run_uri), open_source(config.source), list[FragmentPositions]()
    with KeepFile(keep_list) as kept:
        for fragment, start, stop in units:
            order: dict[str, int] = {}
            for number, sample_id in enumerate(ids_in_order(source, run.with_members(fragment))):
                order.setdefault(sample_id, number)
            ids = kept.rows(start, stop)["sample_id"].to_pylist()
            inside = np.array([order.get(sample_id, -1) for sample_id in ids], np.int64)
            result.append(FragmentPositions(fragment.fragment_id, start, inside))
    return result
