"""Datasets of the Hugging Face Hub, through the package `datasets`, which downloads them into a cache all workers of a machine share."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import dataclass

from raypipe.errors import SourceError

SCHEME = "huggingface://"
DICT, STATE, INFO = "dataset_dict.json", "state.json", "dataset_info.json"
"""What `save_to_disk` writes beside the Arrow files: the splits, the names of the files, the description of the columns."""


@dataclass(frozen=True)
class Prepared:
    """One split of a dataset in the cache of this machine.

    files     name -> local path of its Arrow files
    revision  what the cache calls this content; the same on every machine
    folders   where the cache is: images held by their path only are read below these
    """

    files: dict[str, str]
    revision: str
    folders: tuple[str, ...]

    def content(self, path: str) -> bytes | None:
        """A file of the cache; None where there is no such file in it."""
        real = os.path.realpath(path)
        if not any(real.startswith(folder + os.sep) for folder in self.folders):
            return None
        try:
            with open(real, "rb") as file:
                return file.read()
        except OSError:
            return None


@functools.cache
def prepared(uri: str, config_name: str | None, split: str | None) -> Prepared:
    """Download a dataset `huggingface://user/name` or `huggingface://name`, with `@revision` if any, unless it is in the cache.

    Code of the dataset's repository is never run. Raises SourceError, saying what to do, when the package or the network is missing.
    """
    name, _, revision = uri.removeprefix(SCHEME).strip("/").partition("@")
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError as error:
        raise SourceError(
            f"{uri}: datasets of the hub need the package datasets, which cannot be imported ({error}); pip install 'raypipe[hf]', or "
            "write the dataset with save_to_disk or to_parquet elsewhere and set source.uri to the folder"
        ) from None
    try:
        builder = datasets.load_dataset_builder(name, config_name, revision=revision or None)
        builder.download_and_prepare()
        chosen = choose_split(uri, list(builder.info.splits or {}), split)
        paths = [file["filename"] for file in builder.as_dataset(split=chosen).cache_files]
    except SourceError:
        raise
    except Exception as error:  # of the package, of the hub's client, of HTTP, of the disk
        words = " ".join(str(error).split())[:400] or type(error).__name__
        raise SourceError(
            f"{uri}: {words}. Check the name, source.config_name and the network; without a network only what is in the cache "
            "(HF_HOME) can be read, at once with HF_HUB_OFFLINE=1; or write the dataset with save_to_disk elsewhere"
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
    stamp = os.path.basename(os.path.dirname(paths[0])) if paths else ""
    return Prepared({os.path.basename(path): path for path in paths}, stamp, tuple(sorted(folders)))


def choose_split(uri: str, splits: Iterable[str], wanted: str | None) -> str:
    """The split to read. Raises SourceError, naming those there are, when it is not clear or not there."""
    there = list(splits)
    if wanted is None and len(there) == 1:
        return there[0]
    if wanted is not None and wanted in there:
        return wanted
    names = (
        f"the splits are {', '.join(there)}; set source.split" if there else "there are no splits"
    )
    raise SourceError(
        f"{uri}: no split {wanted!r}: {names}" if wanted is not None else f"{uri}: {names}"
    )
