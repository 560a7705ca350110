"""Wheel and source archive, built without network, and the demo run from the wheel alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import raypipe

ROOT = Path(__file__).parent.parent
DATA = {".html", ".css", ".js", ".typed", ".yaml", ".yml", ".json"}

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def _call(*command: str | Path, cwd: Path, **variables: str) -> str:
    kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with both archives. The wheel is built from the unpacked source archive."""
    source = tmp_path_factory.mktemp("source")  # a build leaves files where it runs
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    for name in ("raypipe", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    built = tmp_path_factory.mktemp("dist")
    _call(sys.executable, "-m", "build", "--no-isolation", "--outdir", built, source, cwd=source)
    return built


@pytest.fixture(scope="module")
def wheel(archives: Path) -> Path:
    return archives / f"raypipe-{raypipe.__version__}-py3-none-any.whl"


def test_wheel_holds_the_package_its_data_and_the_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in (ROOT / "raypipe").rglob("*") if path.suffix in {".py", *DATA}]
    assert {path.relative_to(ROOT).as_posix() for path in files} <= names
    information = f"raypipe-{raypipe.__version__}.dist-info"
    assert f"{information}/licenses/LICENSE" in names
    assert {name.split("/")[0] for name in names} == {"raypipe", information}
    assert not [name for name in names if "test" in Path(name).name]
    metadata = zipfile.ZipFile(wheel).read(f"{information}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata


def test_source_archive_holds_what_build_and_tests_need(archives: Path) -> None:
    top = f"raypipe-{raypipe.__version__}"
    with tarfile.open(archives / f"{top}.tar.gz") as archive:
        names = {name.removeprefix(f"{top}/") for name in archive.getnames()}
    files = {"LICENSE", "README.md", "pyproject.toml", "constraints.txt", "Makefile"}
    assert files | {"raypipe/report/page.css", "tests/conftest.py", "tests/helpers.py"} <= names


def test_demo_runs_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    copy, empty = tmp_path / "copy", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", copy]
    _call(*pip, wheel, cwd=empty)
    where = _call(
        sys.executable, "-c", "import raypipe; print(raypipe.__file__)",
        cwd=empty, PYTHONPATH=str(copy),
    )  # fmt: skip
    assert Path(where.strip()) == copy / "raypipe" / "__init__.py"
    changes = ("cluster.address=local", "source.limit=400", "proxy.epochs=6")
    demo = [
        copy / "bin" / "raypipe",
        "demo",
        *(word for item in changes for word in ("--set", item)),
    ]
    _call(*demo, cwd=empty, PYTHONPATH=str(copy), OMP_NUM_THREADS="1")
    report = empty / "runs" / "demo" / "report" / "index.html"
    assert report.stat().st_size > 100_000
    assert "<html" in report.read_text()
