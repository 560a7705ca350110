"""Which samples a keep-list holds: from its file, or cut in memory at a fraction without one."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from raypipe import storage
from raypipe.config import absolute_paths
from raypipe.runs.keep_files import keep_file
from raypipe.selection.hashing import string_array
from raypipe.view.lists import MarkLists
from raypipe.view.samples import Samples

HELD = 16
"""Lists held in memory, at a byte per sample."""


_NAME = re.compile(r"keep-(\d\.\d{2,})\.parquet")


@dataclass(frozen=True, eq=False)
class Kept:
    """`mask` has the samples that are kept, bool [n]; `origin` says where the list comes from."""

    mask: np.ndarray
    origin: str


class KeepLists:
    """The keep-lists of a run, at any fraction."""

    def __init__(self, samples: Samples, lists: MarkLists) -> None:
        self._samples, self._lists = samples, lists
        self._held: OrderedDict[tuple[float, str], Kept] = OrderedDict()
        self._lock = threading.Lock()

    def fractions(self) -> list[float]:
        """Return the fractions whose lists are stored, ascending."""
        names = self._stored_files()
        fractions = (_NAME.fullmatch(name) for name in names)
        return sorted(
            fraction
            for found in fractions
            if found is not None
            and 0 < (fraction := float(found[1])) <= 1
            # a list of another origin can have any name
            and keep_file(fraction) == found[0]
        )

    def _stored_files(self) -> dict[str, str]:
        """Return the files in the folder of keep-lists by name, with what changes with them."""
        files = storage.listing(self._samples.run.keep_folder)
        return {file.path: f"{file.stamp} {file.size}" for file in files}

    def at(self, fraction: float) -> Kept:
        """Return the list of a fraction.

        A list that is not stored is cut with the settings of the run, and the marks of this page.

        Raises
        ------
        RaypipeError
            If no such list can be cut.
        """
        stored = self._stored_files().get(keep_file(fraction))
        key = fraction, stored or f"marks {self._lists.version}"
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
