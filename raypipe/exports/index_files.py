"""Exports that are a single file: row numbers for `torch.utils.data.Subset`, and lists of paths with labels."""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.errors import ConfigError, RunError
from raypipe.exports.missing import report_missing
from raypipe.keeplists.file import KeepFile, Located, first_positions, ids_in_order
from raypipe.runs.keep_files import keep_metadata
from raypipe.runs.layout import Run
from raypipe.sources import Fragment, open_source

ENDINGS = {"indices": (".npy", ".json"), "list": (".txt", ".csv")}
ONE_FILE_EACH = {"imagefolder", "filelist"}
"""Formats of sources in which every sample is a file of its own, and its id the path of it."""
LOCAL_FRAGMENTS = 64
"""The ids of so many fragments are read by the driver: that takes less time than Ray to start."""
TASK_FRAGMENTS = 16
TORCHVISION = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What `torchvision.datasets.ImageFolder` takes for an image: IMG_EXTENSIONS."""


def export_listing(
    context: Context,
    keep_list: str,
    located: Located,
    format: str,
    to: str,
    allow_missing: bool,
    force: bool,
) -> dict[str, Any]:
    """Write the indices or the list of a keep-list; see `raypipe.export`."""
    ending = next((ending for ending in ENDINGS[format] if to.lower().endswith(ending)), None)
    if ending is None:
        raise ConfigError(
            f"{to}: format {format} is a file whose name ends in {' or '.join(ENDINGS[format])}"
        )
    config, run = context.config, context.run
    if format == "list" and config.source.format not in ONE_FILE_EACH:
        raise ConfigError(
            f"format list needs a source of which every sample is a file of its own; this one is {config.source.format}: "
            "use indices, webdataset or parquet"
        )
    with KeepFile(keep_list) as file:
        table = (
            file.rows(0, len(file)) if len(file) else pa.table({name: [] for name in file.columns})
        )
    position, order = _positions(
        context, keep_list, located, table["sample_id"].to_pylist(), format
    )
    lost = np.flatnonzero(position < 0)
    gone = [
        (sample_id, f"not among {order}") for sample_id in table["sample_id"].take(lost).to_pylist()
    ]
    base = to.removesuffix(to[-len(ending) :])
    report_missing(f"{base}.missing.json", gone, located.samples, allow_missing)
    rows = np.argsort(position, kind="stable")[len(lost) :]
    kept = table.take(rows)
    if format == "list":
        files = {to: _list(kept, run.classes().names, ending)}
    else:
        about = {
            "order": order,
            "source": config.source.uri,
            "run": run.uri,
            "keep_list": keep_metadata(keep_list),
        }
        files = _indices(kept, position[rows], about, base, ending)
    for uri, content in files.items():
        if not force and storage.exists(uri) and storage.read_bytes(uri) != content:
            raise RunError(
                f"{uri}: is there already, with other content; give another name (--force replaces it)"
            )
    for uri, content in files.items():
        storage.write_bytes(uri, content)
    written = sum(len(content) for content in files.values())
    return {
        "format": format,
        "to": to,
        "samples": len(kept),
        "shards": len(files),
        "bytes": written,
        "missing": len(gone),
    }


def _indices(
    kept: pa.Table, position: np.ndarray, about: dict[str, Any], base: str, ending: str
) -> dict[str, bytes]:
    """The indices as .npy, with everything else in a .json beside it; or all of it in a .json."""
    columns = {"sample_ids": "sample_id", "labels": "label", "scores": "score", "weights": "weight"}
    data = {**about, "indices": position.tolist()} if ending == ".json" else dict(about)
    data |= {
        name: kept[column].to_pylist()
        for name, column in columns.items()
        if column in kept.column_names
    }
    files = {f"{base}.json": (json.dumps(data, ensure_ascii=False) + "\n").encode()}
    if ending == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, position)
        files[f"{base}.npy"] = buffer.getvalue()
    return files


def _list(kept: pa.Table, classes: Sequence[str], ending: str) -> bytes:
    """CSV: path, label (class index), class, score and, where there are any, weight. Text: path and label; the path alone without one."""
    rows, text = kept.to_pylist(), io.StringIO()
    if ending == ".txt":
        for row in rows:
            if "\n" in row["sample_id"]:
                raise ConfigError(
                    f"{row['sample_id']!r} has a line break in its name; write a .csv"
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
                row["sample_id"],
                row["label"],
                name,
                row["score"],
                *(row[column] for column in weight),
            ]
        )
    return text.getvalue().encode()


def _positions(
    context: Context, keep_list: str, located: Located, ids: list[str], format: str
) -> tuple[np.ndarray, str]:
    """The number of each kept sample, int64 [k], in an order that is given in words; -1 where it is not in that order."""
    source = context.config.source
    if (
        format == "indices"
        and source.format == "imagefolder"
        and any("/" in sample_id for sample_id in ids)
    ):
        root = storage.glob_root(source.uri) if not storage.exists(source.uri) else source.uri
        found = image_folder_order(root)
        return np.array(
            [found.get(sample_id, -1) for sample_id in ids], np.int64
        ), f"torchvision.datasets.ImageFolder({root!r})"
    return _source_positions(context, keep_list, located), _source_order(context)


def _source_order(context: Context) -> str:
    fragments, format = context.run.fragments(), context.config.source.format
    paths = {fragment.path for fragment in fragments}
    if format == "parquet" and len(paths) == 1:
        return f"the rows of {paths.pop()}, from 0"
    what = {
        "parquet": "rows of the source's files, sorted by path",
        "webdataset": "samples of the source's tars, sorted by path",
    }
    return f"the {what.get(format, 'samples of the source in its own order')}, from 0"


def image_folder_order(root: str) -> dict[str, int]:
    """Relative path -> index in `torchvision.datasets.ImageFolder(root)`.

    Classes sorted by name, within a class folders by path, within a folder files by name. A plain sort of all paths differs: there
    "a-b/x" comes before "a/x", and "a/b/x" before "a/c". Hidden files count, and formats that raypipe does not read.
    """
    fs, path = storage.filesystem(root)
    start = len(path.rstrip("/")) + 1
    paths = [full[start:] for full in storage.retrying(lambda: fs.find(path), root)]
    images = [path for path in paths if "/" in path and path.lower().endswith(TORCHVISION)]

    def key(path: str) -> tuple[str, str, str]:
        folder, _, file = path.rpartition("/")
        return folder.split("/", 1)[0], folder, file

    return {path: number for number, path in enumerate(sorted(images, key=key))}


def _source_positions(context: Context, keep_list: str, located: Located) -> np.ndarray:
    """Number of each kept sample, int64 [k], in the order of the source: fragment by fragment as in the index."""
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

    def collect(found: dict[str, Any]) -> None:
        for fragment_id, start, inside in found["positions"]:
            result[start : start + len(inside)] = np.where(
                inside < 0, -1, inside + first[fragment_id]
            )

    locate_in = functools.partial(_inside, config, run.uri, keep_list)
    if len(units) <= LOCAL_FRAGMENTS:
        with ThreadPoolExecutor(8) as threads:
            for found in threads.map(locate_in, groups):
                collect(found)
    else:
        context.run_tasks(groups, locate_in, collect)
    return result


def _inside(
    config: Config, run_uri: str, keep_list: str, units: Sequence[tuple[Fragment, int, int]]
) -> dict[str, Any]:
    """Number within its fragment of every kept sample of some fragments, -1 where it is gone. Runs in a task."""
    run, source, result = Run(run_uri), open_source(config.source), []
    with KeepFile(keep_list) as kept:
        for fragment, start, stop in units:
            order: dict[str, int] = {}
            for number, sample_id in enumerate(ids_in_order(source, run.with_members(fragment))):
                order.setdefault(sample_id, number)
            ids = kept.rows(start, stop)["sample_id"].to_pylist()
            result.append(
                (
                    fragment.fragment_id,
                    start,
                    np.array([order.get(sample_id, -1) for sample_id in ids], np.int64),
                )
            )
    return {"positions": result}
