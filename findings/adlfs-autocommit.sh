#!/usr/bin/env bash
# adlfs: a file opened with autocommit=False appears when it is closed, not when it is committed
#
# Versions   adlfs 2026.8.0, fsspec 2026.9.0, azure-storage-blob 12.31.1, Azurite 3.35.0
# Expected   fsspec's transactions: `open(path, "wb", autocommit=False)` writes to a temporary place; `commit()` makes the
#            file appear, and `discard()` throws it away. s3fs does this.
# Seen       the blob is there after `close()`, before `commit()`; `discard()` leaves it there.
# Remedy     check whatever has to be checked before `close()`. To throw a file away, don't close it: set `file.closed = True`,
#            and Azure removes the blocks that were not committed after a week.
#
# Needs Python 3.11 or newer, node, npm and a package index. Exits 0 as long as this is the behaviour.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "${azurite:-}" 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check adlfs==2026.8.0 fsspec==2026.9.0 azure-storage-blob==12.31.1
npm install --prefix "$folder" --silent --no-fund --no-audit azurite@3.35.0
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$folder/node_modules/.bin/azurite-blob" --blobPort "$port" --silent --inMemoryPersistence --skipApiVersionCheck \
  --disableTelemetry &
azurite=$!
"$folder/venv/bin/python" - "$port" <<'PYTHON'
import sys
import time

from adlfs import AzureBlobFileSystem

# the account and the key that Azurite's documentation publishes
key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
fs = AzureBlobFileSystem(
    connection_string=f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={key};"
    f"BlobEndpoint=http://127.0.0.1:{sys.argv[1]}/devstoreaccount1;",
    use_listings_cache=False,
)
time.sleep(3)
fs.mkdir("box")
seen = []
file = fs.open("box/file", "wb", autocommit=False)
file.write(b"not committed")
file.close()
seen.append(fs.exists("box/file"))
print("after close(), before commit(): exists =", seen[-1])
file.discard()
seen.append(fs.exists("box/file"))
print("after discard():                exists =", seen[-1])
assert seen == [True, True], "the behaviour has changed"
PYTHON
