"""Kills without end: runs on this machine lose processes at random moments, and must end as one that nobody disturbed.

    python benchmarks/soak.py [--kills 100] [--seed 0] [--samples 1500] [--cpus 2] [--dir FOLDER]

The source is a few tars of small images, some of them damaged; a run has every stage, the rehearsal too. The first one is left alone: it is
the truth, and shows which kinds of process each stage has and for how long. Then the same command is given again and again, each
time for a fresh run, and processes are killed by SIGKILL under it:

    driver      the command itself, also while it starts; it is then given again
    task        a worker that runs a function: a scan, a draw of the seed set, a sum of gradients, a fit
    actor       a worker that runs a network or the extrapolator over fragments
    trainer     a worker of Ray Train
    controller  what Ray Train itself starts to look after these

Of the combinations of stage and kind, those killed least often are next, in the order of the stages; the moment is drawn from the time that
there is such a process in that stage. All drivers are processes of their own on one Ray cluster, as those of `ray job submit` are.

Every run that ended is compared with the truth: every sample in scores or rejects exactly once; scores, rejects, keep-lists, measured scores and
extrapolator the same bytes. Exit code 1 where anything was lost, doubled or different, or a run did not end; 130 where it was cut short (SIGINT,
SIGTERM). With --dir the truth is kept there, and every run that is not as it; a call that was cut short goes on there with the next one, its
run under way too, and the kills of all of them are counted together.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import secrets
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from soak_runs import Driver, Found, Workers, compare, configuration, ids_of, kind_of, write_source

from raypipe.config import dump_config, parse_config
from raypipe.runs.layout import STAGE_FOLDERS

STAGES = ("start", *STAGE_FOLDERS)
"""`start` is the driver before its first stage."""
KILLS_IN_RUN = (8, 14)
POLL = 0.008
"""Seconds between two looks at titles and ledger."""
PATIENCE = 300.0
"""Seconds without a new stage, kill or start after which a run is taken to hang."""
STARTS_IN_VAIN = 3
"""So many drivers that fail one after the other without having been disturbed end a run."""

Combination = tuple[str, str]


@dataclasses.dataclass
class Kill:
    """outcome: Ray, rerun, or next, where the next kill came before it was seen whether Ray would recover."""

    run: int
    stage: str
    kind: str
    title: str
    seconds: float
    outcome: str = ""


class Soak:
    """All runs of one call, and what became of them."""

    def __init__(self, folder: Path, address: str, seed: int, wanted: int) -> None:
        self._folder, self._address, self._wanted = folder, address, wanted
        self._workers, self._started = Workers(), time.monotonic()
        self._driver: Driver | None = None
        self.windows: dict[Combination, float] = {}
        known = json.loads(self._state.read_bytes()) if self._state.exists() else {}
        self.kills = [Kill(**kill) for kill in known.get("kills", [])]
        self.missed: Counter[Combination] = Counter(
            {(stage, kind): count for stage, kind, count in known.get("missed", [])}
        )
        self.found = [Found(**found) for found in known.get("found", [])]
        self.unfinished: list[str] = known.get("unfinished", [])
        self.errors: Counter[str] = Counter(known.get("errors", {}))
        self.starts, self.ended, self._before = (
            known.get("starts", 0),
            known.get("ended", 0),
            known.get("seconds", 0.0),
        )
        self._random = random.Random(f"{seed} {len(self.kills)}")
        self._settle("next")

    @property
    def _state(self) -> Path:
        return self._folder / "soak.json"

    @property
    def seconds(self) -> float:
        """Of all calls."""
        return self._before + time.monotonic() - self._started

    def save(self) -> None:
        """What the next call goes on from."""
        about = {
            "kills": [dataclasses.asdict(kill) for kill in self.kills],
            "missed": [[*combination, count] for combination, count in self.missed.items()],
            "found": [dataclasses.asdict(found) for found in self.found],
            **{
                name: getattr(self, name)
                for name in ("unfinished", "errors", "starts", "ended", "seconds")
            },
        }
        self._state.write_text(json.dumps(about))

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._started:6.0f} s  {text}", flush=True)

    def _start(self, run: Path) -> Driver:
        config = run.with_suffix(".yaml")
        if not config.exists():
            config.write_text(dump_config(parse_config(configuration(self._folder, run))))
        self.starts += 1
        self._driver = Driver(run, config, self._address)
        return self._driver

    def end_driver(self) -> None:
        if self._driver is not None:
            self._driver.end()
            self._workers.over(driver_too=True)
            self._driver = None

    # -- the truth ------------------------------------------------------------------------------------------------

    def leave_alone(self) -> None:
        """The truth, and for every combination the seconds that there is such a process; both are read where they are there."""
        run, file = self._folder / "truth", self._folder / "windows.json"
        if file.exists():
            self.windows = {
                (stage, kind): seconds for stage, kind, seconds in json.loads(file.read_bytes())
            }
            self.say("the truth is that of an earlier call")
            return
        for left in (run, run.with_suffix(".log")):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(
                missing_ok=True
            )
        driver, titles, looked = self._start(run), Counter[str](), time.monotonic()
        while driver.process.poll() is None:
            if driver.look():
                self._workers.over()
            there, before, looked = self._workers.titles(), looked, time.monotonic()
            for kind in {"driver", *map(kind_of, there.values())}:
                if kind == "driver" or driver.stage != "start":
                    self.windows[driver.stage, kind] = (
                        self.windows.get((driver.stage, kind), 0.0) + looked - before
                    )
            titles.update(
                {f"{kind_of(title)} {title.partition('::')[2]}" for title in there.values()}
            )
            time.sleep(POLL)
        if driver.process.returncode != 0:
            raise SystemExit(f"the undisturbed run failed: {driver.said()}")
        self.end_driver()
        for stage in STAGES:
            kinds = ", ".join(
                f"{kind} {seconds:.1f} s"
                for (of, kind), seconds in self.windows.items()
                if of == stage
            )
            self.say(f"{stage:<12} {kinds}")
        self.say(f"processes: {', '.join(sorted(titles))}")
        file.write_text(
            json.dumps([[*combination, seconds] for combination, seconds in self.windows.items()])
        )
        self.say(f"the truth took {time.monotonic() - driver.started:.0f} s")

    def check_truth(self, samples: int) -> None:
        counts = ids_of(self._folder / "truth")
        if len(counts) != samples or set(counts.values()) != {1}:
            raise SystemExit(
                f"the undisturbed run has {len(counts)} of {samples} samples, one of them {max(counts.values())} times"
            )

    # -- disturbed runs -------------------------------------------------------------------------------------------

    def disturb(self) -> None:
        """Runs until there were kills enough; the last one is brought to its end."""
        while len(self.kills) < self._wanted or self._folder_of(self.ended + 1).exists():
            number = self.ended + 1
            run, kills, started, starts = (
                self._folder_of(number),
                len(self.kills),
                time.monotonic(),
                self.starts,
            )
            ended = self._run(number, run)
            self.end_driver()
            self.ended = number
            about = f"run {number}: {len(self.kills) - kills} kills, {self.starts - starts} starts, {time.monotonic() - started:.0f} s"
            if not ended:
                self.say(f"{about}; given up: {self.unfinished[-1]}")
                continue
            found = compare(self._folder / "truth", run)
            self.found.append(found)
            same = not (found.lost or found.doubled or found.differ)
            self.say(f"{about}; {'as the truth' if same else f'NOT AS THE TRUTH: {found}'}")
            if same:
                shutil.rmtree(run)
                for left in (".yaml", ".log"):
                    run.with_suffix(left).unlink()

    def _folder_of(self, number: int) -> Path:
        return self._folder / f"run-{number:03d}"

    def _plan(self) -> list[tuple[str, str, float]]:
        """Combinations and seconds to wait in them, in the order of the stages."""
        done = Counter((kill.stage, kill.kind) for kill in self.kills)
        rank = {
            item: (done[item] + self.missed[item] / 2, self._random.random())
            for item in self.windows
        }
        number = max(0, min(self._random.randint(*KILLS_IN_RUN), self._wanted - len(self.kills)))
        chosen = sorted(
            sorted(rank, key=lambda item: rank[item])[:number],
            key=lambda item: (STAGES.index(item[0]), rank[item][1]),
        )
        return [
            (stage, kind, self._random.uniform(0, self.windows[stage, kind]))
            for stage, kind in chosen
        ]

    def _run(self, number: int, run: Path) -> bool:
        """One run to its end; False where it does not come to one."""
        plan, driver = self._plan(), self._start(run)
        moved, in_vain, kills, seen, now = (
            time.monotonic(),
            0,
            len(self.kills),
            0.0,
            time.monotonic(),
        )
        while True:
            before, now = now, time.monotonic()
            if driver.process.poll() is not None:
                self._settle("Ray" if driver.process.returncode == 0 else "rerun")
                if driver.process.returncode == 0:
                    self.missed.update((stage, kind) for stage, kind, _ in plan)
                    return True
                error = driver.said()
                self.errors[error] += 1
                self.say(f"  the driver ended in {driver.stage}: {error}")
                in_vain = in_vain + 1 if len(self.kills) == kills else 0
                if in_vain == STARTS_IN_VAIN:
                    self.unfinished.append(error)
                    return False
                self.end_driver()
                driver, moved, kills, seen = (
                    self._start(run),
                    time.monotonic(),
                    len(self.kills),
                    0.0,
                )
                continue
            if driver.look():
                self._settle("Ray")
                self._workers.over()
                moved, seen = now, 0.0
            if now - moved > PATIENCE:
                self.unfinished.append(f"nothing moved in {driver.stage} for {PATIENCE:.0f} s")
                return False
            while plan and STAGES.index(plan[0][0]) < STAGES.index(driver.stage):
                self.missed[plan.pop(0)[:2]] += 1
            if plan and plan[0][0] == driver.stage:
                _, kind, delay = plan[0]
                there = (
                    {driver.process.pid: "the command"}
                    if kind == "driver"
                    else self._workers.of(kind)
                )
                seen += (now - before) * bool(there)
                if there and seen >= delay:
                    pid, title = self._random.choice(sorted(there.items()))
                    plan.pop(0)
                    seen, moved = 0.0, time.monotonic()
                    self._kill(number, driver, kind, pid, title)
                    if kind == "driver":
                        self.end_driver()
                        driver, kills = self._start(run), len(self.kills)
            time.sleep(POLL)

    def _kill(self, number: int, driver: Driver, kind: str, pid: int, title: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        self._settle("next")
        seconds = time.monotonic() - driver.since
        self.kills.append(
            Kill(number, driver.stage, kind, title, seconds, "rerun" if kind == "driver" else "")
        )
        self.say(
            f"  kill {len(self.kills)} of {self._wanted}: run {number}, {driver.stage}, {kind}, after {seconds:.1f} s: {title}"
        )

    def _settle(self, outcome: str) -> None:
        """What became of the kill before, where that is not known yet."""
        if self.kills and not self.kills[-1].outcome:
            self.kills[-1].outcome = outcome

    # -- the table ------------------------------------------------------------------------------------------------

    @property
    def good(self) -> bool:
        return not self.unfinished and not any(
            found.lost or found.doubled or found.differ for found in self.found
        )

    def table(self, cut_short: bool) -> Iterator[str]:
        outcomes = ("Ray", "rerun", "next")
        yield ""
        yield f"{'stage':<12} {'process':<11} {'kills':>6} {'Ray recovered':>15} {'rerun needed':>14} {'next came first':>17}"
        counts = Counter((kill.stage, kill.kind, kill.outcome) for kill in self.kills)
        combinations = sorted(
            {*self.windows, *((kill.stage, kill.kind) for kill in self.kills)},
            key=lambda item: STAGES.index(item[0]),
        )
        for stage, kind in combinations:
            row = [counts[stage, kind, outcome] for outcome in outcomes]
            total = sum(row) + counts[stage, kind, ""]
            yield f"{stage:<12} {kind:<11} {total:>6} {row[0]:>15} {row[1]:>14} {row[2]:>17}"
        row = [sum(kill.outcome == outcome for kill in self.kills) for outcome in outcomes]
        yield f"{'all':<12} {'':<11} {len(self.kills):>6} {row[0]:>15} {row[1]:>14} {row[2]:>17}"
        yield ""
        if cut_short:
            yield f"CUT SHORT after {len(self.kills)} of {self._wanted} kills; the run under way is not compared"
        found = self.found
        yield f"{len(found)} runs ended, {len(self.unfinished)} did not; {self.starts} starts of the command, {self.seconds:.0f} s"
        yield f"samples lost: {sum(item.lost for item in found)}, doubled: {sum(item.doubled for item in found)}"
        yield f"files that differ: {sum(len(item.differ) for item in found)}"
        left = Counter(Path(name).parent.as_posix() for item in found for name in item.left)
        yield f"files that the truth does not have: {sum(left.values())} {dict(left) if left else ''}".rstrip()
        for error, count in self.errors.most_common():
            yield f"{count} x {error}"
        for error in self.unfinished:
            yield f"did not end: {error}"
        if not found and self.good:
            yield "no run ended: nothing is shown"
        else:
            yield (
                "nothing lost, nothing doubled, nothing different"
                if self.good
                else "NOT AS IT SHOULD BE"
            )


@contextlib.contextmanager
def cluster(cpus: int) -> Iterator[str]:
    """Address of a Ray cluster on this machine, which ends with this process."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=200 << 20,
        log_to_driver=False,
    )
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


