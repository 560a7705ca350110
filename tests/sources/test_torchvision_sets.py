from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision_folders as folders
from source_helpers import ids, make, picture, rejects, samples, scans
from torchvision import datasets

import raypipe
from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources import Source
from raypipe.sources.torchvision_request import (
    constructor_arguments,
    dataset_class,
    parse_request,
)
from raypipe.vision.decode import decode_batch

IMAGES = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
LABELS = [(number * 7) % 10 for number in range(24)]


def opened(name: str, root: Path, **options: Any) -> Source:
    return make(f"torchvision://{name}", root=str(root), **{"download": False, **options})


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    folders.cifar10(tmp_path, IMAGES, LABELS, 4)
    return tmp_path


def test_a_cifar_folder_is_read_as_it_is_without_verification(cifar: Path) -> None:
    source = opened("CIFAR10", cifar, verify=False, fragment_samples=8)
    assert source.format == "torchvision"
    found = samples(source)
    assert ids(found) == [f"CIFAR10/train/{index:02d}" for index in range(20)]
    assert [sample.label for sample in found] == LABELS[:20]
    assert np.array_equal(np.stack([sample.image for sample in found]), IMAGES[:20])
    assert scans(source)[0].class_names == tuple(folders.CIFAR10_CLASSES)
    test = samples(opened("CIFAR10", cifar, verify=False, split="test"))
    assert ids(test)[0] == "CIFAR10/test/0" and [sample.label for sample in test] == LABELS[20:]
    (_, fragment, _) = scans(source)[0].fragments
    (drawn,) = source.read(fragment, lambda sample_id: sample_id.endswith("3"))
    assert drawn.sample_id == "CIFAR10/train/13" and np.array_equal(drawn.image, IMAGES[13])


def test_a_copy_with_other_checksums_is_refused_and_left_alone(
    cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "torchvision.datasets.cifar.download_and_extract_archive",
        lambda *_, **__: pytest.fail("downloaded"),
    )
    with pytest.raises(
        SourceError,
        match=r"data_batch_1 .*do not match the published checksums.*source\.verify=false",
    ):
        list(opened("CIFAR10", cifar, download=True).files())
    # where the checksums are right, the same files are read
    for name in ("train_list", "test_list"):
        right = [
            [file, _md5(cifar / "cifar-10-batches-py" / file)]
            for file, _ in getattr(datasets.CIFAR10, name)
        ]
        monkeypatch.setattr(datasets.CIFAR10, name, right)
    meta = {**datasets.CIFAR10.meta, "md5": _md5(cifar / "cifar-10-batches-py" / "batches.meta")}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    assert len(samples(opened("CIFAR10", cifar, download=True))) == 20


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_a_pickle_that_would_execute_something_is_not_opened(cifar: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(cifar / "executed"),)

    (cifar / "cifar-10-batches-py" / "data_batch_3").write_bytes(
        pickle.dumps({"data": Bomb(), "labels": []})
    )
    with pytest.raises(
        SourceError, match=r"not a pickle of arrays: it refers to (posix|nt)\.mkdir"
    ):
        list(opened("CIFAR10", cifar, verify=False).files())
    assert not (cifar / "executed").exists()
    assert datasets.cifar.pickle is pickle


def test_missing_files_are_named_and_only_the_driver_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        SourceError,
        match=r"not found in .*source\.download is false.*cifar-10-batches-py with data_batch_1, "
        r".*source\.root",
    ):
        list(opened("CIFAR10", tmp_path).files())

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(SourceError, match="the download failed: Name or service not known"):
        list(opened("CIFAR10", tmp_path, download=True).files())

    downloads = []

    def fetch(url: str, root: str, **_: Any) -> None:
        downloads.append(url)
        folders.cifar10(Path(root), IMAGES, LABELS, 4)

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fetch)
    source = opened("CIFAR10", tmp_path / "new", download=True, verify=False)
    (file,) = source.files()
    assert downloads == [datasets.CIFAR10.url]
    (tmp_path / "new").rename(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match="every machine must see the same files"):
        source.scan(file)
    assert len(downloads) == 1


def test_files_that_changed_since_they_were_indexed_are_not_read(cifar: Path) -> None:
    source = opened("CIFAR10", cifar, verify=False)
    (before,) = (source.scan(file).fragments[0] for file in source.files())
    path = cifar / "cifar-10-batches-py" / "data_batch_2"
    batch = pickle.loads(path.read_bytes())
    batch["data"][0] = 0
    path.write_bytes(pickle.dumps(batch))  # with a newer protocol, as any Python writes it
    (after,) = (source.scan(file).fragments[0] for file in source.files())
    assert before.fragment_id != after.fragment_id
    with pytest.raises(SourceError, match="changed since they were indexed"):
        list(source.read(before))
    assert list(source.read(after))[4].image.max() == 0


