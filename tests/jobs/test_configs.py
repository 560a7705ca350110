"""The configurations in jobs/configs/ are valid, and their comments are true."""

from __future__ import annotations

from pathlib import Path

import pytest

from raypipe.config import demo_settings, load_config, parse_config
from raypipe.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[2] / "jobs" / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))


def test_every_dataset_has_one() -> None:
    assert [path.stem for path in CONFIGS] == ["cifar10", "digits", "imagenet", "places365"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_is_valid(path: Path) -> None:
    config = load_config(str(path))
    assert config.source.uri and config.run
    assert config.run.rstrip("/").endswith(path.stem)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_is_commented_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    header = text.split("\nrun:")[0]
    assert all(line.startswith("#") or not line for line in header.splitlines())
    assert f"jobs/configs/{path.name}" in header
    assert text.count("#") > 8


@pytest.mark.parametrize("name", ["imagenet", "places365"])
def test_cluster_configurations_leave_nothing_to_a_cluster_without_workers(name: str) -> None:
    config = load_config(str(FOLDER / f"{name}.yaml"))
    assert config.run.startswith("s3://") and config.source.uri.startswith("s3://")
    assert (
        config.proxy.use_gpu is True
        and config.measure.use_gpu is True
        and config.embed.use_gpu is True
    )
    assert isinstance(config.proxy.cpus_per_worker, int)
    for pool in (config.measure, config.embed, config.extrapolate):
        assert isinstance(pool.max_actors, int), pool
    assert config.proxy.max_failures > config.proxy.workers


def test_digits_is_the_demo() -> None:
    config = load_config(str(FOLDER / "digits.yaml"))
    assert config == parse_config({"run": config.run, **demo_settings()})


def test_rehearsal_of_cifar10_as_its_comment_says() -> None:
    config = load_config(
        str(FOLDER / "cifar10.yaml"), ["source.uri=/data/cifar10", "source.limit=10000"]
    )
    assert (config.source.uri, config.source.limit, config.source.include) == (
        "/data/cifar10",
        10_000,
        "train-*",
    )
    assert load_config(str(FOLDER / "cifar10.yaml")).source.limit is None


def test_a_misspelt_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"proxy\.epoch: unknown setting; did you mean 'epochs'"):
        load_config(str(FOLDER / "digits.yaml"), ["proxy.epoch=3"])
