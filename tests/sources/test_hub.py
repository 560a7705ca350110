"""Datasets of the hub, with a fake of the package `datasets`, and with the package if installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from typing import Any

import pyarrow as pa
import pytest
from source_helpers import ids, make, picture, samples
from test_huggingface import STRUCT, arrow, images, save

from raypipe import storage
from raypipe.errors import SourceError
from raypipe.sources import hub


@pytest.fixture
def cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cache with one dataset of two splits, and a fake package that finds nothing else."""
    folder = tmp_path / "datasets" / "user___little" / "default" / "0.0.0" / "0123abcd"
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "1.png").write_bytes(picture(77))
    (tmp_path / "secret.png").write_bytes(picture(78))
    content = [
        {"bytes": None, "path": path}
        for path in (
            f"{tmp_path}/hub/1.png",
            f"{tmp_path}/hub/../secret.png",
            f"{tmp_path}/hub/none.png",
        )
    ]
    by_path = pa.table({"img": pa.array(content, STRUCT), "fine_label": [0, 1, 2]})
    save(str(folder), arrow(images(5)))
    storage.delete(f"{folder}/state.json")
    os.rename(f"{folder}/data-00000-of-00001.arrow", f"{folder}/little-train.arrow")
    storage.write_bytes(f"{folder}/little-test.arrow", arrow(by_path))
    asked: list[tuple[Any, ...]] = []

    class Builder:
        info = types.SimpleNamespace(splits={"train": None, "test": None})

        def download_and_prepare(self) -> None:
            asked.append(("prepare",))

        def as_dataset(self, split: str) -> Any:
            return types.SimpleNamespace(
                cache_files=[{"filename": f"{folder}/little-{split}.arrow"}]
            )

    def load(name: str, config_name: str | None, revision: str | None) -> Builder:
        asked.append((name, config_name, revision))
        if name != "user/little":
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub")
        return Builder()

    config = types.SimpleNamespace(
        HF_DATASETS_CACHE=f"{tmp_path}/datasets", DOWNLOADED_DATASETS_PATH=f"{tmp_path}/downloads"
    )
    constants = types.SimpleNamespace(HF_HUB_CACHE=f"{tmp_path}/hub")
    monkeypatch.setitem(
        sys.modules, "datasets", types.SimpleNamespace(load_dataset_builder=load, config=config)
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(constants=constants))
    hub.download_dataset.cache_clear()
    yield asked
    hub.download_dataset.cache_clear()


def test_a_dataset_of_the_hub_is_read_from_the_cache(cache: list[Any]) -> None:
    source = make("huggingface://user/little@v1", split="train", config_name="plain")
    assert source.format == "huggingface"
    found = samples(source)
    assert ids(found) == [f"little-train.arrow#{row}" for row in range(5)]
    assert [sample.image for sample in found] == [picture(row) for row in range(5)]
    assert next(source.files()).stamp == "0123abcd"
    assert cache == [("user/little", "plain", "v1"), ("prepare",)]  # once per process


def test_images_by_path_are_read_within_the_cache_only(cache: list[Any]) -> None:
    found = samples(make("huggingface://user/little", split="test"))
    assert found[0].image == picture(77)
    assert ["only its path" in sample.reason for sample in found] == [False, True, True]


def test_what_the_hub_does_not_have(cache: list[Any]) -> None:
    for uri, split, words in (
        ("huggingface://user/little", None, "the splits are train, test; set source.split"),
        ("huggingface://user/little", "val", "no split 'val'"),
        (
            "huggingface://none",
            "train",
            "Couldn't reach 'none' on the Hub. Check the name, source.config_name and the network",
        ),
    ):
        with pytest.raises(SourceError, match=words):
            list(make(uri, split=split).files())


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    hub.download_dataset.cache_clear()
    with pytest.raises(
        SourceError, match=r"pip install 'raypipe\[hf\]', or write the dataset with save_to_disk"
    ):
        list(make("huggingface://user/little").files())


@pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="the package datasets is not installed"
)
def test_the_package_itself(tmp_path: Any) -> None:
    """In a separate process, since the package reads its variables when it is imported."""
    program = """
import json, os, shutil, sys, datasets
from source_helpers import ids, make, picture, samples
from raypipe.errors import SourceError
folder = sys.argv[1]
label = datasets.ClassLabel(names=["a", "b"])
kinds = datasets.Features({"img": datasets.Image(), "fine_label": label})
images = [{"bytes": picture(row), "path": None} for row in range(9)]
rows = {"img": images, "fine_label": [0, 1, 0] * 3}
made = datasets.Dataset.from_dict(rows, features=kinds)
datasets.DatasetDict(train=made, test=made.select([5, 2])).save_to_disk(folder + "/saved")
test = samples(make(folder + "/saved", split="test"))
assert [sample.image for sample in test] == [picture(5), picture(2)]
cached = folder + "/home/datasets/user___little/default/0.0.0/" + "0123456789" * 4
made.save_to_disk(folder + "/one")
os.makedirs(cached)
shutil.copy(folder + "/one/data-00000-of-00001.arrow", cached + "/little-train.arrow")
info = json.load(open(folder + "/one/dataset_info.json"))
info |= {"builder_name": "little", "dataset_name": "little"}
info |= {"config_name": "default", "version": "0.0.0"}
train = {"name": "train", "num_bytes": 1, "num_examples": 9, "dataset_name": "little"}
info["splits"] = {"train": train}
json.dump(info, open(cached + "/dataset_info.json", "w"))
found = samples(make("huggingface://user/little"))
assert ids(found) == [f"little-train.arrow#{row}" for row in range(9)]
assert found[4].image == picture(4)
try:
    list(make("huggingface://user/none").files())
except SourceError as error:
    print(error)
"""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "HF_HOME": f"{tmp_path}/home",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (
        "Couldn't reach 'user/none' on the Hub" in done.stdout and "HF_HUB_OFFLINE=1" in done.stdout
    ), done.stderr
