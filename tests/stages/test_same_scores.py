"""The same images in every format give the same pixels, labels, measured scores and embeddings.

What is compared: 160 handwritten digits, enlarged to 32x32 RGB (what the least flexible format can hold) and stored without loss, are laid
out once in each format, in the same order; ids differ by format, and each writer says what they are in its own.

- Every format, without a cluster: order, labels as class numbers, and pixels as the proxy would see them, bit for bit.
- The formats of `WHOLE_RUNS`, through the stages on Ray: seed shards, measured scores and embeddings bit for bit.

The seed set is everything (`seed.fraction: 1`). Which samples a smaller one takes, and the order of training, are decided by hashes of the
ids, and ids differ between formats. Only `source.id_column` of Parquet can give a table the ids of another layout, so whole runs are compared
with such a table; that it is drawn the same seed set as the layout is the last test. `test_same_order.py` follows the same ids up to the
keep-lists.

To add a format: a writer, and its line in `WRITERS`.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_inputs import example, mds_index, mds_shard_bytes, tfrecord_bytes
from helpers import QUIET, small_config
from PIL import Image
from sklearn.datasets import load_digits

import raypipe
from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import read_shard
from raypipe.selection.hashing import canonical_order
from raypipe.sources import class_map, open_source
from raypipe.sources.id_sampling import in_sample
from raypipe.vision.decode import decode_batch

COUNT, SIZE = 160, 8
"""Samples, and the side that the proxy sees, pixels."""


class Data(NamedTuple):
    """Sorted names as "class-3/0017", uint8 pixels [n, 32, 32, 3], labels [n], and PNGs of them."""

    names: list[str]
    pixels: np.ndarray
    labels: list[int]
    pngs: list[bytes]


class Layout(NamedTuple):
    """Settings of the section `source`, and the ids of the samples in the order of `Data`."""

    settings: dict[str, Any]
    ids: list[str]


@pytest.fixture(scope="module")
def data() -> Data:
    digits = load_digits()
    order = np.argsort(digits.target[:COUNT], kind="stable")  # as an image folder lists them
    grey = np.rint(digits.images[order] * 255 / 16).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    pixels = np.stack([grey, 255 - grey, grey // 2], 3)
    pngs = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        pngs.append(buffer.getvalue())
    labels = digits.target[order].tolist()
    return Data(
        [f"class-{label}/{number:04d}" for number, label in enumerate(labels)], pixels, labels, pngs
    )


def parquet(folder: Path, data: Data, ids: list[str] | None = None) -> Layout:
    half = COUNT // 2
    columns = {
        "image": [{"bytes": image, "path": None} for image in data.pngs],
        "label": data.labels,
    }
    table = pa.table(columns if ids is None else {**columns, "id": ids})
    for part in range(2):
        pq.write_table(
            table.slice(part * half, half), folder / f"train-{part}.parquet", row_group_size=30
        )
    own = [f"train-{row // half}.parquet#{row % half}" for row in range(COUNT)]
    return (
        Layout({"format": "parquet"}, own)
        if ids is None
        else Layout({"format": "parquet", "id_column": "id"}, ids)
    )


def parquet_of_pixels(folder: Path, data: Data) -> Layout:
    pq.write_table(
        pa.table({"img": data.pixels.tolist(), "y": data.labels}), folder / "all.parquet"
    )
    settings = {"format": "parquet", "image_column": "img", "label_column": "y"}
    return Layout(settings, [f"all.parquet#{row}" for row in range(COUNT)])


def webdataset(folder: Path, data: Data) -> Layout:
    ids, third = [], COUNT // 3 + 1
    for part in range(3):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for row in range(part * third, min(COUNT, part * third + third)):
                for kind, content in (
                    ("cls", str(data.labels[row]).encode()),
                    ("png", data.pngs[row]),
                ):
                    member = tarfile.TarInfo(f"{data.names[row]}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                ids += [f"{part}.tar#{data.names[row]}"] if row >= len(ids) else []
    return Layout({"format": "webdataset"}, ids)


def imagefolder(folder: Path, data: Data) -> Layout:
    for name, image in zip(data.names, data.pngs, strict=True):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return Layout({"format": "imagefolder"}, [f"{name}.png" for name in data.names])


def filelist(folder: Path, data: Data) -> Layout:
    """Write a list like that of Places365: a path and a class number in each line."""
    imagefolder(folder / "images", data)
    lines = [f"{name}.png {label}\n" for name, label in zip(data.names, data.labels, strict=True)]
    (folder / "train.txt").write_text("".join(lines))
    settings = {
        "uri": str(folder / "train.txt"),
        "format": "filelist",
        "root": str(folder / "images"),
    }
    return Layout(settings, [f"{name}.png" for name in data.names])


def torchvision_cifar10(folder: Path, data: Data) -> Layout:
    """Write files like the original CIFAR-10: pickled arrays, each image all red, green, then blue."""
    batches = folder / "cifar-10-batches-py"
    batches.mkdir()
    rows = data.pixels.transpose(0, 3, 1, 2).reshape(COUNT, -1)
    fifth = COUNT // 5
    for batch in range(5):
        part = slice(batch * fifth, batch * fifth + fifth)
        content = {"data": rows[part], "labels": data.labels[part]}
        (batches / f"data_batch_{batch + 1}").write_bytes(pickle.dumps(content, protocol=2))
    (batches / "test_batch").write_bytes(
        pickle.dumps({"data": rows[:1], "labels": data.labels[:1]}, protocol=2)
    )
    (batches / "batches.meta").write_bytes(
        pickle.dumps({"label_names": [f"class-{label}" for label in range(10)]}, protocol=2)
    )
    settings = {
        "uri": "torchvision://CIFAR10",
        "format": "torchvision",
        "root": str(folder),
        "split": "train",
        "verify": False,
    }
    return Layout(settings, [f"CIFAR10/train/{row:03d}" for row in range(COUNT)])


def huggingface(folder: Path, data: Data) -> Layout:
    """Write what `datasets` saves with `save_to_disk`: Arrow streams, and their schema as JSON."""
    table = pa.table(
        {
            "image": [{"bytes": image, "path": None} for image in data.pngs],
            "label": pa.array(data.labels, pa.int64()),
        }
    )
    half, files = COUNT // 2, []
    for part in range(2):
        files.append({"filename": f"data-{part:05d}-of-00002.arrow"})
        with pa.ipc.new_stream(str(folder / files[-1]["filename"]), table.schema) as writer:
            writer.write_table(table.slice(part * half, half), max_chunksize=30)
    names = [f"class-{label}" for label in range(10)]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    (folder / "state.json").write_text(
        json.dumps({"_data_files": files, "_split": "train", "_format_type": None})
    )
    return Layout(
        {"format": "huggingface"},
        [f"{files[row // half]['filename']}#{row % half}" for row in range(COUNT)],
    )


def tfrecord(folder: Path, data: Data) -> Layout:
    half = COUNT // 2
    examples = [
        example({"image/encoded": image, "image/class/label": label})
        for image, label in zip(data.pngs, data.labels, strict=True)
    ]
    for part in range(2):
        content = tfrecord_bytes(examples[part * half : part * half + half])
        (folder / f"train-0000{part}-of-00002").write_bytes(content)
    ids = [f"train-0000{row // half}-of-00002#{row % half}" for row in range(COUNT)]
    return Layout({"format": "tfrecord"}, ids)


def mds(folder: Path, data: Data) -> Layout:
    """Write shards of PNGs, and one of arrays of pixels."""
    half = COUNT // 2
    labels = [label.to_bytes(8, "little") for label in data.labels]
    images = {
        0: ("png", data.pngs),
        1: ("ndarray:uint8:32,32,3", [x.tobytes() for x in data.pixels]),
    }
    for part, (encoding, values) in images.items():
        rows = [
            {"image": values[row], "label": labels[row]}
            for row in range(part * half, part * half + half)
        ]
        content = mds_shard_bytes(rows, {"image": encoding, "label": "int"})
        (folder / f"shard.0000{part}.mds").write_bytes(content)
    (folder / "index.json").write_bytes(
        mds_index(("shard.00000.mds", half), ("shard.00001.mds", half))
    )
    return Layout(
        {"format": "mds"}, [f"shard.0000{row // half}.mds#{row % half}" for row in range(COUNT)]
    )


def lance(folder: Path, data: Data) -> Layout:
    package = pytest.importorskip("lance")
    table = pa.table({"image": data.pngs, "label": data.labels})
    package.write_dataset(table, f"{folder}/set.lance", max_rows_per_file=COUNT // 2)
    ids = [f"fragment-{row // (COUNT // 2)}#{row % (COUNT // 2)}" for row in range(COUNT)]
    return Layout({"format": "lance", "uri": f"{folder}/set.lance"}, ids)


WRITERS: dict[str, Callable[[Path, Data], Layout]] = {
    "parquet": parquet,
    "parquet-of-pixels": parquet_of_pixels,
    "webdataset": webdataset,
    "imagefolder": imagefolder,
    "filelist": filelist,
    "torchvision": torchvision_cifar10,
    "huggingface": huggingface,
    "tfrecord": tfrecord,
    "mds": mds,
    "lance": lance,
}
WHOLE_RUNS = ("parquet", "webdataset", "imagefolder")
"""Formats that the stages run on: a run takes ten seconds, mostly to start processes."""


def _laid_out(folder: Path, data: Data, writer: Callable[[Path, Data], Layout]) -> Layout:
    folder.mkdir()
    layout = writer(folder, data)
    return layout._replace(settings={"uri": str(folder), "fragment_samples": 64, **layout.settings})


@pytest.mark.parametrize("format", WRITERS)
def test_pixels_and_labels_do_not_depend_on_the_format(
    format: str, data: Data, tmp_path: Path
) -> None:
    layout = _laid_out(tmp_path / "data", data, WRITERS[format])
    source = open_source(SourceSettings.model_validate(layout.settings))
    scans = [source.scan(file) for file in source.files()]
    names = next((scan.class_names for scan in scans if scan.class_names is not None), None)
    classes = class_map(names, frozenset().union(*(scan.labels for scan in scans)), None)
    samples = [
        sample for scan in scans for fragment in scan.fragments for sample in source.read(fragment)
    ]
    assert [sample.sample_id for sample in samples] == layout.ids
    assert [classes.index(sample.label) for sample in samples] == [
        (label, "") for label in data.labels
    ]
    for size in (SIZE, 32):
        pixels, reasons = decode_batch(samples, size, 10_000)
        assert not any(reasons)
        np.testing.assert_array_equal(pixels, _expected(data, size))


def _expected(data: Data, size: int) -> np.ndarray:
    """uint8 [n, 3, size, size]; PNGs are decoded at full size, so arrays and files resample alike."""
    images = [
        Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
        for image in data.pixels
    ]
    return np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])


@pytest.fixture(scope="module")
def run_of(
    cluster: str, data: Data, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Run, Layout]]:
    """The run of a format up to the embeddings, computed at first use."""

    @functools.cache
    def made(format: str) -> tuple[Run, Layout]:
        folder = tmp_path_factory.mktemp(format)
        writer = WRITERS.get(format)
        if writer is None:  # a table with the ids of another format
            ids = made(format.removeprefix("parquet-of-"))[1].ids
            writer = functools.partial(parquet, ids=ids)
        layout = _laid_out(folder / "data", data, writer)
        changes = [f"source.{name}={value}" for name, value in layout.settings.items()]
        changes += [
            "source.limit=null",
            "seed.fraction=1",
            "proxy.epochs=2",
            f"proxy.image_size={SIZE}",
        ]
        config = small_config(str(folder / "run"), *changes, "measure.scores=[moso, el2n]")
        return Run(raypipe.run(config, until="embed", progress=QUIET).uri), layout

    return made


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("format", WHOLE_RUNS)
def test_seed_shards_are_the_same_bit_for_bit(
    format: str, run_of: Callable[[str], tuple[Run, Layout]], data: Data
) -> None:
    run, layout = run_of(format)
    (shard,) = SeedManifest.read(run).shards
    ids, images, labels = read_shard(run, shard)
    rows = canonical_order(layout.ids)
    assert ids == [layout.ids[row] for row in rows]
    assert labels.tolist() == [data.labels[row] for row in rows]
    np.testing.assert_array_equal(images, _expected(data, SIZE)[rows])


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("format", WHOLE_RUNS[1:])
def test_scores_and_embeddings_are_the_same(
    format: str, run_of: Callable[[str], tuple[Run, Layout]]
) -> None:
    expected, found = _numbers(*run_of(f"parquet-of-{format}")), _numbers(*run_of(format))
    assert expected["moso"].std() > 0 and expected["embedding"].std() > 0
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def _numbers(run: Run, layout: Layout) -> dict[str, np.ndarray]:
    """Measured scores and proxy statistics of each sample, in the order of the data."""
    measured, embedded = _in_order(run, "measured", layout), _in_order(run, "embeddings", layout)
    found = {name: measured[name].to_numpy() for name in ("moso", "el2n")}
    found |= {name: embedded[name].to_numpy() for name in ("label", "loss", "entropy")}
    return found | {"embedding": np.stack(embedded["embedding"].to_numpy(zero_copy_only=False))}


def _in_order(run: Run, folder: str, layout: Layout) -> pa.Table:
    """All rows of a folder's tables in the order of the data, each sample exactly once."""
    table = pa.concat_tables(
        [table.replace_schema_metadata(None) for _, table in storage.iter_tables(run.path(folder))]
    )
    rows = {sample_id: row for row, sample_id in enumerate(table["sample_id"].to_pylist())}
    assert len(rows) == len(table) and rows.keys() == set(layout.ids)
    return table.take([rows[sample_id] for sample_id in layout.ids])


@pytest.mark.parametrize("format", ["webdataset", "imagefolder"])
def test_a_table_with_the_ids_of_another_layout_is_drawn_the_same_seed_set(
    format: str, data: Data, tmp_path: Path
) -> None:
    other = _laid_out(tmp_path / "other", data, WRITERS[format])
    table = _laid_out(
        tmp_path / "table", data, lambda folder, data: parquet(folder, data, other.ids)
    )
    drawn = []
    for layout in (other, table):
        source, rule = (
            open_source(SourceSettings.model_validate(layout.settings)),
            in_sample(0.4, 0),
        )
        fragments = [
            fragment for file in source.files() for fragment in source.scan(file).fragments
        ]
        samples = [sample for fragment in fragments for sample in source.read(fragment, rule)]
        pixels, _ = decode_batch(samples, SIZE, 10_000)
        drawn.append(([sample.sample_id for sample in samples], pixels))
    assert drawn[0][0] == drawn[1][0] and 0.2 * COUNT < len(drawn[0][0]) < 0.6 * COUNT
    np.testing.assert_array_equal(drawn[0][1], drawn[1][1])
