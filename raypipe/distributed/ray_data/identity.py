"""Identify a Ray Data dataset without running it, by its steps, input files and data in memory.

Two datasets of the same identity are assumed to hold the same rows. It covers what the functions of
the steps can reach, as far as `Identity.unseen` does not name it. It does not cover data that a
step fetches itself, and a database that changed behind the same query.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from pyarrow.fs import FileSelector, FileType
from ray.data.block import BlockAccessor

from raypipe.distributed.function_identity import Describer

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


@dataclass(frozen=True)
class Identity:
    """Identity of a dataset.

    Attributes
    ----------
    hashes : dict of str to str
        Short hashes of the steps, the input files and the data in memory.
    unseen : tuple of str
        What the steps use whose changes do not show in the hashes.
    """

    hashes: dict[str, str]
    unseen: tuple[str, ...]


def identity(dataset: Any) -> Identity:
    """Return the identity of a dataset.

    Input files count with their names and, where the filesystem reports them, sizes and times.
    """
    operators = list(dataset._logical_plan.dag.post_order_iter())
    describer = Describer()
    hashes = {
        "steps": _hash(_step(operator, describer) for operator in operators),
        "input files": _hash(_files(dataset, operators)),
        "data": _hash(_data_in_memory(operators)),
    }
    return Identity(hashes, tuple(sorted(describer.unseen)))


def _hash(parts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _step(operator: Any, describer: Describer) -> str:
    """Describe an operator and its datasource by their names, values and functions."""
    parts = [type(operator).__name__, operator.name]
    for holder in (operator, getattr(operator, "datasource", None)):
        values = dict(vars(holder)) if hasattr(holder, "__dict__") else {}
        of_ray = type(holder).__module__.split(".")[0] == "ray"
        for name, value in sorted(values.items()):
            if _is_relevant(name):
                plain = name.lstrip("_")
                # what Ray's own classes hold for themselves is nothing that a user changes
                of_user = not of_ray or plain.startswith("fn") or "expr" in plain
                used = describer if of_user else Describer()
                parts.append(f"{name}={used.describe(value, plain)}")
    return " ".join(parts)


def _is_relevant(name: str) -> bool:
    plain = name.lstrip("_")
    return plain not in IGNORED and not any(
        word in plain for word in ("cached", "input", "context", "filesystem")
    )


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
