"""Read embeddings as input of the extrapolators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raypipe import storage
from raypipe.config import SeedSettings
from raypipe.config.choices import PROXY_STATISTICS
from raypipe.runs.run import Run
from raypipe.sources.id_sampling import in_sample
from raypipe.sources.types import IdFilter

if TYPE_CHECKING:
    from raypipe.extrapolators.base import Nodes

SPECIAL_ROWS = {
    "seed": "raypipe.seed_rows",
    "audit": "raypipe.audit_rows",
    "probe": "raypipe.probe_rows",
}
"""Sets whose samples come first in a fragment's file, in this order, each set in a row group of its
own; and the metadata key of their number. A sample is in the first of its sets."""
PROBE_FRACTION = "raypipe.probe_fraction"
"""Metadata key of the share of all samples that linear probes are fitted to."""


def probe_rule(seed: SeedSettings, fraction: float) -> IdFilter:
    """Return the rule that draws the samples of linear probes, whether in the seed set or not."""
    return in_sample(fraction, seed.seed, b"probe")


def read_special_rows(run: Run, fragment_id: str, which: str) -> pa.Table | None:
    """Read only the embeddings of a fragment that belong to the "seed" or the "audit" set.

    None if there are none.
    """
    with storage.open_read(run.embedding_shard(fragment_id)) as file:
        parquet = pq.ParquetFile(file)
        present = _special_groups(parquet)
        return parquet.read_row_group(present.index(which)) if which in present else None


def read_probe_rows(run: Run, fragment_id: str, seed: SeedSettings) -> pa.Table:
    """Read only the embeddings of a fragment that linear probes are fitted to."""
    with storage.open_read(run.embedding_shard(fragment_id)) as file:
        parquet = pq.ParquetFile(file)
        table = parquet.read_row_groups(list(range(len(_special_groups(parquet)))))
        rule = probe_rule(seed, float(parquet.schema_arrow.metadata[PROBE_FRACTION.encode()]))
    drawn = [rule(sample_id) for sample_id in table["sample_id"].to_pylist()]
    return table.filter(pa.array(drawn, pa.bool_())).replace_schema_metadata(None)


def _special_groups(parquet: pq.ParquetFile) -> list[str]:
    """Return the sets that have a row group, in order; one without rows is not written."""
    metadata = parquet.schema_arrow.metadata
    return [name for name, key in SPECIAL_ROWS.items() if int(metadata.get(key.encode(), b"0"))]


def read_views(run: Run, fragment_id: str, proxies: Iterable[int]) -> dict[int, pa.Table]:
    """Read the embeddings of a fragment by some proxies.

    The file is opened once, and only the row groups of these proxies are read.

    Parameters
    ----------
    run
        The run.
    fragment_id
        A fragment.
    proxies
        Numbers of proxies, see `raypipe.runs.proxy_roles.ProxyRoles.in_views`.

    Returns
    -------
    dict of int to pa.Table
        sample_id, proxy and embedding by the number of the proxy.
    """
    others = sorted(set(proxies))
    if not others:
        return {}
    with storage.open_read(run.view_shard(fragment_id)) as file:
        parquet = pq.ParquetFile(file)
        column = parquet.schema_arrow.get_field_index("proxy")
        groups = [
            parquet.metadata.row_group(group).column(column).statistics.min
            for group in range(parquet.metadata.num_row_groups)
        ]
        views = parquet.read_row_groups(
            [row for row, proxy in enumerate(groups) if proxy in others]
        )
    return {proxy: views.filter(pc.equal(views["proxy"], proxy)) for proxy in others}


def as_seen_by(
    table: pa.Table,
    views: Mapping[int, pa.Table],
    proxies: Sequence[int],
    with_features: bool = False,
) -> pa.Table:
    """Return the samples that some proxies embed, with their embeddings side by side.

    Parameters
    ----------
    table
        Rows of the embeddings of a fragment: those by proxy 0, features next to them or instead.
    views
        What `read_views` returned for these proxies.
    proxies
        Numbers of proxies that embed the same samples; none for the table as it is.
    with_features
        Append the features that follow the embeddings by proxy 0 in `table`.
    """
    if not proxies or (tuple(proxies) == (0,) and 0 not in views):
        return table
    rows = {
        proxy: {
            sample_id: row for row, sample_id in enumerate(views[proxy]["sample_id"].to_pylist())
        }
        for proxy in proxies
        if proxy in views
    }
    ids = table["sample_id"].to_pylist()
    seen = [all(sample_id in row for row in rows.values()) for sample_id in ids]
    table = table.filter(pa.array(seen, pa.bool_()))
    ids = table["sample_id"].to_pylist()
    embeddings = []
    for proxy in proxies:
        column = table["embedding"]
        if proxy in views:
            taken = pa.array([rows[proxy][sample_id] for sample_id in ids], pa.int64())
            column = views[proxy]["embedding"].take(taken)
        embeddings.append(storage.matrix_of(column))
    if with_features:
        embeddings.append(storage.matrix_of(table["embedding"])[:, embeddings[0].shape[1] :])
    side_by_side = np.concatenate(embeddings, 1)
    column = pa.FixedSizeListArray.from_arrays(
        pa.array(side_by_side.reshape(-1)), side_by_side.shape[1]
    )
    return table.set_column(table.column_names.index("embedding"), "embedding", column)


COLUMNS = ["sample_id", "label", "embedding", *PROXY_STATISTICS]


def nodes_of(table: pa.Table) -> Nodes:
    """Convert a table of embeddings; without a proxy there are no proxy statistics."""
    from raypipe.extrapolators.base import Nodes

    embedding = storage.matrix_of(table["embedding"]).astype(np.float32, copy=False)
    label = table["label"].fill_null(-1).to_numpy().astype(np.int64)
    statistics = [table[name].to_numpy() for name in PROXY_STATISTICS if name in table.column_names]
    stacked = np.stack(statistics, 1) if statistics else np.zeros((len(table), 0))
    return Nodes(embedding, label, stacked)
