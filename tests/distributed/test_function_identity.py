"""A function is described by all that it can reach, with the same text in every process."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raypipe.distributed.function_identity import Describer, installed

SOURCE = """
import functools, re, threading
import numpy as np
from dataclasses import dataclass
from enum import Enum
import {helper} as helper

SHIFT = 1
TABLE = {{"a": {{3, 1, 2}}, "b": [np.arange(3)]}}
PATTERN = re.compile("x")
LOCK = threading.Lock()

class Colour(Enum):
    RED = 1

@dataclass
class Options:
    scale: float = 2.0
    colour: Colour = Colour.RED

class Base:
    limit = 4
    def inner(self, row):
        return row + 1

class Step(Base):
    def __init__(self, options):
        self.options = options
    def __call__(self, row):
        return self.inner(row)
    @staticmethod
    def fixed(row):
        return row - 1

def plain(row, *, offset=5):
    return row + SHIFT + offset

@functools.lru_cache
def cached(row):
    return row * 3

def calls(row):
    return cached(row) + helper.double(row)

def nested(row):
    return [(lambda value: value + TABLE["b"])(item) for item in row]

def imports(row):
    from {helper} import FACTOR
    return row * FACTOR

def locked(row):
    with LOCK:
        return PATTERN.match(row)

step = Step(Options())
method = step.inner
partial = functools.partial(plain, offset=6)
NAMES = ["plain", "calls", "nested", "imports", "step", "method", "partial"]
"""
HELPER = """
FACTOR = 7
UNUSED = 1
def double(row):
    return row * FACTOR
"""


@pytest.fixture(autouse=True)
def no_cached_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python takes a module of equal size that was rewritten within a second from its cache."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def load(folder: Path, source: str = SOURCE, helper: str = HELPER) -> Any:
    """Import two modules, as in a process of its own."""
    folder.mkdir(exist_ok=True)
    name = f"helper_{abs(hash(str(folder)))}"
    (folder / f"{name}.py").write_text(helper)
    sys.path.insert(0, str(folder))
    try:
        module = types.ModuleType("__main__")
        exec(compile(source.format(helper=name), "pipeline.py", "exec"), vars(module))
        return module
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(name, None)


def described(module: Any) -> dict[str, str]:
    helper = module.helper
    sys.modules[helper.__name__] = helper
    try:
        return {name: Describer().describe(getattr(module, name)) for name in module.NAMES}
    finally:
        del sys.modules[helper.__name__]


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("SHIFT = 1", "SHIFT = 2", {"plain", "partial"}),
        ("*, offset=5", "*, offset=4", {"plain", "partial"}),
        ("offset=6)", "offset=7)", {"partial"}),
        ("return row + 1\n", "return row + 2\n", {"step", "method"}),
        ("limit = 4", "limit = 5", {"step", "method"}),
        ("row - 1", "row - 2", {"step", "method"}),
        ("scale: float = 2.0", "scale: float = 3.0", {"step", "method"}),
        ("return row * 3", "return row * 4", {"calls"}),
        ("np.arange(3)", "np.arange(4)", {"nested"}),
        ("{{3, 1, 2}}", "{{3, 1, 4}}", {"nested"}),
        ("value + TABLE", "value - TABLE", {"nested"}),
        ("FACTOR = 7", "FACTOR = 8", {"calls", "imports"}),
        ("return row * FACTOR\n", "return FACTOR + row\n", {"calls"}),
        ("UNUSED = 1", "UNUSED = 2", set()),
    ],
)  # fmt: skip
def test_a_change_shows_in_what_can_reach_it(
    tmp_path: Path, old: str, new: str, changed: set[str]
) -> None:
    in_helper = old in HELPER
    source = SOURCE if in_helper else SOURCE.replace(old, new)
    helper = HELPER.replace(old, new) if in_helper else HELPER
    before = described(load(tmp_path / "set"))
    assert described(load(tmp_path / "set")) == before
    after = described(load(tmp_path / "set", source, helper))
    assert {name for name in before if before[name] != after[name]} == changed


def test_the_text_is_the_same_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "pipeline.py").write_text(SOURCE.format(helper="helper"))
    code = (
        "import pipeline; from raypipe.distributed.function_identity import Describer; "
        "print([Describer().describe(getattr(pipeline, name)) for name in pipeline.NAMES])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join([str(tmp_path), *sys.path])},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1 and "unseen" not in outputs.pop()


def test_what_cannot_be_seen_is_named(tmp_path: Path) -> None:
    describer = Describer()
    describer.describe(load(tmp_path / "set").locked)
    assert describer.unseen == {"LOCK in locked (_thread.lock)"}
    describer = Describer()

    def later(row: Any) -> Any:
        import not_loaded_anywhere

        return not_loaded_anywhere.change(row)

    describer.describe(functools.partial(later))
    (unseen,) = describer.unseen
    assert unseen.startswith("the import of not_loaded_anywhere in ") and "later" in unseen


def test_a_cycle_ends_and_weights_count() -> None:
    weights = np.zeros(10_000)
    loop: dict[str, Any] = {"weights": weights, "lock": None}
    loop["self"] = loop

    def function() -> Any:
        return loop

    before = Describer().describe(function)
    assert Describer().describe(function) == before
    weights[5_000] = 1e-9  # the middle of an array is not in its repr
    assert Describer().describe(function) != before
    loop["lock"] = threading.Lock()
    describer = Describer()
    describer.describe(function)
    assert len(describer.unseen) == 1


def test_credentials_of_a_filesystem_do_not_count() -> None:
    from fsspec.implementations.local import LocalFileSystem
    from pyarrow.fs import S3FileSystem

    def of(system: Any) -> str:
        describer = Describer()
        text = describer.describe(lambda: system)
        assert not describer.unseen
        return text

    keys = [S3FileSystem(access_key=key, secret_key="x", region="a") for key in ("old", "new")]
    assert of(keys[0]) == of(keys[1]) != of(LocalFileSystem())


def test_packages_of_another_environment_are_installed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, name in (("site-packages", "package_elsewhere"), ("mine", "module_of_mine")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.py").touch()
        monkeypatch.syspath_prepend(tmp_path / folder)
    assert installed("package_elsewhere") and installed("json")
    assert not installed("module_of_mine")
