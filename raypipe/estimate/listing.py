"""The listing of a source, and what it and the opened files say of all of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from raypipe.config import SourceSettings
from raypipe.errors import SourceError
from raypipe.estimate.sampling import read_previews, spread_places
from raypipe.runs.rejects import UnreadableFiles
from raypipe.sources import Source, SourceFile, StatedNames, open_source
from raypipe.sources.classes import LabelSpellings
from raypipe.sources.splits import SplitOfFiles
from raypipe.sources.types import Preview
from raypipe.sources.used_settings import refuse_unused_settings

LabelCounts = Counter[int | str | None]
"""Label (None without one) -> number of samples."""


@dataclass(frozen=True)
class Listing:
    """The files of a source, and previews of some of them.

    Attributes
    ----------
    source, files
        The source and all of its files.
    previews
        Row in `files` -> preview.
    listed
        Labels of each file as its name or the listing states them; None if they do not.
    """

    source: Source
    files: Sequence[SourceFile]
    previews: dict[int, Preview]
    listed: Sequence[LabelCounts | None]

    @classmethod
    def read(cls, settings: SourceSettings, samples: int, seed: int) -> Listing:
        """List a source, and open some of its files to draw about `samples` samples.

        Raises
        ------
        ConfigError
            If a setting has no effect on the format.
        SourceError
            If nothing can be listed, or the format is unknown.
        """
        source = open_source(settings)
        refuse_unused_settings(settings, source.format)
        files = list(source.files())
        places = spread_places(source, files, samples, seed)
        previews = read_previews(source, files, places, seed)
        return cls(source, files, previews, [source.listed_labels(file) for file in files])

    def labels(self) -> LabelCounts:
        """Return all labels that are known."""
        return sum(self.labels_by_file(), Counter())

    def labels_by_file(self) -> list[LabelCounts]:
        """Return the labels that are known of each file, if any are."""
        counts = [
            listed if listed is not None else self.previews[row].labels
            for row, listed in enumerate(self.listed)
            if listed is not None or row in self.previews
        ]
        return [labels for labels in counts if labels.total()]

    def class_names(self) -> tuple[str, ...] | None:
        """Return the class names that the opened files state.

        Raises
        ------
        SourceError
            If these or the splits of the files contradict one another, as a run would.
        """
        stated, split = StatedNames(self.source.labels_by_name), SplitOfFiles()
        spellings = LabelSpellings()
        for row, preview in sorted(self.previews.items()):
            path = self.files[row].path
            stated.add(path, preview.class_names, preview.labels)
            split.add(path, preview.split)
            labels = {label for label in preview.labels if label is not None}
            spellings.add(path, labels, preview.padded)
        if spellings.mixed and stated.names is None:
            raise SourceError(spellings.mixed)
        return stated.names

    def total(self) -> tuple[int, bool]:
        """Return the number of samples, and whether it was counted rather than estimated.

        Files that were not opened are assumed to have as many samples per byte as the others.
        """
        samples = {
            row: float(labels.total())
            for row, labels in enumerate(self.listed)
            if labels is not None
        }
        opened = {row: preview for row, preview in self.previews.items() if row not in samples}
        samples |= {row: preview.samples for row, preview in opened.items()}
        unseen = [row for row, file in enumerate(self.files) if row not in samples and file.size]
        opened_bytes = sum(self.files[row].size for row in opened)
        rest = (
            sum(self.files[row].size for row in unseen)
            * sum(preview.samples for preview in opened.values())
            / opened_bytes
            if opened_bytes
            else 0.0
        )
        counted = not unseen and all(preview.counted for preview in opened.values())
        return round(sum(samples.values()) + rest), counted

    def fragments(self, total: int, fragment_samples: int) -> int:
        """Return the estimated number of fragments."""
        known = [labels.total() for labels in self.listed if labels is not None]
        known += [
            round(preview.samples)
            for row, preview in self.previews.items()
            if self.listed[row] is None
        ]
        per_file = sum(math.ceil(samples / fragment_samples) for samples in known)
        estimate = round(per_file / max(1, len(known)) * len(self.files))
        return max(estimate, math.ceil(total / fragment_samples))

    def unreadable(self) -> tuple[tuple[str, str], ...]:
        """Return path and error of every opened file that cannot be read."""
        return tuple(
            (self.files[row].path, preview.error)
            for row, preview in sorted(self.previews.items())
            if preview.error
        )

    def unreadable_problem(self, fraction: float) -> str:
        """Return why a run stops because of the opened files that cannot be read; "" if not."""
        tally = UnreadableFiles()
        for row, preview in sorted(self.previews.items()):
            file = self.files[row]
            tally.add(
                file.size,
                [{"path": file.path, "error": preview.error, "start": 0, "stop": preview.samples}],
            )
        return tally.problem(fraction)
