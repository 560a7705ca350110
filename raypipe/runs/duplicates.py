"""Reject samples whose id an earlier sample has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from raypipe import storage
from raypipe.config import Config
from raypipe.runs.layout import Run
from raypipe.sources import Fragment, RawSample, open_source

FOLDER, IDS, FOUND, STATE = "duplicates", "duplicates/ids", "duplicates/of", "state.json"


def duplicates_known(config: Config, run: Run) -> bool:
    """Whether duplicates were looked for to the end, or cannot be."""
    return not open_source(config.source).ids_can_repeat or storage.exists(run.path(FOLDER, STATE))


def reject_duplicates(
    run: Run, fragment: Fragment, samples: Iterable[RawSample], ids_can_repeat: bool
) -> Iterator[RawSample]:
    """The samples of a fragment, those that are duplicates of others as rejects. Runs in tasks."""
    known = _duplicates(run, fragment.fragment_id) if ids_can_repeat else {}
    seen = set[str]()
    for sample in samples:
        first = known.get(id_digest(sample.sample_id)) if known else None
        if first is not None:
            sample = sample._replace(image=None, reason=duplicate_reason(first))
        elif ids_can_repeat and sample.sample_id in seen and not sample.reason:
            sample = sample._replace(
                image=None, reason="duplicate id: an earlier sample has it too"
            )
        seen.add(sample.sample_id)
        yield sample


def duplicate_reason(first: str) -> str:
    return f"duplicate id: also in {first}"


def id_digest(sample_id: str) -> bytes:
    return hashlib.blake2b(
        sample_id.encode("utf-8", "surrogateescape"), digest_size=16, person=b"raypipe-id"
    ).digest()


def read_state(run: Run) -> dict[str, Any]:
    try:
        return storage.read_json(run.path(FOLDER, STATE))
    except FileNotFoundError:
        return {}


def _duplicates(run: Run, fragment_id: str) -> dict[bytes, str]:
    """Hash of the id -> path of the file that has its first occurrence."""
    try:
        table = storage.read_table(run.path(FOUND, f"{fragment_id}.parquet"))
    except FileNotFoundError:
        return {}
    return dict(zip(table["id_hash"].to_pylist(), table["first"].to_pylist(), strict=True))
