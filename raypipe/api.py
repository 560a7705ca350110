"""The Python API: the commands of `raypipe` as functions, and `load_scores`."""

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
from raypipe.config.export import ExportSettings
from raypipe.errors import ConfigError, RaypipeError, RunError
from raypipe.progress import Progress
from raypipe.runs.lease import Lease
from raypipe.runs.run import Run
from raypipe.runs.snapshots import load_snapshot, score_shards

if TYPE_CHECKING:
    from raypipe.estimate import Survey
    from raypipe.estimate.cost import Machine


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes
    ----------
    uri : str
        The run folder, or the output folder of `extrapolate`.
    summary : dict
        Content of `report/summary.json`, or of `summary.json` for `extrapolate`. Empty if the run
        stopped before the report.
    """

    uri: str
    summary: dict[str, Any]


def run(
    config: Config | Mapping[str, Any] | str,
    *,
    source: Any = None,
    overrides: Sequence[str] = (),
    until: str | None = None,
    redo: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
    verbose: bool = False,
) -> Result:
    """Run all stages of a configuration, or resume a run that was interrupted.

    Parameters
    ----------
    config : Config, mapping or str
        The configuration: a `Config`, a mapping of the same shape, or the path or URI of a YAML
        file.
    source : ray.data.Dataset, optional
        Dataset to read instead of `source.uri`, which is then left out. It is copied to RUN/source
        once.
    overrides : sequence of str
        `section.field=value` for a YAML file.
    until : str, optional
        Last stage to run, such as "embed". Default: all stages.
    redo : sequence of str
        Stages to run again, with those that depend on them. Finished work of more than five
        minutes is only repeated, after a change of settings, if it is named here.
    overwrite : bool
        Replace whatever run the folder holds, also one over another source.
    progress : Progress, optional
        Where to show progress. Default: standard error.
    verbose : bool
        Show every finished fragment, and the output of Ray.

    Returns
    -------
    Result
        The run folder and the summary of the report.

    Raises
    ------
    ConfigError
        For a wrong configuration, before anything starts.
    TrustError
        If the fidelity of the scores is below `trust.min_spearman`. Scores and report are written,
        keep-lists are not.
    RunError
        If another driver holds the run, or finished work would be lost that neither `redo` nor
        `overwrite` allows.
    RaypipeError
        If a stage fails. The same call resumes the run.

    Examples
    --------
    >>> import raypipe
    >>> config = {
    ...     "run": "runs/digits",
    ...     "source": {"uri": "digits://", "limit": 1000},
    ...     "seed": {"fraction": 0.3},
    ...     "proxy": {"model": "small", "image_size": 16, "epochs": 10, "flip": False},
    ... }
    >>> result = raypipe.run(config)  # doctest: +SKIP
    >>> result.summary["fidelity"]["spearman"]  # doctest: +SKIP
    0.8887782805429865
    """
    from raypipe.pipeline import execute

    if source is not None:
        config = _without_uri(config, overrides)
    elif isinstance(config, str):
        config = load_config(config, overrides)
    elif not isinstance(config, Config):
        config = parse_config(config)
    done = execute(
        absolute_paths(config),
        source,
        until=until,
        redo=redo,
        overwrite=overwrite,
        progress=progress,
        verbose=verbose,
    )
    return Result(done.uri, summary_of(done))


def _without_uri(config: Config | Mapping[str, Any] | str, overrides: Sequence[str]) -> Config:
    """Return the configuration of a run whose source is a dataset; `source.uri` is its copy.

    Raises ConfigError if another `source.uri` is given.
    """
    if isinstance(config, Config):
        return _without_uri(config.model_dump(mode="json"), overrides)
    data = apply_overrides(read_config(config) if isinstance(config, str) else config, overrides)
    section = data.get("source") or {}
    if isinstance(data.get("run"), str) and isinstance(section, dict):
        copy = Run(data["run"]).source_copy
        if Run(str(section.get("uri", copy))).uri != copy:
            raise ConfigError(
                f"source.uri is {section['uri']!r}, but a dataset is given as well; "
                "remove one of them"
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
    """Inspect a source before running anything, and estimate the cost of a run. Takes seconds.

    Reports the balance of the classes, the sizes of the images and the expected rejects, from
    samples spread over the source.

    Parameters
    ----------
    uri : str, optional
        The source. Default: that of `config`.
    config : Config, mapping or str, optional
        A `Config`, a mapping of the same shape (`run` is not needed), or the path or URI of a YAML
        file. Default: the default settings.
    overrides : sequence of str
        `field=value` of the section `source`, or `section.field=value`.
    samples : int
        Number of samples to draw.
    seed : int
        Random seed of the draw.
    grid : str, optional
        Path or URI of a PNG to write, which shows 64 of the samples.
    like : str, optional
        A finished run. The estimate scales its ledger instead of stored constants.
    cpus, gpus : float, optional
        Resources of the run. Default: those of this machine.
    address : str, optional
        A Ray cluster whose resources are used instead; "auto": RAY_ADDRESS. Ray is not touched
        otherwise.

    Returns
    -------
    Survey
        What the source contains; its `cost` is the estimate, None without samples.

    Raises
    ------
    ConfigError
        For settings or options that are not allowed.
    SourceError
        If nothing can be read.
    RunError
        If `like` is not a run.

    Examples
    --------
    >>> import raypipe
    >>> raypipe.inspect("digits://").samples
    1797
    """
    from raypipe.estimate import inspect_source
    from raypipe.estimate.cost import estimate
    from raypipe.scores.registry import check_scores

    data, name = _config_of(config)
    if uri is not None:
        data = {**data, "source": {**data.get("source", {}), "uri": uri}}
    elif not data.get("source", {}).get("uri"):
        raise ConfigError("nothing to inspect: give a source, or a configuration with source.uri")
    if samples < 1:
        raise ConfigError(f"samples: {samples} is not allowed: at least 1")
    dotted = [item if "." in item.partition("=")[0] else f"source.{item}" for item in overrides]
    settings = parse_config(apply_overrides({"run": "unused", **data}, dotted))
    check_scores(settings)
    machine = _machine(cpus, gpus, address)
    inspection = inspect_source(
        settings.source, samples=samples, seed=seed, image_size=settings.proxy.image_size
    )
    if grid is not None:
        from raypipe.estimate.contact_sheet import contact_sheet

        storage.write_bytes(grid, contact_sheet(inspection.survey, inspection.drawn))
    if not inspection.survey.samples:
        return inspection.survey
    return replace(
        inspection.survey,
        cost=estimate(inspection.survey, settings, machine, settings=name, like=like),
    )


def _config_of(config: Config | Mapping[str, Any] | str | None) -> tuple[dict[str, Any], str]:
    """Return a configuration as a mapping, and a name for it."""
    if isinstance(config, str):
        return load_config(config).model_dump(), f"the settings of {config}"
    if isinstance(config, Config):
        return config.model_dump(), "the given settings"
    return (dict(config), "the given settings") if config is not None else ({}, "default settings")


def _machine(cpus: float | None, gpus: float | None, address: str | None) -> Machine:
    """Return the resources of a run: the given ones, or those of the cluster or this machine."""
    from raypipe.estimate.cost import Machine, this_machine

    for name, value, minimum in (("cpus", cpus, 1), ("gpus", gpus, 0)):
        if value is not None and not minimum <= value <= 1e6:
            raise ConfigError(f"{name}: {value:g} is not allowed: at least {minimum}")
    machine = this_machine() if address is None else _cluster_of(address)
    if address is None and os.environ.get("RAY_ADDRESS"):
        machine = replace(
            machine, where="this machine (--address auto estimates for the cluster at RAY_ADDRESS)"
        )
    if cpus is None and gpus is None:
        return machine
    return Machine(
        cpus if cpus is not None else machine.cpus,
        gpus if gpus is not None else machine.gpus,
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
    """Predict a score for every embedding from the scores of some of them, or resume it.

    Neither images nor a proxy are needed, and the score can be any number.

    Parameters
    ----------
    embeddings : str
        Parquet file or folder with the columns sample_id, embedding (list of floats) and optionally
        label (integer or text).
    scores : str
        Parquet file or folder with the columns sample_id and `score_column`. Higher means keep.
    out : str
        Folder for `scores/`, `rejects/`, `summary.json` and what `select` needs. It must be new, or
        of an earlier call with the same tables.
    score_column : str
        Column of `scores` to extrapolate.
    method : str, optional
        Extrapolator: gnn, knn, mlp, trees or knn-published. Default: gnn.
    confidence : float, optional
        Share of samples whose score should lie between lower and upper, 0 to 1. Default: 0.9.
    holdout : float, optional
        Share of the scored samples held out to assess fidelity, below 0.5. Default: 0.2.
    seed : int, optional
        Random seed of the hold-out split and the initial weights. Default: 0.
    progress : Progress, optional
        Where to show progress. Default: standard error.
    verbose : bool
        Show every finished fragment, and the output of Ray.

    Returns
    -------
    Result
        The output folder and the content of `summary.json`.

    Raises
    ------
    ConfigError
        For a wrong option, before anything starts.
    SourceError
        For tables that cannot be used: a missing column, an id with two different scores or two
        embeddings, too few scores.
    RunError
        If `out` contains something else.

    Examples
    --------
    >>> import raypipe
    >>> result = raypipe.extrapolate(
    ...     "embeddings.parquet", "ratings.parquet", "runs/ratings", score_column="rating"
    ... )  # doctest: +SKIP
    >>> counts = raypipe.select(result.uri, keep=0.5)  # doctest: +SKIP
    """
    from raypipe.tables.run import extrapolate as score_tables

    options = {"method": method, "confidence": confidence, "holdout": holdout, "seed": seed}
    extrapolate = {name: value for name, value in options.items() if value is not None}
    # Assessing gnn-published would need a graph over all embeddings.
    extrapolate["judge_published"] = False
    config = parse_config(
        {
            "run": out,
            "source": {"uri": embeddings},
            "extrapolate": extrapolate,
            # The default strategy needs the loss of a proxy, which does not exist here.
            "select": {"strategy": "top"},
            "proxy": {"parts": 1},  # all embeddings are in one space
        }
    )
    config = absolute_paths(config)
    summary = score_tables(
        config, Run(scores).uri, score_column, progress=progress, verbose=verbose
    )
    return Result(Run(config.run).uri, summary)


def attach(
    tables: str,
    images: str,
    to: str,
    *,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    verbose: bool = False,
) -> Result:
    """Make a run over images from scores that `extrapolate` wrote, or resume it.

    Scores and images are matched by id. Report, evaluation and export work with the result.
    Samples without a counterpart are counted and listed. Every image is read once.

    Parameters
    ----------
    tables : str
        The output folder of `extrapolate`.
    images : str
        The images, as `source.uri` of a run.
    to : str
        Folder of the run to write. It must be new, or of an earlier call with the same scores.
    overrides : sequence of str
        Settings of the source or of keep-lists, such as "source.id_column=key".
    progress : Progress, optional
        Where to show progress. Default: standard error.
    verbose : bool
        Show the output of Ray.

    Returns
    -------
    Result
        The run, and how many samples were matched
        (see `raypipe.tables.attach.AttachedCounts`).

    Raises
    ------
    ConfigError
        For a wrong setting.
    RunError
        If there are no such scores, or `to` holds something else.
    SourceError
        If no image has the id of a score, or the classes of both cannot be matched.

    Examples
    --------
    >>> import raypipe
    >>> run = raypipe.attach("runs/ratings", "s3://bucket/images", "runs/images")  # doctest: +SKIP
    >>> counts = raypipe.select(run.uri, keep=0.5)  # doctest: +SKIP
    """
    from raypipe.tables.attach import attach as attach_images

    extrapolated = Run(tables)
    data = extrapolated.config().model_dump(mode="json", exclude_unset=True)
    data |= {"run": to, "source": {"uri": images}}
    config = absolute_paths(parse_config(apply_overrides(data, overrides)))
    summary = attach_images(extrapolated, config, progress=progress, verbose=verbose)
    return Result(Run(config.run).uri, summary)


def summary_of(run: Run) -> dict[str, Any]:
    """Return the content of the run's `report/summary.json`; empty if it does not exist yet."""
    try:
        return storage.read_json(run.report_summary)
    except FileNotFoundError:
        return {}


