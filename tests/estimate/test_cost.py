"""The estimate of a run, compared with what one took."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers import small_config

import raypipe
from raypipe import storage
from raypipe.config import Config, SourceSettings, parse_config
from raypipe.errors import RunError
from raypipe.estimate import Survey, inspect_source, rates
from raypipe.estimate.cost import Machine, estimate
from raypipe.estimate.facts import CostEstimate
from raypipe.estimate.inspect_text import describe_cost
from raypipe.estimate.plan import SourceSize, plan
from raypipe.runs.run import Run
from raypipe.sources.id_sampling import in_sample, part_rule
from raypipe.text import duration_range
from raypipe.vision import network_costs

LAPTOP = Machine(4, 0, "a laptop")


@pytest.fixture(scope="module")
def digits() -> Survey:
    return inspect_source(SourceSettings(uri="digits://")).survey


def _config(**sections: object) -> Config:
    """Of a run with one proxy whose score, MoSo, is extrapolated."""
    proxy = {"parts": 1, "epochs": 50, **sections.pop("proxy", {})}  # type: ignore[dict-item]
    measure = {"scores": ["moso"], **sections.pop("measure", {})}  # type: ignore[dict-item]
    source = {"uri": "digits://"}
    return parse_config(
        {"run": "r", "source": source, **sections, "proxy": proxy, "measure": measure}
    )


def _cpu(cost: CostEstimate) -> dict[str, float]:
    return {stage.stage: stage.cpu_seconds for stage in cost.stages}


@pytest.mark.ray
def test_the_estimate_is_within_a_factor_of_four_of_a_run(
    finished: str, finished_ledger: str
) -> None:
    ledger = Run(finished_ledger).ledger()
    cost = raypipe.inspect(config=small_config(finished), cpus=2, gpus=0).cost
    assert cost is not None
    took = sum(record.cpu_seconds for record in ledger.values())
    assert took / 4 < 3600 * cost.cpu_hours < 4 * took
    # wall-clock seconds are for an idle machine: other work makes a run longer, never shorter
    assert took / 2 < cost.high and cost.low / 4 < sum(
        record.wall_seconds for record in ledger.values()
    )
    assert abs(cost.seed_samples - ledger["seed"].samples) < 0.2 * ledger["seed"].samples
    written = {
        folder: sum(file.size for file in storage.listing(Run(finished).path(folder)))
        for folder in cost.bytes_written
    }
    assert written["seed"] < 5 * cost.bytes_written["seed"]  # digits compress well
    for folder in ("proxy", "measured", "embeddings", "scores"):
        assert written[folder] / 3 < cost.bytes_written[folder] < 3 * written[folder], folder


@pytest.mark.ray
def test_a_run_of_the_past_is_scaled_stage_by_stage(finished_ledger: str, digits: Survey) -> None:
    config, ledger = small_config(finished_ledger), Run(finished_ledger).ledger()
    same = _cpu(estimate(digits, config, LAPTOP, like=finished_ledger))
    for stage in ("proxy", "measure", "embed", "extrapolate"):
        took = ledger[stage].cpu_seconds  # an estimate is given to a tenth of a second
        assert took / 1.3 - 0.05 < same[stage] < took * 1.3 + 0.05, stage
    longer = _cpu(
        estimate(
            digits, small_config(finished_ledger, "proxy.epochs=400"), LAPTOP, like=finished_ledger
        )
    )
    stated = [
        _cpu(estimate(digits, small_config(finished_ledger, f"proxy.epochs={epochs}"), LAPTOP))[
            "proxy"
        ]
        for epochs in (4, 400)
    ]
    assert longer["proxy"] / same["proxy"] == pytest.approx(
        stated[1] / stated[0], rel=0.3
    )  # figures are rounded
    assert longer["embed"] == same["embed"]
    # what ran on CPUs says nothing about a GPU
    on_gpu = estimate(digits, config, Machine(4, 1, "a machine"), like=finished_ledger)
    assert any("constants for proxy, measure, embed" in sentence for sentence in on_gpu.basis)
    with pytest.raises(RunError, match="no run here"):
        estimate(digits, config, LAPTOP, like=f"{finished_ledger}/nowhere")


def test_parts_that_get_too_few_samples_are_foreseen(digits: Survey) -> None:
    def warned(samples: int, fraction: float = 0.1, parts: int = 3) -> str:
        settings = _config(seed={"fraction": fraction}, proxy={"parts": parts})
        cost = estimate(dataclasses.replace(digits, samples=samples), settings, LAPTOP)
        lines = [line for line in describe_cost(cost) if line.startswith("WARNING     a run stops")]
        return "".join(lines)

    assert warned(1797) == ""
    line = warned(750)  # 25 in each part
    assert "each of the 3 parts of the seed set needs 20 samples of 2 classes" in line
    assert "Raise seed.fraction to 0.14 or more, or lower proxy.parts" in line
    assert warned(750, fraction=0.14) == warned(750, parts=1) == ""
    assert "the seed set needs 20" in warned(200, parts=1)
    assert "too few samples" in warned(18)
    assert "a run stops" in plan(_config(proxy={"parts": 3}), SourceSize(750)).notes[0]
    # the rules that draw and divide the seed set fail as often as stated
    drawn, part = in_sample(0.1, 0), part_rule(3, 0)
    sizes = [
        np.bincount([part(i) for i in map(f"{run}-{{}}".format, range(750)) if drawn(i)])
        for run in range(300)
    ]
    stated = float(line.partition("chance of ")[2].split()[0]) / 100
    assert np.mean([min(size) < 20 for size in sizes]) == pytest.approx(stated, abs=0.1)


def test_too_few_steps_are_foreseen(digits: Survey) -> None:
    proxy = {"epochs": 10, "parts": 3}
    cost = estimate(digits, _config(seed={"fraction": 0.1}, proxy=proxy), LAPTOP)
    (line,) = [line for line in describe_cost(cost) if line.startswith("WARNING")]
    assert "each proxy is trained for 10 steps only (10 epochs over 60 samples)" in line
    few, auto = (
        plan(_config(proxy={"epochs": epochs}), SourceSize(1000)) for epochs in (10, "auto")
    )
    assert "steps only" in few.notes[0] and not any("steps only" in note for note in auto.notes)
    hours = {stage.stage: stage.cpu_hours for stage in auto.stages}["proxy"]
    assert hours > 20 * {stage.stage: stage.cpu_hours for stage in few.stages}["proxy"]


@pytest.mark.ray
def test_a_cluster_is_asked_only_for_an_address(cluster: str) -> None:
    import ray

    cost = raypipe.inspect("digits://", address=cluster).cost
    assert cost is not None and cost.machine.startswith(
        f"the cluster at {cluster}: {ray.cluster_resources()['CPU']:g} CPU"
    )
    assert ray.is_initialized()  # the one of the tests is not shut down


def test_cost_follows_what_the_settings_ask_for(digits: Survey) -> None:
    plain = _cpu(estimate(digits, _config(), LAPTOP))
    assert (
        _cpu(estimate(digits, _config(proxy={"epochs": 200}), LAPTOP))["proxy"] > 3 * plain["proxy"]
    )
    attacked = _cpu(estimate(digits, _config(proxy={"adversary": {}}), LAPTOP))
    assert attacked["proxy"] > 3 * plain["proxy"] and attacked["measure"] > 3 * plain["measure"]
    assert (
        _cpu(estimate(digits, _config(measure={"scores": ["el2n"]}), LAPTOP))["measure"]
        < 0.2 * plain["measure"]
    )
    assert (
        _cpu(estimate(digits, _config(measure={"moso": {"gradient": "head"}}), LAPTOP))["measure"]
        < plain["measure"]
    )
    assert (
        _cpu(estimate(digits, _config(extrapolate={"method": "knn"}), LAPTOP))["extrapolate"]
        < plain["extrapolate"]
    )
    half = estimate(digits, _config(source={"uri": "digits://", "limit": 900}), LAPTOP)
    assert half.samples == 900 and _cpu(half)["embed"] < 0.7 * plain["embed"]
    larger = dataclasses.replace(
        digits, samples=100 * digits.samples, bytes=100 * digits.bytes, fragments=200
    )
    assert _cpu(estimate(larger, _config(), LAPTOP))["embed"] > 50 * plain["embed"]


def test_cross_fitting_costs_passes_but_no_training(digits: Survey) -> None:
    one = _cpu(estimate(digits, _config(), LAPTOP))
    three = _cpu(estimate(digits, _config(proxy={"parts": 3}), LAPTOP))
    assert three["proxy"] < 1.5 * one["proxy"]
    assert 1.5 * one["embed"] < three["embed"] < 3 * one["embed"]
    direct = _config(proxy={"parts": 3}, measure={"scores": ["loss"]})
    found = _cpu(estimate(digits, direct, LAPTOP))
    assert found["measure"] < 0.2 * three["measure"]
    assert found["extrapolate"] < 0.5 * three["extrapolate"]


@pytest.mark.parametrize("parts", [1, 3])
def test_repeats_cost_training_measuring_and_passes_again(digits: Survey, parts: int) -> None:
    once, twice = (
        estimate(digits, _config(proxy={"parts": parts, "repeats": repeats}), LAPTOP)
        for repeats in (1, 2)
    )
    for stage in ("proxy", "measure", "embed"):
        assert 1.2 * _cpu(once)[stage] < _cpu(twice)[stage] < 2.1 * _cpu(once)[stage], stage
    before, after = once.bytes_written, twice.bytes_written
    assert after["proxy"] == pytest.approx(2 * before["proxy"], rel=0.01)
    # two viewers of each repeat with cross-fitting, else one; the first is in embeddings/
    width = before["embeddings"] / digits.samples
    views = {1: 0.0, 3: 4 / 3}[parts], {1: 1.0, 3: 10 / 3}[parts]
    added = (after.get("views", 0) - before.get("views", 0)) / digits.samples
    assert 0.5 * width < added / (views[1] - views[0]) < width
    assert after["embeddings"] == before["embeddings"]


def test_more_machines_take_less_time_but_not_less_work(digits: Survey) -> None:
    larger = dataclasses.replace(digits, samples=1_000_000, fragments=1000)
    few, many = (estimate(larger, _config(), Machine(cpus, 0, "")) for cpus in (2, 64))
    assert many.high < few.high / 2
    assert _cpu(many)["embed"] == _cpu(few)["embed"]
    gpus = estimate(larger, _config(), Machine(64, 8, ""))
    assert few.gpu_hours == 0 < gpus.gpu_hours and gpus.high < many.high
    assert any(
        "GPU rates are assumed to be about those of a T4" in sentence for sentence in gpus.basis
    )
    asked = estimate(larger, _config(proxy={"use_gpu": True}), LAPTOP)
    assert asked.gpu_hours == 0 and any(
        "require GPUs (proxy)" in sentence for sentence in asked.basis
    )
    assert "no GPU" in "\n".join(describe_cost(few))


def test_a_search_on_gpus_is_counted_where_there_is_one(digits: Survey) -> None:
    larger, machine = (
        dataclasses.replace(digits, samples=100_000, fragments=100),
        Machine(64, 8, ""),
    )

    def extrapolation(machine: Machine, **settings: object) -> tuple[float, float]:
        config = _config(seed={"fraction": 0.2, "audit": 0}, extrapolate=settings)
        (found,) = (
            stage
            for stage in estimate(larger, config, machine).stages
            if stage.stage == "extrapolate"
        )
        return found.cpu_seconds, found.gpu_seconds

    plain = extrapolation(machine)
    searched = extrapolation(machine, use_gpu=True)
    assert plain[1] == 0 < searched[1] and searched[0] < plain[0]
    assert extrapolation(LAPTOP, use_gpu=True) == extrapolation(LAPTOP)
    # more scored samples are searched by inverted lists, on CPUs
    assert extrapolation(machine, use_gpu=True, exact_neighbours=10_000) == extrapolation(
        machine, exact_neighbours=10_000
    )


def test_bytes_read_depend_on_how_the_format_is_read(digits: Survey) -> None:
    source = dataclasses.replace(digits, bytes=10**9, files=100)
    tar = dataclasses.replace(source, scan_reads="all", reads_singly=False)
    table = dataclasses.replace(source, scan_reads="part", reads_singly=False)
    config = _config(seed={"fraction": 0.1, "audit": 0})
    assert estimate(source, config, LAPTOP).bytes_read == {
        "index": 0,
        "seed": pytest.approx(10**8, rel=0.01),
        "embed": 10**9,
    }
    assert estimate(tar, config, LAPTOP).bytes_read == dict.fromkeys(
        ("index", "seed", "embed"), 10**9
    )
    assert estimate(table, config, LAPTOP).bytes_read == {
        "index": 6_553_600,
        "seed": 10**9,
        "embed": 10**9,
    }


@pytest.mark.parametrize(
    ("model", "size"),
    [("small", 16), ("resnet18", 32), ("resnet18", 64), ("resnet50", 128), ("resnet34", 224)],
)
def test_the_table_of_networks_is_right(model: str, size: int) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from raypipe.proxies.networks import build_network

    with torch.device("meta"):
        network = build_network(model, 10, size).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, size, size, dtype=torch.uint8, device="meta"))
    assert network_costs.macs(model, size) == pytest.approx(counter.get_total_flops() / 2, rel=0.08)
    assert rates.width(model, size) == network.head.in_features
    assert rates.PARAMETERS[model] == pytest.approx(
        sum(value.numel() for value in network.backbone.parameters()), rel=0.01
    )


def test_every_method_and_network_has_a_cost(digits: Survey) -> None:
    from raypipe.config.choices import PROXY_MODELS
    from raypipe.extrapolators import METHODS

    assert set(network_costs.MACS_PER_PIXEL) == set(rates.PARAMETERS) == set(PROXY_MODELS)
    for method in METHODS:
        assert estimate(digits, _config(extrapolate={"method": method}), LAPTOP).high > 0


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (3, 12, "3 to 12 s"),
        (50, 240, "50 s to 4 min"),
        (7200, 7300, "about 2.0 h"),
        (3e5, 3e6, "3.5 to 35 days"),
    ],
)
def test_times_are_in_units_a_person_would_use(low: float, high: float, expected: str) -> None:
    assert duration_range(low, high) == expected
