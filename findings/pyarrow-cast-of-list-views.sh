#!/usr/bin/env bash
# pyarrow 26.0.1: casting a list_view column to a list column gives an invalid array.
#
# Expected: cast(list_(T)) of a list_view(T) array keeps every row, or refuses.
# Seen: the cast returns without an error, but validate() says that the offsets buffer is one entry too small: a
# view has n offsets, a list n + 1. The same with large_list_view and large_list. Between the two widths, from
# list_view to large_list, validate() has no complaint, and the last row is not what it was.
# What to do: compute the offsets from list_value_length(), and do not cast.
#
# Needs Python 3.11 or newer and a package index. Exits 0 as long as this is the behaviour.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check pyarrow==26.0.1
"$folder/venv/bin/python" - <<'PYTHON'
import pyarrow as pa


ROWS = [[1.0], [], [2.0, 3.0]]


def cast(views, lists):
    array = pa.array(ROWS, views(pa.float32()))
    array.validate(full=True)
    result = array.cast(lists(pa.float32()))
    try:
        result.validate()
    except pa.ArrowInvalid as error:
        print(array.type, "->", result.type, ":", error)
        return str(error)
    print(array.type, "->", result.type, ":", result.to_pylist())
    return result.to_pylist()


print("pyarrow", pa.__version__)
for views, lists in ((pa.list_view, pa.list_), (pa.large_list_view, pa.large_list)):
    error = cast(views, lists)
    assert isinstance(error, str) and "ffsets buffer" in error, "the behaviour has changed"
other = cast(pa.list_view, pa.large_list)
assert isinstance(other, list) and other != ROWS, "the behaviour has changed"
PYTHON
