"""The driver of an evaluation: what there is to train, as Ray tasks side by side, and what comes of it."""

from __future__ import annotations

import functools
from contextlib import closing
from dataclasses import replace
from typing import Any

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.config.evaluate import EvaluateSettings
from raypipe.distributed.cluster import Cluster
from raypipe.distributed.context import Context
from raypipe.distributed.nodes import on_each_node, run_on_share, smallest_memory
from raypipe.errors import ResourceError, RunError, SourceError
from raypipe.evaluation.decoded import FOLDER as PIXELS
from raypipe.evaluation.decoded import (
    TEST,
    TRAIN,
    DecodeUnit,
    NodeCopy,
    TestSet,
    bytes_needed,
    check_room,
    decode_test,
    decode_train,
    list_test_set,
    units_of,
)
from raypipe.evaluation.lists import SamplePool, cut_lists
from raypipe.evaluation.summary import Results, summarize, table_of
from raypipe.evaluation.trainings import FOLDER, recipe_of, train_one, trainings_of
from raypipe.keeplists.file import check_has_images
from raypipe.progress import Progress
from raypipe.runs.lease import Lease
from raypipe.runs.ledger import fingerprint
from raypipe.runs.run import Run
from raypipe.sources import open_source

SUMMARY, TABLE = "summary.json", "trainings.parquet"
"""Below `evaluation/`, beside the results of single trainings."""


