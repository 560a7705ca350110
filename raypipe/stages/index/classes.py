"""The classes of a run, fixed when its seed set is drawn.

Class indices are written into seed shards, embeddings and scores, and number the proxy's outputs.
Class names are numbered in sorted order, so that a new class would change the number of every class
after it. Therefore the classes of a run stay as they are once its seed set is drawn. The proxy does
not know a class that appears later: its samples are rejected by name, and the run says that a new
run folder includes it. A class whose files disappeared keeps its number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from raypipe import storage
from raypipe.errors import SourceError
from raypipe.runs.run import Run
from raypipe.sources import ClassMap, class_map
from raypipe.sources.classes import distinct, shown_names


def settle_classes(
    run: Run,
    names: tuple[str, ...] | None,
    labels: frozenset[int | str],
    num_classes: int | None,
    by_name: bool = False,
    mixed: str = "",
) -> tuple[ClassMap, str]:
    """Settle the classes of a run.

    Parameters
    ----------
    run
        The run.
    names, labels, num_classes
        What the source states; see `raypipe.sources.class_map`.
    by_name
        Whether labels are read as names (`Source.labels_by_name`), so that the source can number
        its classes in any order.
    mixed
        `LabelSpellings.mixed`.

    Returns
    -------
    tuple
        The classes, and a note for the user, or "".

    Raises
    ------
    SourceError
        When the labels are inconsistent, or when the source numbers its classes differently than
        before.
    """
    fixed = _fixed(run)
    if fixed is None:
        if mixed and names is None:
            raise SourceError(mixed)
        return class_map(names, labels, num_classes), ""
    if names is not None:
        new = [name for name in names if name not in set(fixed.names)]
        reordered = names[: len(fixed.names)] != fixed.names[: len(names)]
        if reordered and not (by_name and distinct(names) and distinct(fixed.names)):
            raise SourceError(
                "the class names that the source states differ from those when the seed set was "
                "drawn; use a new run folder"
            )
        if len(new) == len(names):
            raise SourceError(
                f"none of the classes that the source states ({shown_names(names)}) is one of "
                f"those when the seed set was drawn ({shown_names(fixed.names)}); use a new run "
                "folder"
            )
        return fixed, _note(new)
    has_numbers = any(isinstance(label, int) for label in labels)
    if by_name and has_numbers and fixed.numeric and not fixed.bare_numbers:
        raise SourceError(
            f"the classes had names ({shown_names(fixed.names)}) when the seed set was drawn, but "
            "now the labels are numbers without names; restore the source, or use a new run folder"
        )
    if num_classes is not None and fixed.numeric:
        return fixed, ""  # a larger number is a wrong label, as it was from the beginning
    unknown = [
        label
        for label in labels
        if fixed.index(label)[1] and (isinstance(label, str) or label >= 0)
    ]
    return fixed, _note(sorted(map(str, unknown)))


def _note(new: Sequence[str]) -> str:
    """Describe classes that are new in the source; "" when there are none."""
    if not new:
        return ""
    shown = shown_names(new)
    if len(new) == 1:
        return (
            f"1 class is new in the source ({shown}). The proxy of this run was not trained on it, "
            "so its samples are rejected; a new run folder includes it"
        )
    return (
        f"{len(new)} classes are new in the source ({shown}). The proxy of this run was not "
        "trained on them, so their samples are rejected; a new run folder includes them"
    )


def _fixed(run: Run) -> ClassMap | None:
    """Return the classes that the seed set was drawn with; None before it is drawn."""
    if not run.done("seed") and not run.done("drawn"):
        return None
    try:
        return run.classes()
    except FileNotFoundError:  # other settings of the source: everything is computed again
        return None


def write_classes(run: Run, classes: ClassMap) -> None:
    """Write `index/classes.json`, unless it holds the same classes already."""
    data: dict[str, Any] = {"names": list(classes.names), "numeric": classes.numeric}
    if classes.noise is not None:
        data["inject_noise"] = dataclasses.asdict(classes.noise)
    if classes.clusters:
        data["clusters"] = True
    file = run.classes_file
    if not storage.exists(file) or storage.read_json(file) != data:
        storage.write_json(file, data)
