"""Settings: wrong ones are refused, naming the field, the value and what is allowed."""

from __future__ import annotations

import itertools
import math

import pytest
import yaml

from raypipe.config import (
    AdversarySettings,
    Config,
    ProxySettings,
    apply_overrides,
    commented_config,
    dump_config,
    load_config,
    parse_config,
)
from raypipe.config.proxy import MIN_STEPS
from raypipe.errors import ConfigError

LEAST = {"run": "out", "source": {"uri": "data"}}


def _message(data: dict) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(data)
    assert error.value.exit_code == 2
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"proxy": {"epochs": -3}}, ["proxy.epochs", "-3", "greater than or equal to 1"]),
        ({"proxy": {"epochs": "ten"}}, ["proxy.epochs", "'ten'", "'auto', or a number"]),
        ({"proxy": {"epoch": 3}}, ["proxy.epoch", "unknown setting", "did you mean 'epochs'"]),
        ({"proksy": {}}, ["proksy", "unknown setting", "did you mean 'proxy'"]),
        ({"proxy": {"model": "vgg"}}, ["proxy", "'vgg'", "resnet18"]),
        ({"proxy": {"epochs": 3, "checkpoints": 12}}, ["checkpoints (12)", "epochs (3)"]),
        ({"proxy": {"workers": 1.5}}, ["proxy.workers", "1.5"]),
        ({"proxy": {"parts": 0}}, ["proxy.parts", "0", "greater than or equal to 1"]),
        ({"proxy": {"normalize": "imagnet"}}, ["proxy.normalize", "'imagnet'", "'imagenet'"]),
        ({"proxy": {"normalize": 0.5}}, ["proxy.normalize", "0.5", "'half'"]),
        (
            {"proxy": {"normalize": {"mean": [0.5, 0.5, 128]}}},
            ["proxy.normalize.mean.2", "128", "proxy.normalize.std", "missing"],
        ),
        (
            {"proxy": {"normalize": {"mean": [0, 0, 0], "std": [0, 1, 1]}}},
            ["proxy.normalize.std.0", "greater than 0"],
        ),
        (
            {"proxy": {"adversary": {"eps": "8/0"}}},
            ["proxy.adversary.eps", "'8/0'", "valid number"],
        ),
        (
            {"proxy": {"adversary": {"eps": 8}}},
            ["proxy.adversary.eps", "8", "less than or equal to 1"],
        ),
        ({"proxy": {"adversary": {"steps": 3}}}, ["proxy.adversary.steps", "unknown setting"]),
        (
            {"proxy": {"adversary": {"iterations": 0}}},
            ["proxy.adversary.iterations", "0", "greater than or equal to 1"],
        ),
        ({"seed": {"fraction": 0}}, ["seed.fraction", "0", "greater than 0"]),
        (
            {"extrapolate": {"exact_neighbours": 0}},
            ["extrapolate.exact_neighbours", "0", "greater than or equal to 1"],
        ),
        ({"seed": {"fraction": float("nan")}}, ["seed.fraction", "finite"]),
        ({"select": {"keep": [0.5, 1.5]}}, ["select.keep.1", "1.5", "less than or equal to 1"]),
        ({"select": {"keep": []}}, ["select.keep"]),
        ({"select": {"strategy": "best"}}, ["select.strategy", "'best'", "'top', 'balanced'"]),
        (
            {"select": {"strategy": "ccs", "hard_cutoff": 0.2}},
            ["select", "keep (0.9)", "hard_cutoff (0.2)", "more than 1"],
        ),
        (
            {"select": {"weights": "inclusion", "strategy": "top"}},
            ["select", "weights", "random, ccs, beta", "not top"],
        ),
        (
            {"select": {"weights": "inclusion", "strategy": "random", "min_per_class": 1}},
            ["select", "min_per_class"],
        ),
        (
            {"select": {"near_duplicates": 1.5}},
            ["select.near_duplicates", "1.5", "less than or equal to 1"],
        ),
        (
            {"select": {"easy_fraction": -0.5}},
            ["select.easy_fraction", "-0.5", "greater than or equal to 0"],
        ),
        ({"seed": {"audit": -1}}, ["seed.audit", "-1", "greater than or equal to 0"]),
        (
            {"extrapolate": {"holdout": 0.3, "folds": 4}},
            ["extrapolate", "folds (4)", "holdout (0.3)"],
        ),
        (
            {"trust": {"min_spearman": 1.2}},
            ["trust.min_spearman", "1.2", "less than or equal to 1"],
        ),
        (
            {"extrapolate": {"method": "gnn-published", "use_gpu": True}},
            ["extrapolate", "use_gpu: gnn-published"],
        ),
        ({"extrapolate": {"method": "gat"}}, ["extrapolate.method", "'gat'", "'gnn-published'"]),
        (
            {"embed": {"min_actors": 4, "max_actors": 2}},
            ["embed", "max_actors (2)", "min_actors (4)"],
        ),
        ({"source": {}}, ["source.uri", "required"]),
        ({"source": {"uri": "x", "inject_noise": 1}}, ["source.inject_noise", "1", "less than 1"]),
        (
            {"source": {"uri": "x", "noise_seed": -1}},
            ["source.noise_seed", "-1", "greater than or equal to 0"],
        ),
        (
            {"source": {"uri": "x", "max_reject_fraction": 1.5}},
            ["source.max_reject_fraction", "1.5", "less than or equal to 1"],
        ),
        ({"source": {"uri": "x", "format": "zip"}}, ["source.format", "'zip'", "'parquet'"]),
        ({"source": {"uri": "x", "split": ""}}, ["source.split", "at least 1 character"]),
        (
            {"source": {"uri": "x", "config_name": ""}},
            ["source.config_name", "at least 1 character"],
        ),
    ],
)
def test_a_bad_setting_is_named(change: dict, expected: list[str]) -> None:
    message = _message({**LEAST, **change})
    for part in expected:
        assert part in message


