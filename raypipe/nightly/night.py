"""One night: scores what is new in the source of a finished run, removes what is gone, cuts the keep-lists anew, judges, snapshots.

Nothing is trained and no seed set is drawn. Every step derives from files that are there, and from the newest snapshot as what was
before: a night that was killed at any moment is done again by the same command, to the same result.

State, beside `snapshots/`: `RUN/nightly/<generation>/` has baseline.json (samples and fragments when the first snapshot of a
generation was made) and reference-old.parquet, reference-seed.parquet (samples of that moment, by which drift is judged). A
generation is a seed set with its proxy and extrapolator.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from raypipe import storage
from raypipe._version import __version__
from raypipe.assessment.drift import embedding_drift, label_drift
from raypipe.config import Config
from raypipe.distributed.context import Context
from raypipe.errors import RunError, TrustError
from raypipe.nightly.audit import audit_new, remove_leftovers, scan_new
from raypipe.nightly.policy import advice, assess, changes
from raypipe.nightly.sampling import ALL, draw, embeddings_of, lowest
from raypipe.pipeline import advance, errors_of_storage, log_file, make_stage
from raypipe.progress import Progress
from raypipe.report.trackers import check_trackers
from raypipe.runs.lease import Lease
from raypipe.runs.ledger import StageRecord, fingerprint, now, tables_of
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.run import Run
from raypipe.runs.snapshots import (
    TIME,
    Entry,
    entries_of,
    expire,
    file_uri,
    keep_file_content,
    latest,
    name_at,
    snapshot_names,
    write_snapshot,
)
from raypipe.sources import Fragment, open_source

LEARNT = ("index", "seed", "label", "proxy", "measure", "rehearse", "embed", "extrapolate")
"""Stages that must have been done with these settings once."""
FIXED = ("seed", "label", "proxy", "measure", "rehearse")
"""Those of them that a night does not touch."""
STATE = "nightly"
ADVISED = 4
"""Exit code of a night after which a refresh is advised."""


@dataclass(frozen=True)
class Night:
    """What a night did.

    snapshot  name of the snapshot that describes the run now; made  whether this night wrote it
    found     that manifest without its lists of files
    advice    why a refresh is advised;  refused  why there are no keep-lists, or ""
    expired   snapshots that expired
    """

    uri: str
    snapshot: str
    made: bool
    found: dict[str, Any]
    advice: list[str]
    refused: str = ""
    expired: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 done, 3 too unfaithful for keep-lists, 4 a refresh is advised."""
        return TrustError.exit_code if self.refused else ADVISED if self.advice else 0


def run_night(
    config: Config,
    *,
    progress: Progress | None = None,
    verbose: bool = False,
    moment: datetime | None = None,
) -> Night:
    """Bring the finished run of a configuration up to its source, and leave a snapshot where anything is different from the last.

    moment  when the night is, by which its snapshot is named and others expire; default: now
    Raises RunError where there is no finished run, where its settings are others, or while another driver has it; and what the
    stages raise. Scores too unfaithful to prune by raise nothing: see `Night.refused`.
    """
    with errors_of_storage(config.run):
        return _run_night(config, progress or Progress(), verbose, moment or datetime.now(UTC))


def _run_night(config: Config, progress: Progress, verbose: bool, moment: datetime) -> Night:
    run, settings = Run(config.run), config.nightly
    if settings.report:
        check_trackers(config.report.log_to)
    run.ledger()  # says so where there is no run at all
    config = config.model_copy(
        update={"source": open_source(config.source).resolved_settings(config.proxy.image_size)}
    )
    context = Context(config, run, progress, verbose)
    with Lease(run), log_file(run), closing(context):
        records = run.ledger()
        generation = _check(context, records)
        run.write_config(config)
        before = latest(run)
        first = before is None or before["generation"] != generation
        if before is None or first:
            before = _first_snapshot(context, records, generation, moment)
        refused = ""
        for name in (
            "index",
            "embed",
            "extrapolate",
            "select",
            *(["report"] if settings.report else []),
        ):
            try:
                advance(make_stage(name), context, records)
            except TrustError as error:
                refused = str(error)
                progress.say(f"select      {refused}")
            if name == "index":
                _check_classes(run, generation)
        fragments = run.fragments()
        files = _files(run, fragments, before)
        made = _contents(files) != _contents(before) or refused != before["refused"]
        if made:
            found = _judged(context, records, before, files, fragments)
            found |= {"refused": refused, "previous": before["name"]}
            found["refresh"] = advice(found, settings, config.trust)
            before = _write(context, records, generation, moment, files, found)
        else:
            progress.say(
                f"nightly     nothing new: {before['name']} is the snapshot of the run as it is"
            )
        gone = expire(run, settings.keep_snapshots, settings.keep_days, moment, clean=made)
        reasons = advice(before, settings, config.trust)
        for reason in reasons:
            progress.say(f"nightly     a refresh is advised: {reason}")
    about = {
        key: value
        for key, value in before.items()
        if key not in ("scores", "keep", "state", "unreadable")
    }
    return Night(run.uri, before["name"], made or first, about, reasons, refused, gone)


