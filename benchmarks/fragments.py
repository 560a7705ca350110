"""A run of very many fragments, its computing replaced by nothing: seconds and memory of the driver, and of `raypipe status`.

    python benchmarks/fragments.py [--fragments 100000] [--dir FOLDER]
    python benchmarks/fragments.py --stream 4000            the same number of units through Ray Data, on this machine

The source is synthetic, so that there is nothing to read; index, ledger and the decisions of embed, extrapolate and select are the real
ones. In place of Ray, a function takes every unit, puts a small file where its output would be (a link to one that is written once) and
reports what an actor would. It stops in the middle of embed, as a driver that is killed, and everything is started again:

- index       scans the source and writes the index
- killed      embed until half of the fragments are there
- status      what `raypipe status` shows of that, in the same process
- decision    from the start of the second attempt until it hands out its first fragment: what is done, what is left, in which order
- rest        the other half, and the check that every sample is embedded or rejected, which opens every file
- scores      extrapolate over all fragments, without a fit
- all done    what a third run looks at to find nothing left to do, over index, embed, extrapolate and select
- status      at the end

Seconds are wall time, with processor seconds beside them; memory is the highest resident set of the process so far, and before the index.

--stream measures what the rest leaves out: Ray Data's own work for so many units, in the driver.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import psutil
import pyarrow as pa

from raypipe import storage
from raypipe.config import Config, parse_config
from raypipe.distributed.cluster import Cluster
from raypipe.distributed.context import Context
from raypipe.pipeline import advance
from raypipe.progress import Progress
from raypipe.runs import status
from raypipe.runs.ledger import StageRecord, content_hash
from raypipe.runs.run import Run
from raypipe.runs.unit_result import UnitResult
from raypipe.stages.base import Stage
from raypipe.stages.embed import stage as embed
from raypipe.stages.extrapolate import stage as extrapolate
from raypipe.stages.index import stage as index
from raypipe.stages.select import stage as select

FRAGMENT_SAMPLES = 8
LINKS = 30_000
"""Names that one file gets; file systems allow some tens of thousands."""


class Killed(BaseException):
    """The end of a driver."""


class Outputs:
    """Takes units in place of a stream of actors, and puts a file for each where its output would be."""

    def __init__(self, run: Run, stop_after: int | None = None) -> None:
        self._run, self._stop_after = run, stop_after
        self.first: tuple[float, float] | None = None
        """When the first unit was taken: seconds of the clock, and of the processor."""

    def stream(
        self,
        units: Sequence[Any],
        read: Any,
        make_actor: Any,
        pool: Any,
        patience: float,
        on_result: Any,
        **_: Any,
    ) -> None:
        self.first = time.monotonic(), time.process_time()
        folder = {embed.EmbedActor: "embeddings", extrapolate.ScoreActor: "scores"}[make_actor.func]
        os.makedirs(self._run.path(folder), exist_ok=True)
        rows = pa.table(
            {
                "sample_id": [str(row) for row in range(FRAGMENT_SAMPLES)],
                "score": pa.array(range(FRAGMENT_SAMPLES), pa.float32()),
            }
        )
        for number, unit in enumerate(units):
            if number == self._stop_after:
                raise Killed
            if number % LINKS == 0:
                template = self._run.path(f".{folder}-{number}.parquet")
                storage.write_table(template, rows)
            name = unit if isinstance(unit, str) else unit.fragment_id
            os.link(template, self._run.path(folder, f"{name}.parquet"))
            on_result(UnitResult(name, FRAGMENT_SAMPLES))


def _serial(
    context: Context,
    units: Any,
    function: Callable[[Any], Any],
    on_result: Callable[[Any], None],
    **_: Any,
) -> None:
    for unit in units:
        on_result(function(unit))


def _fit(context: Context, missing: Sequence[str], samples: int) -> float:
    """What a fit leaves in the run."""
    for file in ("model.json", "model.safetensors", "curve.json"):
        storage.write_json(context.run.path("extrapolator", file), {})
    judged = {
        "search": {"note": ""},
        "measured": 0,
        "keep": [],
        "fidelity": {},
        "fidelity_seed": {},
        "intervals": {},
    }
    storage.write_json(context.run.path("extrapolator", "fidelity.json"), judged)
    return 0.0


def configuration(folder: str, fragments: int) -> Config:
    source = {
        "uri": f"synthetic://?samples={fragments * FRAGMENT_SAMPLES}&size=8",
        "format": "synthetic",
        "fragment_samples": FRAGMENT_SAMPLES,
    }
    one_proxy = {"proxy": {"parts": 1}, "measure": {"scores": ["moso"]}}
    return parse_config({"run": f"{folder}/run", "source": source, **one_proxy})


def simulate(folder: str, fragments: int) -> Iterator[tuple[str, dict[str, float]]]:
    """The steps, one after the other: name, and seconds, processor seconds, peak memory (bytes)."""
    config = configuration(folder, fragments)
    run = Run(config.run)
    records: dict[str, StageRecord] = {}

    def work(stage: Stage, outputs: Outputs) -> None:
        context = Context(config, run, Progress(quiet=True))
        context.__dict__["cluster"] = Cluster(2, 0, 1, 2, False)
        with (
            mock.patch.object(embed, "stream", outputs.stream),
            mock.patch.object(extrapolate, "stream", outputs.stream),
        ):
            advance(stage, context, records)

    with (
        mock.patch.object(Context, "run_tasks", _serial),
        mock.patch.object(extrapolate, "fit_extrapolator", _fit),
        mock.patch.object(extrapolate, "is_assessed", lambda *_: True),
    ):
        run.write_config(config)
        yield "index", _timed(lambda: work(index.IndexStage(), Outputs(run)))
        for stage in ("seed", "proxy", "measure"):
            records[stage] = StageRecord("done", stage)

        def killed() -> None:
            try:
                work(embed.EmbedStage(), Outputs(run, fragments // 2))
            except Killed:
                return

        yield "killed", _timed(killed)
        yield "status", _timed(lambda: list(status.describe_run(run.uri)))
        outputs, started, spent = Outputs(run), time.monotonic(), time.process_time()
        records |= run.ledger()
        rest = _timed(lambda: work(embed.EmbedStage(), outputs))
        assert outputs.first is not None
        yield (
            "decision",
            {**rest, "seconds": outputs.first[0] - started, "processor": outputs.first[1] - spent},
        )
        yield "rest", rest
        yield "scores", _timed(lambda: work(extrapolate.ExtrapolateStage(), Outputs(run)))
        storage.write_table(run.path("keep", "keep-0.50.parquet"), pa.table({"sample_id": ["0"]}))
        shards = content_hash(run.done("scores"))
        config = config.model_copy(
            update={"select": config.select.model_copy(update={"keep": (0.5,)})}
        )
        context = Context(config, run, Progress(quiet=True))

        def look() -> None:
            records.update(run.ledger())
            for stage in (index.IndexStage(), embed.EmbedStage(), extrapolate.ExtrapolateStage()):
                assert stage.complete(context, records[stage.name]), stage.name
            assert select.SelectStage().complete(
                context, StageRecord("done", detail={"shards": shards})
            )

        yield "all done", _timed(look)
        yield "status", _timed(lambda: list(status.describe_run(run.uri)))


def _timed(action: Callable[[], Any]) -> dict[str, float]:
    started, spent = time.monotonic(), time.process_time()
    action()
    seconds, processor = time.monotonic() - started, time.process_time() - spent
    return {
        "seconds": seconds,
        "processor": processor,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def sizes(run: Run) -> dict[str, int]:
    """Bytes of the index and of the ledger."""
    return {
        "index": sum(file.size for file in storage.listing(run.path("index"))),
        "ledger": storage.info(run.path("run.json")).size,
    }


class _Nothing:
    """An actor that does nothing."""

    def __init__(self) -> None:
        pass

    def __call__(self, unit: str, batch: dict[str, Any]) -> UnitResult:
        return UnitResult(unit)


def _unit(config: Config, unit: Any) -> dict[str, Any]:
    import numpy as np

    return {"unit": np.array([unit.fragment_id])}


def streamed(folder: str, units: int) -> dict[str, float]:
    """Units through Ray Data on this machine, with nothing to do: seconds, processor seconds of the driver, peak memory."""
    import functools

    from raypipe.distributed.actor_pool import stream
    from raypipe.sources import open_source

    config = configuration(folder, units)
    source = open_source(config.source)
    fragments = [fragment for file in source.files() for fragment in source.scan(file).fragments]
    context = Context(config, Run(config.run), Progress(quiet=True))
    pool, seen = context.cluster.cpu_pool(1), []
    found = _timed(
        lambda: stream(
            fragments, functools.partial(_unit, config), _Nothing, pool, 600, seen.append
        )
    )
    assert len(seen) == units
    return found


@contextmanager
def _folder(parent: str | None) -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="raypipe-fragments-", dir=parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fragments", type=int, default=100_000)
    parser.add_argument(
        "--stream", type=int, default=0, metavar="UNITS", help="measure Ray Data instead"
    )
    parser.add_argument(
        "--dir", help="where the run is written, and deleted again; default: the temporary folder"
    )
    arguments = parser.parse_args()
    with open("/proc/cpuinfo") as file:
        model = next(
            (line.split(":")[1].strip() for line in file if line.startswith("model name")), "?"
        )
    print(
        f"{platform.machine()}, {model}, {os.cpu_count()} cores; Python {platform.python_version()}"
    )
    before = psutil.Process().memory_info().rss
    with _folder(arguments.dir) as folder:
        if arguments.stream:
            found = streamed(folder, arguments.stream)
            print(
                f"Ray Data, {arguments.stream:,} units: {found['seconds']:.1f} s, {found['processor']:.1f} s processor of the driver, "
                f"{found['memory'] / 1e6:.0f} MB at most, {before / 1e6:.0f} MB before"
            )
            return
        print(f"{arguments.fragments:,} fragments; {before / 1e6:.0f} MB before")
        print(f"{'step':<12}{'seconds':>10}{'processor':>12}{'peak MB':>10}")
        for step, found in simulate(folder, arguments.fragments):
            print(
                f"{step:<12}{found['seconds']:>10.2f}{found['processor']:>12.2f}{found['memory'] / 1e6:>10.0f}",
                flush=True,
            )
        size = sizes(Run(f"{folder}/run"))
        print(f"index {size['index']:,} bytes, ledger {size['ledger']:,} bytes")


if __name__ == "__main__":
    main()
