"""The classes of a run: fixed with its seed set.

Class indices are written into seed shards, embeddings and scores, and are what the proxy's outputs stand for. Names of classes are
numbered in sorted order, so a class that comes later would change the number of every class after it. Therefore the classes of a run
stay as they are once its seed set is drawn: a class that comes later is none the proxy knows, its samples are rejected by name, and
the run says that a new run folder takes it in. A class whose files went away keeps its number.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from raypipe import storage
from raypipe.errors import SourceError
from raypipe.runs.layout import Run
from raypipe.sources import ClassMap, class_map


def settle_classes(
    run: Run, names: tuple[str, ...] | None, labels: frozenset[int | str], num_classes: int | None
) -> tuple[ClassMap, str]:
    """The classes of the run, from what its source states (see `class_map`), and "" or what the user should know of them.

    Raises SourceError when the labels do not fit together, or when the numbers of the source mean other classes than before.
    """
    known = _fixed(run)
    if known is None:
        return class_map(names, labels, num_classes), ""
    if names is not None and names[: len(known.names)] != known.names:
        raise SourceError(
            "the class names that the source states are others than when the seed set was drawn; use a new run folder"
        )
    if num_classes is not None and known.numeric:
        return known, ""  # a number beyond is a wrong label, as it was from the beginning
    new = [
        label
        for label in labels
        if known.index(label)[1] and (isinstance(label, str) or label >= 0)
    ]
    strangers = sorted(map(str, new)) if names is None else names[len(known.names) :]
    if not strangers:
        return known, ""
    shown = ", ".join(strangers[:5]) + (", ..." if len(strangers) > 5 else "")
    many = len(strangers) > 1
    return known, (
        f"{len(strangers)} class{'es are' if many else ' is'} new in the source ({shown}). The proxy of this run was not trained on "
        f"{'them' if many else 'it'}, so {'their' if many else 'its'} samples are rejected; a new run folder takes {'them' if many else 'it'} in"
    )


def _fixed(run: Run) -> ClassMap | None:
    """The classes that the seed set was drawn with; None where there is none yet."""
    if not run.done("seed"):
        return None
    try:
        return run.classes()
    except FileNotFoundError:  # other settings of the source: everything is made anew
        return None


def write_classes(run: Run, classes: ClassMap) -> None:
    about: dict[str, Any] = {"names": list(classes.names), "numeric": classes.numeric}
    if classes.noise is not None:
        about["inject_noise"] = dataclasses.asdict(classes.noise)
    about |= {"clusters": True} if classes.clusters else {}
    file = run.path("index", "classes.json")
    if not storage.exists(file) or storage.read_json(file) != about:
        storage.write_json(file, about)
