"""Reject samples whose id occurs in an earlier sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from raypipe import storage
from raypipe.config import Config
from raypipe.runs.run import Run
from raypipe.sources import Fragment, RawSample, open_source

FOLDER = "duplicates"
"""Results of the search for duplicates, inside the run."""
IDS = "duplicates/ids"
"""Hashes of the ids that the search has read."""
FIRST_OCCURRENCES = "duplicates/of"
"""Per fragment with duplicates: hash of the id, and file of its first occurrence."""
STATE = "state.json"
"""State of the last complete search."""


def duplicates_searched(config: Config, run: Run) -> bool:
    """Whether the search for duplicates is complete, or not needed."""
    return not open_source(config.source).ids_can_repeat or storage.exists(run.path(FOLDER, STATE))


def reject_duplicates(
    run: Run, fragment: Fragment, samples: Iterable[RawSample], ids_can_repeat: bool
) -> Iterator[RawSample]:
    """Pass on the samples of a fragment, with duplicates turned into rejects. Runs in tasks."""
    duplicates = _duplicates(run, fragment.fragment_id) if ids_can_repeat else {}
    seen = set[str]()
    for sample in samples:
        first = duplicates.get(id_digest(sample.sample_id)) if duplicates else None
        if first is not None:
            sample = sample._replace(image=None, reason=duplicate_reason(first))
        elif ids_can_repeat and sample.sample_id in seen and not sample.reason:
            sample = sample._replace(
                image=None, reason="duplicate id: an earlier sample has it too"
            )
        seen.add(sample.sample_id)
        yield sample


def duplicate_reason(first: str) -> str:
    """Return the reason of a reject, given the file with the first occurrence."""
    return f"duplicate id: also in {first}"


def id_digest(sample_id: str) -> bytes:
    """Return the hash that a sample_id is compared by."""
    return hashlib.blake2b(
        sample_id.encode("utf-8", "surrogateescape"), digest_size=16, person=b"raypipe-id"
    ).digest()


def read_state(run: Run) -> dict[str, Any]:
    """Read the state of the last complete search; empty without one."""
    try:
        return storage.read_json(run.path(FOLDER, STATE))
    except FileNotFoundError:
        return {}


def _duplicates(run: Run, fragment_id: str) -> dict[bytes, str]:
    """Return the path of the file with the first occurrence, by hash of the id."""
    try:
        table = storage.read_table(run.path(FIRST_OCCURRENCES, f"{fragment_id}.parquet"))
    except FileNotFoundError:
        return {}
    return dict(zip(table["id_hash"].to_pylist(), table["first"].to_pylist(), strict=True))
