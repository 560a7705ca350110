"""Code that a configuration names: how it is found, and where it is not imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raypipe import plugins
from raypipe.errors import ConfigError
from raypipe.storage.fences import fenced


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder; modules that a test imports from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("name", ["module:name", "a.b.c:D.e", "_m:_f"])
def test_module_and_name_form_a_reference(name: str) -> None:
    assert plugins.is_reference(name)


@pytest.mark.parametrize("name", ["moso", "a:", ":b", "a:b:c", "a/b:c", "a b:c", "1a:b", "s3://x"])
def test_other_names_are_no_references(name: str) -> None:
    assert not plugins.is_reference(name)
    with plugins.code_allowed(), pytest.raises(ConfigError, match="expected module:name"):
        plugins.load(name, "proxy.model")


def test_finds_a_module_in_the_current_folder(folder: Path) -> None:
    (folder / "beside_1.py").write_text("class Mine:\n    size = 3\n")
    with plugins.code_allowed():
        assert plugins.load("beside_1:Mine.size", "proxy.model") == 3


def test_imports_nothing_unless_allowed(folder: Path) -> None:
    (folder / "beside_2.py").write_text("open('mark', 'w').close()\n")
    with pytest.raises(ConfigError, match=r"proxy.model: 'beside_2:f' is code from outside"):
        plugins.load("beside_2:f", "proxy.model")
    assert not (folder / "mark").exists()


def test_permission_ends_with_its_block(folder: Path) -> None:
    with plugins.code_allowed(False):
        assert not plugins.allows_code()
    with plugins.code_allowed():
        with plugins.code_allowed(False):
            assert plugins.allows_code()
        assert plugins.allows_code()
    assert not plugins.allows_code()


def test_work_for_other_processes_carries_the_permission() -> None:
    with plugins.code_allowed():
        allowed = fenced(plugins.allows_code)
    forbidden = fenced(plugins.allows_code)
    try:
        assert allowed() and not forbidden()
    finally:
        plugins.allow_code(False)


@pytest.mark.parametrize(
    ("code", "reference", "message"),
    [
        ("", "no_such_module_x:f", r"cannot import no_such_module_x on \S+ .*start raypipe in the"),
        (
            "import no_such_y",
            "beside_3:f",
            r"No module named 'no_such_y', .* line 1\); install no_such_y on",
        ),
        (
            "\n1 / 0",
            "beside_4:f",
            r"\(ZeroDivisionError: .* by zero, beside_4.py line 2\); fix the",
        ),
        ("raise SystemExit(3)", "beside_5:f", r"\(SystemExit: 3, .* line 1\); fix the module"),
        ("def f(:", "beside_7:f", r"\(SyntaxError: .*\(beside_7.py, line 1\)\); fix the module"),
        ("", "beside_8.py:f", r"No module named .*; name the module without .py: beside_8:f"),
        ("def network(): ...", "beside_6:netwrk", r"has no 'netwrk'; did you mean 'network'\?"),
    ],
)
def test_says_in_one_line_why_code_cannot_be_loaded(
    folder: Path, code: str, reference: str, message: str
) -> None:
    (folder / f"{reference.partition(':')[0].removeprefix('no_such_')}.py").write_text(code)
    with plugins.code_allowed(), pytest.raises(ConfigError, match=message) as caught:
        plugins.load(reference, "proxy.model")
    assert str(caught.value).startswith("proxy.model: ")
    assert "\n" not in str(caught.value)
