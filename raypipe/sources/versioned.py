"""Tables that keep several versions in one folder: Delta, Iceberg, Hudi.

A log of theirs states which Parquet files belong to the current version. Their folder also holds
rows that were deleted, so its files are not the table.
"""

from __future__ import annotations

from raypipe import storage
from raypipe.errors import SourceError
from raypipe.sources.location import Location

DELTA, ICEBERG, HUDI = "_delta_log", "metadata", ".hoodie"
"""Folders of the logs."""


def refuse_versioned_table(uri: str, location: Location, remedy: str) -> None:
    """Raise SourceError if a folder is such a table.

    Parameters
    ----------
    uri : str
        The folder, a file or a pattern.
    location : Location
        The files at `uri`.
    remedy : str
        What else to do than to name the current files; "{}" stands for the kind of the table.
    """
    folders = location.folders()
    if DELTA in folders:
        kind, log = "Delta", DELTA
    elif ICEBERG in folders and _has_metadata(storage.join(uri, ICEBERG)):
        kind, log = "Iceberg", ICEBERG
    elif storage.is_file(storage.join(uri, HUDI, "hoodie.properties")):
        kind, log = "Hudi", HUDI
    else:
        return
    article = "an" if kind == "Iceberg" else "a"
    raise SourceError(
        f"{uri}: {article} {kind} table ({log}), whose folder also holds files of earlier "
        f"versions; {remedy.format(kind.lower())}, or name its current files in a pattern or list"
    )


def _has_metadata(folder: str) -> bool:
    return any(name.endswith(".metadata.json") for name in storage.names(folder))
