"""Names and metadata of keep-list files."""

from __future__ import annotations

from decimal import Decimal

import pyarrow.parquet as pq

from raypipe import storage


def keep_file(fraction: float) -> str:
    """keep-0.70.parquet; more digits where the fraction has them, as in keep-0.125.parquet."""
    exact = Decimal(repr(float(fraction)))
    digits = -int(exact.normalize().as_tuple().exponent)
    return f"keep-{exact:.{max(digits, 2)}f}.parquet"


def keep_metadata(uri: str) -> dict[str, str]:
    """How a keep-list was made: strategy, fraction, count, samples, scores, spearman, spearman_low, forced; options (JSON), if any.

    Empty for a file without. `forced` is true where the fidelity was too low and `select.force` overrode that. `inject_noise`, where it is
    there, is the share of the labels that were replaced for a rehearsal.
    """
    with storage.open_read(uri) as file:
        found = pq.read_schema(file).metadata or {}
    start = b"raypipe."
    return {
        key.removeprefix(start).decode(): value.decode()
        for key, value in found.items()
        if key.startswith(start)
    }
