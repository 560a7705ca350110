"""When a run stops because too much of its source cannot be read: `source.max_reject_fraction`.

Rejects are counted from the first sample on. A run stops when they are certain to exceed the fraction, because they are more than that
share of *all* samples already, or when the samples seen so far make it clear: the lower end of a confidence interval of their share
lies above it. Fragments are read in an order drawn by a hash of their names (`hash_order`), so that those seen so far stand for all,
also where a source is sorted. Rejects come in heaps (one shard, one folder); the interval therefore counts fragments as clusters, as
surveys do: the exact binomial interval (Clopper and Pearson, 1934) at the effective sample size, with the correction for few
clusters (Korn and Graubard, Survey Methodology 24, 1998).

Fewer than `LEAST_REJECTS` rejects never stop a run, so that a small source is not stopped by a few; a fraction of 0 stops at the first.
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
from raypipe.runs.layout import Run

LEAST_REJECTS = 10
LEAST_SAMPLES, LEAST_UNITS = 500, 8
"""Samples and units (fragments, seed shards) that have to be seen before their share says something of the rest."""
DOUBT = 1e-4
"""Probability that the share of all lies below the confidence bound. Small, since the bound is looked at after every unit."""
MOST_KINDS = 100

T = TypeVar("T")


class RejectTally:
    """Rejects among the samples seen so far, by kind of reason.

    fraction  source.max_reject_fraction
    total     samples of the source; of which those seen are a part
    """

    def __init__(self, fraction: float, total: int) -> None:
        self.fraction, self.total = fraction, total
        self.seen = self.rejects = self._units = 0
        self._squares = self._products = self._sizes = 0
        self._kinds: Counter[str] = Counter()
        self._examples: dict[str, tuple[str, str]] = {}

    def add(self, samples: int, kinds: str) -> None:
        """Count a unit: its samples, and its rejects as `summarize` gives them."""
        found = json.loads(kinds)
        rejects = sum(count for _, count, *_ in found)
        for kind, count, *example in found:
            if kind not in self._kinds and len(self._kinds) >= MOST_KINDS:
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
        """Raises RejectError where the rejects are too many. `all_read`: those seen are the whole, or drawn from the whole one by one."""
        if self.rejects < (LEAST_REJECTS if self.fraction else 1):
            return
        if self.rejects > self.fraction * self.total or self.bound(all_read) > self.fraction:
            raise RejectError(self.words())

    def bound(self, all_read: bool = False) -> float:
        """The lower confidence bound of the share of rejects in the source; 0 where too little was seen."""
        from scipy.stats import beta, norm, t

        if (
            self.seen < LEAST_SAMPLES
            or not self.rejects
            or (self._units < LEAST_UNITS and not all_read)
        ):
            return 0.0
        share, effective = self.rejects / self.seen, float(self.seen)
        if not all_read:
            units = self._units
            residuals = self._squares - 2 * share * self._products + share * share * self._sizes
            variance = units / (units - 1) * residuals / self.seen**2
            simple = share * (1 - share) / self.seen
            effective = self.seen / max(1.0, variance / simple) if simple else float(units)
            effective *= float(norm.isf(DOUBT) / t.isf(DOUBT, units - 1)) ** 2
        return float(beta.ppf(DOUBT, share * effective, effective * (1 - share) + 1))

    def words(self) -> str:
        """What is wrong, how often, and what would help."""
        return (
            f"{self.rejects:,} of {self.seen:,} samples read so far were rejected ({_percent(self.rejects, self.seen)}); "
            f"source.max_reject_fraction allows {100 * self.fraction:g} % of {self.total:,}. {self._commonest()}. "
            f"Mend the source, or go on without these samples: set source.max_reject_fraction to more than "
            f"{self.rejects / max(1, self.seen):.2g}; what is done is kept"
        )

    def _commonest(self) -> str:
        shown = []
        for kind, count in self._kinds.most_common(3):
            sample_id, reason = self._examples[kind]
            shown.append(f"{count:,} x {reason if count == 1 else kind} (such as {sample_id})")
        rest = sum(self._kinds.values()) - sum(count for _, count in self._kinds.most_common(3))
        return "; ".join(shown) + (f"; {rest:,} others" if rest else "")


def summarize(rejects: Iterable[tuple[str, str]]) -> str:
    """(sample_id, reason) of rejects -> JSON [[kind, count, a sample_id, its reason], ...], a few kilobytes whatever their number."""
    counts: Counter[str] = Counter()
    examples: dict[str, tuple[str, str]] = {}
    for sample_id, reason in rejects:
        name = kind(reason)
        if name not in counts and len(counts) >= MOST_KINDS:
            name = "other reasons"
        counts[name] += 1
        examples.setdefault(name, (sample_id[:200], reason[:200]))
    return json.dumps([[name, count, *examples[name]] for name, count in counts.most_common()])


def kind(reason: str) -> str:
    """A reason without what is of one sample in it: names, numbers and quoted values."""
    reason = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "'...'", reason)
    reason = re.sub(r"^\S*[./]\S*: ", "", reason)
    reason = re.sub(r"(also in ).*", r"\1another file", reason)
    return re.sub(r"-?\d[\d.,]*(?:x\d+)?", "N", reason)[:160]


def hash_order(units: Sequence[T], name: Callable[[T], str]) -> list[T]:
    """The units in an order that has nothing to do with their place in the source, the same every time."""
    return sorted(
        units, key=lambda unit: hashlib.blake2b(name(unit).encode(), digest_size=8).digest()
    )


class FileTally:
    """Files that cannot be read at all, and what is lost with them.

    Nobody knows how many samples are in them: they count by their share of the bytes, and, from `LEAST_REJECTS` on, by their number.
    """

    def __init__(self) -> None:
        self._files = self._bytes = self._samples = self._broken = self._broken_bytes = 0
        self._reasons: list[tuple[str, str]] = []

    def add(self, size: int, rows: Sequence[dict[str, Any]]) -> None:
        """Count a file of `size` bytes by its rows of the index."""
        self._files += 1
        self._bytes += size
        self._samples += sum(row["stop"] - row["start"] for row in rows)
        for row in rows[:1]:
            if row["error"]:
                self._broken += 1
                self._broken_bytes += size
                if len(self._reasons) < 10_000:
                    self._reasons.append((row["path"], row["error"]))

    def check(self, fraction: float) -> None:
        """Raises RejectError where too much is in files that cannot be read."""
        if not self._broken:
            return
        share = self._broken_bytes / self._bytes if self._bytes else 0.0
        lost = self._samples * share / (1 - share) if share < 1 else float("inf")
        least = LEAST_REJECTS if fraction else 0
        by_bytes = share > fraction and lost >= least
        by_number = self._broken > fraction * self._files and self._broken >= least
        if not by_bytes and not by_number:
            return
        found = json.loads(summarize(self._reasons))
        reasons = "; ".join(
            f"{count:,} x {reason} (such as {path})" for _, count, path, reason in found[:3]
        )
        needed = max(share if by_bytes else 0.0, self._broken / self._files if by_number else 0.0)
        raise RejectError(
            f"{self._broken:,} of {self._files:,} files cannot be read, {_percent(share, 1)} of the bytes; source.max_reject_fraction "
            f"allows {100 * fraction:g} %. {reasons}. Mend them, leave them out with source.include, or go on without them: "
            f"set source.max_reject_fraction to more than {needed:.2g}"
        )


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / max(1e-9, whole):.3g} %"


REJECT_SCHEMA = pa.schema(
    [("sample_id", pa.string()), ("fragment", pa.string()), ("reason", pa.string())]
)


def write_rejects(run: Run, fragment_id: str, rejects: list[tuple[str, str]]) -> None:
    """Every sample of a fragment that could not be read, with its reason."""
    rows = [
        {"sample_id": sample_id, "fragment": fragment_id, "reason": reason}
        for sample_id, reason in rejects
    ]
    storage.write_table(
        run.path("rejects", f"{fragment_id}.parquet"),
        pa.Table.from_pylist(rows, schema=REJECT_SCHEMA),
    )
