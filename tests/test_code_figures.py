"""The counts of `benchmarks/code_figures.py` on a small tree of files."""

from __future__ import annotations

from pathlib import Path

import code_figures
import pytest

FILES = {
    "__init__.py": "",
    "rundir.py": 'def folder(run):\n    return run.path("scores")\n',
    "alone.py": "import os\nfrom raypipe import store\nfrom raypipe.store import places\n",
    "first.py": (
        "from __future__ import annotations\n"
        "from typing import TYPE_CHECKING, Any\n"
        "import ray.data\n"
        "if TYPE_CHECKING:\n"
        "    from raypipe import second\n"
        "else:\n"
        "    from raypipe.store import opened, _hidden, __version__\n"
        "\n"
        "def outer(context, run) -> Any:\n"
        "    context.cluster\n"
        "    def inner(x) -> 'Any':\n"
        "        return 1 if x else 2\n"
        "    for x in [y for y in run if y if x]:\n"
        "        while x and run and context:\n"
        "            pass\n"
        "    try:\n"
        "        match x:\n"
        "            case 1: pass\n"
        "            case _: pass\n"
        "    except OSError:\n"
        "        pass\n"
        '    return run.path("a", x), run.path(f"b{x}"), run.path(x), os.path(x)\n'
    ),
    "second.py": (
        "def late(context) -> dict[str, Any]:\n"
        "    import ray\n"
        "    from raypipe.store.places import here\n"
        "    self.context.cluster\n"
        "    context.cluster.size\n"
        f"    return {{}}  # {'x' * 90}\n"
    ),
    "store/__init__.py": "from .places import here\n",
    "store/places.py": (
        "def here() -> list[Any]:\n    from ..first import outer\n    from . import deep\n"
    ),
    "store/deep/__init__.py": "if TYPE_CHECKING:\n    import ray\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for file, text in FILES.items():
        path = tmp_path / "raypipe" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_functions_are_measured_one_by_one(root: Path) -> None:
    found = {
        item.name: item for item in code_figures.measure_functions(code_figures.read_modules(root))
    }
    assert set(found) == {"folder", "outer", "outer.inner", "late", "here"}
    # for, two ifs of the comprehension, while, two `and`, two cases, except
    assert (found["outer"].lines, found["outer"].branches) == (14, 9)
    assert (found["outer.inner"].lines, found["outer.inner"].branches) == (2, 1)
    assert found["outer"].place == "first.py:9"


def test_imports_are_known_with_the_time_of_the_import(root: Path) -> None:
    modules = code_figures.read_modules(root)
    assert code_figures.importers(modules, "ray") == {
        "import": ["first.py"],
        "lazy": ["second.py"],
        "types": ["store/deep/__init__.py"],
    }
    assert code_figures.private_imports(modules) == ["first.py:7 raypipe.store._hidden"]


def test_circles_include_lazy_and_typing_imports(root: Path) -> None:
    graph = code_figures.import_graph(code_figures.read_modules(root))
    # importing a submodule does not count as importing its package
    assert graph["raypipe.alone"] == {"raypipe.store", "raypipe.store.places"}
    assert graph["raypipe.second"] == {"raypipe.store.places"}
    assert graph["raypipe.store.places"] == {"raypipe.first", "raypipe.store.deep"}
    assert code_figures.circles(graph) == [
        ["raypipe.first", "raypipe.second", "raypipe.store", "raypipe.store.places"]
    ]


def test_the_report_has_every_count(root: Path) -> None:
    lines = list(code_figures.describe(root))
    counts = {line[:56].rstrip(): int(line[56:]) for line in lines if line[56:].strip().isdecimal()}
    assert counts == {
        "modules directly in raypipe/, with __init__.py": 5,
        "packages directly in raypipe/": 1,
        "packages below those": 1,
        "files": 8,
        "lines": sum(text.count("\n") for text in FILES.values()),
        "lines with dict[str, Any]": 1,
        '.path("literal") outside the layout module': 2,
        "functions annotated with -> Any": 2,
        "statements `context.cluster` alone": 2,
        "lines over 100 columns": 1,
        "files over 400 lines": 0,
        "modules that import ray at module level": 1,
        "modules that import ray only in functions": 1,
        "modules that import ray only for types": 1,
        "import circles, lazy and typing imports included": 1,
        "private names imported across modules": 1,
    }
    assert lines[-1].split() == ["2", "first.py"]


def test_a_folder_without_the_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["code_figures.py", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        code_figures.main()
    assert ended.value.code == 2
    assert "give the root of a checkout" in capsys.readouterr().err
