"""Stop a run when too much of its source cannot be read (`source.max_reject_fraction`).

Rejects are counted from the first sample on. A run stops in two cases:

- It is certain: there are already more rejects than the fraction allows of *all* samples.
- It is clear: the lower confidence bound of their share, given the samples read so far, exceeds the
  fraction.

Fragments are read in a random order, sorted by a hash of their names (`hash_order`), so that those
read so far represent all, even in a sorted source. Rejects are clustered (one shard, one folder).
The interval therefore treats fragments as clusters, as in survey sampling: the exact binomial
interval of Clopper and Pearson (1934), with the number of samples replaced by the effective sample
size, and a correction for few clusters (Korn and Graubard, Survey Methodology 24, 1998).

Fewer than `MIN_REJECTS` rejects never stop a run, so that a few bad samples do not stop a small
source. A fraction of 0 stops at the first reject.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import pyarrow as pa

from raypipe import storage
from raypipe.errors import RejectError
from raypipe.runs.run import Run
from raypipe.text import percent

MIN_REJECTS = 10
"""Rejects, or unreadable files, below which a run never stops."""
MIN_SAMPLES, MIN_UNITS = 500, 8
"""Samples and units (fragments or seed shards) that must be read before their share is
extrapolated to the rest."""
ERROR_PROBABILITY = 1e-4
"""Probability that the true share lies below the confidence bound. Small, because the bound is
checked after every unit."""
MAX_KINDS = 100
"""Kinds of reasons that are counted separately."""

T = TypeVar("T")


class RejectCounter:
    """Rejects among the samples read so far, by kind of reason.

    Parameters
    ----------
    fraction : float
        `source.max_reject_fraction`.
    total : int
        Samples of the whole source.
    """

    def __init__(self, fraction: float, total: int) -> None:
        self.fraction, self.total = fraction, total
        self.seen = self.rejects = self._units = 0
        self._squares = self._products = self._sizes = 0
        self._kinds: Counter[str] = Counter()
        self._examples: dict[str, tuple[str, str]] = {}

    def add(self, samples: int, kinds: str) -> None:
        """Count a unit: its samples, and its rejects as `summarize_rejects` returns them."""
        groups = json.loads(kinds)
        rejects = sum(count for _, count, *_ in groups)
        for kind, count, *example in groups:
            if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
                kind = "other reasons"
            self._kinds[kind] += count
            self._examples.setdefault(kind, (example[0], example[1]))
        if samples:
            self._units += 1
            self.seen += samples
            self.rejects += rejects
            self._squares += rejects * rejects
            self._products += rejects * samples
            self._sizes += samples * samples

    def check(self, all_read: bool = False) -> None:
        """Raise RejectError if there are too many rejects.

        Parameters
        ----------
        all_read : bool
            Whether the samples read so far are the whole source, or were drawn from it one by one,
            so that they are not clustered.
        """
        if self.rejects < (MIN_REJECTS if self.fraction else 1):
            return
        if self.rejects > self.fraction * self.total or self.bound(all_read) > self.fraction:
            raise RejectError(self._message())

    def bound(self, all_read: bool = False) -> float:
        """Return the lower confidence bound of the share of rejects in the source.

        0 if too little was read. See `check` for `all_read`.
        """
        from scipy.special import betaincinv, ndtri, stdtrit

        if (
            self.seen < MIN_SAMPLES
            or not self.rejects
            or (self._units < MIN_UNITS and not all_read)
        ):
            return 0.0
        share, effective = self.rejects / self.seen, float(self.seen)
        if not all_read:
            # variance of the share as a ratio of two sums over clusters, compared with that of
            # independent samples: the design effect
            units = self._units
            residuals = self._squares - 2 * share * self._products + share * share * self._sizes
            variance = units / (units - 1) * residuals / self.seen**2
            independent = share * (1 - share) / self.seen
            effective = (
                self.seen / max(1.0, variance / independent) if independent else float(units)
            )
            few_clusters = ndtri(ERROR_PROBABILITY) / stdtrit(units - 1, ERROR_PROBABILITY)
            effective *= float(few_clusters) ** 2
        return float(betaincinv(share * effective, effective * (1 - share) + 1, ERROR_PROBABILITY))

    def outlook(self) -> str:
        """Return a sentence if the samples read so far foretell too many rejects; else nothing.

        The samples must have been drawn one by one from the source.
        """
        return foreseen_rejects(self.rejects, self.seen, self.total, self.fraction)

    def _message(self) -> str:
        share = self.rejects / max(1, self.seen)
        less = f"{share:.2g}"
        without_them = ""
        if less != "1":  # otherwise hardly any sample would be left
            without_them = (
                ", or continue without these samples: set source.max_reject_fraction to more than "
                + less
            )
        return (
            f"{self.rejects:,} of {self.seen:,} samples read so far were rejected "
            f"({percent(share, 3)}); source.max_reject_fraction allows {100 * self.fraction:g} % "
            f"of {self.total:,}. {self._most_common()}. Fix the source and rerun{without_them}; "
            "finished work is kept"
        )

    def _most_common(self) -> str:
        shown = []
        for kind, count in self._kinds.most_common(3):
            sample_id, reason = self._examples[kind]
            shown.append(f"{count:,} x {reason if count == 1 else kind} (such as {sample_id})")
        rest = sum(self._kinds.values()) - sum(count for _, count in self._kinds.most_common(3))
        return "; ".join(shown) + (f"; {rest:,} others" if rest else "")


def foreseen_rejects(rejects: int, drawn: int, total: int, fraction: float) -> str:
    """Return a sentence if a draw foretells that a run will stop; else nothing.

    Parameters
    ----------
    rejects, drawn : int
        Rejects among the samples that were drawn at random.
    total : int
        Samples of the whole source.
    fraction : float
        `source.max_reject_fraction`.
    """
    share = rejects / max(1, drawn)
    expected = share * total
    if not rejects or share <= fraction or (fraction and expected < MIN_REJECTS):
        return ""
    certain = rejects > fraction * total and rejects >= MIN_REJECTS
    return (
        f"{rejects:,} of {drawn:,} samples drawn cannot be read ({percent(share)}), and "
        f"source.max_reject_fraction allows {100 * fraction:g} % of all: the run "
        f"{'stops' if certain else 'probably stops'} in the stage embed. Fix the source, or set "
        f"source.max_reject_fraction to more than {share:.2g}"
    )


def summarize_rejects(rejects: Iterable[tuple[str, str]]) -> str:
    """Group rejects by kind of reason.

    Parameters
    ----------
    rejects : iterable of (str, str)
        sample_id and reason.

    Returns
    -------
    str
        JSON `[[kind, count, a sample_id, its reason], ...]`: a few kilobytes for any number of
        rejects.
    """
    counts: Counter[str] = Counter()
    examples: dict[str, tuple[str, str]] = {}
    for sample_id, reason in rejects:
        name = reason_kind(reason)
        if name not in counts and len(counts) >= MAX_KINDS:
            name = "other reasons"
        counts[name] += 1
        examples.setdefault(name, (sample_id[:200], reason[:200]))
    return json.dumps([[name, count, *examples[name]] for name, count in counts.most_common()])


def reason_kind(reason: str) -> str:
    """Return a reason without the details of one sample: names, numbers and quoted values."""
    reason = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "'...'", reason)
    # a path; but the name of a setting is no detail of a sample
    reason = re.sub(r"^(?!source\.transform: )\S*[./]\S*: ", "", reason)
    reason = re.sub(r"(also in ).*", r"\1another file", reason)
    return re.sub(r"-?\d[\d.,]*(?:x\d+)?", "N", reason)[:160]


def hash_order(units: Sequence[T], name: Callable[[T], str]) -> list[T]:
    """Sort units by a hash of their names: a reproducible order, unrelated to the source's."""
    return sorted(
        units, key=lambda unit: hashlib.blake2b(name(unit).encode(), digest_size=8).digest()
    )


