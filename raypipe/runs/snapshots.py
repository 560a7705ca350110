"""Snapshots of a run: dated, immutable manifests of its scores and keep-lists.

The files that a snapshot names stay readable until it expires::

    RUN/snapshots/<name>.json           a manifest; never overwritten
    RUN/snapshots/files/<hash>.parquet  content named by manifests: score shards, keep-lists and
                                        the state of the nights

Content that several snapshots name is stored once. On a local disk it shares the blocks of the
file in `scores/` or `keep/` through a hard link, which is safe because files of a run are replaced
and never modified. In an object store it is a server-side copy.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, NotRequired, TypedDict

from raypipe import storage
from raypipe.errors import RunError
from raypipe.runs.run import Run
from raypipe.storage import FileInfo

FORMAT = 1
FOLDER, FILES = "snapshots", "snapshots/files"
THREADS = 16
BLOCK = 1 << 20
TIME = "%Y-%m-%dT%H%M%SZ"


class SnapshotEntry(TypedDict):
    """A file that a snapshot names, as JSON.

    Attributes
    ----------
    file : str
        Name of the file in its folder of the run.
    size, stamp : int, str
        Size and time stamp of the original. Neither is present for a file that cannot be read.
    hash : str
        Content hash, the name of the copy in the store. Not present for a file that cannot be read.
    path, samples : str, int
        Of a score shard: path of the source file and number of samples of the fragment.
    """

    file: str
    size: NotRequired[int]
    stamp: NotRequired[str]
    hash: NotRequired[str]
    path: NotRequired[str]
    samples: NotRequired[int]


class SnapshotManifest(TypedDict):
    """A snapshot as JSON.

    Attributes
    ----------
    format, name, made, raypipe
        Layout version, name, time of writing (UTC) and version of raypipe.
    generation : str
        Fingerprint of the seed set, proxy and extrapolator that the scores come from.
    config, index, score
        Fingerprint of the settings, fingerprint of the source listing, and name of the score.
    files, samples
        Counts of new, changed and removed source files and samples since the previous snapshot.
    share_since_seed, drift, labels, fidelity, judging_cpu_seconds
        Assessment of the new samples; see `raypipe.nightly`.
    refused : str
        Why there are no keep-lists, or "".
    refresh : list of str
        Reasons for a refresh.
    previous : str or None
        Name of the previous snapshot.
    state, scores, keep : list of SnapshotEntry
        State of the nights, score shards and keep-lists; the content of each is in the store.
    unreadable : list of SnapshotEntry
        Fragments of source files that could not be read.
    """

    format: int
    name: str
    made: str
    raypipe: str
    generation: str
    config: str
    index: str | None
    score: str
    files: dict[str, int]
    samples: dict[str, int]
    share_since_seed: float
    drift: dict[str, Any] | None
    labels: dict[str, Any] | None
    fidelity: dict[str, Any] | None
    judging_cpu_seconds: float
    refused: str
    refresh: list[str]
    previous: str | None
    state: list[SnapshotEntry]
    scores: list[SnapshotEntry]
    keep: list[SnapshotEntry]
    unreadable: list[SnapshotEntry]


def snapshot_names(run: Run) -> list[str]:
    """Return the names of all snapshots, oldest first."""
    return sorted(
        file.removesuffix(".json")
        for file in storage.names(run.path(FOLDER))
        if file.endswith(".json")
    )


def snapshot_name(moment: datetime) -> str:
    """Return the name of a snapshot written at a moment, such as 2026-11-22T020000Z."""
    return moment.astimezone(UTC).strftime(TIME)


def load_snapshot(run: Run, name: str) -> SnapshotManifest:
    """Read a manifest.

    Raises
    ------
    RunError
        If no snapshot has this name (it may have expired; the message names the newest ones), or
        if its layout version is unknown.
    """
    try:
        manifest = storage.read_json(run.path(FOLDER, f"{name}.json"))
    except FileNotFoundError:
        newest = ", ".join(snapshot_names(run)[-5:]) or "none"
        raise RunError(
            f"{run.uri}: no snapshot {name!r}; the newest are: {newest}. "
            "Older ones may have expired"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise RunError(
            f"{run.path(FOLDER, name + '.json')}: not a snapshot that this version of raypipe reads"
        )
    return manifest  # type: ignore[return-value]


def latest_snapshot(run: Run) -> SnapshotManifest | None:
    """Read the newest manifest; None if the run has no snapshot."""
    names = snapshot_names(run)
    return load_snapshot(run, names[-1]) if names else None


def file_uri(run: Run, entry: SnapshotEntry) -> str:
    """Return the URI of an entry's content."""
    return run.path(FILES, _stored_name(entry))