def test_mnist_is_grey(tmp_path: Path) -> None:
    folders.mnist(tmp_path, IMAGES[:, :28, :28, 0].copy(), LABELS)
    found = samples(opened("MNIST", tmp_path))
    assert np.array_equal(np.stack([sample.image for sample in found]), IMAGES[:, :28, :28, 0])
    assert [sample.label for sample in found] == LABELS and found[0].sample_id == "MNIST/train/00"


def test_imagenet_gives_encoded_files_and_damaged_ones_are_rejects(tmp_path: Path) -> None:
    files = {f"n01440764/n01440764_{number}.JPEG": picture(number) for number in range(5)}
    files |= {
        "n02012849/a.JPEG": picture(7),
        "n02012849/b.JPEG": b"",
        "n03126707/c.JPEG": picture(9)[:60],
    }
    folders.imagenet(tmp_path, files)
    source = opened("ImageNet", tmp_path)
    found = samples(source)
    assert {sample.sample_id: sample.image for sample in found} == {
        f"train/{name}": data for name, data in files.items()
    }
    assert [sample.label for sample in found] == [0] * 5 + [1, 1, 2]
    assert [scan.class_names for scan in scans(source)] == [
        ("tench, Tinca tinca", "crane (1)", "crane (2)")
    ]
    _, reasons = decode_batch(found, 8, 10_000)
    assert [index for index, reason in enumerate(reasons) if reason] == [6, 7]
    fragment = scans(source)[0].fragments[0]
    (tmp_path / "train" / "n02012849" / "a.JPEG").unlink()  # after indexing
    assert "no such file" in rejects(list(source.read(fragment)))["train/n02012849/a.JPEG"]
    with pytest.raises(SourceError, match=r"image-net\.org"):
        list(opened("ImageNet", tmp_path / "nothing").files())


def test_a_new_file_changes_few_fragments(tmp_path: Path) -> None:
    folders.imagenet(tmp_path, {f"n01440764/{number:03d}.png": picture(0) for number in range(200)})
    source = opened("ImageNet", tmp_path, fragment_samples=20)
    before = {fragment.fragment_id for scan in scans(source) for fragment in scan.fragments}
    assert len(ids(samples(source))) == 200
    assert [scan.class_names is not None for scan in scans(source)] == [True] + [False] * (
        len(before) - 1
    )
    (tmp_path / "train" / "n01440764" / "003a.png").write_bytes(picture(1))
    after = {fragment.fragment_id for scan in scans(source) for fragment in scan.fragments}
    assert len(before) > 10 and len(after - before) <= 5
    first, *_ = source.files()
    (tmp_path / "train" / "n02012849").mkdir()
    (tmp_path / "train" / "n02012849" / "x.png").write_bytes(picture(2))
    again, *_ = source.files()
    assert again.members == first.members and again.stamp != first.stamp  # it states more names
    assert source.scan(again).class_names == ("tench, Tinca tinca", "crane")


def test_places365_in_the_order_of_its_categories(tmp_path: Path) -> None:
    listed = {
        f"{name}/{number:08d}.jpg": label
        for label, name in ((1, "a/airfield"), (0, "b/bar"))
        for number in range(3)
    }
    folders.places365(
        tmp_path,
        {name: picture(label) for name, label in listed.items()},
        listed,
        {"/b/bar": 0, "/a/airfield": 1},
    )
    (tmp_path / "data_256_standard" / "b" / "bar" / "00000001.jpg").unlink()
    source = opened("Places365?small=true", tmp_path, verify=False)
    found = samples(source)
    assert ids(found) == [f"data_256_standard/{name}" for name in listed]
    assert [sample.label for sample in found] == [1, 1, 1, 0, 0, 0]
    assert scans(source)[0].class_names == ("/b/bar", "/a/airfield")
    assert list(rejects(found)) == ["data_256_standard/b/bar/00000001.jpg"]
    with pytest.raises(
        SourceError,
        match=r"names files that do not exist, such as .*data_large_standard.*"
        "Expected there: categories",
    ):
        list(opened("Places365", tmp_path, verify=False).files())
    with pytest.raises(
        SourceError, match=r"categories_places365\.txt .*do not match the published checksums"
    ):
        list(opened("Places365?small=true", tmp_path).files())


def test_food101_file_lists(tmp_path: Path) -> None:
    folders.food101(tmp_path, {"pizza/1": picture(1), "pizza/2": b"cut", "apple_pie/3": picture(3)})
    found = samples(opened("Food101", tmp_path))
    assert [(sample.sample_id, sample.label, sample.image) for sample in found] == [
        ("food-101/images/pizza/1.jpg", 1, picture(1)),
        ("food-101/images/pizza/2.jpg", 1, b"cut"),
        ("food-101/images/apple_pie/3.jpg", 0, picture(3)),
    ]


