"""Files by path or URI: the same code for local disk, S3, Google Cloud Storage and Azure.

The clients are those of fsspec: s3fs, gcsfs and adlfs. Credentials come from the usual variables
and files of each store. raypipe stores none of them. Writes are atomic: a reader sees a whole file
or none. Transient faults are retried with exponential back-off and full jitter. A missing file, a
denied access or a full disk is not retried, because waiting does not help.
"""

from __future__ import annotations

from raypipe.storage.content import (
    LOCAL_READERS,
    READERS,
    ahead,
    iter_tables,
    json_bytes,
    matrix_of,
    read_json,
    read_table,
    read_whole,
    write_json,
    write_table,
    write_table_groups,
)
from raypipe.storage.faults import errors_of_storage, retrying
from raypipe.storage.file_info import FileInfo, hidden
from raypipe.storage.files import (
    create_bytes,
    delete,
    exchange_bytes,
    exists,
    info,
    is_file,
    missing_bucket,
    modified,
    open_read,
    read_bytes,
    write_bytes,
)
from raypipe.storage.listings import entries, folders, glob_root, listing, matching, names, walk
from raypipe.storage.places import filesystem, is_local, join, name
from raypipe.storage.streams import Reader, Upload

__all__ = [
    "LOCAL_READERS",
    "READERS",
    "FileInfo",
    "Reader",
    "Upload",
    "ahead",
    "create_bytes",
    "delete",
    "entries",
    "errors_of_storage",
    "exchange_bytes",
    "exists",
    "filesystem",
    "folders",
    "glob_root",
    "hidden",
    "info",
    "is_file",
    "is_local",
    "iter_tables",
    "join",
    "json_bytes",
    "listing",
    "matching",
    "matrix_of",
    "missing_bucket",
    "modified",
    "name",
    "names",
    "open_read",
    "read_bytes",
    "read_json",
    "read_table",
    "read_whole",
    "retrying",
    "walk",
    "write_bytes",
    "write_json",
    "write_table",
    "write_table_groups",
]
