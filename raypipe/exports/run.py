"""Export the samples of a keep-list from their source, in a format that training tools read.

Formats with images are folders of shards; see `raypipe.exports.shards` and `shard_formats`. Two
are a single file, `indices` and `list`; see `raypipe.exports.index_files`. Three describe all
samples, kept or not: `fiftyone`, `cleanlab` and `label-studio`; see `raypipe.exports.all_samples`.
One describes the list itself, `openlineage`; see `raypipe.exports.lineage`.
"""

from __future__ import annotations

from typing import Any

from raypipe import storage
from raypipe.config.export import ExportSettings
from raypipe.distributed.context import Context
from raypipe.errors import ConfigError, RaypipeError, RunError
from raypipe.exports.all_samples import export_all_samples
from raypipe.exports.hub import check_hub, check_hub_client, push_export
from raypipe.exports.index_files import export_single_file
from raypipe.exports.lance import check_lance
from raypipe.exports.lineage import export_lineage
from raypipe.exports.missing import MissingSample
from raypipe.exports.shard_task import STATE
from raypipe.exports.shards import ShardExport
from raypipe.keeplists.file import (
    check_has_images,
    find_keep_list,
    locate,
    split_gone,
)
from raypipe.progress import Progress
from raypipe.runs.lease import Lease
from raypipe.runs.ledger import injected_noise
from raypipe.runs.run import Run
from raypipe.stages.index.stage import IndexStage


def export_keep_list(
    run: Run, settings: ExportSettings, *, progress: Progress | None = None, verbose: bool = False
) -> dict[str, Any]:
    """Write the samples of a keep-list, or resume an export; see `raypipe.export`."""
    check_has_images(run)
    if settings.format == "lance":
        check_lance()
    if settings.push_to is not None:
        check_hub_client()
    config = run.config()
    if noise := injected_noise(run.ledger()):
        raise RunError(f"{run.uri}: {noise.warning}, so nothing can be exported")
    keep_list = find_keep_list(run, settings.keep, settings.snapshot)
    to = Run(settings.to).uri  # absolute: workers have other working directories
    if _is_within(to, config.source.uri):
        raise ConfigError(
            f"{to}: the output cannot be within the source, {config.source.uri}; give another place"
        )
    settings = settings.model_copy(update={"to": to})
    context = Context(config, run, progress or Progress(), verbose)
    if not IndexStage().complete(context, run.record("index")):
        context.progress.say(
            f"note: {config.source.uri} has changed since it was indexed; samples of changed files "
            "may be missing"
        )
    located = locate(run, keep_list, settings.snapshot)
    if settings.format == "openlineage":
        return export_lineage(run, keep_list, located, settings)
    if settings.of_all_samples:
        return export_all_samples(context, keep_list, located, settings)
    if not settings.in_shards:
        return export_single_file(context, keep_list, located, settings)
    gone: list[MissingSample] = []
    if settings.snapshot is not None:
        located, lost = split_gone(run, keep_list, located)
        gone = [
            MissingSample(sample_id, "its file changed or went away since the snapshot")
            for sample_id in lost
        ]
    export = ShardExport(context, keep_list, located, gone, settings)
    export.check_folder()
    if settings.push_to is not None:
        check_hub(settings.push_to, located.fingerprint, force=settings.force)
    with Lease(Run(storage.join(to, STATE))):
        result = export.write()
        if settings.push_to is not None:
            push_export(to, settings.push_to, located.fingerprint, force=settings.force)
        return result


def _is_within(inner: str, outer: str) -> bool:
    """Return whether a path is below the folder of a source."""
    try:
        root = storage.filesystem(storage.glob_root(outer))[1].rstrip("/")
    except RaypipeError:  # not a file system, such as digits://
        return False
    return (storage.filesystem(inner)[1] + "/").startswith(root + "/")
