"""Run an evaluation: its trainings as Ray tasks, as many at a time as the cluster has room for."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from raypipe import storage
from raypipe.config import ProxySettings, SourceSettings
from raypipe.config.evaluate import MIN_CERTIFY_SAMPLES, EvaluateSettings
from raypipe.distributed.cluster import Cluster
from raypipe.distributed.code_identity import code_identity
from raypipe.distributed.context import Context
from raypipe.distributed.nodes import on_each_node, run_on_share, smallest_memory
from raypipe.distributed.spot import training_labels
from raypipe.errors import ResourceError, RunError, SourceError
from raypipe.evaluation.decoded import (
    TEST,
    TRAIN,
    DecodeUnit,
    NodeCopy,
    TestSet,
    UnitCounts,
    bytes_needed,
    check_room,
    decode_test,
    decode_train,
    list_test_set,
    units_of,
)
from raypipe.evaluation.lists import SamplePool, cut_lists
from raypipe.evaluation.summary import Results, summarize, table_of
from raypipe.evaluation.trainings import Training, recipe_of, train_one, trainings_of
from raypipe.keeplists.file import check_has_images
from raypipe.progress import Progress
from raypipe.runs.lease import Lease
from raypipe.runs.ledger import fingerprint
from raypipe.runs.run import Run
from raypipe.sources import open_source
from raypipe.sources.classes import shown_names
from raypipe.stages.network_check import check_network
from raypipe.text import counted
from raypipe.vision.own_code import transform_of

MAX_CPUS_WITH_GPU = 4
"""CPUs of a training that has a GPU, at most."""


def evaluate(
    run: Run,
    test: SourceSettings,
    settings: EvaluateSettings,
    *,
    progress: Progress | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Train on every list that has no result yet, and write `RUN/evaluation/`.

    If the run has a report, it is written again with the figures.

    Parameters
    ----------
    run
        A run with scores.
    test
        The source of the test set.
    settings
        What is compared, and how.
    progress, verbose
        What is printed.

    Returns
    -------
    dict
        The content of `evaluation/summary.json`.

    Raises
    ------
    ConfigError, RunError, SourceError, ResourceError
        Before anything is trained.
    StageError
        If a training fails.
    """
    run.record("extrapolate")
    check_has_images(run)
    config, progress = run.config(), progress or Progress()
    if config.unsupervised:
        raise RunError(
            f"{run.uri}: the labels are pseudo-labels, but an evaluation trains with true labels; "
            "use the keep-lists where true labels exist"
        )
    test = open_source(test).resolved_settings(settings.image_size or config.proxy.image_size)
    context = Context(config, run, progress, verbose)
    with Lease(run), closing(context):
        try:
            return _evaluate(context, test, settings)
        except KeyboardInterrupt:
            if run.lease is not None:
                run.lease.check()
            if context.gave_up_waiting:
                raise ResourceError(f"evaluate: {context.gave_up_waiting}") from None
            raise


