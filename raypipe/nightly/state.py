"""State that the nights of a run keep.

`RUN/nightly/<generation>/` holds what is fixed by the first snapshot of a generation:
`baseline.json`, and `reference-old.parquet` and `reference-seed.parquet`, samples of that moment
that drift is measured against. A generation is a seed set with its proxy and extrapolator.

State that changes every night (`arrivals.parquet`, `audit.parquet`) is stored with the snapshots,
so that a night which is killed and rerun starts from the same state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from raypipe import storage
from raypipe.distributed.context import Context
from raypipe.nightly.sampling import draw
from raypipe.runs.ledger import now
from raypipe.runs.run import Run
from raypipe.runs.snapshots import SnapshotEntry, SnapshotManifest, file_uri, store_file
from raypipe.sources import Fragment

FOLDER = "nightly"
BASELINE = "baseline.json"


@dataclass(frozen=True)
class Baseline:
    """A run before its first night.

    Attributes
    ----------
    samples : int
        Samples of all readable fragments.
    fragments : tuple of str
        Their names.
    classes : tuple of str
        Class names of the source.
    """

    samples: int
    fragments: tuple[str, ...]
    classes: tuple[str, ...]

    @classmethod
    def read(cls, run: Run, generation: str) -> Baseline:
        """Read the baseline of a generation."""
        data = storage.read_json(run.path(FOLDER, generation, BASELINE))
        return cls(data["samples"], tuple(data["fragments"]), tuple(data["classes"]))


def write_baseline(context: Context, generation: str, fragments: Sequence[Fragment]) -> None:
    """Write baseline and references of a generation, if missing; remove earlier generations."""
    run, count = context.run, context.config.nightly.drift_samples
    folder = run.path(FOLDER, generation)
    if BASELINE in storage.names(folder):
        return
    storage.delete(run.path(FOLDER))
    readable = [fragment for fragment in fragments if not fragment.error]
    _write_reference(context, folder, "old", readable, count)
    _write_reference(context, folder, "seed", readable, count)
    baseline = {
        "samples": sum(fragment.samples for fragment in readable),
        "fragments": sorted(fragment.fragment_id for fragment in readable),
        "classes": list(run.classes().names),
        "made": now(),
    }
    storage.write_json(storage.join(folder, BASELINE), baseline)


def _write_reference(
    context: Context,
    folder: str,
    kind: Literal["old", "seed"],
    fragments: Sequence[Fragment],
    count: int,
) -> None:
    table = draw(context, fragments, count, from_seed_set=kind == "seed")
    storage.write_table(storage.join(folder, f"reference-{kind}.parquet"), table)


def read_reference(run: Run, generation: str, kind: Literal["old", "seed"]) -> pa.Table:
    """Read the reference samples outside ("old") or inside ("seed") the seed set."""
    return storage.read_table(run.path(FOLDER, generation, f"reference-{kind}.parquet"))


def load_state(run: Run, snapshot: SnapshotManifest, name: str) -> pa.Table:
    """Read a state table that a snapshot names; an empty table if it names none."""
    for entry in snapshot["state"]:
        if entry["file"] == f"{name}.parquet":
            return storage.read_table(file_uri(run, entry))
    return pa.table({})


def store_state(run: Run, generation: str, **tables: pa.Table) -> list[SnapshotEntry]:
    """Store state tables by name; return the entries of those that are not empty."""
    entries: list[SnapshotEntry] = []
    for name, table in tables.items():
        if not len(table):
            continue
        file = f"{name}.parquet"
        uri = run.path(FOLDER, generation, file)
        storage.write_table(uri, table)
        size = storage.info(uri).size
        entries.append({"file": file, "size": size, "stamp": "", "hash": store_file(run, uri)})
    return entries
