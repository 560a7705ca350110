"""Index of very many small files: seconds and memory of the index stage, on one process, without Ray.

    python benchmarks/indexing.py [--files 1000000] [--folders 1000] [--local 100000] [--cases folders,flat,list,local]

Each case runs in a process of its own. `first` is the index of a source that was never seen; `again` is what a run does that finds every stage
done: it lists the source and compares; `one more` is the index after one image was added in the middle. Seconds are wall time. Memory is
the highest resident set of the process above that before the stage began, with all modules imported and the fake store set up.

The object store is fake and has no network: keys are made up on request, and each answer of at most 1,000 keys, each question whether a key is there
and each read of the list takes --delay seconds (0.03). Requests may overlap, as they do on S3. What it leaves out is the time that
botocore takes to read an answer: it is measured on one answer of 1,000 keys and printed, and is spent by one thread however many
requests there are.

- folders  --files images in --folders folders of one level, as ImageNet has them
- flat     the same number of images in one folder, which can only be listed one answer after the other
- list     a CSV with as many lines, path and label; the images lie in the fake store
- local    --local empty images in folders of 1,000 on this machine's disk
"""

from __future__ import annotations

import argparse
import bisect
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import fsspec
import psutil
from fsspec import AbstractFileSystem

from raypipe.config import Config, parse_config
from raypipe.distributed.context import Context
from raypipe.progress import Progress
from raypipe.runs.layout import Run
from raypipe.runs.ledger import StageRecord
from raypipe.stages.index.stage import IndexStage

PAGE = 1000
BUCKET = "slow://bucket"


class Slow(AbstractFileSystem):
    """An object store of `files` images in `folders` folders below bucket/data, and the list of them as bucket/list.csv.

    It has what of S3 a listing asks for, `list_objects_v2`, one page an answer.
    """

    protocol = "slow"
    files, folders, delay = 0, 1, 0.0
    more = ""
    """One more key."""
    list_file = ""
    """The list, on this machine."""
    requests = 0
    req_kw: dict[str, Any] = {}  # noqa: RUF012 (as s3fs has it)

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = self._strip_protocol(path).partition("/")
        return bucket, key, None

    def call_s3(
        self,
        method: str,
        Bucket: str,
        Prefix: str = "",
        Delimiter: str = "",
        MaxKeys: int = PAGE,
        **given: str,
    ) -> Any:
        self._wait()
        after = given.get("ContinuationToken") or given.get("StartAfter", "")
        place = max(
            bisect.bisect_left(range(self.files), Prefix, key=key_of),
            bisect.bisect_right(range(self.files), after, key=key_of),
        )
        contents: list[dict[str, Any]] = []
        folders: list[dict[str, str]] = []
        while place < self.files and len(contents) + len(folders) < MaxKeys:
            key = key_of(place)
            if not key.startswith(Prefix):
                break
            inside, slash, _ = (
                key[len(Prefix) :].partition(Delimiter) if Delimiter else (key, "", "")
            )
            if slash:
                folders.append({"Prefix": Prefix + inside + slash})
                place = bisect.bisect_left(
                    range(self.files), Prefix + inside + slash + "\uffff", key=key_of
                )
                last = Prefix + inside + slash + "\uffff"
            else:
                contents.append(self._entry(key))
                place, last = place + 1, key
        if (
            self.more.startswith(Prefix)
            and not folders
            and contents
            and contents[0]["Key"] < self.more <= contents[-1]["Key"]
        ):
            contents.insert(
                bisect.bisect_left([item["Key"] for item in contents], self.more),
                self._entry(self.more),
            )
        cut = place < self.files and key_of(place).startswith(Prefix)
        answer = {"IsTruncated": cut, "Contents": contents, "CommonPrefixes": folders}
        return answer | ({"NextContinuationToken": last} if cut else {})

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        self._wait()
        _, key, _ = self.split_path(path)
        if key == "list.csv":
            return {"name": path, "type": "file", "size": os.path.getsize(self.list_file)}
        place = bisect.bisect_left(range(self.files), key, key=key_of)
        if place == self.files or not key_of(place).startswith(key):
            raise FileNotFoundError(path)
        return {
            "name": path,
            "type": "file" if key_of(place) == key else "directory",
            "size": 100_000,
        }

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return Range(self)

    def _entry(self, key: str) -> dict[str, Any]:
        return {
            "Key": key,
            "Size": 100_000,
            "ETag": f'"{hash(key) & 0xFFFFFFFFFFFFFFFF:032x}"',
            "LastModified": datetime(2026, 1, 1, tzinfo=UTC),
            "StorageClass": "STANDARD",
        }

    def _wait(self) -> None:
        type(self).requests += 1
        time.sleep(self.delay)


class Range:
    """The stored list as fsspec opens it: every read is a request."""

    def __init__(self, store: Slow) -> None:
        self._store, self._file = store, open(store.list_file, "rb")  # noqa: SIM115

    def seek(self, *place: int) -> int:
        return self._file.seek(*place)

    def read(self, size: int) -> bytes:
        self._store._wait()
        return self._file.read(size)

    def close(self) -> None:
        self._file.close()


