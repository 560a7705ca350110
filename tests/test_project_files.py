"""The files around the package agree with it: versions, the citation, and what CI runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import raypipe

ROOT = Path(__file__).parent.parent


def _yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def _pinned(package: str) -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.split("==")[1] for line in lines if line.startswith(f"{package}=="))


def test_newest_version_of_the_changelog_is_that_of_the_package() -> None:
    headings = re.findall(r"(?m)^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text())
    versions = [heading for heading in headings if heading != "Unreleased"]
    assert versions[0] == raypipe.__version__


def test_citation_has_what_the_format_requires() -> None:
    citation = _yaml("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == raypipe.__version__
    assert citation["license"] == "Apache-2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()
    preprints = [reference["identifiers"][0]["value"] for reference in citation["references"]]
    assert preprints == ["arXiv:2310.14664", "arXiv:2506.09010"]


def test_ci_runs_the_same_script_with_every_supported_python() -> None:
    workflow = _yaml(".github/workflows/ci.yml")
    assert workflow["permissions"] == {"contents": "read"}
    job = workflow["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    project = (ROOT / "pyproject.toml").read_text()
    classifiers = re.findall(r"Programming Language :: Python :: (3\.\d+)", project)
    assert job["strategy"]["matrix"]["python-version"] == classifiers
    assert job["strategy"]["fail-fast"] is False


def test_pre_commit_uses_the_pinned_ruff() -> None:
    assert _yaml(".pre-commit-config.yaml")["repos"][0]["rev"] == f"v{_pinned('ruff')}"


@pytest.mark.parametrize("form", ["bug_report.yml", "feature_request.yml"])
def test_issue_forms_have_what_the_format_requires(form: str) -> None:
    content = _yaml(f".github/ISSUE_TEMPLATE/{form}")
    assert {"name", "description", "body"} <= content.keys()
    ids = [field["id"] for field in content["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids))
