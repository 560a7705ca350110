"""What the page asks for, as values for JSON."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from raypipe import storage
from raypipe.errors import ConfigError, RaypipeError, RunError
from raypipe.report.text import label_name
from raypipe.runs.ledger import extrapolated_tables, scored_by, without_images
from raypipe.runs.run import Run
from raypipe.runs.score_shards import MEASURED_SCORE
from raypipe.runs.score_stream import read_embedding_columns
from raypipe.runs.untrusted import DAMAGE_ERRORS
from raypipe.view.images import SIZES, Images
from raypipe.view.kept import KeepLists, Kept
from raypipe.view.lists import MarkLists
from raypipe.view.neighbours import NeighbourSearch
from raypipe.view.query import MARKS, Query
from raypipe.view.samples import AUDIT, REST, SEED, Samples

PAGE_SAMPLES = 60
MAX_PAGE_SAMPLES = 240
MAX_IMAGES = 64
"""Images of one answer."""
NEIGHBOURS = 6
SET_NAMES = {SEED: "seed", AUDIT: "audit", REST: ""}
MARK_NAMES = {number: name for name, number in MARKS.items() if name != "none"}


class Answers:
    """Answers about one run.

    Parameters
    ----------
    run : Run
        The run.
    always, never : str or None
        URIs of the lists to write.
    """

    def __init__(self, run: Run, always: str | None = None, never: str | None = None) -> None:
        ledger = run.ledger()
        if without_images(ledger):
            raise RunError(
                f"{run.uri}: was extrapolated from tables, so there are no images to show. Make a "
                f"run over the images with `raypipe attach {run.uri} --images URI --to FOLDER`"
            )
        run.record("extrapolate")  # raises if the scores are not complete
        self._run, config = run, run.config()
        self.samples = Samples.read(run)
        self.lists = MarkLists(self.samples, always, never)
        self._keep = KeepLists(self.samples, self.lists)
        self._search = NeighbourSearch(self.samples)
        self._images = Images(self.samples)
        self._given = bool(extrapolated_tables(ledger))
        self._clusters = config.unsupervised
        self._score = scored_by(ledger, config.score)
        self._confidence = config.extrapolate.confidence

    def run(self, _: Mapping[str, str]) -> dict[str, Any]:
        """Return what the page shows before any search."""
        samples = self.samples
        finite = samples.score[np.isfinite(samples.score)]
        return {
            "name": storage.name(self._run.uri),
            "uri": self._run.uri,
            "score": self._score,
            "samples": len(samples),
            "low": _number(finite.min()) if len(finite) else None,
            "high": _number(finite.max()) if len(finite) else None,
            "classes": [
                {"label": label, "name": self._label_name(label), "samples": count}
                for label, count in sorted(samples.class_counts.items())
            ],
            "clusters": self._clusters,
            "fractions": self._keep.fractions(),
            "embedded": samples.embedded,
            "doubtful": int((samples.doubt_rank > 0).sum()),
            "note": self._images.note,
            **self._list_state(),
        }

    def search(self, fields: Mapping[str, str]) -> dict[str, Any]:
        """Return one page of the samples that match a query."""
        started = time.perf_counter()
        fields = dict(fields)
        offset = _whole(fields.pop("offset", "0"), "offset")
        limit = min(_whole(fields.pop("limit", str(PAGE_SAMPLES)), "limit"), MAX_PAGE_SAMPLES)
        query = Query.parse(fields)
        rows, kept = self._matching(query)
        shown = rows[offset : offset + limit]
        return {
            "total": len(rows),
            "offset": offset,
            "samples": [self._tile(int(row), kept) for row in shown],
            "list": kept.origin if kept is not None else "",
            "seconds": time.perf_counter() - started,
        }

    def images(self, fields: Mapping[str, str]) -> dict[str, Any]:
        """Return images by row, as data: URIs."""
        size = fields.get("size", "tile")
        if size not in SIZES:
            raise ConfigError(f"size: {size[:40]!r} is not one of {', '.join(SIZES)}")
        rows = [self._row(text) for text in fields.get("rows", "").split(",")[:MAX_IMAGES]]
        return {
            str(row): {"uri": image.uri, "pixelated": image.pixelated, "reason": image.reason}
            for row, image in self._images.of(rows, size).items()
        }

    def sample(self, fields: Mapping[str, str]) -> dict[str, Any]:
        """Return one sample, why it has its score, and its neighbours."""
        row = self._row(fields.get("row", ""))
        samples = self.samples
        found = self._search.of(row, NEIGHBOURS) if samples.embedded else None
        direct = bool(samples.measured.all())
        return {
            **self._tile(row, None),
            "why": self._why(row, direct),
            "proxy": self._proxy(row) if samples.embedded else None,
            "kept": [
                {"fraction": fraction, "kept": bool(self._keep.at(fraction).mask[row])}
                for fraction in self._keep.fractions()
            ],
            "nearest": self._similar(found.nearest) if found else [],
            "measured_nearest": self._similar(found.measured) if found and not direct else [],
            "searched": found.searched if found else 0,
        }

    def mark(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Mark some rows, or all that match a query, and write the lists."""
        mark = fields.get("mark")
        if mark not in MARKS:
            raise ConfigError(f"mark: {str(mark)[:40]!r} is not one of {', '.join(MARKS)}")
        if "query" in fields:
            wanted = {str(name): str(value) for name, value in dict(fields["query"]).items()}
            rows, _ = self._matching(Query.parse(wanted))
        else:
            rows = np.array([self._row(str(row)) for row in fields.get("rows", [])], np.int64)
        self.lists.set(rows, MARKS[str(mark)])
        return {"marked": len(rows), **self._list_state()}

    # -- parts ------------------------------------------------------------------------------

    def _matching(self, query: Query) -> tuple[np.ndarray, Kept | None]:
        kept = self._keep.at(query.keep) if query.keep is not None else None
        mask = kept.mask if kept is not None else None
        return query.rows(self.samples, self.lists.marks, mask), kept

    def _row(self, text: str) -> int:
        row = _whole(text, "row")
        if row >= len(self.samples):
            raise ConfigError(f"row: {row} is not one of {len(self.samples):,} samples")
        return row

    def _label_name(self, label: int) -> str:
        return label_name(self.samples.names, label)

    def _tile(self, row: int, kept: Kept | None) -> dict[str, Any]:
        samples = self.samples
        label = int(samples.label[row])
        return {
            "row": row,
            "id": samples.ids.of_rows(np.array([row]))[0],
            "label": label,
            "name": self._label_name(label),
            "score": _number(samples.score[row]),
            "lower": _number(samples.lower[row]),
            "upper": _number(samples.upper[row]),
            "measured": bool(samples.measured[row]),
            "set": SET_NAMES[int(samples.drawn[row])],
            "rank": int(samples.doubt_rank[row]),
            "mark": MARK_NAMES.get(int(self.lists.marks[row]), ""),
            "in_list": bool(kept.mask[row]) if kept is not None else None,
        }

    def _why(self, row: int, direct: bool) -> str:
        """Return how the sample got its score, as a sentence."""
        if self._given:
            measured = "Its score was given in the table."
        elif direct:
            measured = f"Every sample of this run was scored directly: {self._score}."
        else:
            measured = f"Its score ({self._score}) was measured."
        own = self._measured_score(row)
        if self.samples.measured[row] and own is None:
            return measured
        predicted = (
            "Its score was predicted from the nearest measured samples; the interval holds "
            f"{self._confidence:.0%} of such scores."
        )
        if own is None:
            return predicted
        return (
            f"Its measured score is {own:.3g}, but the scores of all samples are predicted, so "
            f"that none is favoured. {predicted}"
        )

    def _measured_score(self, row: int) -> float | None:
        """Return the measured score of a sample whose score is predicted all the same."""
        ids = self.samples.ids
        shard = ids.shard_of(row)
        table = storage.read_table(self._run.score_shard(self.samples.shards[shard]))
        if MEASURED_SCORE.name not in table.column_names:
            return None
        return _number(table[MEASURED_SCORE.name][row - int(ids.starts[shard])].as_py())

    def _proxy(self, row: int) -> dict[str, Any]:
        """Return what the proxy predicts for a sample."""
        ids = self.samples.ids
        shard = ids.shard_of(row)
        table = read_embedding_columns(
            self._run, f"{self.samples.shards[shard]}.parquet", ["prediction", "confidence"]
        ).slice(row - int(ids.starts[shard]), 1)
        prediction = table["prediction"][0].as_py()
        return {
            "label": prediction,
            "name": self._label_name(-1 if prediction is None else prediction),
            "confidence": _number(table["confidence"][0].as_py()),
        }

    def _similar(self, found: list[tuple[int, float]]) -> list[dict[str, Any]]:
        return [{**self._tile(row, None), "similarity": value} for row, value in found]

    def _list_state(self) -> dict[str, Any]:
        """Return the lists that can be written, and how to use them."""
        files = self.lists.files.values()
        given = [
            f"--{file.option} {shlex.quote(file.uri)}" for file in files if file.content is not None
        ]
        command = f"raypipe select {shlex.quote(self._run.uri)} {' '.join(given)}" if given else ""
        return {
            "lists": {
                file.option.partition("-")[0]: {"file": file.uri, "ids": len(file.ids)}
                for file in files
            },
            "command": command,
        }


def _whole(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 12:
        raise ConfigError(f"{name}: {text[:40]!r} is not a whole number")
    return int(text)


def _number(value: Any) -> float | None:
    """Return a number for JSON, which has no NaN."""
    number = float(value) if value is not None else math.nan
    return number if math.isfinite(number) else None


ERRORS = (RaypipeError, OSError, *DAMAGE_ERRORS)
"""What damaged or missing files of a run raise while a question is answered."""