def test_every_bad_setting_is_named_at_once() -> None:
    message = _message({"source": {"uri": "data"}, "seed": {"fraction": 2}, "proxy": {"lr": 0}})
    assert "run: required" in message
    assert "seed.fraction" in message
    assert "proxy.lr" in message


def test_a_wrong_item_of_a_list_is_the_only_problem_of_the_list() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"run": "r", "source": {"uri": "x"}, "select": {"keep": [1.5]}})
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 1 and lines[0].startswith("  select.keep.0: 1.5 is not allowed")
    with pytest.raises(ConfigError, match=r"select\.keep: \[\] is not allowed: give at least 1"):
        parse_config({"run": "r", "source": {"uri": "x"}, "select": {"keep": []}})


def test_the_nearest_allowed_word_is_offered() -> None:
    with pytest.raises(ConfigError, match=r"'el2nn' is not allowed.*; did you mean 'el2n'\?"):
        parse_config({"run": "r", "source": {"uri": "x"}, "measure": {"scores": ["el2nn"]}})


def test_a_single_keep_fraction_is_a_list_of_one() -> None:
    assert parse_config({**LEAST, "select": {"keep": 0.5}}).select.keep == (0.5,)


def test_what_is_taken_off_the_channels(tmp_path) -> None:
    measured = ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])

    def statistics(*overrides: str) -> tuple[list[float], list[float]]:
        config = parse_config(apply_overrides(LEAST, overrides))
        (tmp_path / "config.yaml").write_text(dump_config(config))
        assert load_config(str(tmp_path / "config.yaml")).proxy == config.proxy
        return config.proxy.statistics(*measured)

    assert statistics() == statistics("proxy.normalize=measured") == measured
    assert statistics("proxy.normalize=imagenet") == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert statistics("proxy.normalize=cifar10")[1] == [0.247, 0.2435, 0.2616]
    assert statistics("proxy.normalize=half") == ([0.5] * 3, [0.5] * 3)
    given = ("proxy.normalize.mean=[0, 0.5, 1]", "proxy.normalize.std=[1, 0.5, 0.1]")
    assert statistics(*given) == ([0, 0.5, 1], [1, 0.5, 0.1])


