"""Images of samples, read from the source when the page asks for them."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict

import numpy as np

from raypipe.errors import RaypipeError
from raypipe.report.thumbnails import Size, Thumbnail, fragment_images, untransformed
from raypipe.runs.run import Run
from raypipe.sources import Fragment, Source, open_source
from raypipe.view.samples import Samples
from raypipe.vision.own_code import Transform, transform_to_show

SIZES = {"tile": Size(144, 85), "detail": Size(384, 90)}
HELD_BYTES = 64 << 20
"""Images held in memory."""


class Images:
    """Reads and holds the images of a run. Threads can share it."""

    def __init__(self, samples: Samples) -> None:
        self._samples, self._lock = samples, threading.Lock()
        self._held: OrderedDict[tuple[int, str], Thumbnail] = OrderedDict()
        self._bytes = 0

    @functools.cached_property
    def _opened(self) -> tuple[Run, Source, Transform | None, dict[str, Fragment]]:
        run = self._samples.run
        settings = run.config().source
        fragments = {fragment.fragment_id: fragment for fragment in run.fragments()}
        return run, open_source(settings), transform_to_show(settings), fragments

    @functools.cached_property
    def note(self) -> str:
        """What is missing from all images, as a sentence; "" if nothing is."""
        try:
            _, source, transform, _ = self._opened
        except (RaypipeError, OSError) as error:
            return f"The source cannot be opened, so no images are shown: {error}"
        return untransformed(source.settings, transform).strip()

    def of(self, rows: list[int], size: str) -> dict[int, Thumbnail]:
        """Return an image, or the reason why there is none, for every row."""
        with self._lock:
            result = {row: self._held[row, size] for row in rows if (row, size) in self._held}
        by_shard: dict[int, list[int]] = {}
        for row in rows:
            if row not in result:
                by_shard.setdefault(self._samples.ids.shard_of(row), []).append(row)
        for shard, missing in by_shard.items():
            result |= self._read(shard, missing, size)
        return result

    def _read(self, shard: int, rows: list[int], size: str) -> dict[int, Thumbnail]:
        try:
            run, source, transform, fragments = self._opened
        except (RaypipeError, OSError):
            return {row: Thumbnail(reason=self.note) for row in rows}
        ids = self._samples.ids.of_rows(np.array(rows))
        fragment = fragments.get(self._samples.shards[shard])
        sizes = dict.fromkeys(ids, SIZES[size])
        loaded = fragment_images(run, source, transform, fragment, sizes)
        found = {row: loaded.images[name] for row, name in zip(rows, ids, strict=True)}
        if not loaded.error:  # an error can pass: the next request tries again
            self._hold(found, size)
        return found

    def _hold(self, images: dict[int, Thumbnail], size: str) -> None:
        with self._lock:
            for row, image in images.items():
                if (row, size) not in self._held:
                    self._held[row, size] = image
                    self._bytes += len(image.uri)
            while self._bytes > HELD_BYTES:
                _, dropped = self._held.popitem(last=False)
                self._bytes -= len(dropped.uri)