def key_of(number: int) -> str:
    """The key of an image; numbers and keys have one order."""
    folder, place = divmod(number, -(-Slow.files // Slow.folders))
    return f"data/n{folder:08d}/n{folder:08d}_{place:07d}.JPEG"


def write_list(path: str) -> None:
    with open(path, "w") as file:
        file.write("path,label\n")
        for number in range(Slow.files):
            key = key_of(number)
            file.write(f"{key.removeprefix('data/')},{int(key[6:14])}\n")


def local_images(folder: str, files: int) -> None:
    for number in range(files):
        if number % 1000 == 0:
            os.makedirs(f"{folder}/{number // 1000:05d}")
        with open(f"{folder}/{number // 1000:05d}/{number:08d}.jpg", "wb"):
            pass


def measured(arguments: argparse.Namespace, case: str) -> None:
    """One case in this process; prints a line of JSON per step."""
    fsspec.register_implementation("slow", Slow)
    Slow.files, Slow.folders, Slow.delay = (
        arguments.files,
        1 if case == "flat" else arguments.folders,
        arguments.delay,
    )
    folder = tempfile.mkdtemp(prefix="raypipe-indexing-", dir=arguments.dir)
    try:
        source: dict[str, Any] = {"uri": f"{BUCKET}/data", "format": "imagefolder"}
        if case == "list":
            Slow.list_file = f"{folder}/list.csv"
            write_list(Slow.list_file)
            source = {"uri": f"{BUCKET}/list.csv", "format": "filelist", "root": f"{BUCKET}/data"}
        elif case == "local":
            local_images(f"{folder}/data", arguments.local)
            source["uri"] = f"{folder}/data"
        config = parse_config({"run": f"{folder}/run", "source": source})
        for step, figures in steps(config, case, folder):
            print(json.dumps({"step": step, **figures}), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def steps(config: Config, case: str, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    context, record = Context(config, Run(config.run), Progress(quiet=True)), StageRecord()
    before = psutil.Process().memory_info().rss

    def timed(action: Any, *given: Any) -> dict[str, Any]:
        started, spent, Slow.requests = time.monotonic(), time.process_time(), 0
        result = action(*given)
        return {
            "result": result,
            "seconds": time.monotonic() - started,
            "processor": time.process_time() - spent,
            "requests": Slow.requests,
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
            "samples": record.samples,
        }

    yield "first", timed(IndexStage().execute, context, record)
    yield "again", timed(IndexStage().complete, context, record)
    if case == "local":
        open(f"{folder}/data/00001/00001500a.jpg", "wb").close()
    elif case == "list":
        os.rename(Slow.list_file, f"{folder}/before.csv")
        with open(f"{folder}/before.csv") as before_it, open(Slow.list_file, "w") as file:
            for number, line in enumerate(before_it):
                file.write(line if number != Slow.files // 2 else f"{line}new.JPEG,1\n")
    else:
        Slow.more = key_of(Slow.files // 2 + 500).replace(".JPEG", "a.JPEG")
    stage, one_more = IndexStage(), StageRecord()
    figures = timed(lambda: (stage.complete(context, record), stage.execute(context, one_more)))
    yield "one more", {**figures, "samples": one_more.samples}


def parse_seconds() -> float:
    """Seconds that botocore takes to read one answer of 1,000 keys, the least of several."""
    from botocore.parsers import create_parser
    from botocore.session import Session

    operation = Session().get_service_model("s3").operation_model("ListObjectsV2")
    keys = "".join(
        f"<Contents><Key>data/n{n:08d}/n{n:08d}_{n:07d}.JPEG</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{n:032x}&quot;</ETag><Size>100000</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for n in range(PAGE)
    )
    body = f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>true</IsTruncated>{keys}</ListBucketResult>'
    answer = {"status_code": 200, "headers": {}, "body": body.encode()}
    parser, best = create_parser("rest-xml"), float("inf")
    for _ in range(10):
        started = time.process_time()
        assert len(parser.parse(answer, operation.output_shape)["Contents"]) == PAGE
        best = min(best, time.process_time() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--folders", type=int, default=1000)
    parser.add_argument("--local", type=int, default=100_000, help="files on this machine's disk")
    parser.add_argument("--delay", type=float, default=0.03, help="seconds that a request takes")
    parser.add_argument(
        "--cases", default="folders,flat,list,local", help="some of these, with commas"
    )
    parser.add_argument(
        "--dir",
        help="where runs, list and local images are written, and deleted again; default: the temporary folder",
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return measured(arguments, arguments.one)
    with open("/proc/cpuinfo") as file:
        model = next(
            (line.split(":")[1].strip() for line in file if line.startswith("model name")), "?"
        )
    print(
        f"{platform.machine()}, {model}, {os.cpu_count()} cores; Python {platform.python_version()}; {arguments.delay * 1000:.0f} ms a "
        f"request; botocore reads an answer of {PAGE:,} keys in {parse_seconds() * 1000:.0f} ms"
    )
    print(
        f"{'case':<10}{'step':<10}{'samples':>12}{'seconds':>10}{'processor':>11}{'requests':>10}{'MB above':>10}"
    )
    for case in arguments.cases.split(","):
        command = [sys.executable, __file__, *sys.argv[1:], "--one", case]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        for line in done.stdout.splitlines():
            step = json.loads(line)
            print(
                f"{case:<10}{step['step']:<10}{step['samples']:>12,}{step['seconds']:>10.1f}{step['processor']:>11.1f}"
                f"{step['requests']:>10,}{step['memory'] / 1e6:>10.0f}",
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
