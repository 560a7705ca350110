"""Mutate valid files and feed them to the readers: `python tests/fuzz_readers.py --minutes 10`.

The contract: whatever the bytes, scanning and reading yield exactly `fragment.samples` samples per
fragment, each with pixels or a reason, or raise one SourceError; quickly, and in bounded memory. A
finding is printed with the seed that reproduces it (`--seed N --once`), and `--keep FOLDER` saves
its file. Files are read in child processes, so that a crash of a C library or an endless loop is a
finding as well.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import multiprocessing
import os
import random
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bad_inputs import (
    FORMATS,
    GOOD,
    BadSample,
    encode,
    example,
    good_samples,
    mds_shard_bytes,
    parquet_bytes,
    path_tricks,
    picture,
    tar_bytes,
    tfrecord_bytes,
)
from PIL import Image

from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.sources import class_map, open_source
from raypipe.vision.decode import BadImage, decode, decode_batch

MAX_SECONDS, MAX_BYTES = 20, 2 << 30
"""A file that takes longer, or a process that grows by more, breaks the contract."""
MAX_PIXELS = 4_000_000
WORDS = [
    b"\0" * 4,
    b"\xff" * 4,
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    struct.pack("<q", -1),
    struct.pack("<q", 1 << 40),
    b"\x80" * 9 + b"\1",
]
"""Absurd values for length fields, including Thrift's variable-length ones."""