def score_shards(run: Run, snapshot: SnapshotManifest) -> list[tuple[str, str]]:
    """Return file name and URI of every score shard of a snapshot, in the order of `scores/`."""
    return sorted((entry["file"], file_uri(run, entry)) for entry in snapshot["scores"])


def _stored_name(entry: SnapshotEntry) -> str:
    return f"{entry['hash']}.parquet"


# -- writing ----------------------------------------------------------------------------


def store_folder(
    run: Run, folder: str, previous: Iterable[SnapshotEntry] = ()
) -> list[SnapshotEntry]:
    """Store the content of every Parquet file of a folder of the run; return the entries, sorted.

    Parameters
    ----------
    folder : str
        Folder inside the run.
    previous : iterable of SnapshotEntry
        Entries of the previous snapshot. A file with the same name, size and time stamp is not
        read again.
    """
    hashes = {(entry["file"], entry["size"], entry["stamp"]): entry["hash"] for entry in previous}
    files = sorted(
        (name, info)
        for name, info in storage.entries(run.path(folder)).items()
        if info is not None and name.endswith(".parquet") and not name.startswith(".")
    )

    def store(item: tuple[str, FileInfo]) -> SnapshotEntry:
        name, info = item
        digest = hashes.get((name, info.size, info.stamp))
        return {
            "file": name,
            "size": info.size,
            "stamp": info.stamp,
            "hash": digest or store_file(run, run.path(folder, name)),
        }

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(store, files))


def store_file(run: Run, uri: str) -> str:
    """Put the content of a file into the store under its hash, and return the hash."""
    digest = _content_hash(uri)
    target = run.path(FILES, f"{digest}.parquet")
    if storage.exists(target):
        return digest
    fs, path = storage.filesystem(uri)
    if storage.is_local(uri):
        _link_or_copy(path, storage.filesystem(target)[1])
    else:
        storage.retrying(lambda: fs.cp_file(path, storage.filesystem(target)[1]), target)
    return digest


def _content_hash(uri: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with storage.open_read(uri, BLOCK) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _link_or_copy(path: str, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    try:
        os.link(path, target)
    except FileExistsError:
        pass
    except OSError:  # a filesystem without hard links
        with open(path, "rb") as source, storage.Upload(target) as copy:
            while block := source.read(BLOCK):
                copy.write(block)


def write_snapshot(run: Run, name: str, manifest: Mapping[str, object]) -> None:
    """Write a manifest whose files are already in the store.

    Raises
    ------
    RunError
        If a snapshot of this name exists.
    """
    if run.lease is not None:
        run.lease.check()
    document = {"format": FORMAT, "name": name, **manifest}
    data = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    uri = run.path(FOLDER, f"{name}.json")
    # an object store takes an existing file of the same bytes for its own write whose answer was
    # lost; two nights cannot write the same bytes, because their names differ
    if not storage.create_bytes(uri, data.encode()):
        raise RunError(f"{uri}: already exists; a snapshot is never overwritten. Rerun the night")


# -- expiry -----------------------------------------------------------------------------


def expired_names(names: Sequence[str], keep: int, days: int | None, now: datetime) -> list[str]:
    """Return the snapshots that expire, oldest first.

    All but the newest `keep` expire, and all older than `days`. The newest one never does.
    """
    ordered = sorted(names)
    too_old = snapshot_name(now - timedelta(days=days)) if days is not None else ""
    return [
        name
        for position, name in enumerate(ordered[:-1])
        if position < len(ordered) - keep or name < too_old
    ]


def expire_snapshots(
    run: Run, keep: int, days: int | None, now: datetime, clean: bool = True
) -> list[str]:
    """Remove the snapshots that expire and the files that only they name; return their names.

    Files are removed before manifests, so that the same call finishes one that was killed.

    Parameters
    ----------
    keep, days, now
        See `expired_names`.
    clean : bool
        Look for files that no snapshot names even if none expires: a killed night leaves such
        files behind.
    """
    names = snapshot_names(run)
    expired = expired_names(names, keep, days, now)
    if not (expired or clean):
        return []
    remaining = [load_snapshot(run, name) for name in names if name not in set(expired)]
    referenced = {
        _stored_name(entry)
        for manifest in remaining
        for entry in (*manifest["scores"], *manifest["keep"], *manifest["state"])
    }
    with ThreadPoolExecutor(THREADS) as threads:
        stale = sorted(storage.names(run.path(FILES)) - referenced)
        list(threads.map(lambda file: storage.delete(run.path(FILES, file)), stale))
    for name in expired:
        storage.delete(run.path(FOLDER, f"{name}.json"))
    return expired
