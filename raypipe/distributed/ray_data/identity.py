"""Identify a Ray Data dataset without running it, by its steps, input files and data in memory.

Two datasets of the same identity are assumed to hold the same rows. It does not cover data that a
step fetches itself, a database that changed behind the same query, and objects referenced by a
function that are neither functions nor plain values.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Iterable
from types import CodeType
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from pyarrow.fs import FileSelector, FileType
from ray.data.block import BlockAccessor

PLAIN = (str, int, float, bool, bytes, type(None))
IGNORED = {
    "compute",
    "ray_remote_args",
    "ray_remote_args_fn",
    "parallelism",
    "num_outputs",
    "detected_parallelism",
    "per_block_limit",
}
"""Attributes of a step that only affect its speed."""
MAX_DEPTH = 6


def identity(dataset: Any) -> dict[str, str]:
    """Return short hashes of the steps, the input files and the data in memory.

    Input files count with their names and, where the filesystem reports them, sizes and times.
    """
    operators = list(dataset._logical_plan.dag.post_order_iter())
    return {
        "steps": _hash(_step(operator) for operator in operators),
        "input files": _hash(_files(dataset, operators)),
        "data": _hash(_data_in_memory(operators)),
    }


def _hash(parts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _step(operator: Any) -> str:
    """Describe an operator and its datasource by their names, plain values and functions."""
    parts = [type(operator).__name__, operator.name]
    for holder in (operator, getattr(operator, "datasource", None)):
        values = dict(vars(holder)) if hasattr(holder, "__dict__") else {}
        parts += [
            f"{name}={_describe(value)}"
            for name, value in sorted(values.items())
            if _is_relevant(name)
        ]
    return " ".join(parts)


def _is_relevant(name: str) -> bool:
    plain = name.lstrip("_")
    return plain not in IGNORED and not any(
        word in plain for word in ("cached", "input", "context")
    )


def _describe(value: Any, depth: int = 0) -> str:
    """Describe a value by a text that is the same in every process: no addresses or set order."""
    if depth > MAX_DEPTH:
        return "..."
    inner = functools.partial(_describe, depth=depth + 1)
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, np.ndarray):
        digest = hashlib.blake2b(np.ascontiguousarray(value).tobytes()).hexdigest()[:24]
        return f"array {value.dtype} {value.shape} {digest}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(inner, value))}]"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(inner, value)))}}}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{inner(key)}: {inner(item)}' for key, item in value.items())}}}"
    if isinstance(value, functools.partial):
        return f"partial({inner(value.func)}, {inner(value.args)}, {inner(value.keywords)})"
    if isinstance(value, CodeType):
        constants = [inner(item) for item in value.co_consts]
        return f"code {value.co_code.hex()} {value.co_names} {constants}"
    if isinstance(value, ray.ObjectRef):
        return "reference"
    is_code = inspect.isfunction(value) or inspect.isclass(value)
    if is_code and value.__module__.split(".")[0] == "ray":
        return value.__qualname__  # its code can change with the version of Ray
    if inspect.ismethod(value):
        return f"{inner(value.__func__)} of {type(value.__self__).__qualname__}"
    if inspect.isfunction(value):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        code, defaults = inner(value.__code__), inner(value.__defaults__)
        return f"{value.__qualname__} {code} {defaults} {inner(cells)}"
    if inspect.isclass(value):
        methods = {name: item for name, item in vars(value).items() if inspect.isfunction(item)}
        return f"{value.__qualname__} {inner(methods)}"
    shown = repr(value)
    # the text of a filter expression is complete
    return type(value).__qualname__ if " at 0x" in shown else shown


def _filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _files(dataset: Any, operators: list[Any]) -> list[str]:
    """Return a line per input file: path, and size and time of change if reported."""
    lines: list[str] = []
    for operator in operators:
        if hasattr(operator, "paths") and hasattr(operator, "filesystem"):
            lines += _states(operator.filesystem, list(operator.paths))
        elif hasattr(operator, "datasource"):
            try:
                paths = dataset.input_files()
            except Exception:  # a custom datasource need not report any
                paths = []
            lines += _states(getattr(operator.datasource, "_filesystem", None), sorted(set(paths)))
    return lines


def _states(system: Any, paths: list[str]) -> list[str]:
    if not hasattr(system, "get_file_info"):
        return paths  # as for a Lance dataset, whose file names change with the content
    lines = []
    for info in system.get_file_info(paths):
        files = (
            system.get_file_info(FileSelector(info.path, recursive=True))
            if info.type == FileType.Directory
            else [info]
        )
        lines += [
            f"{file.path} {file.size} {file.mtime_ns}"
            for file in files
            if file.type != FileType.Directory
        ]
    return sorted(lines)


def _data_in_memory(operators: list[Any]) -> list[str]:
    """Return hashes of rows in Ray's memory, independent of their division into blocks."""
    hasher = ray.remote(num_cpus=0.5)(_rows)
    hashes = []
    for operator in operators:
        if operator.input_dependencies:
            continue
        parts, rows = [], 0
        bundles = operator.output_data() if hasattr(operator, "output_data") else None
        for bundle in bundles or []:
            for block, metadata in zip(bundle.block_refs, bundle.metadata, strict=True):
                parts.append(hasher.remote(block, rows))
                rows += metadata.num_rows or 0
        hashes.append(f"{rows} rows {sum(ray.get(parts)) % 2**64:016x}" if parts else "")
    return hashes


def _rows(block: Any, first: int) -> int:
    """Return the sum of the hashes of all rows with their numbers. Runs in a task."""
    table, total = BlockAccessor.for_block(block).to_arrow(), 0
    for row, batch in enumerate(
        part.slice(at, 1) for part in table.to_batches() for at in range(len(part))
    ):
        digest = hashlib.blake2b(f"{first + row} ".encode(), digest_size=8)
        # `take` copies the row: a slice would serialise its offset as well
        digest.update(batch.take(pa.array([0])).serialize())
        total += int.from_bytes(digest.digest(), "little")
    return total % 2**64
