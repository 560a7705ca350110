"""Draw and decode the seed and audit samples of some fragments. Runs in tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raypipe.config import Config, SourceSettings
from raypipe.distributed.usage import Stopwatch
from raypipe.runs.drawn_samples import DrawnSamples, write_drawn
from raypipe.runs.duplicates import reject_duplicates
from raypipe.runs.rejects import summarize_rejects
from raypipe.runs.run import Run
from raypipe.runs.unit_result import UnitResult
from raypipe.sources import ClassMap, RawSample, open_source
from raypipe.sources.id_sampling import audit_rule, in_sample
from raypipe.stages.seed.plan import DrawUnit
from raypipe.vision.bit_depth import CHECKED, BitsInUse, bits_in_use
from raypipe.vision.decode import decode_batch
from raypipe.vision.own_code import transform_of


@dataclass(frozen=True)
class DrawResult(UnitResult):
    """What a task reports of a unit.

    `samples` are those of its fragments; `drawn` of them are in the seed or audit set, and
    `rejects` are among these. `bits_in_use` are the fields of a `BitsInUse`.
    """

    drawn: int = 0
    bits_in_use: dict[str, Any] = field(default_factory=dict)


def draw_samples(
    config: Config, run_uri: str, audit: float, ranges: int, unit: DrawUnit
) -> DrawResult:
    """Read the fragments of a unit and write the samples that are drawn.

    Parameters
    ----------
    config, run_uri
        The configuration and the run folder.
    audit
        Share of the samples outside the seed set that is in the audit set.
    ranges
        Ranges of hashes that the file is divided into; see `write_drawn`.
    unit
        The fragments.
    """
    watch, run, source = Stopwatch(), Run(run_uri), open_source(config.source)
    classes, size = run.classes(), config.proxy.image_size
    in_seed = in_sample(config.seed.fraction, config.seed.seed)
    in_audit = audit_rule(config.seed, audit)
    decoded: list[_DecodedFragment] = []
    for fragment in unit.fragments:
        read = source.read(
            run.with_members(fragment), lambda sample_id: in_seed(sample_id) or in_audit(sample_id)
        )
        raw = list(reject_duplicates(run, fragment, read, source.ids_can_repeat))
        decoded.append(_decode(raw, classes, size, config.source, config.proxy.channels))
    ids = [sample_id for item in decoded for sample_id in item.ids]
    samples = DrawnSamples(
        ids,
        np.array([label for item in decoded for label in item.labels], np.int32),
        np.concatenate([item.images for item in decoded]),
        np.array([not in_seed(sample_id) for sample_id in ids], bool),
    )
    rejects = [reject for item in decoded for reject in item.rejects]
    drawn, reasons = sum(item.drawn for item in decoded), summarize_rejects(rejects)
    bits = dataclasses.asdict(sum((item.bits for item in decoded), BitsInUse()))
    statistics = {"drawn": drawn, "rejects": reasons, "bits_in_use": bits}
    write_drawn(run, unit.name, samples, ranges, statistics)
    return DrawResult(
        unit.name, unit.samples, len(rejects), reasons, watch.lap(), drawn=drawn, bits_in_use=bits
    )


@dataclass(frozen=True)
class _DecodedFragment:
    """The drawn samples of one fragment.

    Attributes
    ----------
    drawn : int
        Samples drawn, rejects included.
    ids, labels : list
        Ids and class indices of the n usable ones.
    images : np.ndarray
        Their pixels, uint8 [n, 3, size, size].
    rejects : list of tuple
        Id and reason of the others.
    bits : BitsInUse
        Of the first few 16-bit images.
    """

    drawn: int
    ids: list[str]
    labels: list[int]
    images: np.ndarray
    rejects: list[tuple[str, str]]
    bits: BitsInUse


def _decode(
    raw: Sequence[RawSample],
    classes: ClassMap,
    size: int,
    source: SourceSettings,
    channels: int,
) -> _DecodedFragment:
    """Decode drawn samples, and separate those that cannot be used."""
    images, unreadable = decode_batch(
        raw,
        size,
        source.max_pixels,
        bit_depth=source.bit_depth,
        transform=transform_of(source),
        channels=channels,
    )
    bits = BitsInUse()
    for sample in raw if source.transform is None else ():
        if bits.images == CHECKED:
            break
        bits += bits_in_use(sample.image, source.max_pixels)
    labelled = [classes.label_of(sample) for sample in raw]
    labels = [label for label, _ in labelled]
    reasons = [
        reason or bad_label for reason, (_, bad_label) in zip(unreadable, labelled, strict=True)
    ]
    good = [
        row
        for row, reason in enumerate(reasons)
        if not reason and (labels[row] >= 0 or classes.clusters)
    ]
    return _DecodedFragment(
        len(raw),
        [raw[row].sample_id for row in good],
        [labels[row] for row in good],
        images[good],
        [(sample.sample_id, reason) for sample, reason in zip(raw, reasons, strict=True) if reason],
        bits,
    )