def _evaluate(
    context: Context, source: SourceSettings, settings: EvaluateSettings
) -> dict[str, Any]:
    run, config = context.run, context.config
    pool, lists = cut_lists(run, config, settings)
    recipe = recipe_of(config, settings, len(pool))
    check_network(config.model_copy(update={"proxy": recipe}), run)
    test = list_test_set(source, config.source, run.classes())
    about_test: dict[str, Any] = {"uri": source.uri}
    if unknown := test.classes.unknown:
        about_test["unknown_classes"] = list(unknown)
        context.progress.say(
            f"note: {len(unknown):,} of {len(test.classes.places):,} classes of the test set are "
            f"not classes of the run ({shown_names(unknown)}), so their samples are left out"
        )
    if test.unreadable:
        about_test["unreadable_files"] = [path for path, _ in test.unreadable]
        path, reason = test.unreadable[0]
        context.progress.say(
            f"note: {counted(len(test.unreadable), 'file')} of the test set cannot be read and "
            f"are left out, such as {path}: {reason}"
        )
    gpu = context.cluster.for_trainings(config.cluster).use_gpu(settings.use_gpu)
    depths = [item.bit_depth for item in (config.source, source)]
    scaled: list[Any] = [depths] if depths != [16, 16] else []  # other results stay valid
    scaled += [code_identity(item).hash for item in _transforms(config.source, source)]
    data = fingerprint([name for name, _ in pool.shards], test.digest, *scaled)
    trainings = trainings_of(lists, pool, recipe, settings, data, gpu)
    counts = _UnitCountsFile(run, fingerprint(data, pool.digest, recipe.image_size))
    missing = _missing(run, trainings, settings.certify)
    if missing:
        _announce(context, missing, trainings, recipe, _images(pool, test))
        check_room(
            _images(pool, test),
            recipe.image_size,
            smallest_memory(),
            channels=config.proxy.channels,
        )
        copy = _decode(context, pool, test, recipe.image_size, counts)
        check_test_samples(source.uri, counts.test["samples"], settings)
        _train(context, missing, trainings, copy, settings, gpu)
        storage.delete(run.evaluation_pixels)
    else:
        check_test_samples(source.uri, counts.test["samples"], settings)
        context.progress.say(f"{'evaluate':<11} done before: {len(trainings):,} trainings")
    results = _read_results(run, trainings)
    summary = summarize(run, settings, recipe, results, len(pool), {**about_test, **counts.test})
    storage.write_table(run.evaluation_table, table_of(results, run.classes().names))
    storage.write_json(run.evaluation_summary, summary)
    if "index.html" in storage.names(run.report_folder):
        from raypipe.report import build

        build(run)
    return summary


def check_test_samples(uri: str, samples: int, settings: EvaluateSettings) -> None:
    """Raise SourceError if a test set is too small for a certificate."""
    if settings.certify and samples < MIN_CERTIFY_SAMPLES:
        raise SourceError(
            f"{uri}: {samples} samples to test on are too few to certify a list; give a test set "
            f"of at least {MIN_CERTIFY_SAMPLES}, or leave out --certify"
        )


def _missing(run: Run, trainings: Sequence[Training], certify: bool) -> list[Training]:
    """Return the trainings without a result, each once: equal ones share a name.

    A certificate needs the result of every test sample, which versions up to 0.2.0 did not store.
    """
    done = storage.names(run.evaluation_folder)
    by_name = {item.name: item for item in trainings}
    return [
        item
        for name, item in by_name.items()
        if f"{name}.json" not in done
        or (certify and "correct" not in storage.read_json(item.path(run)))
    ]


def _transforms(*sources: SourceSettings) -> list[Any]:
    """Return the functions that turn the images of sources into pixels."""
    found = [transform_of(source) for source in sources]
    return [item.function for item in found if item is not None]


def _images(pool: SamplePool, test: TestSet) -> int:
    """Return the number of images that each node holds."""
    return len(pool) + sum(fragment.samples for fragment in test.fragments)


def _announce(
    context: Context,
    missing: Sequence[Training],
    trainings: Sequence[Training],
    recipe: ProxySettings,
    images: int,
) -> None:
    earlier = len({item.name for item in trainings}) - len(missing)
    done = f" ({earlier:,} done before)" if earlier else ""
    needed = bytes_needed(images, recipe.image_size, context.config.proxy.channels)
    context.progress.say(
        f"{'evaluate':<11} {len(missing):,} trainings of {recipe.model} at {recipe.image_size} "
        f"pixels{done}; {needed / 2**20:,.0f} MiB of decoded images on each node"
    )


def _train(
    context: Context,
    missing: Sequence[Training],
    trainings: Sequence[Training],
    copy: NodeCopy,
    settings: EvaluateSettings,
    gpu: bool,
) -> None:
    """Run the trainings that are missing, as Ray tasks."""
    run = context.run
    cluster, labels = context.config.cluster, training_labels(context.config.cluster)
    cpus = _cpus_of(context.cluster.for_trainings(cluster), settings, gpu, len(missing))
    train = functools.partial(train_one, run.uri, copy, len(run.classes().names), cpus, gpu)
    with context.progress.meter("evaluate", len(trainings), "trainings") as meter:
        meter.already(len(trainings) - len(missing))
        try:
            run_on_share(missing, train, lambda _: meter.add(1), cpus, int(gpu), labels)
        finally:
            on_each_node(copy.remove)


