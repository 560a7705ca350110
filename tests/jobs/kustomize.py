"""What `kubectl kustomize` makes of a folder, for the features that jobs/k8s uses; strict.

Everything else in a kustomization is refused, and so is whatever has no effect: a file that no
`resources` names, an image that no container has, a patch or replacement without a target.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
KNOWN = {"apiVersion", "kind", "resources", "namespace", "images", "patches", "replacements"}


def build(folder: Path) -> list[Object]:
    """Return the objects of a kustomization, as it would be applied."""
    text = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    assert set(text) <= KNOWN, f"not understood: {set(text) - KNOWN}"
    named = {folder / name for name in text["resources"]}
    unnamed = set(folder.glob("*.yaml")) - named - {folder / "kustomization.yaml"}
    assert not unnamed, f"files that nothing names: {unnamed}"
    objects = [item for name in text["resources"] for item in _resources(folder / name)]
    if "namespace" in text:
        for item in objects:
            item["metadata"]["name" if item["kind"] == "Namespace" else "namespace"] = text[
                "namespace"
            ]
    for image in text.get("images", []):
        assert set(image) == {"name", "newName", "newTag"}
        containers = [item for item in _containers(objects) if item["image"] == image["name"]]
        assert containers, f"no container has the image {image['name']}"
        for container in containers:
            container["image"] = f"{image['newName']}:{image['newTag']}"
    for patch in text.get("patches", []):
        assert set(patch) == {"target", "patch"}
        for item in _selected(objects, patch["target"]):
            for step in yaml.safe_load(patch["patch"]):
                assert set(step) == {"op", "path", "value"} and step["op"] == "replace"
                _set(item, step["path"].removeprefix("/").split("/"), step["value"])
    for replacement in text.get("replacements", []):
        source = dict(replacement["source"])
        field = source.pop("fieldPath").split(".")
        (item,) = _selected(objects, source)
        value = _get(item, field)
        for target in replacement["targets"]:
            assert set(target) == {"select", "fieldPaths"}, f"not understood: {set(target)}"
            for item in _selected(objects, target["select"]):
                for path in target["fieldPaths"]:
                    _set(item, path.split("."), value)
    return objects


def _resources(path: Path) -> list[Object]:
    if path.is_dir():
        return build(path)
    found = [item for item in yaml.safe_load_all(path.read_text(encoding="utf-8")) if item]
    assert found
    # every use of an anchor becomes an object of its own, as in kustomize
    return [json.loads(json.dumps(item)) for item in found]


def _selected(objects: list[Object], target: dict[str, str]) -> list[Object]:
    assert set(target) <= {"kind", "name"}
    found = [
        item
        for item in objects
        if item["kind"] == target["kind"]
        and target.get("name", item["metadata"]["name"]) == item["metadata"]["name"]
    ]
    assert found, f"nothing is {target}"
    return found


def _containers(value: Any) -> list[Object]:
    if isinstance(value, list):
        return [found for item in value for found in _containers(item)]
    if not isinstance(value, dict):
        return []
    own = value.get("containers", [])
    return [*own, *(found for item in value.values() for found in _containers(item))]


def _get(item: Any, path: list[str]) -> Any:
    for key in path:
        item = item[int(key) if isinstance(item, list) else key]
    return item


def _set(item: Any, path: list[str], value: Any) -> None:
    """Replace a field; it has to exist."""
    inner = _get(item, path[:-1])
    key = int(path[-1]) if isinstance(inner, list) else path[-1]
    assert key in (range(len(inner)) if isinstance(inner, list) else inner), f"no {key}"
    inner[key] = value
