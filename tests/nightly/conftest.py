"""Nights in this process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from nights import Place, finished_place, in_process


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that is finished, before its first night. Not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch)
        return finished_place(tmp_path_factory.mktemp("nights") / "place")


@pytest.fixture
def growing(made: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """The same, to be changed: the source is put back as it was afterwards."""
    in_process(monkeypatch)
    aside = Path(f"{made.folder}-aside")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(made.folder, aside)
    yield made
    shutil.rmtree(made.folder)
    os.rename(aside, made.folder)