def _read_results(run: Run, trainings: Sequence[Training]) -> Results:
    names = {item.name for item in trainings}
    by_name = {name: storage.read_json(run.evaluation_file(f"{name}.json")) for name in names}
    return Results(trainings, by_name)


class _UnitCountsFile:
    """The number of samples in each decoded unit.

    It is stored with the results: the decoded files are deleted when everything is trained.
    """

    def __init__(self, run: Run, key: str) -> None:
        self.key, self._uri = key, run.evaluation_file(f"data-{key}.json")
        self._content: dict[str, Any] = {}

    def write(self, train: list[int], test: list[int], left_out: int) -> None:
        self._content = {"train": train, "test": test, "left_out": left_out}
        storage.write_json(self._uri, self._content)

    @property
    def test(self) -> dict[str, int]:
        """Samples of the test set, and those that were left out."""
        content = self._content or storage.read_json(self._uri)
        return {"samples": sum(content["test"]), "left_out": content["left_out"]}


def _decode(
    context: Context, pool: SamplePool, test: TestSet, size: int, counts: _UnitCountsFile
) -> NodeCopy:
    """Decode, in tasks, what no earlier attempt has decoded.

    Raises
    ------
    SourceError
        If there is nothing to test on.
    """
    run = context.run
    folder = storage.join(run.evaluation_pixels, counts.key)
    units = units_of(run, pool.shards, test)
    decoded = storage.names(folder)
    missing = [unit for unit in units if f"{unit.file}.json" not in decoded]
    total = sum(unit.fragment.samples for unit in units)
    with context.progress.meter("decode", total, "images") as meter:
        meter.already(total - sum(unit.fragment.samples for unit in missing))
        decode = functools.partial(
            _decode_unit,
            run.uri,
            context.config.source,
            replace(test, fragments=()),
            size,
            context.config.proxy.channels,
            folder,
        )
        context.run_tasks(missing, decode, lambda result: meter.add(result["read"]))
    unit_counts: dict[DecodeUnit, UnitCounts] = {
        unit: storage.read_json(storage.join(folder, f"{unit.file}.json")) for unit in units
    }
    train, tested = (
        [unit_counts[unit]["samples"] for unit in units if unit.part == part]
        for part in (TRAIN, TEST)
    )
    if not sum(tested):
        own = " (those that the run scored are left out)" if test.without_own else ""
        raise SourceError(
            f"{test.source.uri}: no labelled, readable sample to test on{own}; "
            "give another test set"
        )
    counts.write(train, tested, sum(unit_counts[unit]["left_out"] for unit in units))
    return NodeCopy(run.uri, folder, counts.key, size, (tuple(train), tuple(tested)))


def _decode_unit(
    run: str,
    source: SourceSettings,
    test: TestSet,
    size: int,
    channels: int,
    folder: str,
    unit: DecodeUnit,
) -> dict[str, Any]:
    """Decode a unit and write how many samples it has. Runs in a task."""
    counts = (
        decode_train(run, source, size, folder, unit, channels)
        if unit.part == TRAIN
        else decode_test(run, test, size, folder, unit, channels)
    )
    storage.write_json(storage.join(folder, f"{unit.file}.json"), counts)
    return {"read": unit.fragment.samples}


def _cpus_of(cluster: Cluster, settings: EvaluateSettings, gpu: bool, trainings: int) -> int:
    """Return the CPUs of each training; raise ResourceError if no node has that many."""
    if settings.cpus_per_training != "auto":
        if settings.cpus_per_training > cluster.largest_node_cpus and not cluster.can_grow:
            raise ResourceError(
                f"cpus_per_training is {settings.cpus_per_training}, but the largest node of the "
                f"cluster ({cluster}) has {cluster.largest_node_cpus:g}; lower it"
            )
        return settings.cpus_per_training
    at_a_time = min(trainings, max(1, int(cluster.gpus if gpu else cluster.cpus)))
    each = max(1, int(min(cluster.cpus // at_a_time, cluster.largest_node_cpus)))
    return min(each, MAX_CPUS_WITH_GPU) if gpu else each
