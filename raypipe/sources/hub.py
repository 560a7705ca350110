"""Datasets of the Hugging Face Hub.

The package `datasets` downloads them into a cache that all workers of a machine share.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass

from raypipe.errors import SourceError
from raypipe.text import error_text

SCHEME = "huggingface://"
SPLITS_FILE, STATE_FILE, INFO_FILE = "dataset_dict.json", "state.json", "dataset_info.json"
"""What `save_to_disk` writes next to the Arrow files: splits, file names, column descriptions."""


@dataclass(frozen=True)
class CachedDataset:
    """One split of a dataset in the cache of this machine.

    Attributes
    ----------
    files : dict of str to str
        Name -> local path of each Arrow file.
    revision : str
        The cache's identifier of this content; the same on every machine.
    folders : tuple of str
        Folders of the cache. Images stored only by their path are read from these and nowhere
        else.
    """

    files: dict[str, str]
    revision: str
    folders: tuple[str, ...]

    def content(self, path: str) -> bytes | None:
        """Return the content of a file in the cache; None if the cache has no such file."""
        real = os.path.realpath(path)
        if not any(real.startswith(folder + os.sep) for folder in self.folders):
            return None
        try:
            with open(real, "rb") as file:
                return file.read()
        except OSError:
            return None


@functools.cache
def download_dataset(uri: str, config_name: str | None, split: str | None) -> CachedDataset:
    """Download a dataset unless it is in the cache. Never runs code of its repository.

    Parameters
    ----------
    uri : str
        `huggingface://user/name` or `huggingface://name`, optionally followed by `@revision`.
    config_name, split : str or None
        `source.config_name` and `source.split`.

    Raises
    ------
    SourceError
        If the package, the dataset or the network is missing; the message says what to do.
    """
    name, _, revision = uri.removeprefix(SCHEME).strip("/").partition("@")
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError as error:
        raise SourceError(
            f"{uri}: datasets of the hub need the package datasets, which cannot be imported "
            f"({error}); pip install 'raypipe[hf]', or write the dataset with save_to_disk or "
            "to_parquet elsewhere and set source.uri to the folder"
        ) from None
    try:
        builder = datasets.load_dataset_builder(name, config_name, revision=revision or None)
        builder.download_and_prepare()
        chosen = choose_split(uri, list(builder.info.splits or {}), split)
        paths = [file["filename"] for file in builder.as_dataset(split=chosen).cache_files]
    except SourceError:
        raise
    except Exception as error:  # from the package, the hub's client, HTTP or the disk
        message = error_text(error, 400)
        raise SourceError(
            f"{uri}: {message}. Check the name, source.config_name and the network; without a "
            "network, only datasets in the cache (HF_HOME) can be read (HF_HUB_OFFLINE=1 skips "
            "the wait); or write the dataset with save_to_disk elsewhere"
        ) from None
    config = datasets.config
    folders = {
        os.path.realpath(folder)
        for folder in (
            config.HF_DATASETS_CACHE,
            config.DOWNLOADED_DATASETS_PATH,
            constants.HF_HUB_CACHE,
        )
    }
    fingerprint = os.path.basename(os.path.dirname(paths[0])) if paths else ""
    files = {os.path.basename(path): path for path in paths}
    return CachedDataset(files, fingerprint, tuple(sorted(folders)))


def choose_split(uri: str, splits: Iterable[str], requested: str | None) -> str:
    """Return the split to read: the requested one, or the only one.

    Raises
    ------
    SourceError
        If it does not exist, or none is requested and there are several. Names the existing ones.
    """
    existing = list(splits)
    if requested is None and len(existing) == 1:
        return existing[0]
    if requested is not None and requested in existing:
        return requested
    problem = (
        f"the splits are {', '.join(existing)}; set source.split"
        if existing
        else "the dataset has no splits"
    )
    if requested is not None:
        problem = f"no split {requested!r}: {problem}"
    raise SourceError(f"{uri}: {problem}")
