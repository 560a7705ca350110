"""The files and bytes that a planned run writes, and its requests to storage."""

from __future__ import annotations

import math
from collections.abc import Mapping

from raypipe import storage
from raypipe.estimate.efforts import expected_plan
from raypipe.estimate.plan_rates import Rates
from raypipe.estimate.volumes import bytes_written
from raypipe.estimate.workload import Workload
from raypipe.runs.run import Run
from raypipe.runs.score_stream import CACHE_BYTES
from raypipe.runs.sizes import (
    INDEX_FILE_FRAGMENTS,
    MAX_DRAWN_FILES,
    SEED_SHARD_SAMPLES,
    gather_bytes,
)
from raypipe.selection import STRATEGIES
from raypipe.storage.remote_listing import PAGE

BLOCK = 4 << 20
"""Bytes of one read of a large file."""
SELECT_PASSES = 12
"""How often `select` reads the score shards by its default strategy, if they exceed its memory."""
SELECT_ROW = 40
"""Bytes that a sample takes in the memory of `select`."""
NAME_BYTES = 24
"""Bytes of the index for the name of one small file among many, compressed."""


def _shards(work: Workload) -> int:
    """Return the number of seed shards."""
    return math.ceil(work.seed / SEED_SHARD_SAMPLES)


def _gathering(work: Workload) -> int:
    """Return the requests to write the drawn samples and gather them into seed shards.

    Every task that gathers opens the files of all draws: size, footer and row group.
    """
    drawn = min(_shards(work), MAX_DRAWN_FILES)
    pixels = 3 * work.config.proxy.image_size**2 * (work.seed + work.audit)
    return drawn + 3 * drawn * math.ceil(pixels / gather_bytes(pixels))


def _proxy_files(work: Workload, proxies: int) -> int:
    """Return the files of the trainings of proxies: checkpoints, epochs, trajectory, manifest."""
    proxy = work.config.proxy
    trajectory = 0 if proxy.trajectory == "none" else proxy.passes * proxy.workers
    return proxies * (len(proxy.checkpoint_epochs()) + proxy.passes + trajectory + 1)


def files_written(work: Workload) -> dict[str, int]:
    """Return the number of files that each stage writes."""
    config, shards = work.config, _shards(work)
    count, proxies = len(config.proxy.checkpoint_epochs()), config.proxy.proxies
    mean_gradients = "moso" in config.measure.scores
    return {
        "index": math.ceil(work.fragments / INDEX_FILE_FRAGMENTS) + 1,
        "seed": 2 * shards + 1,
        # pseudo-labels: the labels of each shard; clusters, network, manifest, classes
        "label": shards * (1 + bool(work.audit)) + 4,
        "proxy": _proxy_files(work, proxies),
        "measure": shards * (1 + bool(work.audit))
        + proxies * count * (mean_gradients + config.measure.recalibrates)
        + shards * proxies,
        # images, scores and embeddings of each shard; the second proxy; manifest and classes
        "rehearse": 3 * shards + _proxy_files(work, config.proxy.parts) + 2,
        "embed": work.fragments * (1 + (config.proxy.cross_fits or config.proxy.repeats > 1)),
        "extrapolate": work.fragments + 8,
        # samples, plan and result, and one file for each training
        "pilot": 3 + _pilot_trainings(work),
        "select": len(config.select.keep),
        "report": 2,
    }


def requests_of(
    work: Workload, random_access: bool, read: Mapping[str, int], files: Mapping[str, int]
) -> dict[str, int]:
    """Return the requests to storage of each stage.

    Listings count by page, small files one by one, large ones block by block, and every file that
    is written counts. A Parquet footer is two requests (size, footer); at their end, embed and
    extrapolate read the footer of every output.
    """
    config, shards, fragments = work.config, _shards(work), work.fragments
    count = len(config.proxy.checkpoint_epochs())
    workers = config.proxy.workers * config.proxy.proxies
    source_pages = math.ceil(work.listed / PAGE)
    output_pages = math.ceil(2 * fragments / PAGE)
    scan = {
        "nothing": 0,
        "part": 3 * work.listed,
        "all": work.listed + math.ceil(read["index"] / BLOCK),
    }[work.scan_reads]
    whole = work.samples if random_access else fragments + math.ceil(read["embed"] / BLOCK)
    drawn = work.seed + work.audit if random_access else whole
    shard_footers, output_footers = 2 * 2 * shards, 2 * fragments
    reads = {
        "index": source_pages + scan,
        "seed": fragments + drawn + _gathering(work) + shard_footers,
        "label": shards * (1 + bool(work.audit)),
        "proxy": shards * workers,
        "measure": count * shards * (2 if "moso" in config.measure.scores else 1),
        "rehearse": 2 * shards + shards * workers,
        "embed": output_pages + fragments + whole + output_footers,
        # the audit of extremes reads all scores, then source and embeddings of its samples
        "extrapolate": output_pages
        + 3 * fragments
        + fragments
        + 2 * output_footers
        + (fragments + 2 * min(work.extremes, fragments) if work.extremes else 0),
        # scores and losses, seed shards, the samples in every training, results
        "pilot": 5 * fragments + 2 * 2 * shards + 2 * _pilot_trainings(work),
        "select": _select_passes(work) * fragments,
        "report": fragments,
    }
    return {stage: number + files[stage] for stage, number in reads.items()}


def _pilot_trainings(work: Workload) -> int:
    return len(expected_plan(work).trials()) if work.config.pilots else 0


def _select_passes(work: Workload) -> int:
    """Return how often `select` reads the score shards.

    With strategy auto, or one from outside, those of `ccs`.
    """
    strategy = STRATEGIES.get(work.config.select.strategy, STRATEGIES["ccs"])
    passes = 2 if work.samples * SELECT_ROW <= CACHE_BYTES else SELECT_PASSES
    # losses are a column of other files: size, footer and column
    return passes * (1 + 3 * (strategy.needs_loss or strategy.uses_difficulty))


def planned_bytes(work: Workload, rates: Rates, like: str | None) -> dict[str, int]:
    """Return the bytes of each folder of the run.

    Folders that grow with the samples are scaled from those of the run `like`.
    """
    small_files = work.scan_reads == "nothing"
    index = work.fragments * rates.index_bytes + small_files * work.samples * NAME_BYTES
    written = {"index": round(index), **bytes_written(work)}
    if like is None:
        return written
    run = Run(like)
    records = run.ledger()
    for folder, stage, samples in (
        ("seed", "seed", work.seed),
        ("embeddings", "embed", work.samples),
        ("scores", "extrapolate", work.samples),
    ):
        if stage in records and records[stage].state == "done" and records[stage].samples:
            folder_bytes = sum(file.size for file in storage.walk(run.path(folder)))
            written[folder] = round(folder_bytes * samples / records[stage].samples)
    return written
