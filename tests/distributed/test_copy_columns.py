"""What the copy of a Ray Data dataset takes from its columns, block by block, without a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from helpers import digit_pngs

from raypipe.config import SourceSettings
from raypipe.distributed.ray_data.copy import _write
from raypipe.errors import SourceError
from raypipe.runs.run import Run


class Blocks:
    """A dataset that has only what the copy calls."""

    def __init__(self, blocks: list[pa.Table]) -> None:
        self._blocks = blocks

    def map_batches(self, function: Any, fn_kwargs: dict[str, Any], **_: Any) -> Blocks:
        return Blocks([function(block, **fn_kwargs) for block in self._blocks])

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        yield from self._blocks


def copied(folder: Path, *splits: list[Any], **source: Any) -> int:
    """Copy blocks with these values in the column `split`; return the rows."""
    blocks = [
        pa.table(
            {"image": digit_pngs(1)[0] * len(values), "Split": values, "label": [1] * len(values)}
        )
        for values in splits
    ]
    settings = SourceSettings(uri="dataset", **source)
    return _write(Blocks(blocks), settings, Run(str(folder)), lambda rows: None)["rows"]


@pytest.mark.parametrize(
    "splits",
    [(["train", "test"],), (["train"] * 2, ["val"]), (["train", None], ["Test"])],
    ids=["in one block", "in two", "next to null"],
)
def test_rows_of_several_splits_are_refused(tmp_path: Path, splits: tuple[list[Any], ...]) -> None:
    with pytest.raises(
        SourceError, match=r"several splits \((test, train|train, validation)\); choose .*filter"
    ):
        copied(tmp_path, *splits)


@pytest.mark.parametrize(
    "splits", [(["train"] * 2, ["training"]), (["left", "right"],), ([1, 2],), ([None],)]
)
def test_rows_of_one_split_are_copied(tmp_path: Path, splits: tuple[list[Any], ...]) -> None:
    assert copied(tmp_path, *splits) == sum(map(len, splits))


def test_a_split_column_that_is_the_label_is_none(tmp_path: Path) -> None:
    assert copied(tmp_path, ["train", "test"], label_column="Split") == 2
