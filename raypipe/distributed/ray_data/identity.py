"""What tells one Ray Data dataset from another without running it: its steps, the files it reads, the data it holds.

Two datasets of the same identity are taken to hold the same rows. What it cannot see: data that a step fetches by itself, a
database that changed behind the same query, and objects a function holds that are neither functions nor plain values.
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
"""How fast a step goes."""
DEEPEST = 6


def identity(dataset: Any) -> dict[str, str]:
    """Short hashes of the steps, of the input files (names, and sizes and times where they can be told) and of the data held."""
    operators = list(dataset._logical_plan.dag.post_order_iter())
    return {
        "steps": _hash(_step(operator) for operator in operators),
        "input files": _hash(_files(dataset, operators)),
        "data": _hash(_held(operators)),
    }


def _hash(parts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _step(operator: Any) -> str:
    """Name of an operator with the plain values and functions it was given, and those of what it reads from."""
    found = [type(operator).__name__, operator.name]
    for holder in (operator, getattr(operator, "datasource", None)):
        values = dict(vars(holder)) if hasattr(holder, "__dict__") else {}
        found += [
            f"{name}={_describe(value)}" for name, value in sorted(values.items()) if _counts(name)
        ]
    return " ".join(found)


def _counts(name: str) -> bool:
    plain = name.lstrip("_")
    return plain not in IGNORED and not any(
        word in plain for word in ("cached", "input", "context")
    )


def _describe(value: Any, depth: int = 0) -> str:
    """A value in words that are the same in another process: no addresses, no order of sets."""
    if depth > DEEPEST:
        return "..."
    inner = functools.partial(_describe, depth=depth + 1)
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, np.ndarray):
        return f"array {value.dtype} {value.shape} {hashlib.blake2b(np.ascontiguousarray(value).tobytes()).hexdigest()[:24]}"
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
    if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__.split(".")[
        0
    ] == "ray":
        return value.__qualname__  # its code may change with Ray's version
    if inspect.ismethod(value):
        return f"{inner(value.__func__)} of {type(value.__self__).__qualname__}"
    if inspect.isfunction(value):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        return f"{value.__qualname__} {inner(value.__code__)} {inner(value.__defaults__)} {inner(cells)}"
    if inspect.isclass(value):
        methods = {name: item for name, item in vars(value).items() if inspect.isfunction(item)}
        return f"{value.__qualname__} {inner(methods)}"
    shown = repr(value)
    return (
        type(value).__qualname__ if " at 0x" in shown else shown
    )  # a filter's expression shows all there is


def _filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _files(dataset: Any, operators: list[Any]) -> list[str]:
    """A line on each file that is read: its path, and its size and time of change where its filesystem tells them."""
    lines: list[str] = []
    for operator in operators:
        if hasattr(operator, "paths") and hasattr(operator, "filesystem"):
            lines += _states(operator.filesystem, list(operator.paths))
        elif hasattr(operator, "datasource"):
            try:
                paths = dataset.input_files()
            except Exception:  # a source of the user's own need not know any
                paths = []
            lines += _states(getattr(operator.datasource, "_filesystem", None), sorted(set(paths)))
    return lines


def _states(system: Any, paths: list[str]) -> list[str]:
    if not hasattr(system, "get_file_info"):
        return paths  # such as those of a Lance dataset, whose names change with their content
    found = []
    for info in system.get_file_info(paths):
        below = (
            system.get_file_info(FileSelector(info.path, recursive=True))
            if info.type == FileType.Directory
            else [info]
        )
        found += [
            f"{file.path} {file.size} {file.mtime_ns}"
            for file in below
            if file.type != FileType.Directory
        ]
    return sorted(found)


def _held(operators: list[Any]) -> list[str]:
    """Hashes of rows that lie in Ray's memory, which do not depend on how they are divided into blocks."""
    hasher = ray.remote(num_cpus=0.5)(_rows)
    found = []
    for operator in operators:
        if operator.input_dependencies:
            continue
        parts, rows = [], 0
        held = operator.output_data() if hasattr(operator, "output_data") else None
        for bundle in held or []:
            for block, metadata in zip(bundle.block_refs, bundle.metadata, strict=True):
                parts.append(hasher.remote(block, rows))
                rows += metadata.num_rows or 0
        found.append(f"{rows} rows {sum(ray.get(parts)) % 2**64:016x}" if parts else "")
    return found


def _rows(block: Any, first: int) -> int:
    """The sum of a hash of each row and its number. Runs in a task."""
    table, total = BlockAccessor.for_block(block).to_arrow(), 0
    for row, batch in enumerate(
        part.slice(at, 1) for part in table.to_batches() for at in range(len(part))
    ):
        digest = hashlib.blake2b(f"{first + row} ".encode(), digest_size=8)
        digest.update(
            batch.take(pa.array([0])).serialize()
        )  # taken out: a slice keeps traces of where it was
        total += int.from_bytes(digest.digest(), "little")
    return total % 2**64