def _check(context: Context, records: dict[str, StageRecord]) -> str:
    """The run's generation. Raises RunError where a night could not go on from it without training."""
    run, config = context.run, context.config
    if tables_of(records):
        raise RunError(
            f"{run.uri}: was made by `raypipe extrapolate`, from tables; there is no source to look into at night"
        )
    prints: dict[str, str] = {}
    for name in LEARNT:
        stage, record = make_stage(name), records.get(name)
        if not stage.applies_to(config):
            continue
        wanted = fingerprint(
            name, stage.settings(config), [prints[need] for need in stage.needs if need in prints]
        )
        prints[name] = wanted
        if record is not None and record.fingerprint != wanted:
            raise RunError(
                f"{run.uri}: settings of stage {name} are others than those the run was made with, and a night trains and rescores nothing; "
                "run jobs/run.py with them first, or put them back"
            )
        if record is None or (
            name in FIXED and not (record.state == "done" and stage.complete(context, record))
        ):
            raise RunError(
                f"{run.uri}: stage {name} is not finished; finish the run with jobs/run.py first"
            )
    if not {"model.json", "model.safetensors", "fidelity.json"} <= storage.names(
        run.extrapolator_folder
    ):
        raise RunError(
            f"{run.uri}: the extrapolator is not finished; finish the run with jobs/run.py first"
        )
    about = [SeedManifest.read(run).as_json(), storage.read_json(run.proxy_manifest_file)]
    return fingerprint(prints["extrapolate"], *about)


def _check_classes(run: Run, generation: str) -> None:
    """Raise RunError where the index, made from nothing after the source was empty for a while, numbers classes in another way."""
    if storage.read_json(run.path(STATE, generation, "baseline.json"))["classes"] != list(
        run.classes().names
    ):
        raise RunError(
            f"{run.uri}: the classes of the source are others than those the proxy was trained on; use a new run folder, or put back "
            "what the source had"
        )


def _first_snapshot(
    context: Context, records: dict[str, StageRecord], generation: str, moment: datetime
) -> dict[str, Any]:
    """Note what the run was before its first night, and snapshot it. Raises RunError where it is not whole."""
    run, count = context.run, context.config.nightly.drift_samples
    fragments = run.fragments()
    readable = {fragment.fragment_id for fragment in fragments if not fragment.error}
    if records["extrapolate"].state != "done" or not readable == run.done("scores") == run.done(
        "embeddings"
    ):
        raise RunError(
            f"{run.uri}: not every sample of its index has a score; finish the run with jobs/run.py first"
        )
    folder = run.path(STATE, generation)
    if "baseline.json" not in storage.names(folder):
        storage.delete(run.path(STATE))  # of seed sets of the past
        parts = [fragment for fragment in fragments if not fragment.error]
        for which, seeds in (("old", False), ("seed", True)):
            table = draw(context, parts, count, seeds=seeds)
            storage.write_table(storage.join(folder, f"reference-{which}.parquet"), table)
        total = sum(fragment.samples for fragment in parts)
        about = {
            "samples": total,
            "fragments": sorted(readable),
            "classes": list(run.classes().names),
            "made": now(),
        }
        storage.write_json(storage.join(folder, "baseline.json"), about)
    files = _files(run, fragments, {"scores": [], "keep": []})
    found: dict[str, Any] = {**changes(_pieces(files), _pieces(files)), "share_since_seed": 0.0}
    found |= {"drift": None, "labels": None, "fidelity": None, "judging_cpu_seconds": 0.0}
    refused = (
        records["select"].error
        if "select" in records and records["select"].state == "refused"
        else ""
    )
    found |= {"refused": refused, "refresh": [], "previous": None, "state": []}
    return _write(context, records, generation, moment, files, found)