class UnreadableFiles:
    """Files that cannot be read at all, and how much of the source is lost with them.

    The number of samples in them is unknown. They count by their share of the bytes and, from
    `MIN_REJECTS` files on, by their number.
    """

    def __init__(self) -> None:
        self._files = self._bytes = self._samples = self._unreadable = self._unreadable_bytes = 0
        self._reasons: list[tuple[str, str]] = []

    def add(self, size: int, rows: Sequence[dict[str, Any]]) -> None:
        """Count a file of `size` bytes, given its rows in the index."""
        self._files += 1
        self._bytes += size
        self._samples += sum(row["stop"] - row["start"] for row in rows)
        for row in rows[:1]:
            if row["error"]:
                self._unreadable += 1
                self._unreadable_bytes += size
                if len(self._reasons) < 10_000:
                    self._reasons.append((row["path"], row["error"]))

    def check(self, fraction: float) -> None:
        """Raise RejectError if too much of the source is in unreadable files."""
        if problem := self.problem(fraction):
            raise RejectError(problem)

    def problem(self, fraction: float) -> str:
        """Return why too much of the source is in unreadable files; "" if it is not."""
        if not self._unreadable:
            return ""
        share = self._unreadable_bytes / self._bytes if self._bytes else 0.0
        lost = self._samples * share / (1 - share) if share < 1 else float("inf")
        minimum = MIN_REJECTS if fraction else 0
        by_bytes = share > fraction and lost >= minimum
        by_number = self._unreadable > fraction * self._files and self._unreadable >= minimum
        if not by_bytes and not by_number:
            return ""
        groups = json.loads(summarize_rejects(self._reasons))
        reasons = "; ".join(
            f"{count:,} x {reason} (such as {path})" for _, count, path, reason in groups[:3]
        )
        needed = max(
            share if by_bytes else 0.0, self._unreadable / self._files if by_number else 0.0
        )
        return (
            f"{self._unreadable:,} of {self._files:,} files cannot be read, {percent(share, 3)} "
            f"of the bytes; source.max_reject_fraction allows {100 * fraction:g} %. {reasons}. "
            "Fix them, exclude them with source.include, or continue without them: "
            f"set source.max_reject_fraction to more than {needed:.2g}"
        )


SHOWN_FILES = 3
"""Unreadable files that an error names."""


def nothing_readable(uri: str, unreadable: Sequence[tuple[str, str]]) -> str:
    """Return the message about a source without a readable sample.

    `unreadable` has paths with reasons; the first few are named.
    """
    problems = "; ".join(f"{path}: {reason}" for path, reason in unreadable[:SHOWN_FILES])
    return f"{uri}: nothing can be read ({problems or 'no samples in any file'})"


REJECT_SCHEMA = pa.schema(
    [("sample_id", pa.string()), ("fragment", pa.string()), ("reason", pa.string())]
)


def write_rejects(run: Run, fragment_id: str, rejects: list[tuple[str, str]]) -> None:
    """Write the rejects of a fragment, given sample_id and reason of each."""
    rows = [
        {"sample_id": sample_id, "fragment": fragment_id, "reason": reason}
        for sample_id, reason in rejects
    ]
    storage.write_table(
        run.reject_shard(fragment_id),
        pa.Table.from_pylist(rows, schema=REJECT_SCHEMA),
    )