@contextlib.contextmanager
def working_folder(given: str | None) -> Iterator[Path]:
    if given is not None:
        folder = Path(given).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="raypipe-soak-") as folder_name:
        yield Path(folder_name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of combinations and moments")
    parser.add_argument(
        "--dir",
        help="where runs are written, and a call goes on that was cut short; default: a temporary folder",
    )
    parser.add_argument("--samples", type=int, default=1500)
    parser.add_argument("--cpus", type=int, default=2, help="that Ray has")
    arguments = parser.parse_args()

    def stop(*_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # a second one would cut off the table
        raise KeyboardInterrupt

    with working_folder(arguments.dir) as folder:
        if not (folder / "source").exists():
            write_source(folder / "source", arguments.samples)
        with cluster(arguments.cpus) as address:
            signal.signal(signal.SIGTERM, stop)  # after Ray, which has a handler of its own
            signal.signal(
                signal.SIGINT, stop
            )  # which is ignored where a shell started this in the background
            soak, cut_short = Soak(folder, address, arguments.seed, arguments.kills), False
            try:
                soak.leave_alone()
                soak.check_truth(arguments.samples)
                soak.disturb()
            except KeyboardInterrupt:
                cut_short = True
            finally:
                soak.end_driver()
                soak.save()
            print("\n".join(soak.table(cut_short)), flush=True)
    raise SystemExit(0 if soak.good and not cut_short else 1 if not soak.good else 130)


if __name__ == "__main__":
    main()