def evaluate(
    run: Run,
    test: SourceSettings,
    settings: EvaluateSettings,
    *,
    progress: Progress | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Train on every list that there is no result of, and write `RUN/evaluation/summary.json` and `trainings.parquet`.

    Returns the summary. `test` is the source of the test set. Where the run has a report, it is written again with the figures.
    Raises ConfigError, RunError, SourceError and ResourceError before anything is trained; StageError where a training fails.
    """
    run.record("extrapolate")
    check_has_images(run)
    config, progress = run.config(), progress or Progress()
    if config.unsupervised:
        raise RunError(
            f"{run.uri}: its labels are pseudo-labels, and a training to compare lists by needs true ones; use the keep-lists where there "
            "are some"
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
    run, config, progress = context.run, context.config, context.progress
    recipe = recipe_of(config, settings)
    pool, lists = cut_lists(run, config, settings)
    test = list_test_set(source, config.source)
    cluster = context.cluster
    gpu = cluster.use_gpu(settings.use_gpu)
    data = fingerprint([name for name, _ in pool.shards], test.digest)
    wanted = trainings_of(lists, pool, recipe, settings, data, gpu)
    done = storage.names(run.path(FOLDER))
    missing = list({item.name: item for item in wanted if f"{item.name}.json" not in done}.values())
    earlier = len({item.name for item in wanted}) - len(missing)
    counts = _Counts(run, fingerprint(data, pool.digest, recipe.image_size))
    if missing:
        needed = bytes_needed(
            len(pool) + sum(fragment.samples for fragment in test.fragments), recipe.image_size
        )
        progress.say(
            f"{'evaluate':<11} {len(missing):,} trainings of {recipe.model} at {recipe.image_size} pixels"
            f"{f' ({earlier:,} done before)' if earlier else ''}; {needed / 2**20:,.0f} MiB of decoded images on each node"
        )
        check_room(
            len(pool) + sum(fragment.samples for fragment in test.fragments),
            recipe.image_size,
            smallest_memory(),
        )
        copy = _decode(context, pool, test, recipe.image_size, counts)
        cpus = _cpus_of(cluster, settings, gpu, len(missing))
        work = functools.partial(train_one, run.uri, copy, len(run.classes().names), cpus, gpu)
        with progress.meter("evaluate", len(wanted), "trainings") as meter:
            meter.already(len(wanted) - len(missing))
            try:
                run_on_share(missing, work, lambda _: meter.add(1), cpus, int(gpu))
            finally:
                on_each_node(copy.remove)
        storage.delete(run.path(PIXELS))
    else:
        progress.say(f"{'evaluate':<11} done before: {len(wanted):,} trainings")
    results = Results(
        wanted,
        {
            name: storage.read_json(run.path(FOLDER, f"{name}.json"))
            for name in {item.name for item in wanted}
        },
    )
    summary = summarize(
        run, config, settings, recipe, results, len(pool), {"uri": source.uri, **counts.test}
    )
    storage.write_table(run.path(FOLDER, TABLE), table_of(results, run.classes().names))
    storage.write_json(run.path(FOLDER, SUMMARY), summary)
    if "index.html" in storage.names(run.report_folder):
        from raypipe.report import build

        build(run)
    return summary


class _Counts:
    """How many samples each decoded unit has, kept beside the results, since the decoded files go when all is trained."""

    def __init__(self, run: Run, key: str) -> None:
        self.key, self._uri = key, run.path(FOLDER, f"data-{key}.json")
        self._found: dict[str, Any] = {}

    def write(self, train: list[int], test: list[int], left_out: int) -> None:
        self._found = {"train": train, "test": test, "left_out": left_out}
        storage.write_json(self._uri, self._found)

    @property
    def test(self) -> dict[str, int]:
        found = self._found or storage.read_json(self._uri)
        return {"samples": sum(found["test"]), "left_out": found["left_out"]}


def _decode(
    context: Context, pool: SamplePool, test: TestSet, size: int, counts: _Counts
) -> NodeCopy:
    """Decode what no earlier attempt has, in tasks. Raises SourceError where nothing is left to test on."""
    run = context.run
    folder = run.path(PIXELS, counts.key)
    units = units_of(run, pool.shards, test)
    said = storage.names(folder)
    missing = [unit for unit in units if f"{unit.file}.json" not in said]
    total = sum(unit.fragment.samples for unit in units)
    with context.progress.meter("decode", total, "images") as meter:
        meter.already(total - sum(unit.fragment.samples for unit in missing))
        decode = functools.partial(
            _decode_unit, run.uri, context.config.source, replace(test, fragments=()), size, folder
        )
        context.run_tasks(missing, decode, lambda result: meter.add(result["read"]))
    found = {unit: storage.read_json(storage.join(folder, f"{unit.file}.json")) for unit in units}
    train, tested = (
        [found[unit]["samples"] for unit in units if unit.part == part] for part in (TRAIN, TEST)
    )
    if not sum(tested):
        own = ", and its samples that the run scored are left out" if test.without_own else ""
        raise SourceError(
            f"{test.source.uri}: no labelled, readable sample is left to test on{own}; give another test set"
        )
    counts.write(train, tested, sum(found[unit]["left_out"] for unit in units))
    return NodeCopy(run.uri, folder, counts.key, size, (tuple(train), tuple(tested)))


def _decode_unit(
    run: str, source: SourceSettings, test: TestSet, size: int, folder: str, unit: DecodeUnit
) -> dict[str, Any]:
    made = (
        decode_train(run, source, size, folder, unit)
        if unit.part == TRAIN
        else decode_test(run, test, size, folder, unit)
    )
    storage.write_json(storage.join(folder, f"{unit.file}.json"), made)
    return {"read": unit.fragment.samples}


def _cpus_of(cluster: Cluster, settings: EvaluateSettings, gpu: bool, trainings: int) -> int:
    """CPUs of each training. Raises ResourceError where no node has so many."""
    if settings.cpus_per_training != "auto":
        if settings.cpus_per_training > cluster.largest_node_cpus and not cluster.can_grow:
            raise ResourceError(
                f"cpus_per_training is {settings.cpus_per_training}, but the largest node of the cluster ({cluster}) has "
                f"{cluster.largest_node_cpus:g}; lower it"
            )
        return settings.cpus_per_training
    beside = min(trainings, max(1, int(cluster.gpus if gpu else cluster.cpus)))
    each = max(1, int(min(cluster.cpus // beside, cluster.largest_node_cpus)))
    return min(each, 4) if gpu else each