def _files(
    run: Run, fragments: Sequence[Fragment], before: dict[str, Any]
) -> dict[str, list[Entry]]:
    """The lists of a manifest: scores (with path and samples of each fragment), keep, and fragments of files that cannot be read."""
    of = {f"{fragment.fragment_id}.parquet": fragment for fragment in fragments}
    scores = [
        {**entry, "path": of[entry["file"]].path, "samples": of[entry["file"]].samples}
        for entry in entries_of(run, "scores", before["scores"])
    ]
    unreadable = [
        {"file": name, "path": fragment.path, "samples": 0}
        for name, fragment in sorted(of.items())
        if fragment.error
    ]
    return {
        "scores": scores,
        "keep": entries_of(run, "keep", before["keep"]),
        "unreadable": unreadable,
    }


def _contents(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (entry["file"], entry.get("hash", ""))
        for kind in ("scores", "keep", "unreadable")
        for entry in manifest[kind]
    ]


def _pieces(manifest: dict[str, Any]) -> list[Entry]:
    return [*manifest["scores"], *manifest["unreadable"]]


def _judged(
    context: Context,
    records: dict[str, StageRecord],
    before: dict[str, Any],
    files: dict[str, list[Entry]],
    fragments: Sequence[Fragment],
) -> dict[str, Any]:
    """Counts, drift and fidelity of what is new since the last snapshot."""
    run, config, settings = context.run, context.config, context.config.nightly
    known = {entry["file"] for entry in _pieces(before)}
    new = [
        item for item in fragments if not item.error and f"{item.fragment_id}.parquet" not in known
    ]
    folder = run.path(STATE, before["generation"])
    baseline = set(storage.read_json(storage.join(folder, "baseline.json"))["fragments"])
    since = sum(item.samples for item in fragments if item.fragment_id not in baseline)
    counts = changes(_pieces(before), _pieces(files))
    line = "; ".join(
        f"{kind} {counts['files'][kind]:,} files of {counts['samples'][kind]:,} samples"
        for kind in ("new", "changed", "removed")
    )
    context.progress.say(f"nightly     {line}")
    seconds, started = 0.0, time.process_time()
    rows = scan_new(run, new, settings.audit)
    drift, arrivals = _drift(context, before, new, folder)
    state = [_stored(run, folder, "arrivals", arrivals)]
    fidelity: dict[str, Any] = {"n": 0, "spearman": None, "note": ""}
    pairs = _earlier(run, before, "audit")
    if config.score not in config.measure.at_checkpoints:
        fidelity["note"] = (
            f"{config.score} needs training on the sample: new samples cannot be measured, and drift alone is looked at"
        )
    elif not settings.audit:
        fidelity["note"] = (
            "nightly.audit is 0: no new sample is measured, and drift alone is looked at"
        )
    else:
        if len(rows.candidates):
            measured, record = audit_new(context, new, rows.candidates)
            seconds += record.cpu_seconds
            pairs = pa.concat_tables([table for table in (measured, pairs) if len(table)]).slice(
                0, settings.audit
            )
        if len(pairs):
            predicted, values = pairs["predicted"].to_numpy(), pairs["measured"].to_numpy()
            fidelity = assess(predicted, values, _first_audit(run), config.extrapolate.seed)
    state.append(_stored(run, folder, "audit", pairs))
    if fidelity["spearman"] is not None:
        between = " to ".join(f"{bound:.2f}" for bound in fidelity["interval"] or [])
        context.progress.say(
            f"nightly     fidelity {fidelity['spearman']:.2f} ({between}) on {fidelity['n']} new samples"
        )
    elif fidelity["note"]:
        context.progress.say(f"nightly     fidelity unknown: {fidelity['note']}")
    return {
        **counts,
        "share_since_seed": since / max(1, counts["samples"]["total"]),
        "drift": drift,
        "labels": label_drift(rows.classes, np.array(SeedManifest.read(run).per_class, np.int64))
        if new
        else None,
        "fidelity": fidelity,
        "judging_cpu_seconds": round(seconds + time.process_time() - started, 2),
        "state": [entry for entry in state if entry],
    }


