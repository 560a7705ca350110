"""A run on a CIFAR-10 folder that was built from images in Parquet."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import QUIET, digit_pngs, small_config
from PIL import Image
from torchvision_folders import CIFAR10_CLASSES, cifar10

import raypipe
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import read_shard
from raypipe.stages.index.stage import IndexStage

pytestmark = pytest.mark.ray


def test_a_cifar_folder_from_parquet(cluster: str, tmp_path: Path) -> None:
    images, labels = digit_pngs(220)
    pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "set.parquet")
    table = pq.read_table(tmp_path / "set.parquet")
    pixels = np.stack([_enlarged(image) for image in table["image"].to_pylist()])
    cifar10(tmp_path / "cifar", pixels, table["label"].to_pylist(), 20)
    config = small_config(
        str(tmp_path / "run"),
        "source.uri=torchvision://CIFAR10",
        "source.format=auto",
        f"source.root={tmp_path}/cifar",
        "source.verify=false",
        "source.limit=150",
        "source.fragment_samples=64",
        "proxy.image_size=32",
    )
    run = Run(raypipe.run(config, until="seed", progress=QUIET).uri)
    assert run.classes().names == tuple(CIFAR10_CLASSES)
    assert [fragment.samples for fragment in run.fragments()] == [64, 64, 22]
    count = 0
    for shard in SeedManifest.read(run).shards:
        for name, image, label in zip(*read_shard(run, shard), strict=True):
            row = int(name.removeprefix("CIFAR10/train/"))
            assert np.array_equal(image, pixels[row].transpose(2, 0, 1)) and label == labels[row]
            count += 1
    assert 30 < count < 80
    # checking or downloading the files changes no output
    checked = config.model_copy(
        update={"source": config.source.model_copy(update={"verify": True, "download": False})}
    )
    assert IndexStage().settings(checked) == IndexStage().settings(config)


def _enlarged(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB").resize((32, 32)))
