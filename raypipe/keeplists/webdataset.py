"""Filter a `webdataset` pipeline by a keep-list."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from raypipe.sources.values import printable

_TAR = re.compile(r"\S+\.(?:tar\.gz|tar|tgz)", re.IGNORECASE)


def kept_samples(
    samples: Iterable[dict[str, Any]],
    uri: str,
    ids: Collection[str],
    files: Collection[str],
    root: str | None,
) -> Iterator[dict[str, Any]]:
    """Yield the samples whose id is kept; warn if there were samples and none was kept.

    Parameters
    ----------
    samples : iterable of dict
        Samples with `__key__` and `__url__`.
    uri : str
        The keep-list file, for the warning.
    ids, files : collection of str
        Ids of the kept samples, and the tar paths in them.
    root : str or None
        URL of the folder that the tar paths in ids are relative to. URLs elsewhere, and all without
        a root, are matched by the end of their path.
    """
    paths: dict[str, str] = {}
    seen = kept = 0
    for sample in samples:
        url, seen = sample["__url__"], seen + 1
        if url not in paths:
            paths[url] = _tar_path(url, root, files)
        if f"{paths[url]}#{printable(sample['__key__'].removeprefix('./'))}" in ids:
            kept += 1
            yield sample
    if seen and not kept:
        example = f", ids of the keep-list are like {min(ids)!r}" if ids else ""
        warnings.warn(
            f"{uri} contains no sample of the {seen} read: the last was in {paths[url]!r}"
            f"{example}; check `root`",
            stacklevel=2,
        )


def _tar_path(url: str, root: str | None, files: Collection[str]) -> str:
    """Return the path of a tar as ids contain it."""
    match = _TAR.search(url)  # for a pipe, the first word that is a tar
    path = match[0] if match is not None else url
    if root is not None and path.startswith(root.rstrip("/") + "/"):
        return path[len(root.rstrip("/")) + 1 :]
    parts = path.split("/")
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end in files), parts[-1])