def _drift(
    context: Context, before: dict[str, Any], new: Sequence[Fragment], folder: str
) -> tuple[dict[str, Any], pa.Table]:
    """Drift of this night's samples and of all since the seed set; and a random draw of the latter, for the nights to come."""
    run, count = context.run, context.config.nightly.drift_samples
    old, seed = (
        storage.read_table(storage.join(folder, f"reference-{which}.parquet"))
        for which in ("old", "seed")
    )
    tonight = draw(context, new, count, seeds=False)
    earlier, limit = _earlier(run, before, "arrivals"), ALL
    if len(earlier):
        about = earlier.schema.metadata or {}
        limit = int(about.get(b"raypipe.below", str(ALL).encode()))
        there = run.done("scores")
        kept = pa.array([name in there for name in earlier["fragment"].to_pylist()], pa.bool_())
        earlier = earlier.replace_schema_metadata(None).filter(kept)
    # what was left out of the draw before cannot come back: from then on all are drawn by the same bound
    below = (
        tonight.filter(pa.array(tonight["order"].to_numpy() < np.uint64(limit)))
        if len(tonight)
        else tonight
    )
    both = lowest([earlier, below], count + 1)
    if len(both) > count:
        limit, both = int(both["order"][count].as_py()), both.slice(0, count)
    arrivals = both.replace_schema_metadata({"raypipe.below": str(limit)})
    windows = {"tonight": tonight} if len(tonight) else {}
    if len(earlier):
        windows["since"] = both
    found, referred = {}, set(old["sample_id"].to_pylist()) if len(old) else set()
    for window, table in windows.items():
        # samples of a changed file may be as they were: on both sides they would make a classifier worse than chance
        table = table.filter(
            pa.array([name not in referred for name in table["sample_id"].to_pylist()], pa.bool_())
        )
        drift = embedding_drift(
            *(embeddings_of(item) for item in (table, *_as_wide(old, seed, table)))
        )
        found[window] = drift.as_dict()
        told = (
            f"auc {drift.auc:.2f}, farther {drift.farther:.2f}"
            if drift.auc is not None and drift.farther is not None
            else drift.note
        )
        context.progress.say(f"nightly     drift {window}: {told}")
    return found, arrivals


def _as_wide(old: pa.Table, seed: pa.Table, like: pa.Table) -> list[pa.Table]:
    """References, of which an empty one has no width of its own."""
    return [table if len(table) else like.slice(0, 0) for table in (old, seed)]


def _earlier(run: Run, before: dict[str, Any], name: str) -> pa.Table:
    """A table of state that the last snapshot names; empty without one."""
    entry = next((entry for entry in before["state"] if entry["file"] == f"{name}.parquet"), None)
    return storage.read_table(file_uri(run, entry)) if entry is not None else pa.table({})


def _stored(run: Run, folder: str, name: str, table: pa.Table) -> Entry | None:
    """Put a table of state into the store; its entry."""
    if not len(table):
        return None
    uri = storage.join(folder, f"{name}.parquet")
    storage.write_table(uri, table)
    return {
        "file": f"{name}.parquet",
        "size": storage.info(uri).size,
        "stamp": "",
        "hash": keep_file_content(run, uri),
    }


def _first_audit(run: Run) -> tuple[np.ndarray, np.ndarray] | None:
    """Predicted and measured scores of the audit set that the run drew with its seed set."""
    if "audit.parquet" not in storage.names(run.extrapolator_folder):
        return None
    table = storage.read_table(run.held_out_predictions("audit"), ["predicted", "measured"])
    return table["predicted"].to_numpy(), table["measured"].to_numpy()


def _write(
    context: Context,
    records: dict[str, StageRecord],
    generation: str,
    moment: datetime,
    files: dict[str, list[Entry]],
    found: dict[str, Any],
) -> dict[str, Any]:
    """Write a snapshot and return its manifest. Names rise, also where a clock went back or a night follows within a second."""
    run, name = context.run, name_at(moment)
    newest = max(snapshot_names(run), default="")
    if name <= newest:
        name = name_at(datetime.strptime(newest, TIME).replace(tzinfo=UTC) + timedelta(seconds=1))
    settings = context.config.model_dump(
        mode="json", exclude={"run", "cluster", "nightly", "report"}
    )
    manifest = {
        "made": now(),
        "raypipe": __version__,
        "generation": generation,
        "config": fingerprint(settings),
        "index": records["index"].detail.get("listing"),
        "score": context.config.score,
        **found,
        **files,
    }
    remove_leftovers(run)
    write_snapshot(run, name, manifest)
    context.progress.say(
        f"nightly     snapshot {name}: {len(files['scores']):,} score shards, {len(files['keep'])} keep-lists"
    )
    return {"name": name, **manifest}