def originals() -> dict[str, list[bytes]]:
    """Valid files by their extension."""
    samples = good_samples(12)
    wide = pa.table(
        {
            "image": pa.array([{"bytes": GOOD, "path": f"{row}.png"} for row in range(12)]),
            "label": pa.array([f"name {row % 3}" for row in range(12)]).dictionary_encode(),
            "key": list(range(12)),
        }
    )
    pixels = pa.table(
        {
            "image": np.arange(12 * 12).reshape(12, 3, 4).tolist(),
            "label": [0.0] * 12,
            "key": [str(row) for row in range(12)],
        }
    )
    buffers = [io.BytesIO() for _ in range(3)]
    pq.write_table(wide, buffers[0], compression="snappy", row_group_size=5)
    pq.write_table(
        pixels, buffers[1], compression="zstd", data_page_version="2.0", write_page_index=True
    )
    pq.write_table(
        wide, buffers[2], compression="gzip", use_dictionary=False, write_page_checksum=True
    )
    # mostly pixels, so that many mutations leave something to read
    bitmaps = [
        BadSample(f"bitmap-{row}", encode(picture(60, 60, row), "BMP"), row % 3) for row in range(4)
    ]
    parquet = [
        parquet_bytes(samples, row_group_size=4),
        parquet_bytes(bitmaps, compression="none"),
        *(buffer.getvalue() for buffer in buffers),
    ]
    tars = [
        tar_bytes(samples[:1]),  # a single sample, so that many mutations leave nothing
        tar_bytes(samples, *((info, data) for info, data, _ in path_tricks())),
        long_names(tarfile.GNU_FORMAT),
        long_names(tarfile.PAX_FORMAT),
    ]
    frames = [picture(20, 30, seed) for seed in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 6
    result = {
        "parquet": parquet,
        "tar": tars,
        "tar.gz": [gzip.compress(tar, level) for tar in tars for level in (0, 6)],
    }
    records = [
        example({"image": sample.image, "label": sample.label, "key": sample.key})
        for sample in samples
    ]
    rows = [
        {"image": GOOD, "label": struct.pack("<q", row % 3), "key": b"%d" % row}
        for row in range(12)
    ]
    shard = mds_shard_bytes(rows, {"image": "png", "label": "int", "key": "str"})
    result |= {
        "tfrecord": [tfrecord_bytes(records), tfrecord_bytes(records[:1])],
        "tfrecord.gz": [
            gzip.compress(tfrecord_bytes(records)),
            zlib.compress(tfrecord_bytes(records)),
        ],
        "mds": [shard],
        "mds.gz": [gzip.compress(shard)],
    }
    for extension, format in FORMATS.items():
        result[extension] = [encode(frames[0], format)]
    result["jpg"] += [
        encode(frames[0], "JPEG", progressive=True, exif=exif),
        encode(frames[0].convert("CMYK"), "JPEG"),
    ]
    result["png"] += [
        encode(frames[0].quantize(8), "PNG"),
        encode(frames[0].convert("LA"), "PNG"),
        encode(Image.new("I;16", (9, 9)), "PNG"),
    ]
    result["png"] += [encode(frames[0], "PNG", save_all=True, append_images=frames[1:])]
    result["gif"] += [encode(frames[0].quantize(8), "GIF", save_all=True, append_images=frames[1:])]
    result["webp"] += [
        encode(frames[0], "WEBP", lossless=True),
        encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
    ]
    for compression in ("tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits"):
        result["tiff"].append(encode(frames[0], "TIFF", compression=compression))
    result["tiff"] += [
        encode(frames[0].convert("1"), "TIFF", compression="group4"),
        encode(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
    ]
    return result


def long_names(format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for number in range(6):
            for name, content in ((".png", GOOD), (".json", b'{"label": %d}' % number)):
                info = tarfile.TarInfo("deep/" * 30 + f"näme-{number}{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def mutate(data: bytes, generator: random.Random, others: list[bytes]) -> bytes:
    """Apply a few mutations.

    Flip bits; overwrite bytes; remove, repeat or insert a piece; write an absurd length; truncate.
    """
    result = bytearray(data)
    gentle = generator.random() < 0.4  # one wrong bit gets further than a wrong page
    for _ in range(generator.choice((1, 1, 2, 4, 16))):
        if not result:
            break
        place = generator.randrange(len(result))
        near = generator.randrange(min(len(result), generator.choice((100, 600, 3000))))
        # prefer headers and footers, which hold the structure
        place = generator.choice((place, place, near, len(result) - 1 - near))
        length = generator.choice((1, 4, 16, 512, 2000))
        action = 0 if gentle else generator.randrange(8)
        if action == 0:
            result[place] ^= 1 << generator.randrange(8)
        elif action == 1:
            result[place : place + length] = generator.randbytes(length)
        elif action == 2:
            del result[place : place + length]
        elif action == 3:
            result[place:place] = result[place : place + length]
        elif action == 4:
            other = generator.choice(others)
            start = generator.randrange(len(other))
            result[place : place + length] = other[start : start + length]
        elif action == 5:
            word = generator.choice(WORDS)
            result[place : place + len(word)] = word
        elif action == 6:
            result[place : place + 4] = struct.pack(
                generator.choice("<>") + "I",
                generator.choice((0, 1, len(result), 1 << 31, 1 << 20)),
            )
        else:
            del result[place:]
    return bytes(result)


def case(seed: int, files: dict[str, list[bytes]]) -> tuple[str, bytes]:
    """Extension and bytes of the mutated file of a seed."""
    generator = random.Random(seed)
    # most cases are of formats whose readers are largely raypipe's own
    own = ("parquet", "tar", "tar.gz", "tfrecord", "mds")
    extension = generator.choice((*own, *(own if seed % 2 else files)))
    data = generator.choice(files[extension])
    if extension == "tar.gz" and generator.random() < 0.5:  # damage inside valid compression
        return extension, gzip.compress(mutate(gzip.decompress(data), generator, files["tar"]), 1)
    return extension, mutate(data, generator, files[extension])


def check(extension: str, data: bytes, folder: Path, fragment_samples: int = 5) -> str:
    """Run a file through the readers and return the outcome in a few words.

    Raises AssertionError, or anything else, if the contract is broken.
    """
    if extension in FORMATS:
        try:
            pixels = decode(data, 16, MAX_PIXELS)
        except BadImage as error:
            assert str(error).strip() and len(str(error)) < 400
            return "refused"
        assert pixels.shape == (3, 16, 16) and pixels.dtype == np.uint8
        return "pixels"
    for leftover in folder.iterdir():
        leftover.unlink()
    (folder / f"a.{extension}").write_bytes(data)
    tar = extension.startswith("tar")
    id_column = "key" if not tar and len(data) % 2 else None
    settings = SourceSettings(
        uri=str(folder / f"a.{extension}" if extension.startswith("mds") else folder),
        fragment_samples=fragment_samples,
        id_column=id_column,
        max_pixels=MAX_PIXELS,
    )
    try:
        source = open_source(settings)
        (file,) = source.files()
        scan = source.scan(file)
        classes = class_map(scan.class_names, scan.labels, None)
    except SourceError as error:
        assert str(error)
        return "no source"
    good = 0
    for fragment in scan.fragments:
        if fragment.samples > 100_000:
            # a footer can state many rows; reading them stays bounded
            assert extension == "parquet"
            continue
        samples = list(source.read(fragment))
        assert len(samples) == fragment.samples, f"{len(samples)} samples of {fragment.samples}"
        for sample in samples:
            assert (sample.image is None) == bool(sample.reason), sample.reason
            assert sample.sample_id and len(sample.reason) < 1200
            (sample.sample_id + sample.reason).encode()
            classes.index(sample.label)
        _, reasons = decode_batch(samples, 8, MAX_PIXELS)
        good += sum(not reason for reason in reasons)
    return "read" if good else "all rejected" if scan.fragments else "nothing in it"


def peak() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def worker(seeds: range, state: Any, results: Any) -> None:
    """Process seeds; `state` holds the current one, so that the parent can report a crash."""
    os.close(1)  # libtiff prints
    os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError):
        os.dup2(1, 2)
    files, before = originals(), peak()
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            extension, data = case(seed, files)
            state[0], state[1] = seed, int(time.time())
            problem = ""
            try:
                outcome = check(extension, data, Path(folder), 1 + seed % 7)
            except BaseException:
                problem, outcome = traceback.format_exc(limit=-6), "breach"
            if peak() - before > MAX_BYTES:
                problem, before = f"memory grew to {peak() >> 20} MiB", peak()
            results.put((seed, extension, outcome, problem))
    results.put(None)


def fuzz(first: int, minutes: float, keep: str | None) -> int:
    """Fuzz for some minutes and return the number of findings."""
    context, until = multiprocessing.get_context("spawn"), time.monotonic() + 60 * minutes
    counts: Counter[str] = Counter()
    findings, seed = 0, first
    state, results = context.Array("q", 2), context.Queue()

    def report(bad_seed: int, what: str) -> None:
        nonlocal findings
        findings += 1
        extension, data = case(bad_seed, originals())
        print(f"--- seed {bad_seed} ({extension}, {len(data)} bytes): {what}", flush=True)
        if keep:
            Path(keep).mkdir(parents=True, exist_ok=True)
            (Path(keep) / f"{bad_seed}.{extension}").write_bytes(data)

    while time.monotonic() < until:
        state[0], state[1] = seed - 1, int(time.time()) + 60  # starting takes a while
        process = context.Process(target=worker, args=(range(seed, seed + 20_000), state, results))
        process.start()
        while time.monotonic() < until:
            for item in drained(results, 1.0):
                if item is None:
                    break
                seed = item[0] + 1
                counts[f"{item[1]}: {item[2]}"] += 1
                if item[3]:
                    report(item[0], item[3])
            if not process.is_alive():
                break
            if time.time() - state[1] > MAX_SECONDS:
                report(state[0], f"takes longer than {MAX_SECONDS} s")
                process.kill()
                seed = state[0] + 1
                break
        if process.exitcode not in (None, 0, -signal.SIGKILL):
            report(state[0], f"the process died: exit code {process.exitcode}")
            seed = state[0] + 1
        process.kill()
        process.join()
    for what, count in sorted(counts.items()):
        print(f"{count:>8,}  {what}")
    print(f"{sum(counts.values()):,} executions, {findings} findings, next seed {seed}")
    return findings


def drained(results: Any, wait: float) -> Iterator[Any]:
    """Items that are in a queue or arrive within `wait` seconds."""
    import queue

    try:
        yield results.get(timeout=wait)
        while True:
            yield results.get_nowait()
    except queue.Empty:
        return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--keep", help="save files that break the contract to this folder")
    parser.add_argument("--once", action="store_true", help="run only this seed, in this process")
    arguments = parser.parse_args()
    if arguments.once:
        with tempfile.TemporaryDirectory() as folder:
            print(check(*case(arguments.seed, originals()), Path(folder), 1 + arguments.seed % 7))
        return
    sys.exit(bool(fuzz(arguments.seed, arguments.minutes, arguments.keep)))


if __name__ == "__main__":
    main()