def test_an_adversary_as_papers_write_it(tmp_path) -> None:
    given = apply_overrides(LEAST, ["proxy.adversary={}", "proxy.adversary.eps=4/255"])
    config = parse_config(given)
    assert config.proxy.adversary == AdversarySettings(eps=4 / 255, step_size=2 / 255, iterations=7)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "config.yaml")).proxy == config.proxy
    assert parse_config(LEAST).proxy.adversary is None


def test_epochs_are_a_number_of_steps_for_a_small_seed_set() -> None:
    proxy = ProxySettings()
    assert proxy.epochs == "auto" and proxy.for_seed_set(100_000).epochs == 50
    for samples in (6, 62, 400, 2_000):
        steps = proxy.steps(samples)
        passes = proxy.for_seed_set(samples).passes
        assert steps == passes * math.ceil(samples / 3 / 128) >= MIN_STEPS and passes >= 50
        assert proxy.too_few_steps(samples) == ""
    few = ProxySettings(epochs=10, image_size=32)
    assert few.for_seed_set(62).epochs == 10
    assert few.too_few_steps(62).startswith(
        "each proxy is trained for 10 steps only (10 epochs over 21 samples)"
    )


def test_overrides() -> None:
    data = apply_overrides(
        LEAST,
        [
            "proxy.epochs=3",
            "select.keep=[0.5, 0.1]",
            "source.id_column=null",
            "run=s3://bucket/run",
        ],
    )
    assert data["proxy"] == {"epochs": 3}
    assert data["select"] == {"keep": [0.5, 0.1]}
    assert data["run"] == "s3://bucket/run"
    assert "proxy" not in LEAST, "the original is not changed"
    deep = {"measure": {"loss": {"at": "checkpoints"}}}
    assert apply_overrides(deep, ["measure.loss.first_epoch=2"])["measure"]["loss"] == {
        "at": "checkpoints",
        "first_epoch": 2,
    }
    assert deep == {"measure": {"loss": {"at": "checkpoints"}}}, "nor what is further down in it"
    for bad in ("proxy.epochs", "=3", "run.field=3", "proxy.epochs=[1"):
        with pytest.raises(ConfigError, match="--set"):
            apply_overrides(LEAST, [bad])


def test_dumped_configuration_reads_back(tmp_path) -> None:
    config = parse_config({**LEAST, "proxy": {"epochs": 12}, "select": {"keep": [0.2]}})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    again = load_config(str(tmp_path / "config.yaml"))
    assert again.proxy == config.proxy
    assert again.select == config.select


def test_printed_configuration_is_complete_and_valid(tmp_path) -> None:
    text = commented_config()
    data = yaml.safe_load(text)
    for section, model in Config.model_fields.items():
        fields = getattr(model.annotation, "model_fields", None)
        if fields:
            assert set(data[section]) == set(fields)
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(str(tmp_path / "config.yaml")).proxy == parse_config(LEAST).proxy
    lines = text.splitlines()
    for above, line in itertools.pairwise(lines):
        if line.startswith("  ") and not line.lstrip().startswith("#"):
            assert above.lstrip().startswith("# "), f"{line!r} has no comment"
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("- a\n- b\n", "expected sections"),
        ("a: [1\n", "not valid YAML"),
        ("", "expected sections"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content: str, expected: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=expected):
        load_config(str(tmp_path / "config.yaml"))


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_config("nowhere.yaml")


def test_local_paths_become_absolute(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = "{uri: s3://bucket/data, root: sets, class_map: ../classes.json}"
    (tmp_path / "config.yaml").write_text(
        f"run: out\nsource: {source}\nselect: {{never_keep: faces.txt}}\n"
    )
    config = load_config("config.yaml")
    assert config.run == str(tmp_path / "out")
    assert (config.select.never_keep, config.select.always_keep) == (
        str(tmp_path / "faces.txt"),
        None,
    )
    assert config.source.uri == "s3://bucket/data"
    assert config.source.root == str(tmp_path / "sets")
    assert config.source.class_map == str(tmp_path.parent / "classes.json")
    assert load_config("config.yaml", ["source.root=null"]).source.root is None


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("proxy.weights", "w.safetensors", "{here}/w.safetensors"),
        ("proxy.weights", "none", "none"),
        ("embed.weights", "w.safetensors", "{here}/w.safetensors"),
        ("embed.weights", "pretrained", "pretrained"),
        ("embed.from", "sub/../table", "{here}/table"),
        ("embed.from", "s3://bucket/table", "s3://bucket/table"),
        ("embed.model", "transformers:mine", "transformers:{here}/mine"),
        ("embed.model", "transformers:facebook/dinov2-small", "transformers:facebook/dinov2-small"),
    ],
)
def test_files_of_networks_become_absolute(tmp_path, monkeypatch, name, value, expected) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "config.yaml").write_text("run: out\nsource: {uri: s3://bucket/data}\n")
    overrides = ["proxy.model=torchvision:vgg11", "embed.model=torchvision:vgg11"]
    config = load_config("config.yaml", [*overrides, f"{name}={value}"])
    section, _, field = name.partition(".")
    assert vars(getattr(config, section))[field] == expected.format(here=tmp_path)