def load_scores(
    uri: str, columns: list[str] | None = None, snapshot: str | None = None
) -> pa.Table:
    """Return all scores of a run as one table.

    Parameters
    ----------
    uri : str
        A run folder, or its `scores` folder.
    columns : list of str, optional
        Columns to read. Default: all (sample_id, label, score, lower, upper, measured).
    snapshot : str, optional
        Name of a snapshot of a nightly run. Default: the scores as they are now.

    Returns
    -------
    pyarrow.Table
        One row per sample. The whole table is held in memory; open the folder of a very large run
        with `pyarrow.dataset` instead.

    Raises
    ------
    RunError
        If there are no scores.

    Examples
    --------
    >>> import raypipe
    >>> scores = raypipe.load_scores("runs/digits", ["sample_id", "score"])  # doctest: +SKIP
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
    """Cut keep-lists from the scores of a finished run, without scoring anything again.

    Parameters
    ----------
    uri : str
        The run.
    keep : float or sequence of float, optional
        Fractions to keep, 0 to 1. Default: those of the run's configuration.
    strategy : str, optional
        Strategy: auto, top, balanced, normalized, moderate, mixed, random, ccs, beta, band, d2,
        infomax, coverage or typical. Default: that of the run's configuration.
    force : bool
        Write lists even if the fidelity is below the run's `trust.min_spearman`. The metadata of
        the lists records this.
    **options
        Other settings of the section `select`: seed, by_class, quotas, min_per_class, always_keep,
        never_keep, near_duplicates, weights, easy_fraction, difficulty, hard_cutoff, strata,
        beta_exponent. Default: those of the run's configuration.

    Returns
    -------
    dict of str to int
        Number of kept samples by file name.

    Raises
    ------
    ConfigError
        For a fraction outside 0 to 1, and for options that are unknown, wrong or incompatible.
    RunError
        If the run has no complete scores.
    TrustError
        If the fidelity is too low.

    Examples
    --------
    >>> import raypipe
    >>> raypipe.select("runs/digits", keep=0.5)  # doctest: +SKIP
    {'keep-0.50.parquet': 500}
    """
    from raypipe.runs.untrusted import damage_as_error, refuse_links_out
    from raypipe.stages.select.stage import write_keep_lists

    run = Run(uri)
    refuse_links_out(run, "keep")
    config = run.config().model_dump()
    if keep is not None:
        config["select"]["keep"] = [keep] if isinstance(keep, int | float) else list(keep)
    if strategy is not None:
        config["select"]["strategy"] = strategy
    config["select"]["force"] |= force
    config["select"] |= options
    settings = absolute_paths(parse_config(config))
    with damage_as_error(run.uri), Lease(run):
        return write_keep_lists(run, settings.select, trust=settings.trust)


def evaluate(
    uri: str,
    test: str,
    *,
    test_settings: Sequence[str] = (),
    progress: Progress | None = None,
    verbose: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train models on keep-lists, on random lists and on the full set, and compare them; resumable.

    Parameters
    ----------
    uri : str
        The run.
    test : str
        Path or URI of the test set. It is read with the run's `source` settings, except format,
        include, split and limit.
    test_settings : sequence of str
        `field=value` of the section `source` for the test set, such as "split=test" or
        "include=test-*".
    progress : Progress, optional
        Where to show progress. Default: standard error.
    verbose : bool
        Show every finished unit of work, and the output of Ray.
    **options
        Fields of `raypipe.config.evaluate.EvaluateSettings`: keep, strategies, scores, beside,
        seeds, protocol, dynamic, attack, certify, model, image_size, epochs, batch_size, lr,
        use_gpu, cpus_per_training.

    Returns
    -------
    dict
        Content of RUN/evaluation/summary.json. Trainings with a stored result are not repeated.

    Raises
    ------
    ConfigError
        For options that are unknown, wrong or incompatible.
    RunError
        If the run has no complete scores.
    SourceError
        If the test set cannot be used.
    ResourceError
        If the decoded images do not fit into the memory of a node.

    Examples
    --------
    >>> import raypipe
    >>> summary = raypipe.evaluate(
    ...     "runs/cifar10", "data/cifar10", test_settings=["include=test-*"], keep=0.5, seeds=3
    ... )  # doctest: +SKIP
    """
    from raypipe.evaluation.driver import evaluate as compare
    from raypipe.pipeline import errors_of_storage

    run = Run(uri)
    settings = parse_settings(EvaluateSettings, options, "evaluate")
    with errors_of_storage(run.uri):
        return compare(
            run,
            _test_source(run.config(), test, test_settings),
            settings,
            progress=progress,
            verbose=verbose,
        )


