"""Which samples a keep-list holds: from its file, or cut in memory at a fraction without one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from raypipe import storage
from raypipe.config import absolute_paths
from raypipe.runs.keep_files import keep_file, keep_metadata
from raypipe.selection.hashing import string_array
from raypipe.view.lists import MarkLists
from raypipe.view.samples import Samples

HELD = 8
"""Lists held in memory, at a byte per sample."""


@dataclass(frozen=True, eq=False)
class Kept:
    """`mask` has the samples that are kept, bool [n]; `origin` says where the list comes from."""

    mask: np.ndarray
    origin: str


class KeepLists:
    """The keep-lists of a run, at any fraction."""

    def __init__(self, samples: Samples, lists: MarkLists) -> None:
        self._samples, self._lists = samples, lists
        self._held: OrderedDict[tuple[float, int], Kept] = OrderedDict()
        self._lock = threading.Lock()

    def fractions(self) -> list[float]:
        """Return the fractions whose lists are stored, ascending."""
        run = self._samples.run
        files = [name for name in storage.names(run.keep_folder) if name.endswith(".parquet")]
        stored = (keep_metadata(run.keep_list(name)).get("fraction") for name in files)
        return sorted({float(fraction) for fraction in stored if fraction is not None})

    def at(self, fraction: float) -> Kept:
        """Return the list of a fraction.

        A list that is not stored is cut with the settings of the run, and the marks of this page.

        Raises
        ------
        RaypipeError
            If no such list can be cut.
        """
        stored = keep_file(fraction) in storage.names(self._samples.run.keep_folder)
        key = fraction, -1 if stored else self._lists.version
        with self._lock:
            if key not in self._held:
                self._held[key] = self._stored(fraction) if stored else self._cut(fraction)
            self._held.move_to_end(key)
            while len(self._held) > HELD:
                self._held.popitem(last=False)
            return self._held[key]

    def _stored(self, fraction: float) -> Kept:
        file = keep_file(fraction)
        table = storage.read_table(self._samples.run.keep_list(file), ["sample_id"])
        mask, gone = self._samples.ids.find(string_array(table["sample_id"]))
        note = f"; {len(gone):,} of its samples have no score any more" if len(gone) else ""
        return Kept(mask, f"{file}{note}")

    def _cut(self, fraction: float) -> Kept:
        from raypipe.stages.select.stage import kept_samples  # imports Ray: only where it is needed

        config = self._samples.run.config()
        changes = {"keep": (fraction,), **self._lists.select_settings()}
        settings = absolute_paths(
            config.model_copy(update={"select": config.select.model_copy(update=changes)})
        )
        mask = kept_samples(self._samples.run, settings.select, settings.trust)
        if len(mask) != len(self._samples):
            raise ValueError("the scores changed; start `raypipe view` again")
        return Kept(mask, f"cut for this page with strategy {config.select.strategy}; not stored")