def test_what_can_be_rehearsed() -> None:
    def given(**extrapolate: object) -> Config:
        proxy = {"parts": 1, **extrapolate.pop("proxy", {})}  # type: ignore[dict-item]
        return parse_config(
            {
                "run": "r",
                "source": {"uri": "digits://"},
                "measure": {"scores": ["el2n", "moso"]},
                "proxy": proxy,
                "extrapolate": extrapolate,
            }
        )

    assert (
        given().rehearses
        and not given(rehearsal=False).rehearses
        and given(rehearsal=True).rehearses
    )
    assert not given(score="moso").rehearses  # it has an audit set
    assert not given(method="knn").rehearses and not given(proxy={"parts": 2}).rehearses
    for wrong, words in (
        ({"score": "moso"}, "audit set"),
        ({"method": "knn"}, "method knn"),
        ({"proxy": {"parts": 2}}, "parts"),
    ):
        with pytest.raises(ConfigError, match=f"nothing to rehearse.*{words}"):
            given(rehearsal=True, **wrong)


def test_labels_come_from_one_place() -> None:
    unlabelled = {"uri": "data", "label_column": None}
    config = parse_config({**LEAST, "source": unlabelled, "pseudo_labels": {"clusters": 10}})
    assert config.unsupervised and not parse_config(LEAST).unsupervised
    assert (
        config.pseudo_labels.rounds,
        config.pseudo_labels.model_copy(update={"method": "turtle"}).rounds,
    ) == (100, 1000)
    for data, expected in (
        (
            {"pseudo_labels": {"clusters": 10}},
            ["pseudo_labels.clusters", "set source.label_column to null"],
        ),
        ({"source": unlabelled}, ["source.label_column", "set pseudo_labels.clusters"]),
        (
            {"source": unlabelled, "pseudo_labels": {"clusters": 1}},
            ["pseudo_labels.clusters", "greater than or equal to 2"],
        ),
        (
            {"pseudo_labels": {"features": "backbone"}},
            ["pseudo_labels", "needs weights", "torchvision://"],
        ),
        (
            {"pseudo_labels": {"weights": "w.safetensors"}},
            ["pseudo_labels", "features are self-supervised", "backbone"],
        ),
        ({"pseudo_labels": {"model": "small"}}, ["pseudo_labels.model", "'small'", "resnet50"]),
        ({"pseudo_labels": {"method": "dbscan"}}, ["pseudo_labels.method", "'dbscan'", "'turtle'"]),
    ):
        message = _message({**LEAST, **data})
        for part in expected:
            assert part in message


def test_weights_of_a_backbone_are_a_path_unless_they_are_a_uri(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = "pseudo_labels: {clusters: 3, features: backbone, weights: w.safetensors}"
    (tmp_path / "config.yaml").write_text(
        f"run: out\nsource: {{uri: data, label_column: null}}\n{backbone}\n"
    )
    assert load_config("config.yaml").pseudo_labels.weights == str(tmp_path / "w.safetensors")
    assert (
        load_config("config.yaml", ["pseudo_labels.weights=torchvision://"]).pseudo_labels.weights
        == "torchvision://"
    )


def test_a_run_cannot_be_on_a_web_server() -> None:
    with pytest.raises(ConfigError, match=r"run: .*a web server cannot hold a run"):
        parse_config({"run": "https://a.org/run", "source": {"uri": "x"}})
