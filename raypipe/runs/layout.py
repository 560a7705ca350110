"""Where a run lives: its folders, its ledger, its lease, and what has been done already.

A run is one folder (a path or URI). Everything in it is Parquet, JSON, YAML, HTML or safetensors: nothing that executes
code when it is opened.

The ledger, `run.json`, has for every stage: its state, the fingerprint of all settings it depends on, samples, seconds.
What is finished is told by the files themselves: names derive from fragments, so a shard that is there is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any, Protocol

from raypipe import storage
from raypipe.config import Config, dump_config, parse_config
from raypipe.errors import RunError
from raypipe.runs.ledger import FORMAT, StageRecord, checked_record, label_noise_in, now
from raypipe.sources.base import ClassMap, Fragment

MOST_CONFIG = 4 << 20
"""Bytes of a configuration."""
VALID_NAME = re.compile(r"[\w-][\w.-]*").fullmatch
"""Of a fragment or a shard, which lead to files by their names: no path."""
STAGE_FOLDERS = {
    "index": ("index", "duplicates"),
    "seed": ("seed",),
    "label": ("labels",),
    "proxy": ("proxy",),
    "measure": ("measured",),
    "rehearse": ("rehearsal",),
    "embed": ("embeddings", "rejects"),
    "extrapolate": ("extrapolator", "scores"),
    "select": ("keep",),
    "report": ("report",),
}
"""What each stage writes, in the order of the stages."""
OPTIONAL_STAGES = {"label", "rehearse"}
"""A ledger without these is whole."""


class LeaseHolder(Protocol):
    """What a run asks of the lease that this process holds on it; see `raypipe.runs.lease`."""

    def check(self) -> None:
        """Raise TakenOverError when another driver has taken the run over."""


class Run:
    """One run folder. Creating the object touches nothing."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/") if "://" in uri else os.path.abspath(os.path.expanduser(uri))
        self.lease: LeaseHolder | None = None
        """While this process is the one that writes the run."""

    def path(self, *parts: str) -> str:
        """URI of something in the run."""
        return storage.join(self.uri, *parts)

    def exists(self) -> bool:
        return storage.exists(self.path("run.json"))

    # -- ledger ---------------------------------------------------------------------------------------------------

    def ledger(self) -> dict[str, StageRecord]:
        """Records by stage. Raises RunError where there is no run or its ledger cannot be understood."""
        try:
            data = storage.read_json(self.path("run.json"))
        except FileNotFoundError:
            raise RunError(f"{self.uri}: no run here (run.json is missing)") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise RunError(
                f"{self.uri}: run.json has format {found!r}; this raypipe reads format {FORMAT}"
            )
        fields = {field.name for field in dataclasses.fields(StageRecord)}
        try:
            return {
                stage: checked_record(
                    StageRecord(**{key: value for key, value in record.items() if key in fields})
                )
                for stage, record in data["stages"].items()
                if stage in STAGE_FOLDERS
            }
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise RunError(f"{self.uri}: run.json is damaged ({error})") from None

    def write_ledger(self, records: Mapping[str, StageRecord]) -> None:
        """Raises TakenOverError, and writes nothing, where another driver took the run over."""
        from raypipe._version import __version__

        stages = {
            stage: dataclasses.asdict(records[stage]) for stage in STAGE_FOLDERS if stage in records
        }
        data = {"format": FORMAT, "raypipe": __version__, "updated": now(), "stages": stages}
        uri = self.path("run.json")
        if self.lease is None or storage.is_local(uri):
            storage.write_json(uri, data)
        elif not self._exchange_ledger(uri, storage.json_bytes(data)):
            self.lease.check()
            raise RunError(
                f"{self.uri}: run.json was changed by somebody while this driver had the run; run again to resume"
            )

    def _exchange_ledger(self, uri: str, content: bytes) -> bool:
        """Write the ledger of an object store unless it changes meanwhile: a request on its way cannot be called back."""
        try:
            known = storage.read_bytes(uri, 0)
        except FileNotFoundError:
            known = None
        if self.lease is not None:
            self.lease.check()
        return (
            storage.create_bytes(uri, content)
            if known is None
            else storage.exchange_bytes(uri, known, content)
        )

    def record(self, stage: str) -> StageRecord:
        """The record of a finished stage. Raises RunError when it is not finished."""
        found = self.ledger().get(stage)
        if found is None or found.state != "done":
            raise RunError(
                f"{self.uri}: stage {stage} is not finished; run `raypipe run` again to resume"
            )
        return found

    def clear(self, stage: str) -> None:
        """Remove everything a stage wrote."""
        for folder in STAGE_FOLDERS[stage]:
            storage.delete(self.path(folder))

    # -- configuration --------------------------------------------------------------------------------------------

    def write_config(self, config: Config, sections: Mapping[str, Any] | None = None) -> None:
        """Write all settings, or those of some sections."""
        storage.write_bytes(self.path("config.yaml"), dump_config(config, sections).encode())

    def config(self) -> Config:
        """The configuration this run was made with."""
        import yaml

        try:
            return parse_config(
                yaml.safe_load(storage.read_whole(self.path("config.yaml"), MOST_CONFIG))
            )
        except FileNotFoundError:
            raise RunError(f"{self.uri}: no run here (config.yaml is missing)") from None
        except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
            raise RunError(f"{self.uri}: config.yaml is damaged ({error})") from None

    # -- index ----------------------------------------------------------------------------------------------------

    def fragments(self) -> list[Fragment]:
        """All fragments in the order of the source, without their `members` (see `with_members`)."""
        result = []
        columns = ["fragment_id", "path", "start", "stop", "offset", "error"]
        for part, table in storage.iter_tables(self.path("index"), columns):
            result += [Fragment(**row, part=part) for row in table.to_pylist()]
        for fragment in result:
            if not VALID_NAME(fragment.fragment_id):  # a file of the run is named after it
                raise RunError(
                    f"{self.uri}: index/ is damaged: {fragment.fragment_id!r} is no name of a fragment"
                )
        return result

    def with_members(self, fragment: Fragment) -> Fragment:
        """The fragment with the names of its small files, ready to be read. Workers call this; the driver never holds them all."""
        table = storage.read_table(self.path("index", fragment.part), ["fragment_id", "members"])
        row = table["fragment_id"].to_pylist().index(fragment.fragment_id)
        return dataclasses.replace(fragment, members=tuple(table["members"][row].as_py()))

    def classes(self) -> ClassMap:
        """The classes of the source; where it has none, the clusters that stand for them, none before they are found."""
        data = storage.read_json(self.path("index", "classes.json"))
        if data.get("clusters"):
            with contextlib.suppress(FileNotFoundError):
                data |= storage.read_json(self.path("labels", "classes.json"))
        return ClassMap(
            tuple(data["names"]),
            bool(data["numeric"]),
            label_noise_in(data),
            bool(data.get("clusters")),
        )

    def done(self, folder: str) -> set[str]:
        """Stems of the Parquet files in a folder: the fragments (or seed shards) that are finished."""
        return {
            file.removesuffix(".parquet")
            for file in storage.names(self.path(folder))
            if file.endswith(".parquet")
        }