def test_a_class_without_files_or_names_and_items_that_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri = "FakeData?size=30&image_size=[3,8,8]&num_classes=4"
    original = datasets.FakeData.__getitem__

    def item(self: Any, index: int) -> tuple[Any, Any]:
        if index == 5:
            raise OSError("broken data stream")
        image, target = original(self, index)
        return (
            (image.convert("RGBA"), target)
            if index == 6
            else (image, "word")
            if index == 7
            else (image, target)
        )

    monkeypatch.setattr(datasets.FakeData, "__getitem__", item)
    source = opened(uri, tmp_path)
    found = samples(source)
    assert ids(found)[29] == "FakeData/29" and scans(source)[0].labels == {0, 1, 2, 3}
    assert rejects(found) == {
        "FakeData/05": "cannot be read: broken data stream",
        "FakeData/07": "the item is (Image, str), not an image and a class number",
    }
    assert found[0].image.shape == (8, 8, 3) and found[6].image.startswith(b"\x89PNG")


@pytest.mark.parametrize("given", ["word", 0.5, [1, 2]])
def test_a_dataset_of_something_else_is_refused(
    given: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = datasets.FakeData.__getitem__
    monkeypatch.setattr(
        datasets.FakeData, "__getitem__", lambda self, index: (original(self, index)[0], given)
    )
    with pytest.raises(
        SourceError,
        match=f"yields .Image, {type(given).__name__}., not an image and a class number",
    ):
        list(opened("FakeData?image_size=[3,8,8]", tmp_path).files())


def test_a_dataset_none_of_whose_items_can_be_read_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(datasets.FakeData, "__getitem__", lambda self, index: 1 / 0)
    with pytest.raises(
        SourceError, match="none of the first 10 items can be read: division by zero"
    ):
        list(opened("FakeData", tmp_path).files())


def arguments(uri: str, split: str) -> dict[str, Any]:
    request = parse_request(SourceSettings(uri=f"torchvision://{uri}", root="/r", split=split))
    found = constructor_arguments(request, dataset_class(request))
    return {
        name: value for name, value in found.items() if name not in {"root", "download", "loader"}
    }


@pytest.mark.parametrize(
    ("uri", "split", "expected"),
    [
        ("CIFAR100", "train", {"train": True}),
        ("FashionMNIST", "test", {"train": False}),
        ("EMNIST?split=letters", "test", {"split": "letters", "train": False}),
        ("QMNIST?what=test50k", "train", {"what": "test50k", "train": True}),
        ("SVHN", "extra", {"split": "extra"}),
        ("ImageNet", "val", {"split": "val"}),
        ("Places365?small=true", "train", {"split": "train-standard", "small": True}),
        ("Places365", "train-challenge", {"split": "train-challenge"}),
        ("Country211", "val", {"split": "valid"}),
        ("INaturalist", "train", {"version": "2021_train"}),
        ("INaturalist?version=2018", "train", {"version": 2018}),
        ("OxfordIIITPet", "train", {"split": "trainval"}),
        ("EuroSAT", "train", {}),
        ("DTD?partition=3", "val", {"partition": 3, "split": "val"}),
    ],
)
def test_the_split_becomes_the_argument_that_the_class_has(
    uri: str, split: str, expected: dict[str, Any]
) -> None:
    assert arguments(uri, split) == expected


@pytest.mark.parametrize(
    ("uri", "options", "words"),
    [
        (
            "torchvision://",
            {},
            "expected the name of a torchvision dataset, such as torchvision://CIFAR10",
        ),
        ("torchvision://CIFAR-10", {}, "no dataset 'CIFAR-10'; did you mean CIFAR10"),
        ("torchvision://wrap_dataset_for_transforms_v2", {}, "no dataset"),
        (
            "torchvision://CIFAR10?train=false",
            {},
            "train is not given in the URI; set source.split",
        ),
        ("torchvision://CIFAR10?small=true", {}, "has no argument 'small'; allowed: none"),
        (
            "torchvision://CIFAR10",
            {"split": "val"},
            "source.split = 'val', but CIFAR10 has train and test",
        ),
        ("torchvision://SUN397", {"split": "test"}, "SUN397 has no splits"),
        ("torchvision://Food101", {"split": "val"}, "Unknown value 'val' for argument split"),
        ("torchvision://EMNIST", {}, r"EMNIST needs split: torchvision://EMNIST\?split="),
        ("torchvision://CIFAR10", {"root": "s3://bucket/cifar"}, "local folders only"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    uri: str, options: dict[str, str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=words):
        list(make(uri, **{"root": str(tmp_path), **options}).files())


def test_inspect_shows_what_would_be_read(cifar: Path) -> None:
    found = raypipe.inspect("torchvision://CIFAR10", overrides=[f"root={cifar}", "verify=false"])
    assert (found.samples, found.class_names[:2]) == (20, ("airplane", "automobile"))
    assert found.rejects.drawn == 20 and not found.rejects.count
