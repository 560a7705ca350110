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
    """A finished run before its first night. Tests must not change it."""
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch)
        return finished_place(tmp_path_factory.mktemp("nights") / "place")


@pytest.fixture
def growing(made: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """The same, for changes: source and run are restored afterwards."""
    in_process(monkeypatch)
    aside = Path(f"{made.folder}-aside")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(made.folder, aside)
    yield made
    shutil.rmtree(made.folder)
    os.rename(aside, made.folder)
