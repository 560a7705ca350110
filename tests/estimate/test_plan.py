"""`raypipe plan`: its figures, where its rates come from, and the commands of cluster.md."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import small_config

from raypipe import storage
from raypipe.cli import cli
from raypipe.config import load_config, parse_config
from raypipe.errors import ConfigError, RunError
from raypipe.estimate.efforts import embedding_passes
from raypipe.estimate.plan import Prices, Rates, RunPlan, SourceSize, plan, read_rates
from raypipe.runs.run import Run
from raypipe.vision import network_costs

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
IMAGENET = load_config(str(ROOT / "jobs" / "configs" / "imagenet.yaml"))


def _plan(samples: int = 1_281_167, **options: Any) -> RunPlan:
    return plan(
        IMAGENET,
        SourceSize(samples, file_samples=options.pop("file_samples", None)),
        **{"gpus": 8, **options},
    )


def _of(found: RunPlan, name: str) -> dict[str, Any]:
    return {stage.stage: getattr(stage, name) for stage in found.stages}


def test_work_grows_with_the_source_and_not_with_the_machines() -> None:
    once, ten = _plan(1_000_000), _plan(10_000_000)
    for name in ("requests", "bytes_read", "files"):
        assert _of(ten, name)["embed"] == pytest.approx(10 * _of(once, name)["embed"], rel=0.01), (
            name
        )
    assert _of(ten, "cpu_hours")["embed"] == pytest.approx(
        10 * _of(once, "cpu_hours")["embed"], rel=0.01
    )
    many = _plan(1_000_000, gpus=64)
    assert _of(many, "gpu_hours") == _of(once, "gpu_hours") and many.total("hours") < once.total(
        "hours"
    )
    alone = _plan(1_000_000, gpus=0)
    assert alone.total("gpu_hours") == 0 and alone.total("cpu_hours") > once.total("cpu_hours")
    assert alone.cpus == 16 and once.cpus == 64 and _plan(gpus=2, cpus=5).cpus == 5


def test_dollars_are_hours_requests_and_bytes_times_the_prices() -> None:
    assert _plan().dollars == {}
    found = _plan(prices=Prices(gpu=2.0, cpu=0.5, request=10.0, storage=0.02))
    expected = {
        "gpu": 2 * found.total("gpu_hours"),
        "cpu": 0.5 * found.total("cpu_hours"),
        "request": found.total("requests") / 1e5,
        "storage": 0.02 * sum(found.written.values()) / 1e9,
    }
    assert found.dollars == pytest.approx(expected)
    assert set(_plan(prices=Prices(cpu=0.0)).dollars) == {"cpu"}
    with pytest.raises(ConfigError, match="--gpu-price: -1 is not allowed"):
        _plan(prices=Prices(gpu=-1))


def test_images_one_by_one_cost_more_requests_and_files_than_shards() -> None:
    folders = plan(
        parse_config({"run": "r", "source": {"uri": "x", "format": "imagefolder"}}),
        SourceSize(100_000),
    )
    shards = plan(
        parse_config({"run": "r", "source": {"uri": "x", "format": "webdataset"}}),
        SourceSize(100_000),
    )
    assert folders.files == 100_000 and shards.files == 100
    assert _of(folders, "requests")["embed"] > 10 * _of(shards, "requests")["embed"]
    assert (
        _of(shards, "bytes_read")["index"] == shards.source_bytes
        and _of(folders, "bytes_read")["index"] == 0
    )
    guessed = plan(parse_config({"run": "r", "source": {"uri": "x"}}), SourceSize(100_000))
    assert guessed.format == "webdataset" and any("auto" in note for note in guessed.notes)


def test_settings_change_what_they_should() -> None:
    def changed(**sections: Any) -> RunPlan:
        return plan(
            parse_config({"run": "r", "source": {"uri": "x", "format": "webdataset"}, **sections}),
            SourceSize(1_000_000),
            gpus=4,
        )

    base = changed()
    assert _of(changed(proxy={"epochs": 100}), "gpu_hours")["proxy"] == pytest.approx(
        2 * _of(base, "gpu_hours")["proxy"], rel=0.05
    )
    assert (
        changed(embed={"dtype": "float16"}).written["embeddings"] < 0.6 * base.written["embeddings"]
    )
    features = changed(embed={"model": "torchvision:mobilenet_v3_small"})
    assert _of(features, "gpu_hours")["embed"] > 1.01 * _of(base, "gpu_hours")["embed"]
    assert _of(features, "cpu_hours")["embed"] > 1.5 * _of(base, "cpu_hours")["embed"]
    assert features.written["embeddings"] != base.written["embeddings"]
    assert changed(select={"keep": [0.5]}).written["keep"] < base.written["keep"]
    small = changed(source={"uri": "x", "format": "webdataset", "fragment_samples": 100})
    assert small.fragments == 10 * base.fragments and small.driver_bytes > base.driver_bytes
    assert _of(small, "requests")["extrapolate"] > 9 * _of(base, "requests")["extrapolate"]


def test_rehearsals_and_pseudo_labels_are_planned() -> None:
    source = {"uri": "x", "format": "webdataset"}
    rehearsed = plan(
        parse_config(
            {
                "run": "r",
                "source": source,
                "proxy": {"parts": 1},
                "measure": {"scores": ["forgetting"]},
            }
        ),
        SourceSize(100_000),
    )
    unlabelled = plan(
        parse_config(
            {
                "run": "r",
                "source": {**source, "label_column": None},
                "pseudo_labels": {"clusters": 10},
            }
        ),
        SourceSize(100_000),
    )
    plain = plan(parse_config({"run": "r", "source": source}), SourceSize(100_000))
    for found, stage in ((rehearsed, "rehearse"), (unlabelled, "label")):
        assert _of(found, "files")[stage] > 0 and _of(found, "requests")[stage] > 0
        assert stage not in _of(plain, "files")
        assert found.written_files == found.total("files")


def test_what_breaks_first_and_what_mends_it() -> None:
    today, ten_billion = (_plan(samples) for samples in (1_281_167, 10_000_000_000))
    # of a score that is extrapolated; that of embeddings needs no fit to the measured samples
    of_moso = load_config(str(ROOT / "jobs/configs/imagenet.yaml"), ["measure.scores=[moso]"])
    hundred = plan(of_moso, SourceSize(100_000_000), gpus=8)
    assert not any("measured samples" in bound.what for bound in _plan(100_000_000).bounds)
    assert today.bounds[0].share < 1, "the configuration as it stands is within every bound"
    first = hundred.bounds[0]
    assert first.what.startswith("memory of a worker") and first.share > 1
    fraction = float(first.remedy.removeprefix("seed.fraction "))
    mended = plan(
        of_moso.model_copy(update={"seed": of_moso.seed.model_copy(update={"fraction": fraction})}),
        SourceSize(100_000_000),
        gpus=8,
    )
    assert mended.bounds[0].share <= 1, mended.bounds[0]
    broken = {bound.what.split(":")[0]: bound for bound in ten_billion.bounds if bound.share > 1}
    remedy = broken["memory of the driver"].remedy
    samples = int(remedy.rsplit(" ", 1)[1])
    source = IMAGENET.source.model_copy(update={"fragment_samples": samples})
    larger = plan(
        IMAGENET.model_copy(update={"source": source}),
        SourceSize(10_000_000_000, file_samples=samples),
        gpus=8,
    )
    within = {bound.what.split(":")[0]: bound.share for bound in larger.bounds}
    assert within["memory of the driver"] <= 1 and within["start of a resumed run"] <= 1


# -- rates ---------------------------------------------------------------------------------


def test_rates_are_those_of_the_committed_tables() -> None:
    reading = (RESULTS / "reading-cpu.txt").read_text(encoding="utf-8")
    header, row = re.search(
        r"Decoding 192 JPEGs.*\n(.*px.*)\n(?:.*\n)*?raypipe +(.*)", reading
    ).groups()  # type: ignore[union-attr]
    sides = [int(side) for side in re.findall(r"(\d+) px", header)]
    assert (
        dict(zip(sides, [float(word) for word in row.split()[::3]], strict=True)) == Rates().decode
    )
    alignment = (RESULTS / "alignment-cpu.txt").read_text(encoding="utf-8")
    forward = float(re.search(r"forward, channels last +([\d.]+)", alignment)[1]) / 1e3  # type: ignore[index]
    assert network_costs.macs("resnet18", 32) / forward == pytest.approx(Rates().cpu_macs, rel=0.5)
    indexing = (RESULTS / "indexing-cpu.txt").read_text(encoding="utf-8")
    answer = float(re.search(r"1,000 keys in (\d+) ms", indexing)[1]) / 1e3  # type: ignore[index]
    again = re.search(r"folders +again +([\d,]+) +[\d.]+ +([\d.]+)", indexing)
    assert again is not None
    each = float(again[2]) / int(again[1].replace(",", "")) + answer / 1000
    assert Rates().list_seconds == pytest.approx(each, rel=0.1)
    fragments = (RESULTS / "fragments-cpu.txt").read_text(encoding="utf-8")
    count = int(re.search(r"([\d,]+) fragments; (\d+) MB before", fragments)[1].replace(",", ""))  # type: ignore[index]
    rows = {
        words[0]: [float(word) for word in words[1:]]
        for words in re.findall(r"^(\w+(?: done)?) +([\d.]+) +([\d.]+) +(\d+)$", fragments, re.M)
    }
    assert rows["decision"][1] / count == pytest.approx(Rates().decision_seconds, rel=0.1)
    before = int(re.search(r"; (\d+) MB before", fragments)[1])  # type: ignore[index]
    assert (max(row[2] for row in rows.values()) - before) * 1e6 / count == pytest.approx(
        Rates().driver_bytes, rel=0.1
    )
    size = int(re.search(r"index ([\d,]+) bytes", fragments)[1].replace(",", ""))  # type: ignore[index]
    assert (
        size / count < Rates().index_bytes < 4 * size / count
    )  # paths of a real source do not compress as well
    for source in Rates().sources.values():
        assert not source.startswith("benchmarks/") or (ROOT / source).is_file()


def test_decoding_takes_longer_for_larger_sides() -> None:
    rates = Rates(decode={64: 1000.0, 128: 500.0})
    assert rates.decode_seconds(32) == rates.decode_seconds(64) == 1e-3
    assert rates.decode_seconds(96) == pytest.approx(1.5e-3) and rates.decode_seconds(512) == 2e-3


def test_rates_of_a_file_and_of_options(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"machine": "H100", "gpu_macs": 4e13, "decode": {"64": 1746}}))
    found = read_rates(str(file))
    assert (
        found.machine == "H100"
        and found.sources["gpu_macs"] == str(file)
        and found.sources["cpu_macs"] == Rates().sources["cpu_macs"]
    )
    fast, slow = _plan(rates=found), _plan()
    assert _of(fast, "gpu_hours")["embed"] == pytest.approx(_of(slow, "gpu_hours")["embed"] / 10)
    assert _of(fast, "cpu_hours")["embed"] < _of(slow, "cpu_hours")["embed"]
    assert not any("assumed" in note for note in fast.notes) and any(
        "assumed" in note for note in slow.notes
    )
    said = CliRunner().invoke(
        cli,
        [
            "plan",
            str(ROOT / "jobs/configs/imagenet.yaml"),
            "--samples",
            "1000000",
            "--gpus",
            "1",
            "--forward-rate",
            "1000",
            "--json",
        ],
    )
    embed = next(stage for stage in json.loads(said.output)["stages"] if stage["stage"] == "embed")
    passes = embedding_passes(load_config(str(ROOT / "jobs/configs/imagenet.yaml")))
    # a million images at a thousand a second through several proxies, and the start
    assert embed["gpu_hours"] == pytest.approx(passes * 1000 / 3600, rel=0.01)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"gpu_mac": 1}', "'gpu_mac' is not one of cpu_macs, decision_seconds"),
        ('{"gpu_macs": 0}', "is not a rate"),
        ('{"gpu_macs": true}', "is not a rate"),
        ('{"decode": {}}', "is not a rate"),
        ('{"decode": {"x": 1}}', "is not a rate"),
        ("[]", "expected an object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_file_of_rates_that_makes_no_sense_is_refused(
    tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "rates.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_rates(str(file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples: 0"),
        ({"gpus": -1}, "gpus: -1"),
        ({"cpus": 0}, "cpus: 0"),
        ({"file_samples": 0}, "images per file: 0"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _plan(**options)


@pytest.mark.ray
def test_a_finished_run_gives_its_rates(finished: str) -> None:
    ledger = Run(finished).ledger()
    samples = ledger["index"].samples
    size = SourceSize(samples, image_bytes=64.0, file_samples=samples, classes=10)
    found = plan(small_config(finished), size, gpus=0, cpus=2, like=finished)
    for stage in ("proxy", "measure", "embed", "extrapolate"):
        took = ledger[stage].cpu_seconds
        if not took:
            continue  # another test ran the stage again, with nothing to do
        assert took / 1.3 < 3600 * _of(found, "cpu_hours")[stage] < 1.3 * took, stage
    written = {
        folder: sum(file.size for file in storage.listing(Run(finished).path(folder)))
        for folder in found.written
    }
    for folder in ("seed", "embeddings", "scores"):
        assert found.written[folder] == pytest.approx(written[folder], rel=0.1), folder
    for folder in ("proxy", "measured", "extrapolator", "index", "keep"):
        assert written[folder] / 6 < found.written[folder] < 6 * written[folder], folder
    files = {
        stage: sum(len(storage.listing(Run(finished).path(folder))) for folder in folders)
        for stage, folders in OUTPUTS.items()
    }
    for stage, count in files.items():
        assert count / 2 <= _of(found, "files")[stage] <= 2 * count, stage
    size_there = storage.info(Run(finished).path("run.json")).size
    assert size_there / 3 < found.ledger_bytes < 3 * size_there
    with pytest.raises(RunError, match="no run here"):
        plan(small_config(finished), size, like=f"{finished}/nowhere")


OUTPUTS = {
    "index": ["index"],
    "seed": ["seed"],
    "proxy": ["proxy"],
    "measure": ["measured"],
    "embed": ["embeddings"],
    "extrapolate": ["scores", "extrapolator"],
}
OUTPUTS |= {"select": ["keep"], "report": ["report"]}


# -- the command ---------------------------------------------------------------------------


def _blocks() -> list[tuple[str, str]]:
    """Commands and their outputs in docs/guides/cluster.md."""
    text = (ROOT / "docs" / "guides" / "cluster.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n\$ (raypipe plan .*?[^\\])\n(.*?)```", text, re.S)
    return [(re.sub(r"\\\n\s*", "", command), output) for command, output in blocks]


def test_the_commands_of_the_page_print_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    samples = []
    for command, expected in _blocks():
        words, _, only = command.partition(" | ")
        done = CliRunner().invoke(cli, words.split()[1:])
        assert done.exit_code == 0, done.output
        shown = done.output
        if only:
            assert only == "sed -n '/^bound/,/^breaks/p'"
            shown = re.search(r"^bound.*?^breaks[^\n]*\n", shown, re.S | re.M)[0]  # type: ignore[index]
        assert shown == expected, command
        samples.append(int(re.search(r"--samples (\d+)", words)[1]))  # type: ignore[index]
    assert {1_281_167, 100_000_000, 10_000_000_000} <= set(samples)


def test_it_answers_at_once_without_ray_or_torch() -> None:
    code = (
        "import sys; from raypipe.cli import cli; cli(sys.argv[1:], standalone_mode=False); "
        "heavy = ('ray', 'torch', 'faiss', 'matplotlib', 'sklearn'); "
        "print(sorted(name for name in heavy if name in sys.modules))"
    )
    config = str(ROOT / "jobs" / "configs" / "imagenet.yaml")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", config, "--samples", "10000000000", "--gpus", "64"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
    assert after.ru_utime - before.ru_utime < 2, (
        "processor seconds; wall-clock seconds depend on what else the machine does"
    )


def test_json_has_everything_and_every_option_is_used() -> None:
    config = str(ROOT / "jobs" / "configs" / "places365.yaml")
    base = [config, "--samples", "1800000", "--json"]
    plain = json.loads(CliRunner().invoke(cli, ["plan", *base]).output)
    assert {
        "stages",
        "written",
        "index_bytes",
        "ledger_bytes",
        "driver_bytes",
        "dollars",
        "bounds",
        "rates",
        "total",
    } <= set(plain)
    options = [
        "--gpus=2",
        "--cpus=99",
        "--image-bytes=5",
        "--images-per-file=7",
        "--classes=5",
        "--decode-rate=1",
        "--forward-rate=1",
    ]
    options += [
        "--gpu-price=1",
        "--cpu-price=1",
        "--request-price=1",
        "--storage-price=1",
        "--set=seed.fraction=0.2",
    ]
    for option in options:
        with_gpu = ["--gpus=2"] if "forward" in option else []
        other = CliRunner().invoke(cli, ["plan", *base, *with_gpu, option]).output
        assert json.loads(other) != json.loads(
            CliRunner().invoke(cli, ["plan", *base, *with_gpu]).output
        ), option
    refused = CliRunner().invoke(cli, ["plan", config, "--samples", "10", "--image-bytes", "0"])
    assert isinstance(refused.exception, ConfigError)
