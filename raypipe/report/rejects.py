"""Rejected samples and unreadable files in the report."""

from __future__ import annotations

from collections import Counter

from raypipe import storage
from raypipe.report.schema import Rejects
from raypipe.runs.run import Run

MAX_REASONS = 20
"""Reject reasons, and unreadable files, that are listed."""
MAX_DISTINCT_REASONS = 10_000
"""Reject reasons that are counted one by one; the others are counted together."""


def reject_figures(run: Run) -> Rejects:
    """Return rejected samples by reason, and the files that could not be read at all.

    Such a file has one row in `rejects/`, which does not count as a sample.
    """
    unreadable = {fragment.fragment_id: fragment for fragment in run.fragments() if fragment.error}
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    columns = ["sample_id", "fragment", "reason"]
    for _, table in storage.iter_tables(run.rejects_folder, columns, threads=storage.READERS):
        for sample_id, fragment, reason in zip(
            *(table[name].to_pylist() for name in columns), strict=True
        ):
            if fragment in unreadable:
                continue
            reason = reason or "no reason given"
            if reason not in reasons and len(reasons) >= MAX_DISTINCT_REASONS:
                reason = "other reasons"
            reasons[reason] += 1
            examples.setdefault(reason, sample_id)
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    files = sorted(unreadable.values(), key=lambda fragment: fragment.path)
    return {
        "samples": reasons.total(),
        "reasons": [
            {"reason": reason, "samples": number, "example": examples[reason]}
            for reason, number in ordered[:MAX_REASONS]
        ],
        "distinct_reasons": len(reasons),
        "files": len(files),
        "unreadable_files": [
            {"path": fragment.path, "reason": fragment.error} for fragment in files[:MAX_REASONS]
        ],
    }
