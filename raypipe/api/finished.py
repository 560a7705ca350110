"""What can be done with a finished run: load its scores, cut, test and export keep-lists."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from raypipe import storage
from raypipe.config import absolute_paths, parse_config, parse_settings
from raypipe.config.choices import AUTO, STRATEGY_NAMES
from raypipe.config.evaluate import EvaluateSettings
from raypipe.config.export import ExportSettings
from raypipe.config.outside import outside_names
from raypipe.config.parts import part_names_accepted
from raypipe.errors import RunError
from raypipe.plugins import code_allowed
from raypipe.progress import Progress
from raypipe.runs.lease import Lease
from raypipe.runs.run import Run
from raypipe.runs.snapshots import load_snapshot, score_shards


def load_scores(
    uri: str | os.PathLike[str], columns: list[str] | None = None, snapshot: str | None = None
) -> pa.Table:
    """Return all scores of a run as one table.

    Parameters
    ----------
    uri : str or os.PathLike
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
    uri = os.fspath(uri)
    run = Run(uri)
    if snapshot is not None:
        run.ledger()  # raises RunError if there is no run
        shards = score_shards(run, load_snapshot(run, snapshot))
        return pa.concat_tables([storage.read_table(stored, columns) for _, stored in shards])
    folder = uri if storage.name(uri) == "scores" else storage.join(run.uri, "scores")
    tables = [table for _, table in storage.iter_tables(folder, columns)]
    if not tables:
        if folder != uri:
            run.ledger()
        raise RunError(f"{folder}: no score shards here; `raypipe status` shows what is finished")
    return pa.concat_tables(tables)


def select(
    uri: str,
    keep: float | Sequence[float] | None = None,
    strategy: str | None = None,
    *,
    force: bool = False,
    allow_code: bool = False,
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
        infomax, coverage, typical, or one from outside raypipe. Default: that of the run's
        configuration.
    force : bool
        Write lists even if the fidelity is below the run's `trust.min_spearman`. The metadata of
        the lists records this.
    allow_code : bool
        Import the code that the run's configuration names: a strategy from outside raypipe. Only
        for runs that you trust. A strategy that you name is always imported.
    **options
        Other settings of the section `select`: options, seed, by_class, quotas, min_per_class,
        always_keep, never_keep, near_duplicates, weights, easy_fraction, difficulty, hard_cutoff,
        strata, beta_exponent. Default: those of the run's configuration.

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
    from raypipe.stages.select.options import refuse_unused_options
    from raypipe.stages.select.stage import write_keep_lists

    run = Run(uri)
    refuse_links_out(run, "keep")
    stored = run.config()
    config = stored.model_dump()
    if keep is not None:
        config["select"]["keep"] = [keep] if isinstance(keep, int | float) else list(keep)
    if strategy is not None:
        config["select"]["strategy"] = strategy
    config["select"]["force"] |= force
    config["select"] |= options
    with part_names_accepted(outside_names(stored)):
        settings = absolute_paths(parse_config(config))
    refuse_unused_options(settings.select, options)
    # a strategy that the caller names is trusted, but not what `auto` takes from the run's files
    allowed = allow_code or strategy not in (None, AUTO, *STRATEGY_NAMES)
    with code_allowed(allowed), damage_as_error(run.uri), Lease(run):
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
    from raypipe.evaluation.held_out import source_of_test_set

    run = Run(uri)
    settings = parse_settings(EvaluateSettings, options, "evaluate")
    with code_allowed(), storage.errors_of_storage(run.uri):
        return compare(
            run,
            source_of_test_set(run.config(), test, test_settings),
            settings,
            progress=progress,
            verbose=verbose,
        )


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
    push_to: str | None = None,
    image_root: str | None = None,
    allow_code: bool = False,
    progress: Progress | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Write the samples of a keep-list for a training tool, or resume an export.

    Finished shards are not written again. The bytes are the same every time, except with lance,
    which gives its files random names.

    Parameters
    ----------
    run : str
        The run. Its source must still be in its place.
    keep : float or None
        Fraction of the keep-list, 0 to 1. None: the only list.
    format : str
        webdataset, parquet, huggingface, croissant, mds, lance: a folder of shards with images.
        indices: .npy or .json with row numbers. list: .csv or .txt with path and label, for image
        folders and file lists. Of all samples, kept or not: fiftyone, a folder; cleanlab, .csv or
        .parquet with label issues; label-studio, .csv with likely label errors. Of the list
        itself: openlineage, .json with an event that names its source, statistics of its scores and
        how it was cut.
    to : str
        Path or URI of the folder or file to write.
    shard_samples : int, optional
        Samples per shard. Default: as many as fit into `shard_bytes`, judged by a few samples.
    shard_bytes : int, optional
        Approximate size of a shard in bytes. Default: 512 MiB.
    allow_missing : bool
        Succeed even if samples of the keep-list can no longer be read.
    force : bool
        Replace another export in the same place, or write next to other files.
    snapshot : str, optional
        Export the keep-list as it was in this snapshot. Samples of files that have changed or gone
        away since are missing.
    push_to : str, optional
        huggingface: dataset on the Hugging Face Hub (user/name) to push the export to as well.
    image_root : str, optional
        fiftyone, label-studio: path or URL that the paths of images start with. After an http(s)
        URL, they are quoted. Default: the folder of the source.
    allow_code : bool
        Import the code that the run's configuration names: a source from outside raypipe. Only for
        runs that you trust.
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
        For a wrong option, or a package that is not installed.
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
    from raypipe.runs.untrusted import damage_as_error

    options = {
        "format": format,
        "to": to,
        "keep": keep,
        "shard_samples": shard_samples,
        "shard_bytes": shard_bytes,
        "allow_missing": allow_missing,
        "force": force,
        "snapshot": snapshot,
        "push_to": push_to,
        "image_root": image_root,
    }
    settings = parse_settings(ExportSettings, options, "export")
    with code_allowed(allow_code), damage_as_error(run), storage.errors_of_storage(to):
        return export_keep_list(Run(run), settings, progress=progress, verbose=verbose)
