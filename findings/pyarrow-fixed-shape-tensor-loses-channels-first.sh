#!/usr/bin/env bash
# pyarrow 26.0.1, numpy 2.4.6: a channels-first view of images does not survive FixedShapeTensorArray.
#
# Expected: to_numpy_ndarray() returns the array that from_numpy_ndarray() was given. Both are documented
# as counterparts, and from_numpy_ndarray() accepts arrays of any memory layout.
# Seen: for images of 4 x 5 x 3 (height, width, channels) seen through transpose(0, 3, 1, 2), an array of
# shape (2, 3, 4, 5) comes back as (2, 5, 3, 4), without an error or a warning. A contiguous copy of the
# same array comes back unchanged. So the result depends on the memory layout of the input.
# Why: the strides are stored as a permutation, and reading applies that permutation where its inverse is
# needed. A permutation that is its own inverse (swapping two axes) is not affected.
# What to do: call numpy.ascontiguousarray() before from_numpy_ndarray().
#
# Needs Python 3.11 or newer and a package index. Exits 0 as long as this is the behaviour.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import pyarrow as pa

images = np.arange(2 * 4 * 5 * 3, dtype="float32").reshape(2, 4, 5, 3)
first = images.transpose(0, 3, 1, 2)  # channels first: a view, nothing is copied
of_view = pa.FixedShapeTensorArray.from_numpy_ndarray(first)
of_copy = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(first))
print("pyarrow", pa.__version__, "numpy", np.__version__)
print("given          ", first.shape)
print("view, type     ", of_view.type)
print("view, returned ", of_view.to_numpy_ndarray().shape)
print("copy, type     ", of_copy.type)
print("copy, returned ", of_copy.to_numpy_ndarray().shape)
swapped = images.transpose(0, 2, 1, 3)
of_swapped = pa.FixedShapeTensorArray.from_numpy_ndarray(swapped)
print("two axes swapped: equal", np.array_equal(of_swapped.to_numpy_ndarray(), swapped))

assert first.shape == (2, 3, 4, 5)
assert of_view.to_numpy_ndarray().shape == (2, 5, 3, 4), "the behaviour has changed"
assert np.array_equal(of_copy.to_numpy_ndarray(), first), "the behaviour has changed"
assert np.array_equal(of_swapped.to_numpy_ndarray(), swapped), "the behaviour has changed"
PYTHON
echo "confirmed: a channels-first view comes back with its axes in another order"
