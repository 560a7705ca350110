"""The pilot: its trainings, its choice for every fraction, and that a killed pilot resumes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import serial
import torch
from helpers import QUIET

from raypipe import storage
from raypipe.config import Config, SelectSettings, parse_config
from raypipe.distributed.cluster import Cluster
from raypipe.distributed.context import Context
from raypipe.errors import ConfigError
from raypipe.runs.keep_files import keep_metadata
from raypipe.runs.ledger import StageRecord
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.pilot import RANDOM, Pilot, PilotCell, PilotPlan
from raypipe.runs.run import Run
from raypipe.runs.seed_shards import audit_name, shard_table
from raypipe.selection import SelectionOptions
from raypipe.stages.pilot import stage as pilot_stage
from raypipe.stages.pilot.plan import make_plan, plan_seconds
from raypipe.stages.pilot.samples import ListRule, collect_samples, halved
from raypipe.stages.pilot.stage import PilotStage
from raypipe.stages.pilot.trial import rows_of_list
from raypipe.stages.select.stage import make_keep_lists
from raypipe.vision.network_costs import training_seconds

SIZE = 8
SETTINGS: dict[str, Any] = {
    "source": {"uri": "memory"},
    "proxy": {
        "model": "small",
        "image_size": SIZE,
        "epochs": 50,
        "batch_size": 16,
        "flip": False,
        "crop_padding": 0,
    },
    "pilot": {
        "budget": 50,
        "candidates": [{"ccs": {"strata": 1}}],
        "keep": [0.3, 0.6],
        "max_repeats": 3,
        "epochs": 2,
        "batch_size": 16,
    },
}


def hard_minority(count: int, draw: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Images, labels, and whether a sample is of a rare kind.

    Bright spots at four places: two belong to each class, a frequent and a rare one. Without rare
    samples a network cannot know their class.
    """
    label, rare = draw.integers(0, 2, count), draw.random(count) < 0.3
    images = draw.normal(60, 10, (count, 3, SIZE, SIZE))
    place = 2 * label + rare
    for row in range(count):
        top, left = divmod(int(place[row]), 2)
        images[row, :, 4 * top : 4 * top + 4, 4 * left : 4 * left + 4] += 120
    return np.clip(images, 0, 255).astype(np.uint8), label, rare


