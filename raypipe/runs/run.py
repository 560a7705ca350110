"""A run: its ledger, its configuration, its index, and the work that is finished.

The ledger, `run.json`, holds the state of every stage, the fingerprint of all settings that it
depends on, samples and seconds. The files themselves show which work is finished: their names
derive from fragments, and a shard that exists is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Protocol

from raypipe import storage
from raypipe.config import Config, dump_config, parse_config
from raypipe.config.parts import part_names_accepted
from raypipe.errors import RunError
from raypipe.runs.layout import STAGE_FOLDERS, VALID_NAME, Layout
from raypipe.runs.ledger import FORMAT, StageRecord, checked_record, label_noise_of, now
from raypipe.sources import ClassMap, Fragment
from raypipe.text import error_text

MAX_CONFIG_BYTES = 4 << 20
"""A larger `config.yaml` is refused."""


class LeaseHolder(Protocol):
    """The lease that this process holds on a run; see `raypipe.runs.lease`."""

    def check(self) -> None:
        """Raise TakenOverError if another driver has taken over the run."""


class Run(Layout):
    """One run folder. Creating the object reads and writes nothing."""

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        super().__init__(uri)
        self.lease: LeaseHolder | None = None
        """Set while this process is the driver of the run."""

    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return storage.exists(self.ledger_file)

    # -- ledger -------------------------------------------------------------------------

    def ledger(self) -> dict[str, StageRecord]:
        """Read the records by stage. Raises RunError if they are missing or damaged."""
        try:
            data = storage.read_json(self.ledger_file)
        except FileNotFoundError:
            raise RunError(self._absent("run.json")) from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            version = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise RunError(
                f"{self.uri}: run.json has format {version!r}; this raypipe reads format {FORMAT}. "
                "Use the version of raypipe that wrote this run, or give another run folder"
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

    def _absent(self, file: str) -> str:
        """Return the message about a folder that holds no run."""
        if bucket := storage.missing_bucket(self.uri):
            return (
                f"{self.uri}: the bucket {bucket!r} does not exist; check its name, the endpoint "
                "and the credentials"
            )
        if storage.is_file(self.uri):
            return f"{self.uri}: a file, not a run; give the folder of a run"
        return f"{self.uri}: no run here ({file} is missing); give the folder of a run"

    def write_ledger(self, records: Mapping[str, StageRecord]) -> None:
        """Write the ledger. Raises TakenOverError if another driver took over the run."""
        from raypipe._version import __version__

        stages = {
            stage: dataclasses.asdict(records[stage]) for stage in STAGE_FOLDERS if stage in records
        }
        data = {"format": FORMAT, "raypipe": __version__, "updated": now(), "stages": stages}
        uri = self.ledger_file
        if self.lease is None or storage.is_local(uri):
            storage.write_json(uri, data)
        elif not self._exchange_ledger(uri, storage.json_bytes(data)):
            self.lease.check()
            raise RunError(
                f"{self.uri}: another process changed run.json while this driver held the run; "
                "rerun to resume"
            )

    def _exchange_ledger(self, uri: str, content: bytes) -> bool:
        """Write the ledger to an object store, and return True, unless it has changed.

        Unlike a local write, a request that was sent cannot be stopped when the lease is lost.
        """
        try:
            current = storage.read_bytes(uri, 0)
        except FileNotFoundError:
            current = None
        if self.lease is not None:
            self.lease.check()
        return (
            storage.create_bytes(uri, content)
            if current is None
            else storage.exchange_bytes(uri, current, content)
        )

    def record(self, stage: str) -> StageRecord:
        """Return the record of a finished stage. Raises RunError if it is not finished."""
        record = self.ledger().get(stage)
        if record is None or record.state != "done":
            raise RunError(
                f"{self.uri}: stage {stage} is not finished; rerun `raypipe run` to resume"
            )
        return record

    def clear(self, stage: str) -> None:
        """Remove everything that a stage wrote."""
        for folder in STAGE_FOLDERS[stage]:
            storage.delete(self.path(folder))

    # -- configuration ------------------------------------------------------------------

    def write_config(self, config: Config, sections: Mapping[str, Any] | None = None) -> None:
        """Write all settings, or those of some sections."""
        storage.write_bytes(self.config_file, dump_config(config, sections).encode())

    def config(self) -> Config:
        """Read the configuration of the run. Raises RunError if it is missing or damaged.

        It can name parts of packages that are not installed here; nothing is imported.
        """
        import yaml

        try:
            with part_names_accepted():
                return parse_config(
                    yaml.safe_load(storage.read_whole(self.config_file, MAX_CONFIG_BYTES))
                )
        except FileNotFoundError:
            raise RunError(self._absent("config.yaml")) from None
        except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
            raise RunError(f"{self.uri}: config.yaml is damaged ({error_text(error)})") from None

    # -- index --------------------------------------------------------------------------

    def fragments(self) -> list[Fragment]:
        """Return all fragments in the order of the source.

        Their `members` are left out, see `with_members`.
        """
        result = []
        columns = ["fragment_id", "path", "start", "stop", "offset", "error"]
        for name, table in storage.iter_tables(self.index_folder, columns):
            result += [Fragment(**row, index_file=name) for row in table.to_pylist()]
        if not result and storage.is_file(self.uri):
            raise RunError(self._absent("run.json"))
        for fragment in result:
            if not VALID_NAME(fragment.fragment_id):  # files of the run are named after it
                raise RunError(
                    f"{self.uri}: index/ is damaged: {fragment.fragment_id!r} is not a valid "
                    "fragment name"
                )
        return result

    def with_members(self, fragment: Fragment) -> Fragment:
        """Return the fragment with the names of its small files, ready to be read.

        Only workers call this: the driver never holds all names at once.
        """
        table = storage.read_table(self.index_file(fragment.index_file), ["fragment_id", "members"])
        row = table["fragment_id"].to_pylist().index(fragment.fragment_id)
        return dataclasses.replace(fragment, members=tuple(table["members"][row].as_py()))

    def classes(self) -> ClassMap:
        """Return the classes of the source.

        For an unlabelled source these are its clusters; none before the stage `label` has run.
        """
        try:
            data = storage.read_json(self.classes_file)
        except FileNotFoundError:
            if storage.is_file(self.uri):
                raise RunError(self._absent("run.json")) from None
            raise
        if data.get("clusters"):
            with contextlib.suppress(FileNotFoundError):
                data |= storage.read_json(self.pseudo_classes_file)
        return ClassMap(
            tuple(data["names"]),
            bool(data["numeric"]),
            label_noise_of(data),
            bool(data.get("clusters")),
        )

    def done(self, folder: str) -> set[str]:
        """Return the stems of the Parquet files in a folder: its finished fragments or shards."""
        return {
            file.removesuffix(".parquet")
            for file in storage.names(self.path(folder))
            if file.endswith(".parquet")
        }
