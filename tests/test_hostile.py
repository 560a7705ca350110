"""Untrusted run folders.

status, report and select report what is wrong in one line, execute nothing and use little memory.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import raypipe
from raypipe import storage
from raypipe.cli import cli
from raypipe.config import parse_config
from raypipe.errors import ConfigError, RaypipeError, RunError
from raypipe.report import build
from raypipe.runs.run import Run
from raypipe.runs.untrusted import damage_as_error, printable, refuse_links_out
from raypipe.storage import untrusted_parquet
from raypipe.storage.untrusted_parquet import read_checked

_SPEC = importlib.util.spec_from_file_location(
    "report_fixtures", Path(__file__).parent / "report" / "conftest.py"
)
assert _SPEC is not None and _SPEC.loader is not None
_FIXTURES = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_FIXTURES)
make_run, source = _FIXTURES.make_run, _FIXTURES.source  # those of the tests of the report

DEEP = "[" * 100_000 + "]" * 100_000
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture
def run(make_run: Callable[..., Run]) -> Run:
    return make_run()


def _refused(run: Run, verb: str) -> str:
    """The one line that a verb ends with; an error that is not ours fails the test."""
    done = CliRunner().invoke(
        cli, [verb, run.uri, *(["--keep", "0.5"] if verb == "select" else [])]
    )
    assert isinstance(done.exception, RaypipeError), (verb, done.output, repr(done.exception))
    return str(done.exception)


def _put(run: Run, file: str, content: bytes | str) -> None:
    storage.write_bytes(
        run.path(*file.split("/")), content.encode() if isinstance(content, str) else content
    )


# -- JSON and YAML ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        DEEP,
        "\xff\xfe",
        '{"format": 1, "stages": []}',
        '{"format": 1, "stages": {"embed": 5}}',
        '{"format": 1, "stages": {"embed": {"samples": "many"}}}',
        '{"format": 1, "stages": {"embed": {"samples": -1}}}',
        '{"format": 1, "stages": {"embed": {"wall_seconds": NaN}}}',
        '{"format": 1, "stages": {"embed": {"wall_seconds": 1e999}}}',
        '{"format": 1, "stages": {"embed": {"detail": [1]}}}',
        '{"format": 1, "stages": {"embed": {"state": {"a": 1}}}}',
        '{"format": 1, "stages": {"embed": {"samples": ' + "9" * 5000 + "}}}",
        '{"format": [[1]]}',
        "null",
    ],
    ids=lambda text: text[:60] or "empty",
)
def test_a_ledger_that_is_none_is_refused(run: Run, content: str) -> None:
    _put(run, "run.json", content.encode("latin-1"))
    for verb in ("status", "report", "select"):
        assert "run.json" in _refused(run, verb)


def test_details_of_another_kind_than_expected_are_refused(run: Run) -> None:
    ledger = json.loads(storage.read_bytes(run.path("run.json")))
    for detail in (
        {"tables": 5},
        {"rejects": "x"},
        {"fidelity": [1, 2]},
        {"fidelity": {"spearman": "high", "spearman_interval": "no"}},
    ):
        for stage in ("embed", "extrapolate"):
            ledger["stages"][stage]["detail"] = detail
        _put(run, "run.json", json.dumps(ledger))
        for verb in ("status", "report", "select"):
            done = CliRunner().invoke(cli, [verb, run.uri])
            assert done.exception is None or isinstance(
                done.exception, (RaypipeError, SystemExit)
            ), (
                detail,
                verb,
                repr(done.exception),
            )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("!!python/object/apply:os.system ['touch {marker}']", "config.yaml is damaged"),
        ("run: !!python/name:os.system\nsource: {uri: x}", "config.yaml is damaged"),
        ("run: [", "config.yaml is damaged"),
        (DEEP, "config.yaml is damaged"),
        ("- 1", "damaged|bad configuration"),
        ("run: 5\nsource: {uri: [x]}", "is not allowed"),
        ("run: r\nsource: {uri: x}\nplugins: [os]", "plugins: unknown setting"),
    ],
)
def test_a_configuration_runs_nothing(run: Run, tmp_path: Path, content: str, message: str) -> None:
    import re

    marker = tmp_path / "was-run"
    _put(run, "config.yaml", content.replace("{marker}", str(marker)))
    for verb in ("report", "select"):
        assert re.search(message, _refused(run, verb)), verb
    assert not marker.exists()


def test_a_configuration_that_is_longer_than_memory_when_written_out_is_refused_in_a_line() -> None:
    import yaml

    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi")
    )
    with pytest.raises(ConfigError) as refused:
        parse_config({"run": "r", "source": {"uri": yaml.safe_load(bomb)["i"]}})
    assert len(str(refused.value)) < 1000 and "source.uri" in str(refused.value)


def test_a_file_that_is_far_too_large_is_not_read(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.content, "read_bytes", lambda *_: pytest.fail("it was read"))
    for file, verb in (("run.json", "status"), ("scores/f001.parquet", None)):
        path = run.path(*file.split("/"))
        with open(path, "wb") as sparse:
            sparse.truncate(1 << 40)  # takes no space on disk
        with pytest.raises(RaypipeError, match=r"bytes, but at most [0-9,]+ are allowed"):
            storage.read_json(path) if verb else storage.read_table(path)


@pytest.mark.timeout(60)
def test_pipes_and_devices_are_no_files(run: Run) -> None:
    os.remove(run.path("run.json"))
    os.mkfifo(run.path("run.json"))  # would be waited for without end
    assert "not a file" in _refused(run, "status")
    os.remove(run.path("run.json"))
    os.symlink("/dev/zero", run.path("run.json"))
    assert "not a file" in _refused(run, "status")


# -- Parquet ---------------------------------------------------------------------------------------


def _table(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    return buffer.getvalue()


def _rle(rows: int, value: str) -> bytes:
    """A few kilobytes that hold one text in very many rows."""
    one = pa.array([value])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), one)
    return _table(
        sample_id=column,
        score=pa.array([0.0] * rows, pa.float32()),
        label=pa.array([0] * rows, pa.int32()),
    )


def test_one_long_text_in_all_rows_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _rle(50_000, "x" * 1_000_000)
    assert len(data) < 20_000
    before = pa.total_allocated_bytes()
    with pytest.raises(ValueError, match="50,000,000,000 bytes of text"):
        read_checked(data)
    assert pa.total_allocated_bytes() - before < 10 << 20
    assert len(read_checked(data, ["score"])) == 50_000, (
        "a column that is not asked for does no harm"
    )
    monkeypatch.setattr(untrusted_parquet, "MAX_DECODED_BYTES", 1 << 20)
    with pytest.raises(ValueError, match=r"bytes stated for one column|bytes of text"):
        read_checked(_table(sample_id=["y" * 2_000_000]))


def test_more_rows_than_a_file_can_hold_are_not_believed() -> None:
    rows = 1_000_000
    data = _table(measured=pa.array([False] * rows))
    assert len(data) < 10_000
    with pytest.raises(ValueError, match="1,000,000 values stated in"):
        read_checked(data)


def test_tables_of_runs_come_out_as_before() -> None:
    table = pa.table(
        {
            "sample_id": ["a", None, "b", "a"],
            "label": pa.array([1, None, 2, 1], pa.int32()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array([0.5] * 8, pa.float32()), 2),
            "members": pa.array([["x"], [], None, ["y", "z"]], pa.list_(pa.string())),
            "bytes": pa.array([b"1", b"", None, b"2"]),
        }
    ).replace_schema_metadata({"raypipe.seed_rows": "2"})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=3)
    for columns in (None, ["label", "sample_id"], ["embedding"], []):
        expected = pq.read_table(io.BytesIO(buffer.getvalue()), columns=columns)
        found = read_checked(buffer.getvalue(), columns)
        assert found.equals(expected, check_metadata=True), columns
        found.validate(full=True)


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _footer_of_gigabytes(data: bytes) -> bytes:
    return data[:-8] + struct.pack("<I", 0x7FFFFFF0) + b"PAR1"


def _noise_in_pages(data: bytes) -> bytes:
    return (
        data[:4]
        + bytes((byte + 101) % 256 for byte in data[4 : len(data) // 3])
        + data[len(data) // 3 :]
    )


@pytest.mark.parametrize(
    "damage",
    [_cut, _footer_of_gigabytes, _noise_in_pages, lambda data: b"", lambda data: b"PAR1PAR1"],
)
@pytest.mark.parametrize("folder", ["scores", "index", "keep"])
def test_damaged_tables_are_named(run: Run, folder: str, damage: Callable[[bytes], bytes]) -> None:
    file = sorted(storage.names(run.path(folder)) - {"classes.json"})[0]
    _put(run, f"{folder}/{file}", damage(storage.read_bytes(run.path(folder, file))))
    verbs = {"scores": ("report", "select"), "index": ("report",), "keep": ("report",)}[folder]
    for verb in verbs:
        assert file in _refused(run, verb) or run.uri in _refused(run, verb)


@pytest.mark.parametrize(
    "table",
    [
        {
            "sample_id": ["a"],
            "label": [0],
            "score": ["high"],
            "lower": [0.0],
            "upper": [1.0],
            "measured": [True],
        },
        {
            "sample_id": [5],
            "label": ["cat"],
            "score": [1.0],
            "lower": [0.0],
            "upper": [1.0],
            "measured": [True],
        },
        {"sample_id": ["a"]},
        {
            "sample_id": [["a"]],
            "label": [[1]],
            "score": [[1.0]],
            "lower": [0.0],
            "upper": [1.0],
            "measured": [3],
        },
    ],
)
def test_tables_of_other_columns_are_refused(run: Run, table: dict[str, Any]) -> None:
    for file in storage.names(run.path("scores")):
        _put(run, f"scores/{file}", _table(**table))
    for verb in ("report", "select"):
        assert run.uri in _refused(run, verb)


def test_memory_is_bounded_in_a_process_of_its_own(run: Run) -> None:
    """60 GB of text in each score shard, of a few kilobytes."""
    for file in storage.names(run.path("scores")):
        _put(run, f"scores/{file}", _rle(60_000, "z" * 1_000_000))
    code = (
        "import atexit, resource, sys\nimport raypipe.stages.select.stage\nfrom raypipe.cli import main\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\nbefore = peak()\n"
        "atexit.register(lambda: print(peak() - before))\nmain(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "select", run.uri], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1 and "bytes of text in one column" in done.stderr, done.stderr[-600:]
    assert int(done.stdout) < 300, "MB more than the imports took"


# -- names and links -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../../outside", "/etc/passwd", "a/b", "..", "", "a\0b", ".hidden"]
)
def test_a_fragment_whose_name_is_a_path_is_refused(run: Run, name: str) -> None:
    columns = {
        "fragment_id": [name], "path": ["p"], "start": [0], "stop": [1], "offset": [0],
        "members": pa.array([[]], pa.list_(pa.string())), "error": [""],
    }  # fmt: skip
    for file in storage.names(run.path("index")) - {"classes.json"}:
        _put(run, f"index/{file}", _table(**columns))
    with pytest.raises(RunError, match="is not a valid fragment name"):
        run.fragments()
    _refused(run, "report")


def test_a_shard_of_the_manifest_whose_name_is_a_path_is_refused(run: Run) -> None:
    from raypipe.runs.manifests import SeedManifest

    storage.write_json(
        run.path("seed", "manifest.json"), {"shards": ["../../x"], "audit_shards": []}
    )
    with pytest.raises(RunError, match=r"seed/manifest.json is damaged"):
        SeedManifest.read(run)
    storage.write_json(
        run.path("seed", "manifest.json"),
        {"shards": ["seed-00000-ab"], "audit_shards": ["audit-00000-ab"]},
    )
    assert SeedManifest.read(run).shards == ("seed-00000-ab",)


@pytest.mark.parametrize(("folder", "verb"), [("report", "report"), ("keep", "select")])
def test_nothing_is_written_through_a_link_out_of_the_run(
    run: Run, tmp_path: Path, folder: str, verb: str
) -> None:
    import shutil

    elsewhere = tmp_path / "precious"
    elsewhere.mkdir()
    precious = elsewhere / "keep-0.10.parquet"
    pq.write_table(pa.table({"sample_id": ["mine"]}), precious)
    shutil.rmtree(run.path(folder), ignore_errors=True)
    os.symlink(elsewhere, run.path(folder))
    assert "leads out of the run" in _refused(run, verb)
    assert os.listdir(elsewhere) == [precious.name]
    os.remove(run.path(folder))
    os.makedirs(run.path("real"))
    os.symlink("real", run.path(folder))
    refuse_links_out(run, folder)  # within the run a link is nobody else's business


# -- text ------------------------------------------------------------------------------------------


def test_names_and_ids_are_text_in_the_page(make_run: Callable[..., Run]) -> None:
    nasty = f"{SCRIPT}\"'&--><img src=x onerror=alert(2)>$\\frac{{1}}$"
    run = make_run(names=(nasty, "b", "c"), path=nasty.replace("/", "_") + "-{}")
    ledger = run.ledger()
    ledger["select"].state, ledger["select"].error = "refused", SCRIPT
    run.write_ledger(ledger)
    build(run)
    page = storage.read_bytes(run.path("report", "index.html")).decode()
    assert "<script" not in page.lower() and "onerror=alert" not in page.replace(
        "onerror=alert(2)&gt;", ""
    )
    assert "&lt;script&gt;" in page and "Content-Security-Policy" in page


def test_a_terminal_is_not_told_what_to_do(run: Run) -> None:
    ledger = run.ledger()
    ledger["embed"].state, ledger["embed"].error = (
        "failed",
        "\x1b]0;owned\x07\x1b[2J words\x9b31m \u202egnp.exe",
    )
    run.write_ledger(ledger)
    shown = CliRunner().invoke(cli, ["status", run.uri]).output
    assert "words" in shown and not any(mark in shown for mark in "\x1b\x07\x9b\u202e")
    assert printable("Zoë, 猫, a\tb\n") == "Zoë, 猫, a\tb\n"


# -- the sentence ----------------------------------------------------------------------------------


def test_errors_of_form_become_one_line_and_ours_stay() -> None:
    for error in (
        KeyError("fidelity"),
        RecursionError("deep"),
        pa.ArrowInvalid("x\ny"),
        ZeroDivisionError("0"),
        UnicodeDecodeError("u", b"", 0, 1, "z"),
    ):
        with (
            pytest.raises(
                RunError,
                match=r"somewhere: a file of this run has unexpected content \(\w+: [^\n]*\)$",
            ) as raised,
            damage_as_error("somewhere"),
        ):
            raise error
        assert raised.value.__cause__ is error
    with pytest.raises(RunError, match="ours"), damage_as_error("somewhere"):
        raise RunError("ours")
    with pytest.raises(KeyboardInterrupt), damage_as_error("somewhere"):
        raise KeyboardInterrupt
    with (
        pytest.raises(RunError, match=r"index/classes.json is missing"),
        damage_as_error("somewhere"),
    ):
        raise FileNotFoundError(2, "No such file", "index/classes.json")


def test_selecting_from_python_says_the_same(run: Run) -> None:
    for file in storage.names(run.path("scores")):
        _put(run, f"scores/{file}", _table(sample_id=["a"]))
    with pytest.raises(RaypipeError):
        raypipe.select(run.uri, keep=0.5)
