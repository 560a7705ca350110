"""Names and metadata of keep-list files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal

import pyarrow.parquet as pq

from raypipe import storage


def keep_file(fraction: float) -> str:
    """Return the file name of a keep-list, such as keep-0.70.parquet or keep-0.125.parquet."""
    exact = Decimal(repr(float(fraction)))
    digits = -int(exact.normalize().as_tuple().exponent)
    return f"keep-{exact:.{max(digits, 2)}f}.parquet"


def keep_metadata(uri: str) -> dict[str, str]:
    """Read how a keep-list was cut.

    Returns
    -------
    dict of str to str
        `strategy`, `fraction`, `count`, `samples`, `scores`, `spearman`, `spearman_low` and
        `forced`; `options` (JSON) if there are any. `forced` is true if the fidelity was too low
        and `select.force` overrode that. `inject_noise`, if present, is the share of labels that
        were replaced to test the detection of label noise. With `select.strategy: auto`, `chosen`
        is auto, `reason` explains the strategy, and `candidate` names that of the pilot. Empty for
        a file without metadata.
    """
    with storage.open_read(uri) as file:
        metadata = pq.read_schema(file).metadata or {}
    prefix = b"raypipe."
    return {
        key.removeprefix(prefix).decode(): value.decode()
        for key, value in metadata.items()
        if key.startswith(prefix)
    }


def choice_lines(chosen: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Yield a line for each reason why lists were cut as they are, with `select.strategy: auto`.

    `chosen` has strategy and reason by file name; see `raypipe.stages.select.stage`.
    """
    by_reason: dict[str, list[str]] = {}
    for file, choice in chosen.items():
        by_reason.setdefault(choice["reason"], []).append(file.removesuffix(".parquet"))
    for reason, files in by_reason.items():
        where = "all keep-lists" if len(by_reason) == 1 else ", ".join(files)
        yield f"{where}: {reason}"
