"""The verbs of the command line from Python: `raypipe.inspect`, `run`, `extrapolate`, `select`, `evaluate`, `export`, and `load_scores`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from raypipe import storage
from raypipe.config import (
    Config,
    SourceSettings,
    absolute_paths,
    apply_overrides,
    load_config,
    parse_config,
    parse_settings,
    read_config,
)
from raypipe.config.evaluate import EvaluateSettings
from raypipe.errors import ConfigError, RaypipeError, RunError
from raypipe.progress import Progress
from raypipe.runs.layout import Run
from raypipe.runs.lease import Lease
from raypipe.runs.snapshots import load_snapshot, score_shards

if TYPE_CHECKING:
    from raypipe.estimate import Survey
    from raypipe.estimate.cost import Machine


@dataclass(frozen=True)
class Result:
    """A finished run: where it is, and what its `report/summary.json` holds (empty when the run stopped before the report).

    Of `extrapolate`: the output folder, and what its `summary.json` holds.
    """

    uri: str
    summary: dict[str, Any]


def run(
    config: Config | Mapping[str, Any] | str,
    *,
    source: Any = None,
    overrides: Sequence[str] = (),
    until: str | None = None,
    progress: Progress | None = None,
    verbose: bool = False,
) -> Result:
    """Do the whole job, or resume it.

    config     a `Config`, a mapping of the same shape, or the path or URI of a YAML file
    source     a `ray.data.Dataset` to read in place of `source.uri`, which is then left out; it is copied to RUN/source once
    overrides  `section.field=value`, for a YAML file
    until      last stage to run, such as "embed"; default: all
    Raises ConfigError before anything starts; TrustError at the end of a run whose scores are too unfaithful to prune by (scores
    and report are there, keep-lists are not); another RaypipeError when a stage cannot go on.
    """
    from raypipe.pipeline import execute

    if source is not None:
        config = _without_uri(config, overrides)
    elif isinstance(config, str):
        config = load_config(config, overrides)
    elif not isinstance(config, Config):
        config = parse_config(config)
    done = execute(absolute_paths(config), source, until=until, progress=progress, verbose=verbose)
    return Result(done.uri, summary_of(done))


def _without_uri(config: Config | Mapping[str, Any] | str, overrides: Sequence[str]) -> Config:
    """The configuration of a run whose source is a dataset; its `source.uri` is where the copy will be. Raises ConfigError."""
    if isinstance(config, Config):
        return _without_uri(config.model_dump(mode="json"), overrides)
    data = apply_overrides(read_config(config) if isinstance(config, str) else config, overrides)
    section = data.get("source") or {}
    if isinstance(data.get("run"), str) and isinstance(section, dict):
        copy = Run(data["run"]).path("source")
        if Run(str(section.get("uri", copy))).uri != copy:
            raise ConfigError(
                f"source.uri is {section['uri']!r}, and a dataset is given as well; leave one of them out"
            )
        data["source"] = {**section, "uri": copy}
    return parse_config(data)


def inspect(
    uri: str | None = None,
    *,
    config: Config | Mapping[str, Any] | str | None = None,
    overrides: Sequence[str] = (),
    samples: int = 256,
    seed: int = 0,
    grid: str | None = None,
    like: str | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
    address: str | None = None,
) -> Survey:
    """Look at a source before anything is run: balance, sizes, rejects, and about what a run would cost. Takes seconds.

    uri        the source; default: that of `config`
    config     a `Config`, a mapping of the same shape (it needs no `run`), or the path or URI of a YAML file; default: default settings
    overrides  `field=value` of the section `source`, or `section.field=value`
    samples    samples that are drawn, from places spread over the source; seed: which
    grid       path or URI of a PNG to write: a sheet of 64 of them
    like       a run of the past, whose ledger is scaled to this source and configuration
    cpus, gpus what the run would have; default: what this machine has
    address    a Ray cluster to ask for that instead ("auto": RAY_ADDRESS); Ray is not touched otherwise
    Raises ConfigError for settings that no run can have, SourceError where nothing can be read, RunError where `like` is no run.
    """
    from raypipe.estimate import inspect_source
    from raypipe.estimate.cost import estimate
    from raypipe.scores.registry import check_scores

    given, name = _config_of(config)
    if uri is not None:
        given = {**given, "source": {**given.get("source", {}), "uri": uri}}
    elif not given.get("source", {}).get("uri"):
        raise ConfigError("nothing to look at: give a source, or a configuration with source.uri")
    if samples < 1:
        raise ConfigError(f"samples: {samples} is not allowed: at least 1")
    dotted = [item if "." in item.partition("=")[0] else f"source.{item}" for item in overrides]
    settings = parse_config(apply_overrides({"run": "unused", **given}, dotted))
    check_scores(settings)
    machine = _machine(cpus, gpus, address)
    looked = inspect_source(
        settings.source, samples=samples, seed=seed, image_size=settings.proxy.image_size
    )
    if grid is not None:
        from raypipe.estimate.contact_sheet import contact_sheet

        storage.write_bytes(grid, contact_sheet(looked.survey, looked.drawn))
    if not looked.survey.samples:
        return looked.survey
    return replace(
        looked.survey, cost=estimate(looked.survey, settings, machine, settings=name, like=like)
    )


def _config_of(config: Config | Mapping[str, Any] | str | None) -> tuple[dict[str, Any], str]:
    """A configuration as a mapping, and what to call it."""
    if isinstance(config, str):
        return load_config(config).model_dump(), f"the settings of {config}"
    if isinstance(config, Config):
        return config.model_dump(), "the given settings"
    return (dict(config), "the given settings") if config is not None else ({}, "default settings")


def _machine(cpus: float | None, gpus: float | None, address: str | None) -> Machine:
    """What a run would have: as given, else of a cluster, else of this machine."""
    from raypipe.estimate.cost import Machine, this_machine

    for name, value, least in (("cpus", cpus, 1), ("gpus", gpus, 0)):
        if value is not None and not least <= value <= 1e6:
            raise ConfigError(f"{name}: {value:g} is not allowed: at least {least}")
    found = this_machine() if address is None else _cluster_of(address)
    if address is None and os.environ.get("RAY_ADDRESS"):
        found = replace(
            found, where="this machine (--address auto estimates for the cluster at RAY_ADDRESS)"
        )
    if cpus is None and gpus is None:
        return found
    return Machine(
        cpus if cpus is not None else found.cpus,
        gpus if gpus is not None else found.gpus,
        "as given",
    )


def _cluster_of(address: str) -> Machine:
    from raypipe.distributed.cluster import resources_at
    from raypipe.estimate.cost import Machine

    if address == "auto" and not os.environ.get("RAY_ADDRESS"):
        raise RaypipeError("--address auto: RAY_ADDRESS is not set; give the address of a cluster")
    cluster = resources_at(address)
    return Machine(
        cluster.cpus,
        cluster.gpus,
        f"the cluster at {os.environ['RAY_ADDRESS'] if address == 'auto' else address}",
    )


def extrapolate(
    embeddings: str,
    scores: str,
    out: str,
    *,
    score_column: str = "score",
    method: str | None = None,
    confidence: float | None = None,
    holdout: float | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
    verbose: bool = False,
) -> Result:
    """Predict a score for every embedding from the scores of some of them, or resume it. The score may be anybody's.

    embeddings    Parquet file or folder: sample_id, embedding (a list of floats), and optionally label (whole number or text)
    scores        Parquet file or folder: sample_id and `score_column`; higher means keep
    out           folder for `scores/`, `rejects/`, `summary.json` and what `select` needs; new, or of the same call before
    method, confidence, holdout, seed
                  as the settings of these names in the section `extrapolate`; None: their default
    Raises ConfigError before anything starts; SourceError for tables that cannot be used (a column that is missing, an id with two
    different scores or with two embeddings, too few scores); RunError when `out` holds something else.
    """
    from raypipe.tables.run import extrapolate as score_tables

    given = {"method": method, "confidence": confidence, "holdout": holdout, "seed": seed}
    section = {name: value for name, value in given.items() if value is not None}
    # what gnn-published would say takes a graph over all embeddings
    # without images there is no loss of a proxy, which the default strategy cuts off by
    select = {"strategy": "top"}
    extrapolate = {**section, "judge_published": False}
    config = parse_config(
        {"run": out, "source": {"uri": embeddings}, "extrapolate": extrapolate, "select": select}
    )
    config = absolute_paths(config)
    summary = score_tables(
        config, Run(scores).uri, score_column, progress=progress, verbose=verbose
    )
    return Result(Run(config.run).uri, summary)


def summary_of(run: Run) -> dict[str, Any]:
    """What the run's `report/summary.json` holds; empty when there is none yet."""
    try:
        return storage.read_json(run.path("report", "summary.json"))
    except FileNotFoundError:
        return {}


