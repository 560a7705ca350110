"""Bring the scores that several proxies gave the same samples to a common scale, and join them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raypipe.runs.measured_scores import BY_PROXY

FIXED_UNITS = frozenset({"loss", "el2n", "entropy"})
"""Scores whose unit is the same for every proxy."""


@dataclass(frozen=True)
class CommonScale:
    """Brings the scores of one proxy to the scale that all proxies share.

    The lengths of gradients differ between proxies. Without a common scale, the proxy with the
    longest gradients would decide the mean.

    Attributes
    ----------
    factor : Mapping of str to float
        By score. The mean spread over all proxies, divided by the spread of this proxy. 1 for
        `FIXED_UNITS` and for a proxy whose scores are all equal.
    """

    factor: Mapping[str, float]

    @classmethod
    def of_proxies(cls, proxies: Iterable[Iterable[pa.Table]]) -> list[CommonScale]:
        """Return the scale of each proxy from its tables, as `join_proxies` takes them."""
        spreads = [_spreads(tables) for tables in proxies]
        scales: list[dict[str, float]] = [{} for _ in spreads]
        for score in spreads[0]:
            mean = np.mean([spread[score] for spread in spreads])
            for scale, spread in zip(scales, spreads, strict=True):
                fixed = score in FIXED_UNITS or not spread[score]
                scale[score] = 1.0 if fixed else float(mean / spread[score])
        return [cls(scale) for scale in scales]


def _spreads(tables: Iterable[pa.Table]) -> dict[str, float]:
    """Return the standard deviation of every score, from the tables of one proxy."""
    count, totals, squares = 0, dict[str, float](), dict[str, float]()
    for table in tables:
        count += len(table)
        for score in table.column_names[2:]:
            values = table[score].to_numpy().astype(np.float64)
            totals[score] = totals.get(score, 0.0) + float(values.sum())
            squares[score] = squares.get(score, 0.0) + float(values @ values)
    return {
        score: float(np.sqrt(max(0.0, squares[score] / count - (total / count) ** 2)))
        for score, total in totals.items()
    }


def join_proxies(
    labels: pa.Table, tables: Sequence[pa.Table], scales: Sequence[CommonScale]
) -> pa.Table:
    """Average the scores that the proxies gave to the samples of one shard.

    Parameters
    ----------
    labels
        sample_id and label of the n samples.
    tables
        By proxy: sample_id, label and float32 columns of scores, with the samples that the proxy
        scores.
    scales
        By proxy.

    Returns
    -------
    pa.Table
        sample_id and label. By score the mean over the proxies that score the sample, float32 [n],
        and as `<score>_by_proxy` the scores of all k proxies, float32 [n, k], on the common scale;
        NaN for the others.
    """
    row = {sample_id: index for index, sample_id in enumerate(labels["sample_id"].to_pylist())}
    rows = [
        np.array([row[sample_id] for sample_id in table["sample_id"].to_pylist()], np.int64)
        for table in tables
    ]
    result = labels.select(["sample_id", "label"])
    for score in tables[0].column_names[2:]:
        values = np.full((len(labels), len(tables)), np.nan)
        for number, (table, scale) in enumerate(zip(tables, scales, strict=True)):
            values[rows[number], number] = table[score].to_numpy() * scale.factor[score]
        mean = np.nanmean(values, 1) if len(values) else np.zeros(0)
        flat = pa.array(values.astype(np.float32).reshape(-1))
        by_proxy = pa.FixedSizeListArray.from_arrays(flat, len(tables))
        result = result.append_column(score, pa.array(mean.astype(np.float32)))
        result = result.append_column(BY_PROXY.format(score), by_proxy)
    return result
