"""Snapshots of a run: dated, immutable manifests of its scores and keep-lists, whose files stay readable until they expire.

    RUN/snapshots/<name>.json         a manifest; never written over
    RUN/snapshots/files/<hash>.parquet  what manifests name: score shards, keep-lists and the state of the nights, by their content

A file that several snapshots name is there once. On a local disk it shares the blocks of the file in `scores/` or `keep/` (a hard link:
files of a run are replaced and never changed), in an object store it is a copy made by the store.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

from raypipe import storage
from raypipe.errors import RunError
from raypipe.runs.layout import Run

FORMAT = 1
FOLDER, FILES = "snapshots", "snapshots/files"
NAMED = ("scores", "keep", "state")
"""Lists of a manifest whose entries name files: file, size, stamp (of the original) and hash."""
THREADS = 16
BLOCK = 1 << 20
TIME = "%Y-%m-%dT%H%M%SZ"

Entry = dict[str, Any]


def snapshot_names(run: Run) -> list[str]:
    """Names of the snapshots, the oldest first."""
    return sorted(
        file.removesuffix(".json")
        for file in storage.names(run.path(FOLDER))
        if file.endswith(".json")
    )


def name_at(moment: datetime) -> str:
    """The name of a snapshot made at a moment: 2026-11-22T020000Z."""
    return moment.astimezone(UTC).strftime(TIME)


def load_snapshot(run: Run, name: str) -> dict[str, Any]:
    """A manifest. Raises RunError where there is none of this name (it may have expired), naming those there are."""
    try:
        found = storage.read_json(run.path(FOLDER, f"{name}.json"))
    except FileNotFoundError:
        there = snapshot_names(run)
        shown = ", ".join(there[-5:]) if there else "none"
        raise RunError(
            f"{run.uri}: no snapshot {name!r}; the newest there are: {shown}. Older ones may have expired"
        ) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise RunError(
            f"{run.path(FOLDER, name + '.json')}: not a snapshot that this raypipe reads"
        )
    return found


def latest(run: Run) -> dict[str, Any] | None:
    """The newest manifest; None without any."""
    names = snapshot_names(run)
    return load_snapshot(run, names[-1]) if names else None


def file_uri(run: Run, entry: Mapping[str, Any]) -> str:
    """Where the content of an entry is."""
    return run.path(FILES, f"{entry['hash']}.parquet")


def score_shards(run: Run, snapshot: Mapping[str, Any]) -> list[tuple[str, str]]:
    """File name and URI of every score shard of a snapshot, sorted by name, as `scores/` is read."""
    return sorted((entry["file"], file_uri(run, entry)) for entry in snapshot["scores"])


# -- making ---------------------------------------------------------------------------------------------------------


def entries_of(run: Run, folder: str, before: Iterable[Mapping[str, Any]] = ()) -> list[Entry]:
    """An entry of every Parquet file of a folder of the run, sorted, with the content in the store.

    before  entries of the last snapshot: a file with the size and stamp that it had then is not read again
    """
    known = {(entry["file"], entry["size"], entry["stamp"]): entry["hash"] for entry in before}
    there = [
        (name, info) for name, info in storage.entries(run.path(folder)).items() if info is not None
    ]
    files = sorted(
        (name, info)
        for name, info in there
        if name.endswith(".parquet") and not name.startswith(".")
    )

    def entry(item: tuple[str, Any]) -> Entry:
        name, info = item
        found = known.get((name, info.size, info.stamp))
        return {
            "file": name,
            "size": info.size,
            "stamp": info.stamp,
            "hash": found or keep_file_content(run, run.path(folder, name)),
        }

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(entry, files))


def keep_file_content(run: Run, uri: str) -> str:
    """Put the content of a file into the store, under its hash, which is returned."""
    digest = hashlib.blake2b(digest_size=16)
    with storage.open_read(uri, BLOCK) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    target = run.path(FILES, f"{digest.hexdigest()}.parquet")
    if storage.exists(target):
        return digest.hexdigest()
    fs, path = storage.filesystem(uri)
    if not storage.is_local(uri):
        storage.retrying(lambda: fs.cp_file(path, storage.filesystem(target)[1]), target)
        return digest.hexdigest()
    os.makedirs(os.path.dirname(target := storage.filesystem(target)[1]), exist_ok=True)
    try:
        os.link(path, target)
    except FileExistsError:
        pass
    except OSError:  # a filesystem without hard links
        with open(path, "rb") as source, storage.Upload(target) as copy:
            while block := source.read(BLOCK):
                copy.write(block)
    return digest.hexdigest()


def write_snapshot(run: Run, name: str, manifest: Mapping[str, Any]) -> None:
    """Write a manifest; its files must be in the store. Raises RunError where there is a snapshot of this name."""
    if run.lease is not None:
        run.lease.check()
    data = (
        json.dumps(
            {"format": FORMAT, "name": name, **manifest},
            indent=1,
            ensure_ascii=False,
            allow_nan=False,
        )
        + "\n"
    )
    uri = run.path(FOLDER, f"{name}.json")
    # an object store takes a manifest of the same bytes for an answer that was lost; two nights in one second do not come about so
    if not storage.create_bytes(uri, data.encode()):
        raise RunError(f"{uri}: is there already; a snapshot is never written over. Run it again")


# -- expiry ---------------------------------------------------------------------------------------------------------


def expired(names: Sequence[str], keep: int, days: int | None, now: datetime) -> list[str]:
    """Which snapshots expire: all but the newest `keep`, and those more than `days` old. The newest never does."""
    ordered = sorted(names)
    too_old = name_at(now - timedelta(days=days)) if days is not None else ""
    return [
        name
        for place, name in enumerate(ordered[:-1])
        if place < len(ordered) - keep or name < too_old
    ]


def expire(run: Run, keep: int, days: int | None, now: datetime, clean: bool = True) -> list[str]:
    """Remove the snapshots that expire, and the files that they alone name; returns their names, the oldest first.

    clean  look for files that no snapshot names where none expires, too: what a night that was killed has left
    Files go before manifests, so that the same call ends what one that was killed began.
    """
    there = snapshot_names(run)
    gone = expired(there, keep, days, now)
    if not (gone or clean):
        return []
    kept = [load_snapshot(run, name) for name in there if name not in set(gone)]
    named = {
        f"{entry['hash']}.parquet"
        for manifest in kept
        for kind in NAMED
        for entry in manifest[kind]
    }
    with ThreadPoolExecutor(THREADS) as threads:
        stale = sorted(storage.names(run.path(FILES)) - named)
        list(threads.map(lambda file: storage.delete(run.path(FILES, file)), stale))
    for name in gone:
        storage.delete(run.path(FOLDER, f"{name}.json"))
    return gone
