"""Folders as torchvision's datasets expect them, filled with small images."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import numpy as np

CIFAR10_CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]


def cifar10(root: Path, images: np.ndarray, labels: list[int], tests: int) -> None:
    """CIFAR-10 in its original layout: five batches, and the last `tests` images as the test batch.

    images  uint8 [n, 32, 32, 3]
    """
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
    train = np.array_split(np.arange(len(images) - tests), 5)
    for name, part in (
        *((f"data_batch_{number}", part) for number, part in enumerate(train, 1)),
        ("test_batch", np.arange(len(images) - tests, len(images))),
    ):
        batch = {
            "batch_label": name,
            "labels": [labels[row] for row in part],
            "data": rows[part],
            "filenames": [f"{row}.png" for row in part],
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {"num_cases_per_batch": len(train[0]), "label_names": CIFAR10_CLASSES, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))


def mnist(root: Path, images: np.ndarray, labels: list[int]) -> None:
    """MNIST as unpacked: the same images for training and test. images: uint8 [n, height, width]."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        head = b"".join(size.to_bytes(4, "big") for size in (0x803, *images.shape))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = b"".join(size.to_bytes(4, "big") for size in (0x801, len(labels)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + bytes(labels))
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(b""))


def imagenet(root: Path, files: dict[str, bytes]) -> None:
    """ImageNet after torchvision unpacked it: meta.bin and train/<wnid>/."""
    import torch

    root.mkdir(parents=True, exist_ok=True)
    names = {
        "n01440764": ("tench", "Tinca tinca"),
        "n02012849": ("crane",),
        "n03126707": ("crane",),
    }
    torch.save((names, []), root / "meta.bin")
    for path, content in files.items():
        (root / "train" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / path).write_bytes(content)


def places365(
    root: Path, files: dict[str, bytes], listed: dict[str, int], classes: dict[str, int]
) -> None:
    """Places365 with its small images: categories, the list of train-standard, and the folder."""
    (root / "data_256_standard").mkdir(parents=True)
    (root / "categories_places365.txt").write_text(
        "".join(f"{name} {index}\n" for name, index in classes.items())
    )
    (root / "places365_train_standard.txt").write_text(
        "".join(f"/{name} {label}\n" for name, label in listed.items())
    )
    for name, content in files.items():
        path = root / "data_256_standard" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def food101(root: Path, files: dict[str, bytes]) -> None:
    """Food-101: lists by class in meta/, files in images/."""
    folder = root / "food-101"
    by_class: dict[str, list[str]] = {}
    for name, content in files.items():
        by_class.setdefault(name.split("/")[0], []).append(name)
        path = folder / "images" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "meta").mkdir()
    (folder / "meta" / "train.json").write_text(json.dumps(by_class))
