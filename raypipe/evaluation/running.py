"""The driver of an evaluation: what there is to train, as Ray tasks side by side, and what comes of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from raypipe import storage
from raypipe.config import SourceSettings
from raypipe.errors import ResourceError, RunError, SourceError
from raypipe.evaluation.lists import Pool, cut_lists
from raypipe.evaluation.outcome import Results, summarize, table_of
from raypipe.evaluation.pixels import FOLDER as PIXELS
from raypipe.evaluation.pixels import (
    TEST,
    TRAIN,
    NodeCopy,
    TestSet,
    Unit,
    bytes_needed,
    check_room,
    decode_test,
    decode_train,
    list_test_set,
    units_of,
)
from raypipe.evaluation.trainings import FOLDER, Training, recipe_of, train_one, trainings_of
from raypipe.progress import Progress
from raypipe.rundir import Lease, Run, fingerprint
from raypipe.settings.evaluate import EvaluateSettings
from raypipe.sources import open_source
from raypipe.stages.base import Context
from raypipe.stages.cluster import Cluster
from raypipe.stages.kept import check_has_images

SUMMARY, TABLE = "summary.json", "trainings.parquet"
"""Below `evaluation/`, beside the results of single trainings."""


def evaluate(
    run: Run, test: SourceSettings, settings: EvaluateSettings, *, progress: Progress | None = None, verbose: bool = False
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
    test = open_source(test).settled(settings.image_size or config.proxy.image_size)
    context = Context(config, run, progress, verbose)
    with Lease(run), closing(context):
        try:
            return _evaluate(context, test, settings)
        except KeyboardInterrupt:
            if run.lease is not None:
                run.lease.check()
            if context.starved:
                raise ResourceError(f"evaluate: {context.starved}") from None
            raise


def _evaluate(context: Context, source: SourceSettings, settings: EvaluateSettings) -> dict[str, Any]:
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
        needed = bytes_needed(len(pool) + sum(fragment.samples for fragment in test.fragments), recipe.image_size)
        progress.say(
            f"{'evaluate':<11} {len(missing):,} trainings of {recipe.model} at {recipe.image_size} pixels"
            f"{f' ({earlier:,} done before)' if earlier else ''}; {needed / 2**20:,.0f} MiB of decoded images on each node"
        )
        check_room(len(pool) + sum(fragment.samples for fragment in test.fragments), recipe.image_size, _smallest_memory())
        copy = _decode(context, pool, test, recipe.image_size, counts)
        cpus = _cpus_of(cluster, settings, gpu, len(missing))
        work = functools.partial(train_one, run.uri, copy, len(run.classes().names), cpus, gpu)
        with progress.meter("evaluate", len(wanted), "trainings") as meter:
            meter.already(len(wanted) - len(missing))
            try:
                run_on(missing, work, lambda _: meter.add(1), cpus, int(gpu))
            finally:
                _on_each_node(copy.remove)
        storage.delete(run.path(PIXELS))
    else:
        progress.say(f"{'evaluate':<11} done before: {len(wanted):,} trainings")
    results = Results(
        wanted, {name: storage.read_json(run.path(FOLDER, f"{name}.json")) for name in {item.name for item in wanted}}
    )
    summary = summarize(run, config, settings, recipe, results, len(pool), {"uri": source.uri, **counts.test})
    storage.write_table(run.path(FOLDER, TABLE), table_of(results, run.classes().names))
    storage.write_json(run.path(FOLDER, SUMMARY), summary)
    if "index.html" in storage.names(run.path("report")):
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


def _decode(context: Context, pool: Pool, test: TestSet, size: int, counts: _Counts) -> NodeCopy:
    """Decode what no earlier attempt has, in tasks. Raises SourceError where nothing is left to test on."""
    from raypipe.stages.streaming import run_tasks

    run = context.run
    folder = run.path(PIXELS, counts.key)
    units = units_of(run, pool.shards, test)
    said = storage.names(folder)
    missing = [unit for unit in units if f"{unit.file}.json" not in said]
    total = sum(unit.fragment.samples for unit in units)
    with context.progress.meter("decode", total, "images") as meter:
        meter.already(total - sum(unit.fragment.samples for unit in missing))
        decode = functools.partial(_decode_unit, run.uri, context.config.source, replace(test, fragments=()), size, folder)
        run_tasks(missing, decode, lambda result: meter.add(result["read"]))
    found = {unit: storage.read_json(storage.join(folder, f"{unit.file}.json")) for unit in units}
    train, tested = ([found[unit]["samples"] for unit in units if unit.part == part] for part in (TRAIN, TEST))
    if not sum(tested):
        own = ", and its samples that the run scored are left out" if test.without_own else ""
        raise SourceError(f"{test.source.uri}: no labelled, readable sample is left to test on{own}; give another test set")
    counts.write(train, tested, sum(found[unit]["left_out"] for unit in units))
    return NodeCopy(run.uri, folder, counts.key, size, (tuple(train), tuple(tested)))


def _decode_unit(run: str, source: SourceSettings, test: TestSet, size: int, folder: str, unit: Unit) -> dict[str, Any]:
    made = decode_train(run, source, size, folder, unit) if unit.part == TRAIN else decode_test(run, test, size, folder, unit)
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


def _smallest_memory() -> float:
    """Bytes that Ray's books have on the smallest node with CPUs."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node.get("Alive") and node["Resources"].get("CPU", 0) > 0]
    return min((node.get("memory", 0.0) + node.get("object_store_memory", 0.0) for node in alive), default=0.0) or float("inf")


def run_on(
    units: Sequence[Training],
    function: Callable[[Training], dict[str, Any]],
    on_result: Callable[[dict[str, Any]], None],
    cpus: float,
    gpus: float,
) -> None:
    """Run a function on every unit in Ray tasks with a share of a machine each, retried when a worker dies. Raises what it raises."""
    import ray

    from raypipe.stages.demand import asking, shape
    from raypipe.stages.streaming import failure
    from raypipe.storage.fences import fenced

    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=-1)(fenced(_call))
    shared = ray.put(function)
    waiting = [remote.remote(shared, unit) for unit in units]
    try:
        with asking(shape(cpus, gpus)):
            while waiting:
                ready, waiting = ray.wait(waiting)
                for result in ray.get(ready):
                    on_result(result)
    except Exception as error:
        raise failure(error) from error
    finally:
        for task in waiting:  # of one that failed, or was interrupted; what they had got to is kept
            ray.cancel(task, force=True)


def _call(function: Callable[[Training], dict[str, Any]], unit: Training) -> dict[str, Any]:
    return function(unit)


def _on_each_node(function: Callable[[], None]) -> None:
    """Run a function on every node that is alive; one that cannot be reached is left as it is."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = [node["NodeID"] for node in ray.nodes() if node.get("Alive")]
    remote = ray.remote(num_cpus=0, max_retries=0)(_plain)
    tasks = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(function) for node in there
    ]
    ray.wait(tasks, num_returns=len(tasks), timeout=60)


def _plain(function: Callable[[], None]) -> None:
    function()
