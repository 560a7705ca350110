"""The bytes that a run reads and writes."""

from __future__ import annotations

from raypipe.config import Config
from raypipe.estimate import rates
from raypipe.estimate.workload import Workload
from raypipe.runs.layout import STAGE_FOLDERS
from raypipe.runs.proxy_roles import ProxyRoles

FOOTER_BYTES = 65_536.0
"""Bytes read of a file to count its samples, if that does not require all of it."""


def bytes_read(work: Workload, stored: float, random_access: bool) -> dict[str, int]:
    """Return the bytes of the source that each stage reads.

    Parameters
    ----------
    work
        The run.
    stored
        Bytes of the samples that are used.
    random_access
        Whether single samples can be read; otherwise the stage `seed` reads what lies between.
    """
    index = {
        "nothing": 0.0,
        "part": min(work.listed_bytes, work.listed * FOOTER_BYTES),
        "all": work.listed_bytes,
    }[work.scan_reads]
    drawn = (work.seed + work.audit) / max(1, work.samples) if random_access else 1.0
    return {"index": round(index), "seed": round(stored * min(1.0, drawn)), "embed": round(stored)}


def bytes_written(work: Workload) -> dict[str, int]:
    """Return the bytes of each folder of the run."""
    config, proxy, measure = work.config, work.config.proxy, work.config.measure
    width = work.proxy_width
    weights = rates.parameters(proxy.model, proxy.image_size)
    checkpoint = 4 * (weights + width * work.classes) * proxy.parts
    count = len(proxy.checkpoint_epochs())
    # of one repeat
    checkpoints = count * checkpoint
    trajectory = (
        0 if proxy.trajectory == "none" else proxy.passes * work.seed * (24 + 2 * work.classes)
    )
    image = 3 * proxy.image_size**2 + 40
    drawn = work.seed + work.audit
    measured = sum(map(measure.uses_epoch, proxy.checkpoint_epochs()))
    proxies = len(ProxyRoles.of(config).seen_by(0))
    # with cross-fitting, two viewers of each repeat embed a sample; those of part 0 have an
    # embedding by proxy 0 as well
    views = proxy.repeats - 1.0
    if proxy.cross_fits:
        views = 2 * proxy.repeats - 1 + 1 / proxy.parts
    if config.embed.has_features and not ProxyRoles.of(config).single:
        views += 1  # those by proxy 0 are there, too
    feature = 4 if config.embed.dtype == "float32" else 2
    labeller = 4 * _label_parameters(config) + 60 * drawn
    rehearsal = (work.seed * image + trajectory) // 2 + checkpoints + work.seed * (4 * width + 60)
    folder_bytes = {
        "seed": drawn * image,
        "labels": config.unsupervised * labeller,
        "proxy": proxy.repeats * (checkpoints + trajectory),
        "measured": (
            proxy.repeats * checkpoints * (("moso" in measure.scores) + measure.recalibrates)
            + work.seed * (60 + 12 * measured * proxies)
        ),
        "rehearsal": config.rehearses * rehearsal,
        "embeddings": work.samples * (feature * work.embedding_width + 150),
        "views": round(views * work.samples * (feature * width + 60)),
        "extrapolator": 2 * work.seed * (4 * work.embedding_values + 100),
        "scores": work.samples * 30,
        "pilot": config.pilots * 400 * config.pilot.max_repeats,
        "keep": round(sum(config.select.keep) * work.samples * 25),
    }
    return {
        folder: folder_bytes[folder]
        for folders in STAGE_FOLDERS.values()
        for folder in folders
        if folder_bytes.get(folder)
    }


def _label_parameters(config: Config) -> int:
    """Return the weights of the network whose features give samples their pseudo-labels."""
    settings = config.pseudo_labels
    if settings.features == "backbone":
        return rates.parameters(settings.model, settings.image_size)
    return rates.parameters(config.proxy.model, config.proxy.image_size)
