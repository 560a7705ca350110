"""Values that JSON cannot hold."""

from __future__ import annotations

import numpy as np

from raypipe.report.json_values import clean


def test_clean_makes_anything_fit_for_json() -> None:
    value = {"a": np.float32("nan"), 1: (np.int64(3), [float("inf")]), "b": np.bool_(True)}
    assert clean(value) == {"a": None, "1": [3, [None]], "b": True}
