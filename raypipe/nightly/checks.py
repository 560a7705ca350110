"""Checks that a night can continue a run without any training."""

from __future__ import annotations

from collections.abc import Sequence

from raypipe import storage
from raypipe.distributed.context import Context
from raypipe.errors import RunError
from raypipe.nightly.state import Baseline
from raypipe.pipeline import make_stage
from raypipe.runs.ledger import StageRecord, extrapolated_tables, fingerprint
from raypipe.runs.manifests import SeedManifest
from raypipe.runs.run import Run
from raypipe.sources import Fragment
from raypipe.stages.extrapolate.model import model_files

LEARNED = ("index", "seed", "label", "proxy", "measure", "rehearse", "embed", "extrapolate")
"""Stages that must have run once with the same settings."""
UNCHANGED = ("seed", "label", "proxy", "measure", "rehearse")
"""Those of them that a night does not run again; they must be complete."""


def check_finished(context: Context, records: dict[str, StageRecord]) -> str:
    """Return the generation of a run: a fingerprint of its seed set, proxy and extrapolator.

    Raises
    ------
    RunError
        If a night cannot continue the run without training: it is not finished, its settings
        changed, or it was written from tables.
    """
    run, config = context.run, context.config
    if extrapolated_tables(records):
        raise RunError(
            f"{run.uri}: its scores were extrapolated from tables, so no proxy can score new "
            "samples; extrapolate to their embeddings with `raypipe extrapolate`"
        )
    if config.embed.table is not None:
        raise RunError(
            f"{run.uri}: embed.from names a table, which has no embeddings of new samples; run "
            "jobs/run.py with the new table, or use embed.model instead"
        )
    fingerprints: dict[str, str] = {}
    for name in LEARNED:
        stage, record = make_stage(name), records.get(name)
        if not stage.applies_to(config):
            continue
        inputs = [fingerprints[need] for need in stage.needs if need in fingerprints]
        expected = fingerprints[name] = stage.fingerprint(config, context.code, inputs)
        if record is not None and record.fingerprint != expected:
            raise RunError(
                f"{run.uri}: settings of stage {name} have changed since the run, and a night "
                "neither trains nor scores again; run jobs/run.py with the new settings first, "
                "or restore the old ones"
            )
        if record is None or (
            name in UNCHANGED and not (record.state == "done" and stage.complete(context, record))
        ):
            raise RunError(
                f"{run.uri}: stage {name} is not finished; finish the run with jobs/run.py first"
            )
    files = {"fidelity.json"} | model_files(config, run)
    if not files <= storage.names(run.extrapolator_folder):
        raise RunError(
            f"{run.uri}: the extrapolator is not finished; finish the run with jobs/run.py first"
        )
    manifests = [SeedManifest.read(run).as_json(), storage.read_json(run.proxy_manifest_file)]
    return fingerprint(fingerprints["extrapolate"], *manifests)


def check_complete(
    run: Run, records: dict[str, StageRecord], fragments: Sequence[Fragment]
) -> None:
    """Raise RunError unless every readable fragment of the index is embedded and scored."""
    readable = {fragment.fragment_id for fragment in fragments if not fragment.error}
    complete = readable == run.done("scores") == run.done("embeddings")
    if records["extrapolate"].state != "done" or not complete:
        raise RunError(
            f"{run.uri}: not every sample of its index has a score; "
            "finish the run with jobs/run.py first"
        )


def check_classes(run: Run, generation: str) -> None:
    """Raise RunError if the classes differ from those of the baseline.

    This happens if the source was empty for a while: the index is then built from scratch, and can
    number the classes differently.
    """
    if Baseline.read(run, generation).classes != run.classes().names:
        raise RunError(
            f"{run.uri}: the classes of the source differ from those the proxy was trained on; "
            "use a new run folder, or restore the source"
        )
