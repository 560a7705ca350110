"""Units much larger in total than the object store are read as they fit, without spilling."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_store import STORE, UNITS


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(250)
def test_a_small_object_store_is_enough() -> None:
    command = [sys.executable, str(Path(__file__).with_name("small_store.py"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    numbers = list(range(UNITS))
    assert found["stream"]["result"] == numbers
    assert found["sums"]["result"] == [sum(numbers), 2 * sum(numbers), UNITS]
    assert 0 < found["stream"]["used"] < STORE, found
    assert found["stream"]["fallback"] == found["stream"]["spilled"] == 0, found