def load_scores(
    uri: str, columns: list[str] | None = None, snapshot: str | None = None
) -> pa.Table:
    """All score shards of a run (a run folder or its `scores` folder) as one table; see the README for the columns.

    With `snapshot`, the scores of a run as they were then (docs/nightly.md). Raises RunError when there are none.
    The whole table is held in memory: for very large runs, open the folder with
    `pyarrow.dataset` instead.
    """
    if snapshot is not None:
        run = Run(uri)
        shards = score_shards(run, load_snapshot(run, snapshot))
        return pa.concat_tables([storage.read_table(stored, columns) for _, stored in shards])
    folder = uri if storage.name(uri) == "scores" else storage.join(Run(uri).uri, "scores")
    tables = [table for _, table in storage.iter_tables(folder, columns)]
    if not tables:
        raise RunError(f"{folder}: no score shards here")
    return pa.concat_tables(tables)


def select(
    uri: str,
    keep: float | Sequence[float] | None = None,
    strategy: str | None = None,
    *,
    force: bool = False,
    **options: Any,
) -> dict[str, int]:
    """Cut keep-lists of a finished run without scoring anything again. Returns the number of samples kept by file.

    keep      one fraction or several; default: those of the run's configuration
    strategy  default: that of the run's configuration
    force     make them even where the fidelity is below the run's `trust.min_spearman`; the lists' metadata says so
    options   any other setting of the section `select` (seed, by_class, min_per_class, always_keep, never_keep, near_duplicates, weights,
              easy_fraction, difficulty, hard_cutoff, strata, beta_exponent); default: those of the run's configuration
    Raises ConfigError for a fraction outside 0..1 and for options that are unknown, wrong or do not go together, RunError for a run
    without complete scores, TrustError for too low a fidelity.
    """
    from raypipe.runs.untrusted import damage_as_error, refuse_links_out
    from raypipe.stages.select.stage import write_keep_lists

    found = Run(uri)
    refuse_links_out(found, "keep")
    config = found.config().model_dump()
    if keep is not None:
        config["select"]["keep"] = [keep] if isinstance(keep, int | float) else list(keep)
    if strategy is not None:
        config["select"]["strategy"] = strategy
    config["select"]["force"] |= force
    config["select"] |= options
    settings = absolute_paths(parse_config(config))
    with damage_as_error(found.uri), Lease(found):
        return write_keep_lists(found, settings.select, trust=settings.trust)