def _test_source(config: Config, uri: str, overrides: Sequence[str]) -> SourceSettings:
    """Return the source settings of a test set: those of the run with another URI.

    Settings of the run that have no effect on the test set's format are left out. Raises
    ConfigError if one is among the overrides.
    """
    from raypipe.sources import open_source
    from raypipe.sources.used_settings import refuse_unused_settings, unused_settings

    data = config.model_dump(mode="json")
    reset = ("format", "include", "split", "limit")
    data["source"] |= {name: SourceSettings.model_fields[name].default for name in reset}
    data["source"]["uri"] = uri
    if Run(uri).uri == Run(config.source.uri).uri:  # another part of the run's own source
        data["source"]["format"] = config.source.format
    dotted = [item if "." in item.partition("=")[0] else f"source.{item}" for item in overrides]
    source = absolute_paths(parse_config(apply_overrides(data, dotted))).source
    format = open_source(source).format
    given = {item.partition("=")[0].removeprefix("source.") for item in dotted}
    inherited = set(unused_settings(source, format)) - given
    source = source.model_copy(
        update={name: SourceSettings.model_fields[name].default for name in inherited}
    )
    refuse_unused_settings(source, format)
    return source


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
    """Write the samples of a keep-list for a training tool, or resume an export.

    Finished shards are not written again. The bytes are the same every time.

    Parameters
    ----------
    run : str
        The run. Its source must still be in its place.
    keep : float or None
        Fraction of the keep-list, 0 to 1. None: the only list.
    format : str
        webdataset, parquet: a folder of shards with images. indices: .npy or .json with row
        numbers. list: .csv or .txt with path and label, for image folders and file lists.
    to : str
        Path or URI of the folder or file to write.
    shard_samples : int, optional
        Samples per shard. Default: as many as fit into `shard_bytes`, judged by a few samples.
    shard_bytes : int, optional
        Approximate size of a shard in bytes. Default: 512 MiB.
    allow_missing : bool
        Succeed even if samples of the keep-list can no longer be read.
    force : bool
        Replace another export in the same place.
    snapshot : str, optional
        Export the keep-list as it was in this snapshot. Samples of files that have changed or gone
        away since are missing.
    progress : Progress, optional
        Where to show progress. Default: standard error.
    verbose : bool
        Show the output of Ray.

    Returns
    -------
    dict
        format, to, samples, shards, bytes and missing (numbers of samples, files, bytes and missing
        samples).

    Raises
    ------
    ConfigError
        For a wrong option.
    RunError
        If there is no such keep-list, or `to` contains something else.
    StageError
        If samples cannot be read, after all others are written.

    Examples
    --------
    >>> import raypipe
    >>> raypipe.export("runs/digits", 0.5, "webdataset", "shards")["samples"]  # doctest: +SKIP
    500
    """
    from raypipe.exports.run import export_keep_list
    from raypipe.pipeline import errors_of_storage

    options = {
        "format": format,
        "to": to,
        "keep": keep,
        "shard_samples": shard_samples,
        "shard_bytes": shard_bytes,
        "allow_missing": allow_missing,
        "force": force,
        "snapshot": snapshot,
    }
    settings = parse_settings(ExportSettings, options, "export")
    with errors_of_storage(to):
        return export_keep_list(Run(run), settings, progress=progress, verbose=verbose)
