"""Run a configuration, extrapolate scores of tables, or attach images to them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raypipe import storage
from raypipe.config import (
    Config,
    absolute_paths,
    apply_overrides,
    parse_config,
    read_config,
)
from raypipe.errors import ConfigError
from raypipe.plugins import code_allowed
from raypipe.progress import Progress
from raypipe.runs.run import Run


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
    config: Config | Mapping[str, Any] | str | os.PathLike[str],
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
    config : Config, mapping, str or os.PathLike
        The configuration: a `Config`, a mapping of the same shape, or the path or URI of a YAML
        file.
    source : ray.data.Dataset, optional
        Dataset to read instead of `source.uri`, which is then left out. It is copied to RUN/source
        once.
    overrides : sequence of str
        `section.field=value` that replaces a setting of `config`.
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

    data = apply_overrides(config_data(config), overrides)
    if source is not None:
        data = _with_copy_as_uri(data)
    done = execute(
        absolute_paths(parse_config(data)),
        source,
        until=until,
        redo=redo,
        overwrite=overwrite,
        progress=progress,
        verbose=verbose,
    )
    return Result(done.uri, summary_of(done))


def config_data(config: Config | Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    """Return a configuration as a mapping; a path is that of a YAML file.

    Raises ConfigError if it is something else.
    """
    if isinstance(config, str | os.PathLike):
        return read_config(os.fspath(config))
    if isinstance(config, Config):
        return config.model_dump(mode="json", exclude_unset=True)
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"configuration: a {type(config).__name__} is not allowed: give a mapping, the path of "
            "a YAML file, or a raypipe.Config"
        )
    return dict(config)


def _with_copy_as_uri(data: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a run whose source is a dataset; `source.uri` is its copy.

    Raises ConfigError if another `source.uri` is given.
    """
    section = data.get("source") or {}
    if isinstance(data.get("run"), str) and isinstance(section, dict):
        copy = Run(data["run"]).source_copy
        if Run(str(section.get("uri", copy))).uri != copy:
            raise ConfigError(
                f"source.uri is {section['uri']!r}, but a dataset is given as well; "
                "remove one of them"
            )
        return {**data, "source": {**section, "uri": copy}}
    return data


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
    with code_allowed():  # everything in the configuration comes from the caller
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
    allow_code: bool = False,
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
    allow_code : bool
        Import the code that these settings or the output folder name. Only for folders that you
        trust.
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
    with code_allowed(allow_code):
        summary = attach_images(extrapolated, config, progress=progress, verbose=verbose)
    return Result(Run(config.run).uri, summary)


def summary_of(run: Run) -> dict[str, Any]:
    """Return the content of the run's `report/summary.json`; empty if it does not exist yet."""
    try:
        return storage.read_json(run.report_summary)
    except FileNotFoundError:
        return {}