def evaluate(
    uri: str,
    test: str,
    *,
    test_settings: Sequence[str] = (),
    progress: Progress | None = None,
    verbose: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train fresh models on keep-lists of a run, on random lists of the same size and on everything, and compare them; or resume it.

    test           path or URI of the test set, read with the run's settings of `source`, but for format, files and limit
    test_settings  `field=value` of the section `source` for it, such as "split=test" or "include=test-*"
    options        fields of `raypipe.config.evaluate.EvaluateSettings`: keep, strategies, scores, beside, seeds, protocol, attack, model,
                   image_size, epochs, batch_size, lr, use_gpu, cpus_per_training
    Returns what RUN/evaluation/summary.json then holds. A training whose result is there is not made again. Raises ConfigError for
    options that are unknown, wrong or do not go together, RunError for a run without complete scores, SourceError for a test set
    that cannot be used, ResourceError where the decoded images do not fit into the memory of a node.
    """
    from raypipe.evaluation.driver import evaluate as compare
    from raypipe.pipeline import errors_of_storage

    found = Run(uri)
    settings = parse_settings(EvaluateSettings, options, "evaluate")
    with errors_of_storage(found.uri):
        return compare(
            found,
            _test_source(found.config(), test, test_settings),
            settings,
            progress=progress,
            verbose=verbose,
        )


def _test_source(config: Config, uri: str, overrides: Sequence[str]) -> SourceSettings:
    """The source of a test set: that of the run with another URI. Raises ConfigError."""
    given = config.model_dump(mode="json")
    anew = ("format", "include", "split", "limit")
    given["source"] |= {name: SourceSettings.model_fields[name].default for name in anew} | {
        "uri": uri
    }
    if Run(uri).uri == Run(config.source.uri).uri:  # what is left of the run's own source
        given["source"]["format"] = config.source.format
    dotted = [item if "." in item.partition("=")[0] else f"source.{item}" for item in overrides]
    return absolute_paths(parse_config(apply_overrides(given, dotted))).source


def export(
    run: str,
    keep: float | None,
    format: str,
    to: str,
    *,
    shard_samples: int | None = None,
    shard_bytes: int | None = None,
    allow_missing: bool = False,
    force: bool = False,
    snapshot: str | None = None,
    progress: Progress | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Write the samples of a keep-list for a training tool, or resume it; docs/training.md says how to read each format.

    run            the run, whose source must still be where it was
    keep           fraction of the keep-list; None: the only one there is
    format         webdataset, parquet: a folder of shards with images; indices: .npy or .json with row numbers; list: .csv or .txt with
                   path and label, for image folders
    to             path or URI of the folder or file
    shard_samples  samples in a shard; default: as many as fit into `shard_bytes`, by the size of a few samples
    shard_bytes    bytes in a shard, about; default: 512 MiB
    allow_missing  end well although samples of the keep-list cannot be read any more
    force          replace another export that is there
    snapshot       the keep-list as it was in this snapshot; samples of files that changed or went away since are missing
    Returns format, to, samples, shards, bytes and missing. Shards that are finished are not made again; the bytes are the same every
    time. Raises ConfigError for a bad option, RunError for a missing keep-list or a folder that holds something else, StageError at
    the end for samples that cannot be read.
    """
    from raypipe.exports.run import export_keep_list
    from raypipe.pipeline import errors_of_storage

    with errors_of_storage(to):
        return export_keep_list(
            Run(run),
            keep,
            format,
            to,
            shard_samples=shard_samples,
            shard_bytes=shard_bytes,
            allow_missing=allow_missing,
            force=force,
            snapshot=snapshot,
            progress=progress,
            verbose=verbose,
        )
