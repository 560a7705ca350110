#!/usr/bin/env bash
# pyarrow 26.0.1, numpy 2.4.6: a channels-first view of images does not survive FixedShapeTensorArray.
#
# Expected: to_numpy_ndarray() returns the array that from_numpy_ndarray() was given, whatever its memory
# layout, since from_numpy_ndarray() accepts transposed views and notes their layout in the column's type.
# Seen: swapping two axes works. Moving an axis past two others does not:
# - images of 4 x 4 x 3 (height, width, channels), seen channels first through transpose(0, 3, 1, 2), are
#   accepted, but reading them raises "strides must not involve buffer over run";
# - a view through transpose(0, 2, 3, 1) of images of 4 x 5 x 3 has the shape (2, 5, 3, 4) and comes back
#   as (2, 3, 4, 5), without an error or a warning.
# The type records the inverse of the permutation that leads from the stored to the logical axes: [1, 2, 0]
# where it is [2, 0, 1]. A swap of two axes is its own inverse, so it is not affected.
# Reading is affected as well: stored 4 x 5 x 3 images whose type is declared with [2, 0, 1] come back in
# the right shape (2, 3, 4, 5), with the pixels in the wrong places.
# What to do: call numpy.ascontiguousarray() before from_numpy_ndarray().
#
# Needs Python 3.11 or newer and a package index. Exits 0 as long as this is the behaviour.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check pyarrow==26.0.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import pyarrow as pa


def back(array):
    stored = pa.FixedShapeTensorArray.from_numpy_ndarray(array)
    print("given", array.shape, "stored", stored.type.shape, "permutation", stored.type.permutation)
    try:
        read = stored.to_numpy_ndarray()
    except pa.ArrowInvalid as error:
        print("  error:", error)
        return str(error)
    print("  returned", read.shape, "equal", np.array_equal(read, array))
    return read


print("pyarrow", pa.__version__, "numpy", np.__version__)
square = np.arange(2 * 4 * 4 * 3, dtype="float32").reshape(2, 4, 4, 3)
oblong = np.arange(2 * 4 * 5 * 3, dtype="float32").reshape(2, 4, 5, 3)

swapped = oblong.transpose(0, 2, 1, 3)
assert np.array_equal(back(swapped), swapped), "the behaviour has changed"
first = square.transpose(0, 3, 1, 2)
assert np.array_equal(back(np.ascontiguousarray(first)), first), "the behaviour has changed"

error = back(first)
assert isinstance(error, str) and "buffer over run" in error, "the behaviour has changed"
stored = pa.FixedShapeTensorArray.from_numpy_ndarray(first).type
assert (stored.shape, stored.permutation) == ([4, 4, 3], [1, 2, 0]), "the behaviour has changed"
moved = oblong.transpose(0, 2, 3, 1)
read = back(moved)
assert moved.shape == (2, 5, 3, 4), "the behaviour has changed"
assert not isinstance(read, str) and read.shape == (2, 3, 4, 5), "the behaviour has changed"

flat = pa.FixedSizeListArray.from_arrays(pa.array(oblong.ravel()), 4 * 5 * 3)
kind = pa.fixed_shape_tensor(pa.float32(), [4, 5, 3], permutation=[2, 0, 1])
read = pa.ExtensionArray.from_storage(kind, flat).to_numpy_ndarray()
right = np.array_equal(read, oblong.transpose(0, 3, 1, 2))
print("declared [2, 0, 1] returned", read.shape, "equal", right)
assert read.shape == (2, 3, 4, 5) and not right, "the behaviour has changed"
PYTHON
echo "confirmed: a view with an axis moved past two others cannot be read back"