def write_run(folder: Path, seed: int = 200, audit: int = 120, **sections: Any) -> Config:
    """A run up to its scores, two shards of the seed set; rare samples have the highest losses."""
    config = parse_config(
        {
            "run": str(folder),
            **SETTINGS,
            **{k: {**SETTINGS.get(k, {}), **v} for k, v in sections.items()},
        }
    )
    run, draw = Run(config.run), np.random.default_rng(0)
    run.write_config(config)
    storage.write_json(run.classes_file, {"names": ["a", "b"], "numeric": False})
    ids, labels, scores = list[str](), [], []
    for shard in ("seed-000000", "seed-000001"):
        for name, count in ((shard, seed // 2), (audit_name(shard), audit // 2)):
            images, label, rare = hard_minority(count, draw)
            own = [f"{name}/{row}" for row in range(count)]
            storage.write_table(
                run.seed_shard(name), shard_table(own, label.tolist(), images, 2, SIZE)
            )
            ids += own
            labels.append(label)
            scores.append(rare + draw.random(count))
    SeedManifest.from_shards(run, ("seed-000000", "seed-000001"), 0.1).write(run)
    ids += [f"rest/{row}" for row in range(1000)]
    labels.append(draw.integers(0, 2, 1000))
    scores.append(draw.random(1000))
    label, score = np.concatenate(labels), np.concatenate(scores).astype(np.float32)
    order = draw.permutation(len(ids))
    columns = {
        "sample_id": pa.array([ids[row] for row in order]),
        "label": pa.array(label[order], pa.int32()),
        "score": pa.array(score[order]),
    }
    storage.write_table(run.score_shard("f"), pa.table(columns))
    storage.write_table(
        run.embedding_shard("f"),
        pa.table({"sample_id": columns["sample_id"], "loss": columns["score"]}),
    )
    detail = {"score": "loss", "measured": len(ids)}
    records = {"extrapolate": StageRecord("done", "x", samples=len(ids), detail=detail)}
    run.write_ledger(records)
    return config


def execute(config: Config) -> Pilot:
    """Run the stage in this process."""
    run, record = Run(config.run), StageRecord(fingerprint="f")
    PilotStage().execute(Context(config, run, QUIET), record)
    pilot = Pilot.read(run)
    assert pilot is not None and PilotStage().complete(Context(config, run, QUIET), record)
    return pilot


@contextlib.contextmanager
def in_this_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raypipe.distributed.tasks.run_tasks", serial.run_tasks)
        patch.setattr(Context, "cluster", Cluster(2.0, 0.0, 1, 2.0, False))
        yield


@pytest.fixture(scope="module", autouse=True)
def without_ray() -> Iterator[None]:
    with in_this_process():
        yield


@pytest.fixture(scope="module")
def piloted(tmp_path_factory: pytest.TempPathFactory, without_ray: None) -> Config:
    """A run whose pilot has finished; tests share it."""
    config = write_run(tmp_path_factory.mktemp("piloted") / "run")
    execute(config)
    return config


def test_where_pruning_hurts_the_run_says_so_and_hands_out_random_lists(piloted: Config) -> None:
    """100 images of each of two classes; the hardest are the only ones of their kind."""
    config, run = piloted, Run(piloted.run)
    pilot = Pilot.read(run)
    assert pilot is not None
    assert pilot.plan.samples == 200 and pilot.plan.tested == 120 and pilot.plan.repeats == 3
    gain = pilot.gains(0.3, 2000)["ccs, strata 1"]
    assert gain.mean < -0.05
    written = make_keep_lists(run, config.select.model_copy(update={"keep": (0.3, 0.6)}))
    for fraction in ("0.30", "0.60"):
        about = keep_metadata(run.keep_list(f"keep-{fraction}.parquet"))
        assert about["strategy"] == "random" and json.loads(about["options"])["by_class"]
        assert about["chosen"] == "auto" and about["reason"].startswith("random within classes: ")
        assert "ccs, strata 1 at -" in about["reason"]
    assert written.chosen["keep-0.30.parquet"]["strategy"] == "random"
    assert written.ledger_detail()["strategy"] == "auto"
    # an explicit strategy is as before
    make_keep_lists(run, SelectSettings(strategy="ccs", keep=(0.3,)))
    about = keep_metadata(run.keep_list("keep-0.30.parquet"))
    assert about["strategy"] == "ccs" and "chosen" not in about


def test_a_strategy_that_helps_is_taken(tmp_path: Path) -> None:
    """With made-up results: three repeats, 2,000 test samples, 30 points per share pruned."""
    config = write_run(tmp_path / "run")
    run, name = Run(config.run), "ccs, strata 1"
    cells = tuple(
        PilotCell(keep, size, round(keep * size * 200)) for size in (1, 0.5) for keep in (0.3, 0.6)
    )
    settings = {"strategy": "ccs", "strata": 1}
    plan = PilotPlan(((name, settings),), cells, 3, 200, 2000, 2, SIZE)
    draw = np.random.default_rng(0)
    rate = np.array([0.3 * (1 - cell.keep) for cell in cells])[:, None, None]
    correct = {
        RANDOM: draw.random((4, 3, 2000)) < 0.5,
        name: draw.random((4, 3, 2000)) < 0.5 + rate,
    }
    Pilot(plan, correct).write(run)
    make_keep_lists(run, config.select.model_copy(update={"keep": (0.3,)}))
    about = keep_metadata(run.keep_list("keep-0.30.parquet"))
    assert about["strategy"] == "ccs" and json.loads(about["options"])["strata"] == 1
    assert about["reason"].startswith("the pilot predicts ccs, strata 1 at +")
    # not with scores that are not trusted, unless forced
    record = run.ledger()["extrapolate"]
    record.detail = {**record.detail, "measured": 0, "fidelity": {"spearman": 0.1}}
    run.write_ledger({"extrapolate": record})
    make_keep_lists(run, config.select.model_copy(update={"keep": (0.3,)}))
    about = keep_metadata(run.keep_list("keep-0.30.parquet"))
    assert about["strategy"] == "random" and "Spearman" in about["reason"]
    forced = config.select.model_copy(update={"force": True})
    make_keep_lists(run, forced.model_copy(update={"keep": (0.3,)}))
    assert keep_metadata(run.keep_list("keep-0.30.parquet"))["strategy"] == "ccs"


def test_without_a_pilot_lists_are_random_within_classes(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run")
    run = Run(config.run)
    make_keep_lists(run, config.select.model_copy(update={"keep": (0.5,)}))
    about = keep_metadata(run.keep_list("keep-0.50.parquet"))
    assert about["strategy"] == "random" and about["reason"] == "random within classes: no pilot"
    record = run.ledger()["extrapolate"]
    record.detail = {"tables": {"embeddings": "x"}}
    run.write_ledger({"extrapolate": record})
    with pytest.raises(ConfigError, match="name a strategy"):
        make_keep_lists(run, config.select.model_copy(update={"keep": (0.5,)}))


def _run_and_wait(config: Config) -> None:
    """Run the stage, slowly after some trainings. For a process that is killed."""
    torch.set_num_threads(1)
    function = pilot_stage.run_trial

    def slow(*arguments: Any) -> Any:
        if len(storage.names(Run(config.run).pilot_trainings_folder)) >= 7:
            time.sleep(60)
        return function(*arguments)

    pilot_stage.run_trial = slow  # type: ignore[assignment]
    with in_this_process():
        execute(config)


def test_a_killed_pilot_resumes_and_chooses_the_same(tmp_path: Path, piloted: Config) -> None:
    """SIGKILL of the process in the eighth training; no finished training is repeated."""
    config = write_run(tmp_path / "killed")
    run = Run(config.run)
    # not a fork: this process may be too large for one
    process = multiprocessing.get_context("spawn").Process(target=_run_and_wait, args=(config,))
    process.start()
    deadline = time.monotonic() + 120
    while len(storage.names(run.pilot_trainings_folder)) < 7 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    stamps = {item.path: item.stamp for item in storage.listing(run.pilot_trainings_folder)}
    assert len(stamps) == 7 and not storage.exists(run.pilot_result)
    execute(config)
    after = {item.path: item.stamp for item in storage.listing(run.pilot_trainings_folder)}
    assert len(after) == 24 and {name: after[name] for name in stamps} == stamps
    assert storage.read_bytes(run.pilot_result) == storage.read_bytes(Run(piloted.run).pilot_result)


def test_lists_are_drawn_by_id_and_repeat_and_have_the_same_size(tmp_path: Path) -> None:
    config = write_run(tmp_path / "run")
    rules = {
        "random": ListRule("random", SelectionOptions(by_class=True)),
        "ccs": ListRule("ccs", SelectionOptions(by_class=True, strata=1)),
    }
    samples = collect_samples(config, Run(config.run), rules.values())
    assert (
        len(samples.ids) == 320 and set(samples.labels) == {0, 1} and int(samples.test.sum()) == 120
    )
    assert np.isfinite(samples.score[~samples.test]).all()
    shuffled = samples.take(np.random.default_rng(1).permutation(320))
    whole, half = PilotCell(0.3, 1.0, 60), PilotCell(0.3, 0.5, 30)
    lists: dict[Any, set[str]] = {}
    for name, rule in rules.items():
        for cell in (whole, half):
            for repeat in range(3):
                ids = [
                    set(
                        given.ids.take(
                            pa.array(rows_of_list(given, rule, cell, 2, 0, repeat))
                        ).to_pylist()
                    )
                    for given in (samples, shuffled)
                ]
                assert ids[0] == ids[1] and len(ids[0]) == cell.samples
                assert not any(name.startswith("audit") for name in ids[0])
                lists[name, cell.size, repeat] = ids[0]
    assert len({frozenset(ids) for ids in lists.values()}) == 12
    hardest = set(samples.ids.filter(pa.array(samples.score > 1.2)).to_pylist())
    assert hardest & lists["random", 1.0, 0] and not hardest & lists["ccs", 1.0, 0]


def test_the_budget_decides_how_many_trainings_there_are() -> None:
    def plan(samples: int = 2000, tested: int = 200, classes: int = 10, **pilot: Any) -> PilotPlan:
        config = parse_config(
            {"run": "x", "source": {"uri": "x"}, "pilot": pilot, "seed": {"fraction": 0.2}}
        )
        return make_plan(config, samples, samples, tested, classes, 32)

    usual, more = plan(), plan(budget=1.0)
    assert len(usual.candidates) == 3 and 3 <= usual.repeats < more.repeats <= 12
    settings = parse_config({"run": "x", "source": {"uri": "x"}}).pilot
    proxies = training_seconds("resnet18", 64, 50 * 2000, 50 * 2000 / 128)
    for budget, found in ((0.5, usual), (1.0, more)):
        assert 0.6 * budget * proxies < plan_seconds(settings, found) <= 1.001 * budget * proxies
    few = plan(budget=0.3)
    assert 0 < len(few.candidates) < 3 and few.repeats >= 3 and "beta" in few.note
    none = plan(budget=0.01)
    assert not none.repeats and not none.trials() and "too few trainings" in none.note
    allowed = float(none.note.partition("pilot.budget to ")[2].split()[0])
    assert plan(budget=allowed).repeats == 3 and not plan(budget=0.8 * allowed).repeats
    assert "seed.audit" in plan(tested=30).note
    assert "seed.fraction" in plan(samples=60).note
    # a line through gains cannot be fitted to lists of everything
    assert "pilot.keep" in plan(keep=1, sizes=[0.3, 0.6, 1]).note
    assert "seed.fraction" in plan(samples=130, keep=[0.3, 1], sizes=[0.3, 0.5, 1]).note
    assert plan(keep=[0.5, 1], budget=1.0).repeats >= 3
    assert PilotPlan.from_json(json.loads(json.dumps(usual.as_json()))) == usual
    assert len({trial.name for trial in usual.trials()}) == 4 * 6 * usual.repeats


def test_images_are_halved_to_the_size_of_the_pilot() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), dtype=np.uint8)
    small = halved(images, 20)
    assert small.shape == (3, 3, 16, 16) and small.dtype == np.uint8
    plain = images.reshape(3, 3, 16, 4, 16, 4).astype(float).mean((3, 5))
    assert np.abs(small - plain).max() <= 1
    assert halved(images[..., :63, :63], 20).shape[-1] == 63


@pytest.mark.parametrize(
    ("pilot", "message"),
    [
        ({"candidates": [{"ccs": {"stratum": 1}}]}, "stratum"),
        ({"candidates": [{"ccs": {"strata": 0}}]}, "strata"),
        ({"candidates": ["random"]}, "candidates"),
        ({"candidates": ["ccs", "ccs"]}, "twice"),
        ({"candidates": [{"ccs": {"hard_cutoff": 0.5}}]}, "hard_cutoff"),
        ({"model": "vgg"}, "model"),
    ],
)
def test_wrong_settings_are_refused(pilot: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"run": "x", "source": {"uri": "x"}, "pilot": pilot})


def test_a_run_has_a_pilot_where_it_decides_something() -> None:
    def pilots(**sections: Any) -> bool:
        return parse_config({"run": "x", "source": {"uri": "x"}, **sections}).pilots

    assert pilots() and not pilots(select={"strategy": "ccs"})
    assert pilots(select={"strategy": "ccs"}, pilot={"enabled": True})
    assert not pilots(pilot={"enabled": False})
    unlabelled = {"source": {"uri": "x", "label_column": None}, "pseudo_labels": {"clusters": 5}}
    assert not pilots(**unlabelled)
    with pytest.raises(ConfigError, match=r"pilot\.enabled"):
        pilots(**unlabelled, pilot={"enabled": True})
