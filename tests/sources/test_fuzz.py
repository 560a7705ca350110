"""A short run of `tests/fuzz_readers.py`: the same mutated files through the readers every time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from bad_inputs import FORMATS
from fuzz_readers import case, check, originals
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:PIL"
)  # pytest turns warnings on that raypipe.vision.decode silences
FILES = originals()


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**48))
def test_mutated_files_keep_the_contract(tmp_path: Path, seed: int) -> None:
    check(*case(seed, FILES), tmp_path, 1 + seed % 7)


@pytest.mark.parametrize("extension", sorted(FILES))
def test_the_originals_are_read(tmp_path: Path, extension: str) -> None:
    """If they were not, their mutations would test nothing."""
    expected = "pixels" if extension in FORMATS else "read"
    assert {check(extension, data, tmp_path, 4) for data in FILES[extension]} == {expected}


def test_mutations_reach_past_the_first_check(tmp_path: Path) -> None:
    """Of each kind of file, some mutations are still read and some refused."""
    outcomes: Counter[tuple[str, str]] = Counter()
    for seed in range(300):
        extension, data = case(seed, FILES)
        outcomes[
            "image" if extension in FORMATS else extension, check(extension, data, tmp_path)
        ] += 1
    for extension, good, bad in (
        ("parquet", "read", "all rejected"),
        ("tar", "read", "all rejected"),
        ("tfrecord", "read", "all rejected"),
        ("mds", "read", "all rejected"),
        ("image", "pixels", "refused"),
    ):
        assert outcomes[extension, good] >= 10 and outcomes[extension, bad] >= 10, outcomes
