"""Trainings and what their names depend on, settings, the copy of the images on a node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers import small_config

from raypipe import storage
from raypipe.config import parse_settings
from raypipe.config.evaluate import EvaluateSettings
from raypipe.errors import ConfigError, ResourceError
from raypipe.evaluation import decoded
from raypipe.evaluation.held_out import source_of_test_set
from raypipe.evaluation.lists import FULL, RANDOM, ListedSamples, SamplePool
from raypipe.evaluation.summary import Results, _untrained
from raypipe.evaluation.trainings import recipe_of, trainings_of

POOL = SamplePool((("f", 100),), np.zeros(100, np.int64), np.arange(100), "digest")


def _lists() -> list[ListedSamples]:
    rows = np.arange(30)
    return [
        ListedSamples(FULL, 1.0, np.arange(100)),
        *(ListedSamples(RANDOM, 0.3, rows + seed, draw=seed) for seed in range(2)),
        ListedSamples("a, top", 0.3, rows + 50, "run", "a", "top"),
        ListedSamples("a, moderate", 0.3, rows + 50, "run", "a", "moderate"),
    ]


def _names(
    config: Any = None, data: str = "data", gpu: bool = False, **changed: Any
) -> dict[tuple[str, int], str]:
    settings = EvaluateSettings(**{"seeds": 2, "epochs": 3, **changed})
    config = config or small_config("run")
    found = trainings_of(
        _lists(), POOL, recipe_of(config, settings, len(POOL)), settings, data, gpu
    )
    return {(item.listed.name, item.seed): item.name for item in found}


def test_a_random_list_is_for_the_seed_it_was_drawn_for() -> None:
    names = _names()
    assert set(names) == {
        (name, seed) for name in (FULL, RANDOM, "a, top", "a, moderate") for seed in range(2)
    }
    # equal rows are one training, whatever the list is called
    assert len(set(names.values())) == 6 and names["a, top", 1] == names["a, moderate", 1]


def test_a_name_depends_on_all_that_determines_the_training() -> None:
    names = set(_names().values())
    assert names == set(_names(keep=[0.3]).values()) == set(_names(cpus_per_training=2).values())
    for other in (
        _names(epochs=4),
        _names(lr=0.5),
        _names(model="resnet18"),
        _names(batch_size=8),
        _names(data="new"),
        _names(gpu=True),
        _names(attack=True),
    ):
        assert not names & set(other.values())
    scored = small_config("run", "proxy.checkpoints=1", "proxy.seed=5", "proxy.parts=2")
    assert names == set(_names(scored).values())
    # an attack in the proxy's training matters only to an evaluation under attack
    adversarial = small_config("run", "proxy.adversary={eps: 4/255}")
    assert names == set(_names(adversarial).values())
    assert not set(_names(attack=True).values()) & set(_names(adversarial, attack=True).values())
    # with as many steps for all, those on everything are the same
    steps = _names(protocol="steps")
    assert steps[FULL, 0] == _names()[FULL, 0] and steps["a, top", 0] != _names()["a, top", 0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"keep": [1.5]}, "keep.0: 1.5"),
        ({"strategies": ["random"]}, "strategies.0"),
        ({"scores": ["el2n"]}, "'el2n' is neither run nor measured:NAME"),
        ({"model": "vgg"}, "'vgg' is not one of"),
        ({"protocol": "time"}, "protocol: 'time'"),
        ({"epoch": 3}, "epoch: unknown setting; did you mean 'epochs'"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match="bad settings of evaluate") as error:
        parse_settings(EvaluateSettings, change, "evaluate")
    assert expected in str(error.value)


def test_every_setting_has_a_description_and_single_values_are_lists() -> None:
    assert all(field.description for field in EvaluateSettings.model_fields.values())
    given = EvaluateSettings.model_validate(
        {"keep": 0.5, "strategies": "top", "beside": "s3://b/run"}
    )
    assert (given.keep, given.strategies, given.beside) == ((0.5,), ("top",), ("s3://b/run",))


def test_the_test_set_is_read_as_the_source_is(tmp_path: Path) -> None:
    config = small_config("run", "source.label_column=digit", "source.include=train-*")
    storage.write_table(f"{tmp_path}/test-0.parquet", pa.table({"image": [b"x"], "digit": [1]}))
    found = source_of_test_set(config, str(tmp_path), ["include=test-*"])
    assert (found.format, found.label_column, found.include, found.limit) == (
        "auto",
        "digit",
        "test-*",
        None,
    )
    own = source_of_test_set(config, "digits://", [])
    assert (own.format, own.label_column) == ("digits", "auto"), "digits have no such column"


def test_images_that_do_not_fit_are_refused_with_what_would() -> None:
    decoded.check_room(1000, 32, 4e6)
    with pytest.raises(
        ResourceError,
        match=r"all 1,000,000 images.* at 224 pixels.*140\.2 GiB.*16\.0 GiB of memory.*image_size",
    ):
        decoded.check_room(1_000_000, 224, 16 * 2**30)


def test_a_node_has_what_the_parts_hold_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded.tempfile, "gettempdir", lambda: str(tmp_path))
    random = np.random.default_rng(0)
    counts = ((3, 0, 2), (4,))
    images = {
        part: random.integers(0, 256, (sum(of), 3, 4, 4), dtype=np.uint8)
        for part, of in zip(("train", "test"), counts)
    }
    labels = {part: random.integers(0, 9, len(of)) for part, of in images.items()}
    for part, of in zip(("train", "test"), counts):
        ends = np.cumsum(of)
        for number, (start, stop) in enumerate(zip(ends - of, ends)):
            decoded._write(
                f"{tmp_path}/parts/{part}-{number:06d}.parquet",
                images[part][start:stop],
                labels[part][start:stop],
                np.arange(start, stop, dtype=np.uint64) if part == "train" else None,
            )
    copy = decoded.NodeCopy("run", f"{tmp_path}/parts", "key", 4, counts)
    found = copy.open()
    assert np.array_equal(found.images, images["train"]) and np.array_equal(
        found.test_images, images["test"]
    )
    assert np.array_equal(found.labels, labels["train"]) and np.array_equal(
        found.test_labels, labels["test"]
    )
    assert found.keys.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(
        found.statistics[0], images["train"].mean((0, 2, 3)) / 255, rtol=1e-5
    )
    for part in (tmp_path / "parts").iterdir():
        part.unlink()
    assert np.array_equal(copy.open().labels, labels["train"])  # it is not filled again
    copy.remove()
    assert {path.name for path in tmp_path.iterdir()} == {"parts"}


@pytest.mark.parametrize(
    "by_class, trained", [([0.34, 0.33, 0.33], False), ([0.9, 0.2, None], True)]
)
def test_it_is_said_when_no_training_learned_anything(
    by_class: list[float | None], trained: bool
) -> None:
    settings = EvaluateSettings(seeds=2, epochs=3)
    found = trainings_of(
        _lists(), POOL, recipe_of(small_config("run"), settings, len(POOL)), settings, "data", False
    )
    full = [item for item in found if item.listed.name == FULL]
    results = Results(full, {item.name: {"per_class": by_class} for item in full})
    warning = _untrained(results, 600)
    assert (warning == "") == trained
    assert (
        trained or "accuracy over classes 33 %, chance 33 %), so no list can be judged" in warning
    )
