"""A small run as the tests of the report write it, with marks of the drawn sets."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raypipe import storage
from raypipe.runs.run import Run
from raypipe.view import images

_SPEC = importlib.util.spec_from_file_location(
    "report_fixtures_of_view", Path(__file__).parents[1] / "report" / "conftest.py"
)
assert _SPEC is not None and _SPEC.loader is not None
_FIXTURES = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_FIXTURES)
make_run, source = _FIXTURES.make_run, _FIXTURES.source

SEED_ROWS, AUDIT_ROWS = 7, 3
"""Of every fragment: the first rows."""


@pytest.fixture
def viewed(
    make_run: Callable[..., Run], source: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    monkeypatch.setattr(images, "open_source", lambda settings: source)

    def make(**settings: Any) -> Run:
        run = make_run(**settings)
        for name in run.done("embeddings"):
            table = storage.read_table(run.embedding_shard(name))
            metadata = {
                b"raypipe.seed_rows": str(SEED_ROWS),
                b"raypipe.audit_rows": str(AUDIT_ROWS),
            }
            storage.write_table(run.embedding_shard(name), table.replace_schema_metadata(metadata))
        return run

    return make
