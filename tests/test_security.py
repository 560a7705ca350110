"""Nothing is unpickled, no YAML is constructed, and no secret is written anywhere."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import PLANTED

from raypipe import storage
from raypipe.runs.run import Run

ROOT = Path(__file__).parents[1]
FILES = [
    file
    for folder in ("raypipe", "jobs", "benchmarks")
    for file in sorted((ROOT / folder).rglob("*.py"))
]
CODE = {
    "pickle",
    "cPickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
}
"""Modules whose files run code when they are opened."""
RESTRICTED = "raypipe/sources/torchvision_build.py"
"""The module that opens the published CIFAR pickles, with an Unpickler that allows arrays only."""


def _called(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def problems(code: str, restricted: bool = False) -> list[str]:
    """What in a piece of Python could run code from a file."""
    tree, found = ast.parse(code), []
    for node in ast.walk(tree):
        names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [name for name in names if name.split(".")[0] in CODE and not restricted]
    for name, call in _called(tree):
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}:
            found.append(name)
        if name.endswith("torch.load") and words.get("weights_only") != "True":
            found.append(name)
        if re.fullmatch(
            r"yaml\.(load|load_all|unsafe_load|full_load|unsafe_load_all|full_load_all)", name
        ):
            found.append(name)
        if name in {"np.load", "numpy.load"} and words.get("allow_pickle", "False") != "False":
            found.append(name)
        if name.startswith("subprocess.") and words.get("shell") == "True":
            found.append(name)
        if restricted and name in {"pickle.load", "pickle.loads", "pickle.Unpickler"}:
            found.append(name)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_that_is_read_can_run_code(file: Path) -> None:
    name = file.relative_to(ROOT).as_posix()
    assert problems(file.read_text(encoding="utf-8"), name == RESTRICTED) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "import torch; torch.load('x')",
        "import torch; torch.load('x', weights_only=False)",
        "import yaml; yaml.load(f, Loader=yaml.Loader)",
        "import yaml; yaml.unsafe_load(f)",
        "import numpy as np; np.load('x', allow_pickle=True)",
        "eval(text)",
        "import subprocess; subprocess.run(text, shell=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(code: str) -> None:
    assert problems(code)


def test_the_search_leaves_the_rest_alone() -> None:
    assert not problems(
        "import torch; torch.load('x', weights_only=True); model.eval(); yaml.safe_load(f); "
        "np.load('x')"
    )
    assert problems("import pickle; pickle.load(f)", restricted=True) and not problems(
        "import pickle", restricted=True
    )


# -- secrets ---------------------------------------------------------------------------------------


def _files(folder: str) -> Iterator[tuple[str, bytes]]:
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            with open(path, "rb") as file:
                yield os.path.relpath(path, folder), file.read()


@pytest.mark.ray
def test_a_secret_of_the_environment_is_in_no_file_of_a_run(finished: str) -> None:
    """Secrets that conftest plants before the cluster starts: password, S3 key, endpoint."""
    assert (
        os.environ["RAYPIPE_TEST_PASSWORD"] == PLANTED
        and PLANTED in os.environ["AWS_SECRET_ACCESS_KEY"]
    )
    content = dict(_files(finished))
    needed = {"config.yaml", "run.json", "report/index.html", "report/summary.json"}
    assert needed <= set(content) and any(name.startswith("logs/") for name in content)
    assert [name for name, data in content.items() if PLANTED.encode() in data] == []
    assert any(b"proxy" in data for data in content.values()), "the files were read"


def test_credentials_in_an_address_are_in_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors name unreachable storage by its URI, not by the endpoint, which has credentials."""
    from raypipe.errors import RaypipeError
    from raypipe.storage import errors_of_storage

    monkeypatch.setattr("raypipe.storage.faults.RETRIES", 1)
    storage.places.remote_filesystem.cache_clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:planted-password@127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "planted-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-password")
    try:
        with pytest.raises(RaypipeError) as refused, errors_of_storage("s3://bucket/run"):
            Run("s3://bucket/run").ledger()
    finally:
        storage.places.remote_filesystem.cache_clear()
    assert "planted" not in str(refused.value)
